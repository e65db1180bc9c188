"""Returns after a fixed budget: ctrlrl's PPO, SPO, BPO, MDPO and Stable-Baselines3's PPO, on three MuJoCo tasks.

Everyone has one environment on Gymnasium's simulator, 2048 steps per iteration, two tanh layers of 64, Adam at
3e-4, gamma 0.99, GAE 0.95, running normalisation of observations and rewards, and the loss's own defaults. The
score of a run is the mean return of 100 deterministic episodes of its last checkpoint, from fixed reset seeds.
Each run is a shard (one JSON file); a later call adds the missing ones and merges all. The table gives, per task,
the interquartile mean over seeds (the plain mean, for three) with a 95 % bootstrap interval over runs (rliable,
5,000 repetitions).

    python scripts/bench_returns.py --minutes 60 --out bench/returns

With ``--off-policy``: ctrlrl's SAC, off-policy MDPO and TD3 and Stable-Baselines3's SAC and TD3 after 50,000 steps on
Hopper and HalfCheetah, everyone with networks of 256-256, batches of 256, Adam at 3e-4 (SAC, MDPO and TD3 alike),
10,000 random steps at first and one update per step after them; evaluation and table as above.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from functools import partial
from pathlib import Path

import shards

ENVS = ("Hopper-v5", "HalfCheetah-v5", "Walker2d-v5")
METHODS = ("sb3_ppo", "ppo", "spo", "bpo", "mdpo")
OFF_POLICY = ("sb3_sac", "sac", "mdpo_off", "sb3_td3", "td3")
EPISODES = 100


def train_ctrlrl(env: str, method: str, seed: int, steps: int) -> list[float]:
    from ctrlrl.api import make

    name, *settings = method.split(",")
    chosen = {k: json.loads(v) for k, v in (setting.split("=") for setting in settings)}
    agent = make(name, env, seed=seed, backend="sync", device="cpu", compile=True, eval_every=None, **chosen)
    agent.learn(steps, root=None, progress=False)
    return agent.evaluate(EPISODES, seed=10_000).returns.tolist()


def train_sb3(env: str, method: str, seed: int, steps: int) -> list[float]:
    import numpy as np
    import stable_baselines3
    import torch
    from stable_baselines3.common.env_util import make_vec_env
    from stable_baselines3.common.noise import NormalActionNoise
    from stable_baselines3.common.vec_env import VecNormalize

    from ctrlrl.engine.environments import make_vector
    from ctrlrl.engine.evaluate import evaluate
    from ctrlrl.engine.seeding import derive
    from ctrlrl.types import EnvSpec

    torch.set_num_threads(1)
    kind = getattr(stable_baselines3, method.removeprefix("sb3_").upper())
    training = make_vec_env(env, 1, seed=seed)
    if method == "sb3_ppo":
        training = VecNormalize(training)
        model = kind("MlpPolicy", training, seed=seed, device="cpu")
    else:
        settings = {"learning_starts": 10_000, "learning_rate": 3e-4, "batch_size": 256, "train_freq": 1}
        if method == "sb3_td3":  # it has no exploration noise of its own
            size = training.action_space.shape[0]
            settings["action_noise"] = NormalActionNoise(np.zeros(size), np.full(size, 0.1))
        model = kind("MlpPolicy", training, policy_kwargs={"net_arch": [256, 256]}, seed=seed, device="cpu", **settings)
    model.learn(steps)
    vector = make_vector(EnvSpec(env, n_envs=10, backend="sync"), autoreset="disabled")

    def act(obs, _):
        if isinstance(training, VecNormalize):
            obs = training.normalize_obs(obs)
        return model.predict(obs, deterministic=True)[0]

    return evaluate(vector, act, EPISODES, derive(10_000, "evaluate")).returns.tolist()


def worker(args: argparse.Namespace) -> None:
    from ctrlrl.engine.runfolder import versions, write_json

    env, method, seed = args.worker
    began = time.perf_counter()
    if method.startswith("sb3"):
        returns = train_sb3(env, method, int(seed), args.steps)
    else:
        returns = train_ctrlrl(env, method, int(seed), args.steps)
    path = shard(args, env, method, int(seed))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(
        path,
        {
            "env": env, "method": method, "seed": int(seed), "steps": args.steps, "returns": returns,
            "wall_s": round(time.perf_counter() - began, 1), "versions": versions(),
        },
    )  # fmt: skip


def shard(args: argparse.Namespace, env: str, method: str, seed: int) -> Path:
    return args.out / f"{args.steps}" / env / f"{method}-s{seed}.json"


def table(args: argparse.Namespace) -> dict:
    import numpy as np

    from ctrlrl.run.report_statistics import iqm

    found: dict[str, dict] = {}
    for env in args.envs:
        scores = {}
        for path in sorted((args.out / f"{args.steps}" / env).glob("*.json")):
            data = json.loads(path.read_text())
            scores.setdefault(data["method"], []).append(float(np.mean(data["returns"])))
        if not scores:
            continue
        estimates = {m: iqm(np.array(s)[:, None], reps=5000) for m, s in scores.items()}
        order = [m for m in (*METHODS, *OFF_POLICY) if m in scores] + sorted(set(scores) - {*METHODS, *OFF_POLICY})
        found[env] = {
            m: {
                "seeds": len(scores[m]), "iqm": round(estimates[m].value, 1),
                "low": bound(estimates[m].low), "high": bound(estimates[m].high),
                "runs": [round(s, 1) for s in scores[m]],
            }
            for m in order
        }  # fmt: skip
    return found


def bound(value: float | None) -> float | None:
    return None if value is None else round(value, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    shards.add_arguments(parser, None, words=3)
    parser.add_argument("--off-policy", action="store_true", help="SAC, TD3 and MDPO instead of PPO and its kin")
    parser.add_argument("--steps", type=int, default=None, help="300,000; with --off-policy 50,000")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--envs", nargs="+", default=None)
    about = "sb3_ppo, or a method with settings: spo,eps=0.6"
    parser.add_argument("--methods", nargs="+", default=None, help=about)
    parser.add_argument("--plot", type=Path, default=None, help="also draw the table as a picture")
    args = parser.parse_args()
    args.steps = args.steps or (50_000 if args.off_policy else 300_000)
    args.envs = args.envs or list(ENVS[:2] if args.off_policy else ENVS)
    args.methods = args.methods or list(OFF_POLICY if args.off_policy else METHODS)
    args.out = args.out or Path("bench/off_policy" if args.off_policy else "bench/returns")
    if args.worker:
        worker(args)
        return
    queue = [(e, m, s) for s in range(args.seeds) for e in args.envs for m in args.methods]
    failed = shards.run_missing(args, __file__, queue, partial(shard, args), shards.flags(args, "steps", "out"))
    merged = table(args)
    runs = [json.loads(p.read_text()) for p in (args.out / f"{args.steps}").rglob("*.json")]
    document = {
        "protocol": " ".join(" ".join((__doc__ or "").split("\n\n")[1 : 4 if args.off_policy else 2 : 2]).split()),
        "arguments": {"steps": args.steps, "seeds": args.seeds, "envs": args.envs, "methods": args.methods},
        "compiled": "ctrlrl yes, Stable-Baselines3 no",
        "versions": runs[0]["versions"] if runs else {},
        "table": merged,
    }
    (args.out / f"table-{args.steps}.json").write_text(json.dumps(document, indent=2) + "\n")
    if args.plot is not None:
        shards.plot(merged, args.plot, f"return after {args.steps:,} steps", lambda method: method.startswith("sb3"))
    for env, rows in merged.items():
        print(env)
        for method, row in rows.items():
            print(f"  {method:14} {row['iqm']:8.1f}  [{row['low']}, {row['high']}]  {row['seeds']} seeds")
    if failed:
        sys.exit(f"{failed} runs failed and are missing from the table")


if __name__ == "__main__":
    main()
