"""Offline learning on sets of our own: ctrlrl's BC, TD3+BC and IQL beside d3rlpy's TD3+BC and IQL.

The sets are made here: SAC trains on each environment, and all that its replay holds at the end is the set
(medium-replay in D4RL's words, with the last policy as the medium one). As in D4RL, steps that were cut by time are
left out, as their next observation is not recorded there. Scores are D4RL's, between a random policy (0) and that SAC's
last policy (100), both measured over 100 episodes. Everyone learns from the same rows with the same settings: networks
of 256-256 ReLU, batches of 256, Adam at 3e-4 without schedule, gamma 0.99, tau 0.005, observations normalised by the
set; TD3+BC has alpha 2.5; IQL has expectile 0.7, beta 3, weights up to 100, and rewards divided by the range of the
returns and multiplied by 1,000. The score of a run is the mean over 100 deterministic episodes of its last checkpoint,
from the same reset seeds for all. The table has the mean over seeds with a 95 % bootstrap interval over runs (5,000
repetitions), and the differences of ours and d3rlpy's with theirs.

Each run is a shard (one JSON file); a later call adds the missing ones and merges all.

    python scripts/bench_offline.py --minutes 60 --out bench/offline
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from functools import partial
from pathlib import Path

import shards

ENVS = ("Hopper-v5", "HalfCheetah-v5")
METHODS = ("bc", "td3_bc", "iql", "d3rlpy_td3_bc", "d3rlpy_iql")
PAIRS = (("td3_bc", "d3rlpy_td3_bc"), ("iql", "d3rlpy_iql"))
EVALUATION_SEED, REPETITIONS = 10_000, 5_000


def folder(args: argparse.Namespace, env: str) -> Path:
    return args.out / f"{env}-{args.sac_steps}"


def make_set(args: argparse.Namespace, env: str) -> None:
    """Train SAC, keep its replay and the reference scores."""
    from ctrlrl.api import make
    from ctrlrl.data import d4rl
    from ctrlrl.engine import data_making

    agent = make("sac", env, seed=args.data_seed, backend="sync", device="cpu", compile=args.compile, eval_every=None)
    agent.learn(args.sac_steps, root=folder(args, env) / "sac", progress=False)
    source = data_making.Source(agent, agent.run_dir)
    data = data_making.make("medium-replay", agent.env_spec, source, expert=source, reference_episodes=args.episodes)
    d4rl.write(data, folder(args, env) / "data.hdf5")


def read_set(args: argparse.Namespace, env: str):
    """The set without the steps after which time was up."""
    from ctrlrl.data.load import load

    data = load(folder(args, env) / "data.hdf5")
    return dataclasses.replace(data, next_known=data.next_known & ~data.timeouts)


def train_ctrlrl(args: argparse.Namespace, data, method: str, seed: int):
    """Returns of the evaluation episodes."""
    from ctrlrl.api import make

    settings = {"iql": {"scale_by_returns": True, "actor_schedule": "constant"}}.get(method, {})
    agent = make(
        method, dataset=data, seed=seed, device="cpu", threads=1, compile=args.compile, eval_every=None,
        normalize_obs=True, actor_hidden=(256, 256), critic_hidden=(256, 256), batch_size=256, learning_rate=3e-4,
        **settings,
    )  # fmt: skip
    agent.learn(args.updates, root=None, progress=False)
    return agent.evaluate(args.episodes, seed=EVALUATION_SEED).returns


def train_d3rlpy(args: argparse.Namespace, data, method: str, seed: int):
    """The same with d3rlpy."""
    import d3rlpy
    import torch

    from ctrlrl.engine.environments import make_vector
    from ctrlrl.engine.evaluate import evaluate
    from ctrlrl.engine.seeding import derive

    torch.set_num_threads(1)
    d3rlpy.seed(seed)
    network = d3rlpy.models.VectorEncoderFactory([256, 256])
    used = data.observations[data.usable]
    scaler = d3rlpy.preprocessing.StandardObservationScaler(mean=used.mean(0), std=used.std(0), eps=1e-3)
    common = {
        "actor_encoder_factory": network, "critic_encoder_factory": network, "observation_scaler": scaler,
        "batch_size": 256, "actor_learning_rate": 3e-4, "critic_learning_rate": 3e-4, "gamma": 0.99, "tau": 0.005,
    }  # fmt: skip
    rewards = data.rewards
    if method == "d3rlpy_td3_bc":
        config = d3rlpy.algos.TD3PlusBCConfig(alpha=2.5, **common)
    else:
        rewards = rewards * (1000.0 / float(data.returns.max() - data.returns.min()))
        config = d3rlpy.algos.IQLConfig(
            expectile=0.7, weight_temp=3.0, max_weight=100.0, value_encoder_factory=network, **common
        )
    algorithm = config.create(device="cpu:0")
    # a step where the episode only was cut is no transition to d3rlpy, either
    recorded = d3rlpy.dataset.MDPDataset(
        data.observations, data.actions, rewards, data.terminals, data.timeouts & ~data.terminals,
        action_space=d3rlpy.ActionSpace.CONTINUOUS,
    )  # fmt: skip
    assert recorded.transition_count == int(data.usable.sum())
    algorithm.fit(
        recorded, n_steps=args.updates, n_steps_per_epoch=args.updates, save_interval=2, show_progress=False,
        logger_adapter=d3rlpy.logging.NoopAdapterFactory(),
    )  # fmt: skip
    spec = dataclasses.replace(data.info.env, n_envs=min(10, args.episodes), backend="sync")
    vector = make_vector(spec, autoreset="disabled")
    returns = evaluate(
        vector, lambda obs, _: algorithm.predict(obs), args.episodes, derive(EVALUATION_SEED, "evaluate")
    ).returns
    vector.close()
    return returns


def worker(args: argparse.Namespace) -> None:
    from importlib.metadata import version

    from ctrlrl.engine.runfolder import versions, write_json

    env, method, seed = args.worker
    if method == "data":
        make_set(args, env)
        return
    began = time.perf_counter()
    data = read_set(args, env)
    train = train_d3rlpy if method.startswith("d3rlpy") else train_ctrlrl
    returns = train(args, data, method, int(seed))
    path = shard(args, env, method, seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    document = {
        "env": env, "method": method, "seed": int(seed), "updates": args.updates, "returns": returns.tolist(),
        "scores": data.normalized(returns).tolist(), "set": set_document(data),
        "wall_s": round(time.perf_counter() - began, 1), "versions": {**versions(), "d3rlpy": version("d3rlpy")},
    }  # fmt: skip
    write_json(path, document)


def set_document(data) -> dict:
    """What the set is."""
    return {
        "steps": len(data), "usable": int(data.usable.sum()), "episodes": len(data.episodes),
        "references": [data.info.ref_min_score, data.info.ref_max_score], "sha256": data.info.sha256,
        "mean_score": float(data.normalized(data.returns).mean()),
        "best_score": float(data.normalized(data.returns).max()),
    }  # fmt: skip


def shard(args: argparse.Namespace, env: str, method: str, seed: int | str) -> Path:
    if method == "data":
        return folder(args, env) / "data.hdf5"
    return folder(args, env) / f"{args.updates}" / f"{method}-s{seed}.json"


def read(args: argparse.Namespace) -> dict[str, dict[str, list[dict]]]:
    """Shards by environment and method."""
    found: dict[str, dict[str, list[dict]]] = {}
    for env in args.envs:
        by_method: dict[str, list[dict]] = {}
        for path in sorted((folder(args, env) / f"{args.updates}").glob("*.json")):
            data = json.loads(path.read_text())
            by_method.setdefault(data["method"], []).append(data)
        if by_method:
            found[env] = {m: by_method[m] for m in METHODS if m in by_method}
    return found


def interval(*runs: list[float]) -> list[float] | None:
    """95 % bootstrap interval of the mean of one list of runs, or of the difference of two."""
    import numpy as np

    if min(map(len, runs)) < 2:
        return None
    rng = np.random.default_rng(0)
    means = [rng.choice(np.array(r), (REPETITIONS, len(r))).mean(1) for r in runs]
    drawn = means[0] if len(means) == 1 else means[0] - means[1]
    return [round(float(x), 1) for x in np.percentile(drawn, [2.5, 97.5])]


def table(made: dict[str, dict[str, list[dict]]]) -> dict:
    from statistics import fmean

    found: dict[str, dict] = {}
    for env, methods in made.items():
        runs = {m: [fmean(s["scores"]) for s in each] for m, each in methods.items()}
        pairs = [(a, b) for a, b in PAIRS if a in runs and b in runs]
        found[env] = {
            "set": next(iter(methods.values()))[0]["set"],
            "scores": {
                m: {
                    "seeds": len(r), "mean": round(fmean(r), 1), "interval": interval(r),
                    "runs": [round(x, 1) for x in r],
                    "mean_return": round(fmean(fmean(s["returns"]) for s in methods[m]), 1),
                    "wall_s": [s["wall_s"] for s in methods[m]],
                }
                for m, r in runs.items()
            },
            "differences": {
                f"{a} - {b}": {
                    "mean": round(fmean(runs[a]) - fmean(runs[b]), 1), "interval": interval(runs[a], runs[b])
                }
                for a, b in pairs
            },
        }  # fmt: skip
    return found


def plot(merged: dict, path: Path) -> None:
    """One panel per set: a tick per run, the mean with its interval, the set's own mean as a line."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    size = (3.6 * len(merged), 2.4)
    figure, axes = plt.subplots(1, len(merged), figsize=size, constrained_layout=True, squeeze=False)
    for axis, (env, found) in zip(axes[0], merged.items(), strict=True):
        rows = found["scores"]
        for y, (method, row) in enumerate(reversed(rows.items())):
            color = "#8a8f98" if method.startswith("d3rlpy") else "#0072b2"
            axis.plot(row["runs"], [y] * len(row["runs"]), "|", color=color, markersize=9, alpha=0.6)
            if row["interval"] is not None:
                axis.plot(row["interval"], [y, y], color=color, linewidth=2)
            axis.plot(row["mean"], y, "o", color=color, markersize=6)
        axis.axvline(found["set"]["mean_score"], color="#444444", linewidth=0.8, linestyle=":")
        axis.set_yticks(range(len(rows)), [m.replace("d3rlpy_", "d3rlpy ") for m in reversed(rows)])
        axis.set_title(f"{env} medium-replay", fontsize=10)
        axis.set_xlabel("score (dotted: mean of the data)", fontsize=9)
        axis.grid(axis="x", alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    shards.add_arguments(parser, "bench/offline", words=3)
    parser.add_argument("--envs", nargs="+", default=list(ENVS))
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--sac-steps", type=int, default=100_000, help="steps of the SAC that makes a set")
    parser.add_argument("--updates", type=int, default=50_000, help="of every run")
    parser.add_argument("--episodes", type=int, default=100, help="of each evaluation and reference")
    parser.add_argument("--data-seed", type=int, default=100)
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True, help="ctrlrl's updates")
    parser.add_argument("--plot", type=Path, default=None, help="also draw the table as a picture")
    args = parser.parse_args()
    if args.worker:
        worker(args)
        return
    queue = [(e, "data", 0) for e in args.envs]
    queue += [(e, m, s) for s in range(args.seeds) for e in args.envs for m in args.methods]
    failed = shards.run_missing(
        args, __file__, queue, partial(shard, args),
        shards.flags(args, "out", "compile", "sac_steps", "updates", "episodes", "data_seed"),
        ready=lambda job, _: job[1] == "data" or shard(args, str(job[0]), "data", 0).exists(),
        quiet=True,  # d3rlpy tells its settings on standard output
    )  # fmt: skip
    found = read(args)
    merged = table(found)
    first = next((run for methods in found.values() for runs in methods.values() for run in runs), None)
    document = {
        "protocol": shards.protocol(__doc__),
        "arguments": {k: getattr(args, k) for k in ("envs", "seeds", "sac_steps", "updates", "episodes", "compile")},
        "versions": first["versions"] if first else {},
        "table": merged,
    }
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / f"table-{args.updates}.json").write_text(json.dumps(document, indent=2) + "\n")
    if args.plot is not None and merged:
        plot(merged, args.plot)
    for env, found in merged.items():
        about = found["set"]
        print(f"{env}: {about['steps']:,} steps, mean {about['mean_score']:.1f}, best {about['best_score']:.1f}")
        for method, row in found["scores"].items():
            print(f"  {method:14} {row['mean']:7.1f}  {row['interval']}  {row['seeds']} seeds")
        for pair, row in found["differences"].items():
            print(f"  {pair:24} {row['mean']:7.1f}  {row['interval']}")
    if failed:
        sys.exit(f"{failed} runs failed and are missing from the table")


if __name__ == "__main__":
    main()
