"""Neural inventory control by HDPO against exact optima, bounds, published figures, and PPO.

Parts, each with its cells (``--cells`` picks some, ``--all`` takes every one that was studied):

- backlogged, lost: one store; the gap of a plain network (vanilla) to the exact optimum.
- serial: a chain of four places (3 to 7 with ``--all``); plain, graph network and learned echelon-stock levels.
- transshipment: graph and plain network, l = 4 and p = 9, from 8,192 fixed scenarios; the gap to a lower bound.
- sharing: 20 independent stores from 128 fixed scenarios; what the graph network's shared weights are worth.
- real: 288 products in 21 stores (``--stores``) behind one warehouse, weekly sales; the share of the clairvoyant's
  profit, in weeks that were not trained on.

Gaps are of the mean cost per store and period over the test horizon, its first part left out, in scenarios that all
share; they carry the standard error of sampling them. Each arm is trained with the settings of ``training``, one
thread each, and keeps the weights of its best look at the dev scenarios. ``--peers`` adds, for one cell of each part,
Stable-Baselines3's PPO on the same Gymnasium environment (observations and rewards normalised, actions scaled by the
environment) with ten times HDPO's wall time, and this library's PPO and REINFORCE for as long.

Each training is a shard (one JSON file); a later call adds the missing ones and merges all.

    python scripts/bench_inventory.py --minutes 60 --out bench/inventory
    python scripts/bench_inventory.py --parts real --minutes 60 --out bench/inventory
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from functools import partial
from pathlib import Path

import shards

ENVS = {
    "backlogged": "ctrlrl/OneStoreBacklogged-v0", "lost": "ctrlrl/OneStoreLost-v0", "serial": "ctrlrl/Serial-v0",
    "transshipment": "ctrlrl/Transshipment-v0", "sharing": "ctrlrl/IndependentStores-v0",
    "real": "ctrlrl/RealStores-v0",
}  # fmt: skip
# cells by their environment's arguments: the default ones, then the rest of what was studied
CELLS: dict[str, tuple[list[str], list[str]]] = {
    "backlogged": (
        ["1,4", "4,9", "4,39", "7,9", "10,19", "20,9"],
        [f"{t},{p}" for t in (1, 4, 7, 10, 15, 20) for p in (4, 9, 19, 39)],
    ),
    "lost": (["1,4", "1,39", "2,9", "3,19", "4,9", "4,39"], [f"{t},{p}" for t in (1, 2, 3, 4) for p in (4, 9, 19, 39)]),
    "serial": (["4"], ["3", "4", "5", "6", "7"]),
    "transshipment": (["3", "5", "10"], ["3", "5", "10", "20", "30", "50"]),
    "sharing": (["20"], ["3", "5", "10", "20", "30", "50"]),
    "real": (["21"], ["3", "5", "10", "15", "21"]),
}  # fmt: skip
ARMS = {
    "backlogged": ("vanilla", "base_stock"), "lost": ("vanilla", "base_stock", "capped_base_stock"),
    "serial": ("vanilla", "gnn", "echelon_stock"), "transshipment": ("gnn", "vanilla"), "sharing": ("gnn", "vanilla"),
    "real": ("gnn", "data_driven"),
}  # fmt: skip
# published gaps to optimum or bound in percent, or shares of the clairvoyant's profit (arXiv:2306.11246's experiments)
PUBLISHED = {
    ("serial", "gnn"): {"3": 0.0, "4": 0.09, "5": 0.09, "6": 0.6, "7": 3.98},
    ("serial", "vanilla"): {"3": 0.91, "4": 0.93, "5": 0.91, "6": 0.94, "7": 2.19},
    ("transshipment", "gnn"): {"3": 0.11, "5": 0.09, "10": 0.04, "20": 0.02, "30": 0.05, "50": 0.08},
    ("transshipment", "vanilla"): {"3": 0.28, "5": 0.28, "10": 0.34, "20": 0.34, "30": 0.45, "50": 0.86},
    ("sharing", "gnn"): {"20": 0.055},
    ("sharing", "vanilla"): {"20": 4.2},
    ("real", "gnn"): {"3": 85.21, "5": 85.08, "10": 81.63, "15": 82.02, "21": 82.74},
    ("real", "data_driven"): {"3": 85.20, "5": 84.63, "10": 80.40, "15": 81.24, "21": 81.26},
}
TRAINING: dict[str, dict] = {
    "backlogged": {"updates": 800, "batch_size": 256, "learning_rate": 5e-3, "hidden": (32, 32, 32)},
    "lost": {"updates": 1500, "batch_size": 512, "learning_rate": 5e-3, "hidden": (32, 32)},
    "serial": {"updates": 1500, "batch_size": 256, "learning_rate": 3e-3, "hidden": (64, 64)},
    "transshipment": {
        "updates": 1000, "batch_size": 256, "scenarios": 8192, "learning_rate": 3e-3, "hidden": (128, 128, 128),
    },
    "sharing": {"updates": 1000, "batch_size": 128, "scenarios": 128, "learning_rate": 3e-3, "hidden": (128, 128)},
    "real": {"updates": 600, "batch_size": 72, "learning_rate": 1e-3, "hidden": (64, 64), "graph_width": 64},
}  # fmt: skip
GRAPH = {"updates": 500, "batch_size": 64, "learning_rate": 3e-3}
"""Of the graph network where it differs: an update costs it ten times as much."""
LEVEL = {"updates": 500, "batch_size": 256, "learning_rate": None}
"""Of arms with a few parameters in units of stock, which have a learning rate of their own."""
LEVELS = ("base_stock", "capped_base_stock", "echelon_stock")
PEERS, LONGER = ("sb3_ppo", "ppo", "reinforce"), 10.0
PEER_CELLS = {"backlogged": "4,9", "lost": "4,9", "serial": "4", "transshipment": "3", "sharing": "20", "real": "21"}


def arguments(args: argparse.Namespace, part: str, cell: str) -> dict:
    """Of the environment."""
    if part in ("backlogged", "lost"):
        lead_time, unmet_cost = cell.split(",")
        return {"lead_time": int(lead_time), "unmet_cost": float(unmet_cost)}
    if part == "serial":
        return {"echelons": int(cell)}
    return {"stores": int(cell), **({"data": args.data} if part == "real" and args.data else {})}


def training(part: str, arm: str) -> dict:
    """Settings of an arm."""
    own = LEVEL if arm in LEVELS else GRAPH if arm == "gnn" and part != "real" else {}
    return TRAINING[part] | own


def hdpo(args: argparse.Namespace, part: str, cell: str, arm: str, seed: int) -> dict:
    from ctrlrl import api

    settings = training(part, arm)
    updates = max(1, round(settings.pop("updates") * args.share))
    agent = api.make(
        "hdpo", ENVS[part], env_kwargs=arguments(args, part, cell), policy=arm, seed=seed, device="cpu", threads=1,
        eval_every=None, **settings,
    )  # fmt: skip
    began = time.perf_counter()
    agent.learn(updates, root=None, progress=False, tensorboard=False)
    trained = time.perf_counter() - began
    return {"updates": agent.steps, "train_s": round(trained, 1), "figures": plain(agent.cost(seed=args.test_seed))}


def peer(args: argparse.Namespace, part: str, cell: str, arm: str, seed: int) -> dict:
    """A score-function method for ten times the seconds that HDPO took here."""
    from ctrlrl import api
    from ctrlrl.inventory.comparison import compare

    limit = LONGER * json.loads(shard(args, part, cell, ARMS[part][0], 0).read_text())["train_s"]
    kwargs, began = arguments(args, part, cell) | {"scale_actions": True}, time.perf_counter()
    if arm == "sb3_ppo":
        agent, env, steps = sb3(ENVS[part], kwargs, seed, limit)
    else:

        class Clock:
            def on_update(self, agent, step, metrics):
                return time.perf_counter() - began < limit

        rollout = {"n_steps": 64} if arm == "ppo" else {}
        agent = api.make(
            arm, ENVS[part], env_kwargs=kwargs, seed=seed, n_envs=32, threads=1, device="cpu", eval_every=None,
            **rollout,
        )  # fmt: skip
        agent.learn(2**40, root=None, progress=False, tensorboard=False, callbacks=[Clock()])
        env, steps = made(ENVS[part], kwargs), agent.steps
    trained = time.perf_counter() - began
    figures = compare(agent, env, seed=args.test_seed)
    return {"env_steps": steps, "train_s": round(trained, 1), "figures": plain(figures)}


def made(env_id: str, kwargs: dict):
    import ctrlrl_envs  # noqa: F401 - registers
    import gymnasium as gym

    return gym.make(env_id, **kwargs)


def sb3(env_id: str, kwargs: dict, seed: int, limit: float):
    import torch
    from stable_baselines3 import PPO
    from stable_baselines3.common.callbacks import BaseCallback
    from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

    class Clock(BaseCallback):
        def _on_step(self) -> bool:
            return time.perf_counter() - began < limit

    class Normalized:
        """Acts on the environment's own observations."""

        def predict(self, obs, deterministic=True, **_):
            return model.predict(training.normalize_obs(obs), deterministic=deterministic)

    torch.set_num_threads(1)
    began = time.perf_counter()
    training = VecNormalize(DummyVecEnv([lambda: made(env_id, kwargs)] * 8))
    model = PPO("MlpPolicy", training, n_steps=256, batch_size=256, seed=seed, device="cpu")
    model.learn(2**40, callback=Clock())
    training.training = False
    return Normalized(), made(env_id, kwargs), model.num_timesteps


