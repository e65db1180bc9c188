"""CDSA's correction of offline policies, over the whole range of its strengths, beside its controls.

Base policies are BC, TD3+BC and IQL (networks of 256-256, batches of 256, Adam at 3e-4, observations normalised by the
set), each seed with a set, base policies and a model of the density of its own. Every base is measured as it is, with
every combination of eta_state, eta_action and skipping in-data steps or not (all other settings are the library's
defaults), and blended with the same seed's BC at several weights: (1 - w) a + w BC(s). That blend and TD3+BC itself say
what mere closeness to the behaviour gives. Nothing is selected: all settings that were run are in the table.
risky-safe and risky-mixed are ctrlrl/RiskyPointMass-v0 (steps inside a disc cost 50 with probability 0.1) with 250
episodes from its starting corner, actions with noise of deviation 0.02: all of the demonstrator that walks around the
disc, or a fifth of them of the one that walks straight through it (--straight-share). There the straight policy itself
is a base, too. mujoco is a file (--data) and its environment; there every base is also measured with its actions
corrupted by N(0, 0.3^2), in units of actions in [-1, 1], before anything is corrected or blended (check D4). For each
run: mean, value at risk and conditional value at risk (the worst tenth) of the returns of deterministic episodes from
reset seeds that all share, violating steps per episode and the share of successful ones, where the environment tells
them, and D4RL's score, where the set has references. The table has means over seeds, all runs, and a 95 % bootstrap
interval of the mean return over runs.

Each training with its measurements is a shard (one JSON file); a later call adds the missing ones and merges all.

    python scripts/bench_cdsa.py --minutes 60 --out bench/cdsa
    python scripts/bench_cdsa.py --tasks mujoco --data bench/offline/Hopper-v5-100000/data.hdf5 --out bench/cdsa
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import fmean

import bench_offline
import shards

TASKS = ("risky-safe", "risky-mixed", "mujoco")
BASES = ("straight", "bc", "td3_bc", "iql")
EVALUATION_SEED, LEVEL, CORRUPTION, SHAKE, LIMIT, STRIDE = 10_000, 0.1, 0.3, 0.02, 60, 0.1
LEARNER = {
    "normalize_obs": True, "actor_hidden": (256, 256), "critic_hidden": (256, 256), "batch_size": 256,
    "learning_rate": 3e-4,
}  # fmt: skip
WORDS = (
    "out", "data", "updates", "cdsa_updates", "episodes", "mujoco_episodes", "demonstrations", "straight_share",
    "eta_state", "eta_action", "weights", "skips", "compile",
)  # fmt: skip


def numbers(text: str) -> list[float]:
    return [float(x) for x in text.split(",")]


def folder(args: argparse.Namespace, task: str) -> Path:
    if task == "mujoco":
        return args.out / f"{args.data.parent.name}-{args.data.stem}"
    return args.out / f"{task}-{args.demonstrations}"


def data_file(args: argparse.Namespace, task: str, seed: int | str) -> Path:
    return args.data if task == "mujoco" else folder(args, task) / f"data-s{seed}.hdf5"


def shard(args: argparse.Namespace, task: str, kind: str, seed: int | str) -> Path:
    if kind == "data":
        return data_file(args, task, seed)
    updates = args.cdsa_updates if kind == "cdsa" else args.updates
    return folder(args, task) / f"{updates}" / f"{kind}-s{seed}.json"


# -- sets and policies ----------------------------------------------------------------------------


def demonstrations(episodes: int, straight_share: float, seed: int):
    """Whole episodes on Risky PointMass, the straight ones first, all with a little noise."""
    import numpy as np
    from ctrlrl_envs.risky import RiskyPointMass, RiskyPointMassVector, safe_action, straight_action

    from ctrlrl.data.dataset import Dataset, DatasetInfo
    from ctrlrl.types import EnvSpec

    rng, env = np.random.default_rng(seed), RiskyPointMassVector(episodes, max_episode_steps=LIMIT)
    straight = np.arange(episodes)[:, None] < round(straight_share * episodes)
    obs, _ = env.reset(seed=seed)
    rows, live = [], np.ones(episodes, bool)
    while live.any():
        meant = np.where(straight, straight_action(obs), safe_action(obs))
        action = np.clip(meant + SHAKE * rng.normal(size=meant.shape), -STRIDE, STRIDE).astype(np.float32)
        following, reward, terminated, truncated, _ = env.step(action)
        rows.append((obs, action, reward.astype(np.float32), following, terminated, truncated, live.copy()))
        live &= ~(terminated | truncated)
        obs = following
    columns = [np.stack(c, 1) for c in zip(*rows, strict=True)]  # [episodes, steps], so that masks keep episodes whole
    obs, action, reward, following, terminated, truncated = (c[columns[-1]] for c in columns[:-1])
    space = RiskyPointMass()
    return Dataset(
        observations=obs, actions=action, rewards=reward, terminals=terminated, timeouts=truncated & ~terminated,
        next_observations=following, next_known=np.ones(len(obs), bool), observation_space=space.observation_space,
        action_space=space.action_space, info=DatasetInfo("risky", EnvSpec("ctrlrl/RiskyPointMass-v0")),
    )  # fmt: skip


def train(args: argparse.Namespace, task: str, kind: str, seed: int):
    """A trained agent, kept in a run folder beside its shard; one that was stopped begins anew."""
    from ctrlrl import api

    into = shard(args, task, kind, seed).with_suffix("")
    shutil.rmtree(into, ignore_errors=True)
    iql = {"actor_schedule": "constant", "scale_by_returns": task == "mujoco"}
    settings = {"cdsa": {"densities": "conditional"}, "iql": LEARNER | iql}.get(kind, LEARNER)
    agent = api.make(
        kind, dataset=data_file(args, task, seed), seed=seed, device="cpu", threads=1, compile=args.compile,
        eval_every=None, **settings,
    )  # fmt: skip
    updates = args.cdsa_updates if kind == "cdsa" else args.updates
    return agent.learn(updates, run_dir=into, root=None, progress=False, tensorboard=False)


class Straight:
    """Walks straight to the goal."""

    def predict(self, obs, deterministic: bool = True):
        from ctrlrl_envs.risky import straight_action

        return straight_action(obs), None


def corrupted(agent, seed: int):
    """The agent with noise on its actions, cut at the bounds."""
    import numpy as np

    from ctrlrl.engine.corrected import PolicyAgent

    class Corrupted(PolicyAgent):
        def change(self, observations, actions):
            low, high = self.action_space.low, self.action_space.high
            noise = CORRUPTION * (high - low) / 2.0 * drawing.normal(size=actions.shape)
            return np.clip(actions + noise, low, high).astype(actions.dtype)

    drawing = np.random.default_rng(seed)
    return Corrupted(
        agent, observation_space=agent.observation_space, action_space=agent.action_space, env_spec=agent.env_spec
    )


# -- measuring ------------------------------------------------------------------------------------


def measure(act: Callable, spec, episodes: int, width: int) -> dict:
    """Returns, and what the environment tells of violations and success, of whole episodes."""
    import dataclasses

    import gymnasium as gym
    import numpy as np

    from ctrlrl.engine.environments import make_vector
    from ctrlrl.engine.evaluate import evaluate
    from ctrlrl.engine.seeding import derive

    width = min(width, episodes)
    index, over = np.zeros(width, int), np.zeros(episodes, bool)
    told: dict[str, np.ndarray] = {}

    def watched(obs, episode):
        index[:] = episode
        return act(obs, episode)

    class Watched(gym.vector.VectorWrapper):
        def step(self, actions):
            obs, reward, terminated, truncated, infos = self.env.step(actions)
            live = ~over[index]  # a place that waits goes on with an episode that is over
            for name in {"violation", "is_success"} & infos.keys():
                np.add.at(told.setdefault(name, np.zeros(episodes)), index[live], np.asarray(infos[name], float)[live])
            over[index[terminated | truncated]] = True
            return obs, reward, terminated, truncated, infos

    spec = dataclasses.replace(spec, n_envs=width, backend="sync")
    env = Watched(make_vector(spec, autoreset="disabled", keep_infos=True))
    try:
        found = evaluate(env, watched, episodes, derive(EVALUATION_SEED, "evaluate"))
    finally:
        env.close()
    return {
        "mean": found.mean, "var": found.value_at_risk(LEVEL), "cvar": found.conditional_value_at_risk(LEVEL),
        "violations": float(told["violation"].mean()) if "violation" in told else None,
        "success": float((told["is_success"] > 0).mean()) if "is_success" in told else None,
    }  # fmt: skip


def settings_of(args: argparse.Namespace) -> list[dict]:
    """The corrections, each once."""
    found = [
        {"eta_state": s, "eta_action": a, "skip_in_data": bool(k)}
        for k in numbers(args.skips) for a in numbers(args.eta_action) for s in numbers(args.eta_state)
    ]  # fmt: skip
    return [c for c in found if c["eta_state"] > 0.0 or c["eta_action"] > 0.0]


def base_rows(args: argparse.Namespace, task: str, base: str, seed: int) -> list[dict]:
    """Train a base policy and measure it as it is, corrected, and blended with BC."""
    from ctrlrl import api
    from ctrlrl.data.dataset import normalized
    from ctrlrl.engine.corrected import BlendedAgent, PolicyAgent

    model = api.load(shard(args, task, "cdsa", seed).with_suffix(""))
    about = {
        "observation_space": model.observation_space,
        "action_space": model.action_space,
        "env_spec": model.env_spec,
    }
    agent = PolicyAgent(Straight(), **about) if base == "straight" else train(args, task, base, seed)
    cloned = agent if base == "bc" else api.load(shard(args, task, "bc", seed).with_suffix(""))
    on_mujoco, rows = task == "mujoco", []
    episodes, width = (args.mujoco_episodes, 10) if on_mujoco else (args.episodes, 50)

    def add(variant: str, what: str, policy, **about) -> None:
        found = measure(policy.session(None), model.env_spec, episodes, width)
        known = model.info.ref_min_score is not None and model.info.ref_max_score is not None
        score = float(normalized(model.info, found["mean"])) if known else None
        rows.append({"variant": variant, "what": what, **about, **found, "score": score})

    for variant in ("clean", "corrupted") if on_mujoco else ("clean",):
        # the same noise for all that is made of it
        again = partial(corrupted, agent, seed) if variant == "corrupted" else lambda: agent
        add(variant, "as it is", again())
        for correction in settings_of(args):
            add(variant, "corrected", model.correct(again(), **correction), **correction)
        if base != "bc" or variant == "corrupted":
            for weight in numbers(args.weights):
                add(variant, "blend", BlendedAgent(again(), cloned, weight, **about), weight=weight)
    return rows


def worker(args: argparse.Namespace) -> None:
    from ctrlrl.data import d4rl
    from ctrlrl.engine.runfolder import versions, write_json

    task, kind, seed = args.worker
    path, began = shard(args, task, kind, seed), time.perf_counter()
    path.parent.mkdir(parents=True, exist_ok=True)
    if kind == "data":
        share = args.straight_share if task == "risky-mixed" else 0.0
        d4rl.write(demonstrations(args.demonstrations, share, int(seed)), path)
        return
    if kind == "cdsa":
        rows, agent = [], train(args, task, kind, int(seed))
        about = {"set": {"steps": len(agent.data), "mean_return": float(agent.data.returns.mean())}}
    else:
        rows, about = base_rows(args, task, kind, int(seed)), {}
    document = {
        "task": task, "kind": kind, "seed": int(seed), "rows": rows, **about, "versions": versions(),
        "arguments": {k: str(getattr(args, k)) for k in WORDS}, "wall_s": round(time.perf_counter() - began, 1),
    }  # fmt: skip
    write_json(path, document)


# -- merging --------------------------------------------------------------------------------------


def bases(args: argparse.Namespace, task: str) -> list[str]:
    return [b for b in args.bases if b != "straight" or task != "mujoco"]


def jobs(args: argparse.Namespace) -> list[shards.Job]:
    per_task = lambda t: [*([] if t == "mujoco" else ["data"]), "cdsa", *bases(args, t)]  # noqa: E731
    return [(t, k, s) for s in range(args.seeds) for t in args.tasks for k in per_task(t)]


def ready(args: argparse.Namespace, job: shards.Job) -> bool:
    """Whether what a job needs is there."""
    task, kind, seed = str(job[0]), str(job[1]), str(job[2])
    needs = {"data": [], "cdsa": ["data"], "bc": ["cdsa"]}.get(kind, ["cdsa", "bc"])
    return all(shard(args, task, need, seed).exists() for need in needs)


def name_of(row: dict) -> str:
    if row["what"] == "corrected":
        skip = ", in-data steps too" if not row["skip_in_data"] else ""
        return f"corrected, state {row['eta_state']:g}, action {row['eta_action']:g}{skip}"
    return f"blend {row['weight']:g}" if row["what"] == "blend" else row["what"]


def table(args: argparse.Namespace) -> tuple[dict, list[dict]]:
    """By task, base with its variant, and setting; and the shards."""
    paths = [shard(args, *map(str, job)) for job in jobs(args) if job[1] != "data"]
    made = [json.loads(p.read_text()) for p in paths if p.exists()]
    runs: dict[tuple[str, str, str], list[dict]] = {}
    for s in made:
        for row in s["rows"]:
            base = s["kind"] if row["variant"] == "clean" else f"{s['kind']}, corrupted"
            runs.setdefault((s["task"], base, name_of(row)), []).append(row)
    merged: dict[str, dict] = {}
    for (task, base, name), rows in runs.items():
        known = [k for k in ("mean", "var", "cvar", "violations", "success", "score") if rows[0][k] is not None]
        setting = {k: rows[0][k] for k in ("what", "eta_state", "eta_action", "skip_in_data", "weight") if k in rows[0]}
        merged.setdefault(task, {}).setdefault(base, {})[name] = {
            **setting, "seeds": len(rows), **{k: round(fmean(r[k] for r in rows), 3) for k in known},
            "interval": bench_offline.interval([r["mean"] for r in rows]),
            "runs": {k: [round(r[k], 3) for r in rows] for k in known},
        }  # fmt: skip
    return merged, made


def plot(merged: dict, path: Path) -> None:
    """A panel per task and base: mean (dashed) and conditional value at risk over eta_state; dotted: the clone."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    columns = max(map(len, merged.values()))
    size = (3.2 * columns, 2.6 * len(merged))
    figure, axes = plt.subplots(len(merged), columns, figsize=size, constrained_layout=True, squeeze=False)
    for line, (task, found) in zip(axes, merged.items(), strict=True):
        for axis in line[len(found) :]:
            axis.axis("off")
        for axis, (base, rows) in zip(line, found.items(), strict=False):
            corrected = [r for r in rows.values() if r["what"] == "corrected"]
            for i, (action, skip) in enumerate(dict.fromkeys((r["eta_action"], r["skip_in_data"]) for r in corrected)):
                of = [r for r in corrected if (r["eta_action"], r["skip_in_data"]) == (action, skip)]
                of = ([rows["as it is"] | {"eta_state": 0.0}] if action == 0.0 else []) + of
                of.sort(key=lambda r: r["eta_state"])
                label = f"action {action:g}" + (", skips" if skip else "")
                for key, style in (("cvar", "o-"), ("mean", "--")):
                    x, y = [r["eta_state"] for r in of], [r[key] for r in of]
                    axis.plot(x, y, style, color=f"C{i}", markersize=3, label=label if key == "cvar" else None)
            if "blend 1" in rows:
                axis.axhline(rows["blend 1"]["cvar"], color="#444444", linewidth=0.8, linestyle=":")
            axis.set_title(f"{task}: {base}", fontsize=9)
            axis.set_xlabel("eta_state", fontsize=8)
            axis.grid(alpha=0.3)
            axis.spines[["top", "right"]].set_visible(False)
    axes[0][0].legend(fontsize=6, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def show(merged: dict) -> None:
    for task, found in merged.items():
        for base, rows in found.items():
            print(f"{task}: {base}")
            for name, r in rows.items():
                rest = "  ".join(f"{k} {r[k]:.2f}" for k in ("violations", "success", "score") if k in r)
                print(f"  {name:52} mean {r['mean']:9.1f}  VaR {r['var']:9.1f}  CVaR {r['cvar']:9.1f}  {rest}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    shards.add_arguments(parser, "bench/cdsa", words=3)
    parser.add_argument("--tasks", nargs="+", default=list(TASKS[:2]), choices=TASKS)
    parser.add_argument("--bases", nargs="+", default=list(BASES), choices=BASES, help="others need bc's run")
    parser.add_argument("--data", type=Path, default=None, help="set of the task mujoco, with its environment")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--updates", type=int, default=20_000, help="of each base policy")
    parser.add_argument("--cdsa-updates", type=int, default=5_000)
    parser.add_argument("--episodes", type=int, default=500, help="of each measurement on Risky PointMass")
    parser.add_argument("--mujoco-episodes", type=int, default=20)
    parser.add_argument("--demonstrations", type=int, default=250, help="episodes of a set of Risky PointMass")
    parser.add_argument("--straight-share", type=float, default=0.2, help="of them, in risky-mixed")
    parser.add_argument("--eta-state", default="0,0.5,1,2,3", help="numbers with commas, as the next ones")
    parser.add_argument("--eta-action", default="0,0.5")
    parser.add_argument("--weights", default="0.25,0.5,0.75,1", help="of BC in blends")
    parser.add_argument("--skips", default="1,0", help="1: leave in-data steps out, 0: correct everywhere")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--plot", type=Path, default=None, help="also draw the table as a picture")
    args = parser.parse_args()
    if "mujoco" in args.tasks and args.data is None and not args.worker:
        parser.error("the task mujoco needs --data FILE (bench_offline makes some)")
    if args.worker:
        worker(args)
        return
    words = shards.flags(args, *(w for w in WORDS if getattr(args, w) is not None))
    failed = shards.run_missing(
        args, __file__, jobs(args), partial(shard, args), words, ready=lambda job, _: ready(args, job)
    )
    merged, made = table(args)
    document = {
        "protocol": shards.protocol(__doc__),
        "arguments": {k: str(getattr(args, k)) for k in (*WORDS, "tasks", "bases", "seeds")},
        "versions": made[0]["versions"] if made else {},
        "sets": {f"{s['task']} {s['seed']}": s["set"] for s in made if "set" in s},
        "wall_s": {f"{s['task']} {s['kind']} {s['seed']}": s["wall_s"] for s in made},
        "table": merged,
    }
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / f"table-{args.updates}.json").write_text(json.dumps(document, indent=2) + "\n")
    if args.plot is not None and merged:
        plot(merged, args.plot)
    show(merged)
    if failed:
        sys.exit(f"{failed} runs failed and are missing from the table")


if __name__ == "__main__":
    main()
