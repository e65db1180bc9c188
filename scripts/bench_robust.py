"""Worst case over an uncertainty set after a fixed budget: SAC and TD3, nominal and randomised, and robust methods.

Every method trains for the same number of steps (iwocs for fewer where a worst case comes out twice) on one
ctrlrl/Robust environment, with its own defaults: a plain name (sac) at the nominal parameters, a name with _dr
(sac_dr, td3_dr) with parameters drawn uniformly at every reset (randomize=True), and robust methods (iwocs, m2td3,
rarl) with the set itself. The last policy then acts (of iwocs the one whose searched worst case is best)
deterministically on a grid over the set that includes both ends of every range (M2TD3's convention), for a few
episodes in each cell, all cells and methods from the same reset seeds. The return of a cell is the mean over its
episodes; the worst case of a run is its lowest cell, its average the mean over cells. The table gives the
interquartile mean over seeds (the plain mean, for three) with a 95 % bootstrap interval over runs (rliable, 5,000
repetitions). Steps that a method simulates to look for the worst case (iwocs) are outside the training budget and
counted apart.

Each run is a shard (one JSON file); a later call adds the missing ones and merges all.

    python scripts/bench_robust.py --minutes 60 --env InvertedPendulum Hopper --steps 300000 --out bench/robust
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from functools import partial
from pathlib import Path

import shards

METHODS = ("iwocs", "sac", "sac_dr", "td3_dr", "m2td3", "rarl")
EVALUATION_SEED = 10_000


def parse(method: str) -> tuple[str, bool, dict]:
    """Registered name, whether the parameters are randomised, and settings of ``name_dr,setting=JSON,...``."""
    name, *settings = re.split(r",(?![^\[]*\])", method)  # not at the commas of a list
    chosen = {k: json.loads(v) for k, v in (setting.split("=", 1) for setting in settings)}
    return name.removesuffix("_dr"), name.endswith("_dr"), chosen


def train(args: argparse.Namespace, env: str, method: str, seed: int):
    """The agent of ``method`` after ``--steps`` steps."""
    from ctrlrl import api

    name, randomised, settings = parse(method)
    kwargs = {"uncertainty": args.uncertainty} | ({"randomize": True} if randomised else {})
    agent = api.make(
        name, f"ctrlrl/Robust{env}-v0", env_kwargs=kwargs, seed=seed, backend="sync", device="cpu",
        eval_every=None, compile=args.compile, **settings,
    )  # fmt: skip
    return agent.learn(args.steps, root=None, progress=False)


def worker(args: argparse.Namespace) -> None:
    from ctrlrl.engine.runfolder import versions, write_json

    env, method, seed = args.worker
    began = time.perf_counter()
    agent = train(args, env, method, int(seed))
    trained = time.perf_counter()
    result = agent.evaluate_robust(args.points, args.episodes, seed=EVALUATION_SEED)
    path = shard(args, env, method, seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    document = {
        "env": env, "method": method, "seed": int(seed), "uncertainty": args.uncertainty, "points": args.points,
        "episodes": args.episodes, "compiled": args.compile, "steps": agent.steps,
        "search_steps": int(getattr(agent, "search_steps", 0)), "train_s": round(trained - began, 1),
        "evaluate_s": round(time.perf_counter() - trained, 1), "versions": versions(),
    }  # fmt: skip
    write_json(path, document | {"evaluation": result.document()})


def shard(args: argparse.Namespace, env: str, method: str, seed: int | str) -> Path:
    return args.out / f"{args.steps}" / f"{env}-{args.uncertainty}" / f"{method}-s{seed}.json"


def read(args: argparse.Namespace) -> dict[str, dict[str, list[dict]]]:
    """Shards by environment and method, the methods in the order of METHODS.

    Raises:
        SystemExit: A shard was evaluated in another way than these arguments say.
    """
    found: dict[str, dict[str, list[dict]]] = {}
    for env in args.env:
        by_method: dict[str, list[dict]] = {}
        for path in sorted((args.out / f"{args.steps}" / f"{env}-{args.uncertainty}").glob("*.json")):
            data = json.loads(path.read_text())
            for key, asked in (("points", args.points), ("episodes", args.episodes), ("compiled", args.compile)):
                if data[key] != asked:
                    sys.exit(f"{path} has {key}={data[key]}, asked is {asked}; take another --out")
            by_method.setdefault(data["method"], []).append(data)
        order = [m for m in METHODS if m in by_method] + sorted(set(by_method) - set(METHODS))
        if by_method:
            found[env] = {m: by_method[m] for m in order}
    return found


def table(made: dict[str, dict[str, list[dict]]]) -> dict:
    import numpy as np

    from ctrlrl.run.report_statistics import iqm

    def over_seeds(values: list[float]) -> dict:
        estimate = iqm(np.array(values)[:, None], reps=5000)
        bounds = {k: None if v is None else round(v, 1) for k, v in (("low", estimate.low), ("high", estimate.high))}
        return {"iqm": round(estimate.value, 1), **bounds, "runs": [round(v, 1) for v in values]}

    scores = {"worst": "worst", "average": "mean", "nominal": "nominal_mean"}
    return {
        env: {
            method: {
                "seeds": len(runs),
                **{k: over_seeds([run["evaluation"][key] for run in runs]) for k, key in scores.items()},
                "worst_params": [run["evaluation"]["worst_params"] for run in runs],
                **{k: [run[k] for run in runs] for k in ("steps", "search_steps", "train_s")},
            }
            for method, runs in methods.items()
        }
        for env, methods in made.items()
    }


def draw(made: dict[str, dict[str, list[dict]]], path: Path) -> None:
    """Heat maps of the mean over seeds, a row for each environment and a column for each method."""
    import numpy as np

    from ctrlrl.engine.robust import RobustEvaluation
    from ctrlrl.run.robust_figures import comparison

    def over_seeds(runs: list[dict]) -> RobustEvaluation:
        each = [RobustEvaluation.from_document(run["evaluation"]) for run in runs]
        joined = {
            k: np.concatenate([getattr(e, k) for e in each], -1) for k in ("returns", "lengths", "nominal_returns")
        }
        return each[0]._replace(**joined)

    rows = {env: {m: over_seeds(runs) for m, runs in methods.items()} for env, methods in made.items()}
    path.write_bytes(comparison(rows))


def check(methods: list[str]) -> None:
    """Stop before the first run where a method is unknown."""
    from ctrlrl import api

    for method in methods:
        try:
            api.get_method(parse(method)[0])
        except KeyError as error:
            sys.exit(error.args[0])


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    shards.add_arguments(parser, "bench/robust", words=3)
    parser.add_argument("--env", nargs="+", default=["InvertedPendulum"], help="X of ctrlrl/RobustX-v0")
    about = "a method, with _dr on randomised parameters, with settings: m2td3,learning_rate=1e-3"
    parser.add_argument("--methods", nargs="+", default=list(METHODS), help=about)
    parser.add_argument("--steps", type=int, default=300_000, help="training steps of every method")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--uncertainty", default="2d", choices=["1d", "2d", "3d"])
    parser.add_argument("--points", type=int, default=10, help="of the grid, in each dimension")
    parser.add_argument("--episodes", type=int, default=5, help="in each cell")
    about = "the updates of every method"
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=False, help=about)
    args = parser.parse_args(arguments)
    if args.worker:
        worker(args)
        return
    check(args.methods)
    queue = [(e, m, s) for s in range(args.seeds) for e in args.env for m in args.methods]
    words = shards.flags(args, "steps", "points", "episodes", "uncertainty", "out", "compile")
    failed = shards.run_missing(args, __file__, queue, partial(shard, args), words)
    found = read(args)
    merged = table(found)
    arguments_used = ("steps", "seeds", "env", "methods", "uncertainty", "points", "episodes", "compile")
    document = {
        "protocol": shards.protocol(__doc__),
        "arguments": {name: getattr(args, name) for name in arguments_used},
        "versions": [run["versions"] for methods in found.values() for runs in methods.values() for run in runs][:1],
        "table": merged,
    }
    stem = args.out / f"table-{args.steps}-{args.uncertainty}"
    if merged:
        stem.with_suffix(".json").write_text(json.dumps(document, indent=2) + "\n")
        draw(found, stem.with_suffix(".png"))
    for env, rows in merged.items():
        print(f"{env:20}    worst                      average  nominal  search steps  seeds")
        for method, row in rows.items():
            worst, average, nominal = (row[k]["iqm"] for k in ("worst", "average", "nominal"))
            bounds = f"[{row['worst']['low']}, {row['worst']['high']}]" if row["seeds"] > 1 else ""
            numbers = f"{average:8.1f} {nominal:8.1f} {max(row['search_steps']):13,} {row['seeds']:6}"
            print(f"  {method:18} {worst:8.1f}  {bounds:20} {numbers}")
    if failed:
        sys.exit(f"{failed} runs failed and are missing from the table")


if __name__ == "__main__":
    main()
