"""D-eta-N's conditional value at risk on a gridworld, against the exact optimum and against what is known to fail.

The task is ctrlrl/RiskyGrid-v0 (6 x 4 cells, slip 0.1, 50 steps): a short way on which every step may cost 20 more, a
long one around it. One network of D-eta-N serves all levels: its initial stock is found by its own scan. QR-DQN, this
library's and sb3-contrib's, learns the same quantiles and takes the best mean. Nothing is sampled: the law of the
return of each trained policy is computed from the environment's transition table, and so are the optimum (stock-
augmented dynamic programming) and what is known to fail: the risk-neutral policy, the one that is greedy for CVaR step
by step, and dynamic programming on risk levels, of which the row has what it claims (more than can be had). ``share``
is CVaR over the optimum's, all returns being negative: 1 is optimal, 1.05 five percent worse.

Each training is a shard (one JSON file); a later call adds the missing ones and merges all.

    python scripts/bench_d_eta_n.py --minutes 30 --out bench/d_eta_n
"""

from __future__ import annotations

import argparse
import json
import time
from functools import partial
from pathlib import Path

import shards

ENV, HORIZON = "ctrlrl/RiskyGrid-v0", 50
ARMS = ("d_eta_n", "qr_dqn", "sb3_qr_dqn")
LEVELS = (0.05, 0.1, 0.25, 0.5)
DEEP = {
    "learning_rate": 1e-3, "replay_ratio": 0.1, "learning_starts": 2_000, "replay_size": 100_000, "gamma": 1.0,
    "quantiles": 50,
}  # fmt: skip
STOCKS = {"objective": "cvar", "stock_low": 0.0, "stock_high": 60.0, "finite_horizon": True, "kappa": 0.5}
OFFSETS = 400
"""Returns so far, from 0 down, for which actions are looked up at once."""


def made():
    import ctrlrl_envs  # noqa: F401 - registers
    import gymnasium as gym

    return gym.make(ENV)


def stock_rule(agent, states: int):
    """D-eta-N's action by (time, state, stock): all states and all integer returns so far at once, when first asked."""
    import numpy as np
    import torch

    known: dict[tuple[int, float], np.ndarray] = {}

    def rule(t: int, state: int, stock: float) -> int:
        # stocks of an episode are its initial one and whole numbers; the row of its fraction serves all of it
        top = stock % 1.0
        key = t, top
        if key not in known:
            each = torch.arange(states).repeat_interleave(OFFSETS)
            at = (top + 60.0 - torch.arange(OFFSETS)).repeat(states).unsqueeze(1).float()
            obs = {
                "observation": each, "stock": at, "discount": torch.ones_like(at),
                "timestep": torch.full(at.shape, t, dtype=torch.int64),
            }  # fmt: skip
            with torch.inference_mode():
                known[key] = agent.policy.mode(obs).view(states, OFFSETS).numpy()
        place = round(top + 60.0 - stock)
        return int(known[key][state, min(max(place, 0), OFFSETS - 1)])

    return rule


def figures(laws: dict[float, tuple[object, float]]) -> dict:
    """By level: CVaR, mean and initial stock."""
    return {
        f"{level:g}": {"cvar": float(law.cvar(level)), "mean": float(law.mean()), "stock": float(stock)}
        for level, (law, stock) in laws.items()
    }


def train_ctrlrl(args: argparse.Namespace, arm: str, seed: int) -> dict:
    import numpy as np

    from ctrlrl import api
    from ctrlrl.planning.distributional_dp import evaluate

    env = made()
    settings = DEEP | (STOCKS if arm == "d_eta_n" else {})
    agent = api.make(arm, ENV, seed=seed, backend="sync", device="cpu", threads=1, eval_every=None, **settings)
    agent.learn(args.steps, root=None, progress=False, tensorboard=False)
    if arm == "d_eta_n":
        rule = stock_rule(agent, env.observation_space.n)
        chosen = {level: agent.choose_stock(level) for level in LEVELS}
        return figures({k: (evaluate(env, rule, HORIZON, stock=float(c)), c) for k, c in chosen.items()})
    actions = agent.predict(np.arange(env.observation_space.n))[0].astype(np.int64)
    law = evaluate(env, actions, HORIZON)
    return figures({level: (law, 0.0) for level in LEVELS})