def plain(figures) -> dict:
    names = ("cost", "standard_error", "gap", "gap_error", "share", "clairvoyant", "scenarios", "periods")
    return {name: getattr(figures, name) for name in names} | {"known": dict(figures.known)}


def worker(args: argparse.Namespace) -> None:
    import ctrlrl_envs  # noqa: F401 - registers

    from ctrlrl.engine.runfolder import versions, write_json

    part, cell, arm, seed = args.worker
    path = shard(args, part, cell, arm, seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    found = (peer if arm in PEERS else hdpo)(args, part, cell, arm, int(seed))
    about = {"part": part, "cell": cell, "arm": arm, "seed": int(seed), "training": training(part, arm)}
    write_json(path, about | {"share": args.share, "versions": versions()} | found)


def shard(args: argparse.Namespace, part: str, cell: str, arm: str, seed: int | str) -> Path:
    return args.out / f"{args.share:g}" / part / cell.replace(",", "-") / f"{arm}-s{seed}.json"


def jobs(args: argparse.Namespace) -> list[shards.Job]:
    def cells(part: str) -> list[str]:
        few, every = CELLS[part]
        return [c for c in (every if args.all else few) if not args.cells or c in args.cells]

    wanted = args.parts
    queue: list[shards.Job] = [
        (part, cell, arm, seed)
        for seed in range(args.seeds) for part in wanted for cell in cells(part) for arm in ARMS[part]
        if not args.arms or arm in args.arms
    ]  # fmt: skip
    if args.peers:
        queue += [(p, PEER_CELLS[p], arm, 0) for p in wanted if p in PEER_CELLS for arm in PEERS]
    return queue


def ready(args: argparse.Namespace, job: shards.Job) -> bool:
    """Whether the time that a peer gets is known."""
    part, cell, arm, _ = map(str, job)
    return arm not in PEERS or shard(args, part, cell, ARMS[part][0], 0).exists()


def table(found: list[dict]) -> list[dict]:
    """A row for each cell and arm, with the mean over seeds."""
    rows = []
    for key in dict.fromkeys((s["part"], s["cell"], s["arm"]) for s in found):
        runs = [s for s in found if (s["part"], s["cell"], s["arm"]) == key]
        part, cell, arm = key
        which = "share" if runs[0]["figures"]["share"] is not None else "gap"
        values = [s["figures"][which] for s in runs if s["figures"][which] is not None]
        rows.append({
            "part": part, "cell": cell, "arm": arm, "seeds": len(runs), "measure": which,
            "cost": round(sum(s["figures"]["cost"] for s in runs) / len(runs), 4),
            "known": runs[0]["figures"]["known"],
            "percent": round(sum(values) / len(values), 3) if values else None,
            "runs": [round(v, 3) for v in values],
            "sampling_error": runs[0]["figures"]["gap_error"],
            "published": PUBLISHED.get((part, arm), {}).get(cell),
            "train_s": round(sum(s["train_s"] for s in runs) / len(runs), 1),
        })  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    shards.add_arguments(parser, "bench/inventory", words=4)
    parser.add_argument("--parts", nargs="+", default=list(ENVS), choices=ENVS)
    parser.add_argument("--cells", nargs="+", default=None, help="such as 4,9 (lead time, cost), or numbers of places")
    parser.add_argument("--arms", nargs="+", default=None, choices=sorted({a for arms in ARMS.values() for a in arms}))
    parser.add_argument("--all", action="store_true", help="every cell that was studied")
    parser.add_argument("--peers", action="store_true", help="PPO and REINFORCE, too")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--share", type=float, default=1.0, help="of the updates in TRAINING")
    parser.add_argument("--data", default=None, help="folder of the recorded sales")
    parser.add_argument("--test-seed", type=int, default=10_000)
    args = parser.parse_args()
    if args.worker:
        worker(args)
        return
    words = shards.flags(args, "out", "share", "test_seed", *(["data"] if args.data else []))
    failed = shards.run_missing(
        args, __file__, jobs(args), partial(shard, args), words, ready=lambda job, _: ready(args, job)
    )
    paths = [shard(args, *map(str, job)) for job in jobs(args)]
    found = [json.loads(path.read_text()) for path in paths if path.exists()]
    rows = table(found)
    for row in rows:
        published = "" if row["published"] is None else f"  published {row['published']}"
        percent = "" if row["percent"] is None else f"{row['measure']} {row['percent']:7.3f} %"
        print(f"{row['part']:14} {row['cell']:6} {row['arm']:18} cost {row['cost']:9.4f}  {percent}{published}")
    document = {
        "protocol": shards.protocol(__doc__, 0), "share": args.share,
        "training": {part: {arm: training(part, arm) for arm in ARMS[part]} for part in args.parts},
        "versions": found[0]["versions"] if found else {}, "table": rows,
    }  # fmt: skip
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / f"table-{args.share:g}.json").write_text(json.dumps(document, indent=2) + "\n")
    if failed:
        sys.exit(f"{failed} runs failed and are missing from the table")


if __name__ == "__main__":
    main()
