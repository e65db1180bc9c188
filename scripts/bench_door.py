"""BC and IQL on the human door demonstrations, evaluated in gymnasium-robotics' AdroitHandDoor with D4RL's reward.

The 25 demonstrations (6,729 steps) lie in door-human-demos.hdf5 in $CTRLRL_DATA. Settings are those that are published
for door-human-v1 (ctrlrl.engine.published), but for the number of updates. The score of a run is D4RL's, of the mean
return of 100 deterministic episodes of 200 steps of its last checkpoint, from the same reset seeds for all; the table
has the mean over seeds with a 95 % bootstrap interval over runs (5,000 repetitions) and the best single episode.

Each run is a shard (one JSON file); a later call adds the missing ones and merges all.

    python scripts/bench_door.py --minutes 60 --out bench/door
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from functools import partial
from pathlib import Path

import shards

METHODS = ("bc", "iql")
LIKE, EVALUATION_SEED, REPETITIONS = "door-human-v1", 10_000, 5_000
FOLDER = Path(os.environ.get("CTRLRL_DATA", Path(__file__).parents[2] / "shared" / "data"))


def worker(args: argparse.Namespace) -> None:
    from importlib.metadata import version

    from ctrlrl.api import make
    from ctrlrl.engine.published import published
    from ctrlrl.engine.runfolder import versions, write_json
    from ctrlrl.types import EnvSpec

    method, seed = args.worker
    began = time.perf_counter()
    door = EnvSpec("AdroitHandDoor-v1", wrappers=(("ctrlrl.engine.adroit:DoorReward", {}),))
    settings = published(method, LIKE).settings
    agent = make(
        method, door, dataset=args.file, like=LIKE, seed=int(seed), device="cpu", threads=1, eval_every=None,
        compile=args.compile, **settings,
    )  # fmt: skip
    agent.learn(args.updates, root=None, progress=False)
    trained = time.perf_counter()
    returns = agent.evaluate(args.episodes, seed=EVALUATION_SEED).returns
    found = {name: version(name) for name in ("gymnasium-robotics", "mujoco")}
    path = shard(args, method, seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    document = {
        "method": method, "seed": int(seed), "updates": args.updates, "settings": settings,
        "returns": returns.tolist(), "scores": agent.normalized(returns).tolist(),
        "train_s": round(trained - began, 1), "evaluate_s": round(time.perf_counter() - trained, 1),
        "versions": {**versions(), **found},
    }  # fmt: skip
    write_json(path, document)


def shard(args: argparse.Namespace, method: str, seed: int | str) -> Path:
    return args.out / f"{args.updates}" / f"{method}-s{seed}.json"


def table(args: argparse.Namespace) -> dict:
    import numpy as np

    from ctrlrl.engine.published import published

    found = {}
    for method in METHODS:
        made = [json.loads(p.read_text()) for p in sorted((args.out / f"{args.updates}").glob(f"{method}-s*.json"))]
        if not made:
            continue
        runs = np.array([np.mean(s["scores"]) for s in made])
        drawn = np.random.default_rng(0).choice(runs, (REPETITIONS, len(runs))).mean(1)
        theirs = published(method, LIKE)
        found[method] = {
            "seeds": len(runs), "mean": round(float(runs.mean()), 2),
            "interval": None if len(runs) < 2 else [round(float(x), 2) for x in np.percentile(drawn, [2.5, 97.5])],
            "runs": [round(float(x), 2) for x in runs],
            "mean_return": round(float(np.mean([np.mean(s["returns"]) for s in made])), 1),
            "best_episode": round(max(max(s["scores"]) for s in made), 1),
            "published": f"{theirs.score:.2f} ± {theirs.score_std:.2f} after {theirs.updates:,} updates",
            "train_s": [s["train_s"] for s in made],
        }  # fmt: skip
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    shards.add_arguments(parser, "bench/door", words=2)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--updates", type=int, default=100_000, help="of every run")
    parser.add_argument("--episodes", type=int, default=100)
    parser.add_argument("--file", type=Path, default=FOLDER / "door-human-demos.hdf5")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    args = parser.parse_args()
    if not args.file.is_file():
        sys.exit(f"{args.file} is absent; set CTRLRL_DATA to its folder, or give it by --file")
    if args.worker:
        worker(args)
        return
    queue = [(m, s) for s in range(args.seeds) for m in args.methods]
    words = shards.flags(args, "file", "updates", "episodes", "out", "compile")
    failed = shards.run_missing(args, __file__, queue, partial(shard, args), words)
    merged = table(args)
    paths = sorted((args.out / f"{args.updates}").glob("*.json"))
    document = {
        "protocol": shards.protocol(__doc__),
        "arguments": {k: getattr(args, k) for k in ("methods", "seeds", "updates", "episodes", "compile")},
        "versions": json.loads(paths[0].read_text())["versions"] if paths else {},
        "table": merged,
    }
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / f"table-{args.updates}.json").write_text(json.dumps(document, indent=2) + "\n")
    for method, row in merged.items():
        print(f"{method:4} {row['mean']:7.2f}  {row['interval']}  {row['seeds']} seeds  (CORL {row['published']})")
    if failed:
        sys.exit(f"{failed} runs failed and are missing from the table")


if __name__ == "__main__":
    main()