def train_sb3(args: argparse.Namespace, seed: int) -> dict:
    import numpy as np
    import torch
    from sb3_contrib import QRDQN

    from ctrlrl.planning.distributional_dp import evaluate

    torch.set_num_threads(1)
    env = made()
    model = QRDQN(
        "MlpPolicy", env, seed=seed, device="cpu", learning_rate=DEEP["learning_rate"], gamma=DEEP["gamma"],
        buffer_size=DEEP["replay_size"], learning_starts=DEEP["learning_starts"], batch_size=128, train_freq=10,
        target_update_interval=500, exploration_fraction=0.5,
        policy_kwargs={"net_arch": [120, 84], "n_quantiles": DEEP["quantiles"]},
    )  # fmt: skip
    model.learn(args.steps)
    actions = model.predict(np.arange(env.observation_space.n), deterministic=True)[0].astype(np.int64)
    law = evaluate(env, actions, HORIZON)
    return figures({level: (law, 0.0) for level in LEVELS})


def exact() -> dict:
    """What needs no training: the optimum, the risk-neutral policy, and the two that fail."""
    from ctrlrl.planning.distributional_dp import cvar, cvar_greedy, cvar_value_iteration, evaluate, risk_neutral, solve

    env = made()
    plan = solve(env, "shortfall", HORIZON, engine="lattice")
    scans = {level: cvar(plan, level) for level in LEVELS}
    neutral = evaluate(env, risk_neutral(env, HORIZON), HORIZON)
    by_level = cvar_value_iteration(env, HORIZON)
    return {
        "optimum": figures({k: (plan.law(s.stock), s.stock) for k, s in scans.items()}),
        "risk_neutral": figures({k: (neutral, 0.0) for k in LEVELS}),
        "cvar_greedy": figures({k: (cvar_greedy(env, k, HORIZON).law, 0.0) for k in LEVELS}),
        "risk_levels": {f"{k:g}": {"cvar": by_level.claimed(k), "mean": None, "stock": None} for k in LEVELS},
    }


def worker(args: argparse.Namespace) -> None:
    from ctrlrl.engine.runfolder import versions, write_json

    arm, seed = args.worker
    path, began = shard(args, arm, seed), time.perf_counter()
    path.parent.mkdir(parents=True, exist_ok=True)
    if arm == "exact":
        found = exact()
    else:
        found = {arm: train_sb3(args, int(seed)) if arm.startswith("sb3") else train_ctrlrl(args, arm, int(seed))}
    about = {"arm": arm, "seed": int(seed), "steps": args.steps, "seconds": round(time.perf_counter() - began, 1)}
    write_json(path, about | {"figures": found, "versions": versions()})


def shard(args: argparse.Namespace, arm: str, seed: int | str) -> Path:
    return args.out / f"{args.steps}" / f"{arm}-s{seed}.json"


def table(found: list[dict]) -> dict:
    """By arm and level: CVaR and mean, means over seeds, every run's CVaR, and the share of the optimum's."""
    best = next((s["figures"]["optimum"] for s in found if s["arm"] == "exact"), {})
    rows: dict[str, dict] = {}
    for name in dict.fromkeys(name for s in found for name in s["figures"]):
        runs = [s["figures"][name] for s in found if name in s["figures"]]
        for level in runs[0]:
            values = [run[level]["cvar"] for run in runs]
            rows.setdefault(name, {})[level] = {
                "seeds": len(runs), "cvar": round(sum(values) / len(values), 3), "runs": [round(v, 3) for v in values],
                "mean": None if runs[0][level]["mean"] is None
                else round(sum(run[level]["mean"] for run in runs) / len(runs), 3),
                "share": round(sum(values) / len(values) / best[level]["cvar"], 3) if best else None,
            }  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    shards.add_arguments(parser, "bench/d_eta_n", words=2)
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=ARMS)
    parser.add_argument("--steps", type=int, default=100_000)
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    if args.worker:
        worker(args)
        return
    queue: list[shards.Job] = [("exact", 0), *((arm, seed) for seed in range(args.seeds) for arm in args.arms)]
    words = shards.flags(args, "out", "steps")
    failed = shards.run_missing(args, __file__, queue, partial(shard, args), words, quiet=True)
    found = [json.loads(p.read_text()) for p in (shard(args, *map(str, job)) for job in queue) if p.exists()]
    merged = table(found)
    for name, levels in merged.items():
        print(f"{name:14}", "  ".join(f"{k}: {r['cvar']:8.3f} ({r['share']})" for k, r in levels.items()))
    document = {
        "protocol": shards.protocol(__doc__, 1), "settings": {"deep": DEEP, "d_eta_n": STOCKS, "steps": args.steps},
        "versions": found[0]["versions"] if found else {}, "table": merged,
    }  # fmt: skip
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / f"table-{args.steps}.json").write_text(json.dumps(document, indent=2) + "\n")
    if failed:
        raise SystemExit(f"{failed} runs failed and are missing from the table")


if __name__ == "__main__":
    main()
