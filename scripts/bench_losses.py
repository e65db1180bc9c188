"""All losses side by side: two token tasks against GRPO, two control tasks against PPO, and the papers' claims.

Everyone has the same network and number of steps, the loop's defaults (rows per optimiser step, passes, learning
rate) and the loss's own; what a method demands of the loop (its ``loop_defaults``) comes first. Nothing is tuned. The
token tasks are small enough for a transformer of one block of width 32, so that a run takes seconds. Of the dozen
losses only GRPO has a penalty on leaving the reference policy, so GRPO without it stands beside them. A run is scored
by its last policy, which acts by sampling, from fixed reset seeds: 512 answers, or 20 episodes of control. The table
gives the interquartile mean over seeds with a 95 % bootstrap interval over runs (rliable, 1,000 repetitions); losses
with one seed have no interval, and say whether they run and learn, not how they rank.

Each run is a shard (one JSON file); a later call adds the missing ones and merges all.

    python scripts/bench_losses.py --minutes 60 --out bench/losses                      # a dozen losses, five seeds
    python scripts/bench_losses.py --minutes 60 --out bench/losses --all --claims       # every loss; the claims
    python scripts/bench_losses.py --minutes 0 --out bench/losses --markdown --plot assets/losses.png
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from pathlib import Path
from typing import Any

import numpy as np
import shards
from losses_claims import CLAIMS, judge
from losses_runs import ANSWERS, EPISODES, HEADLINE, PLAIN, REPS, SEEDS, TASKS, Job, records, run, shard

# -- merging --------------------------------------------------------------------------------------


MEASURES = ("reward", "success", "entropy", "length")


def table(out: Path, tasks: Iterable[str]) -> dict[str, dict[str, dict]]:
    """Per task and method: each measure's interquartile mean with its interval."""
    from ctrlrl.run.report_statistics import iqm

    merged: dict[str, dict[str, dict]] = {}
    for task in tasks:
        scores: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
        for record in records(out, task):
            if record["outcome"] == "ran":
                for name in MEASURES:
                    if (value := record["score"].get(name)) is not None:
                        scores[record["method"]][name].append(value)
        rows: dict[str, dict] = {}
        for method, measures in scores.items():
            row: dict[str, Any] = {"seeds": len(measures["reward"])}
            for name, values in measures.items():
                if name == "length" and np.ptp(values) == 0:  # the task's, and not worth a bootstrap
                    continue
                estimate = iqm(np.array(values)[:, None], reps=REPS)
                row[name] = {
                    "iqm": round(estimate.value, 4), "low": rounded(estimate.low), "high": rounded(estimate.high),
                    "runs": [round(v, 4) for v in values],
                }  # fmt: skip
            rows[method] = row
        if rows:
            merged[task] = dict(sorted(rows.items(), key=lambda item: -item[1]["reward"]["iqm"]))
    return merged


def rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)


def cell(row: Mapping[str, Any] | None, name: str, digits: int) -> str:
    if row is None or name not in row:
        return ""
    value = row[name]
    text = f"{value['iqm']:.{digits}f}"
    return text if value["low"] is None else f"{text} [{value['low']:.{digits}f}, {value['high']:.{digits}f}]"


def markdown(document: Mapping[str, Any]) -> str:
    """The tables of the documentation."""
    merged = document["table"]
    methods = {m for rows in merged.values() for m in rows}
    first = [m for m in HEADLINE if m in methods]
    columns = [("sort", "success", 2), ("sort", "reward", 3), ("sort", "entropy", 2), ("arithmetic", "success", 2),
               ("arithmetic", "reward", 3), ("arithmetic", "entropy", 2), ("cartpole", "reward", 0),
               ("acrobot", "reward", 0)]  # fmt: skip
    columns = [c for c in columns if c[0] in merged]

    def lines(names: Iterable[str]) -> list[str]:
        titles = [f"{task}: {'return' if task in ('cartpole', 'acrobot') else name}" for task, name, _ in columns]
        head = ["| loss | " + " | ".join(titles) + " |", "|---" * (len(columns) + 1) + "|"]
        return head + [
            f"| `{m}` | " + " | ".join(cell(merged[t].get(m), n, d) for t, n, d in columns) + " |" for m in names
        ]

    def rank(name: str) -> float:
        return -merged.get("sort", {}).get(name, {"reward": {"iqm": -1.0}})["reward"]["iqm"]

    text = [*lines(sorted(first, key=rank)), ""]
    if rest := sorted(methods - set(first), key=rank):
        text += ["One seed each:", "", *lines(rest), ""]
    if document["claims"]:
        text += ["| claim | who | seeds | held | numbers |", "|---|---|---|---|---|"]
        for claim in document["claims"].values():
            for v in claim["verdicts"]:
                held = "yes" if v["held"] else "no"
                text.append(f"| {claim['says']} | `{v['who']}` | {claim['seeds']} | {held} | {v['numbers']} |")
    return "\n".join(text).rstrip() + "\n"


def plot(merged: Mapping[str, Mapping[str, dict]], path: Path) -> None:
    """A panel per task and measure: a bar per run, the interquartile mean with its interval, the baseline as a line."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = [("sort", "reward", "sorting: reward"), ("arithmetic", "reward", "arithmetic: reward"),
              ("sort", "entropy", "sorting: entropy at the end"), ("cartpole", "reward", "CartPole-v1: return"),
              ("acrobot", "reward", "Acrobot-v1: return")]  # fmt: skip
    panels = [p for p in panels if p[0] in merged]
    methods = [m for m in HEADLINE if any(m in rows for rows in merged.values())]
    order = merged[panels[0][0]]
    methods.sort(key=lambda m: order[m]["reward"]["iqm"] if m in order else -np.inf)
    height = 0.9 + 0.26 * len(methods)
    figure, axes = plt.subplots(
        1, len(panels), figsize=(0.8 + 2.3 * len(panels), height), sharey=True, constrained_layout=True, squeeze=False
    )
    for axis, (task, measure, title) in zip(axes[0], panels, strict=True):
        rows, baseline = merged[task], TASKS[task].baseline
        if baseline in rows and measure in rows[baseline]:
            axis.axvline(rows[baseline][measure]["iqm"], color="#8a8f98", linewidth=1, linestyle="--", zorder=0)
        for y, method in enumerate(methods):
            value = rows.get(method, {}).get(measure)
            if value is None:
                continue
            color = "#8a8f98" if method == baseline else "#0072b2"
            axis.plot(value["runs"], [y] * len(value["runs"]), "|", color=color, markersize=7, alpha=0.5)
            if value["low"] is not None:
                axis.plot([value["low"], value["high"]], [y, y], color=color, linewidth=2)
            axis.plot(value["iqm"], y, "o", color=color, markersize=5)
        axis.set_title(title, fontsize=9)
        axis.tick_params(labelsize=8)
        axis.grid(axis="x", alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0][0].set_yticks(range(len(methods)), ["grpo, no KL" if m == PLAIN else m for m in methods])
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def merge(args: argparse.Namespace) -> dict[str, Any]:
    """Everything there is in ``--out`` as one document."""
    every = [r for task in TASKS for r in records(args.out, task)]
    runs = [{k: v for k, v in r.items() if k not in ("versions", "shares", "curve")} for r in every]
    for short, r in zip(runs, every, strict=True):
        short["git_commit"] = r["versions"]["git_commit"]
    latest = max(every, key=lambda r: r["at"])["versions"] if every else {}
    return {
        "protocol": shards.protocol(__doc__),
        "arguments": {
            "tasks": {
                name: {"env": t.env, "steps": t.steps, "baseline": t.baseline, "settings": dict(t.settings),
                       "episodes": dict(t.episodes), "transitions": dict(t.transitions)}
                for name, t in TASKS.items()
            },
            "headline": HEADLINE, "answers": ANSWERS, "episodes": EPISODES,
        },
        "versions": latest,
        "table": table(args.out, ("sort", "arithmetic", "cartpole", "acrobot")),
        "claims": judge(args.out),
        "absent": sorted({(r["task"], r["method"], r["outcome"], r["why"]) for r in every if r["outcome"] != "ran"}),
        "runs": runs,
    }  # fmt: skip


# -- the queue ------------------------------------------------------------------------------------


def queue_of(args: argparse.Namespace) -> list[Job]:
    """All jobs, those first that tell most: every method once before any has a second seed."""
    from ctrlrl.losses import base

    jobs = []
    for seed in range(args.seeds):
        jobs += [Job(task, m, seed) for task in args.tasks for m in args.methods]
        if args.claims and seed < args.claim_seeds:
            wanted = {n: c for n, c in CLAIMS.items() if not args.only or n in args.only}
            jobs += [Job(claim.task, arm, seed) for claim in wanted.values() for arm in claim.arms]
        if args.all and seed == 0:
            jobs += [Job(task, m, 0) for task in args.tasks for m in base.names() if m not in args.methods]
    return list(dict.fromkeys(jobs))


def work(args: argparse.Namespace) -> int:
    """Run what is missing until the time is up; returns the number of failures."""
    deadline = time.monotonic() + 60 * args.minutes
    queue = [job for job in queue_of(args) if not shard(args.out, job).exists()]
    if not queue or args.minutes <= 0:
        return 0
    os.environ["OMP_NUM_THREADS"] = "1"
    failed, running = 0, {}
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(args.jobs, len(queue)), mp_context=context) as pool:
        while running or (queue and time.monotonic() < deadline):
            while queue and len(running) < args.jobs and time.monotonic() < deadline:
                job = queue.pop(0)
                if not shard(args.out, job).exists():  # made by another call meanwhile
                    future: Future[str] = pool.submit(run, job, str(args.out), args.steps)
                    running[future] = job
            done, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                job, outcome = running.pop(future), future.result()
                failed += outcome.startswith("failed")
                print(f"{job.task} {job.method} s{job.seed}: {outcome}", flush=True)
    return failed


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60.0, help="no new run is started after this; 0 only merges")
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--tasks", nargs="*", default=["sort", "arithmetic", "cartpole", "acrobot"], choices=[*TASKS])
    about = "methods with all seeds, with settings if wanted: bapo,epochs=8"
    parser.add_argument("--methods", nargs="+", default=list(HEADLINE), help=about)
    parser.add_argument("--all", action="store_true", help="also every other loss, with one seed")
    parser.add_argument("--claims", action="store_true", help="also the runs behind the claims")
    parser.add_argument("--claim-seeds", type=int, default=3)
    parser.add_argument("--only", nargs="+", default=[], choices=[*CLAIMS], help="these claims only")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--out", type=Path, default=Path("bench/losses"))
    parser.add_argument("--json", type=Path, default=None, help="where the merged document goes; default: in --out")
    parser.add_argument("--plot", type=Path, default=None, help="also draw the table as a picture")
    parser.add_argument("--markdown", action="store_true", help="print the tables for the documentation")
    parser.add_argument("--steps", type=int, default=None, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    failed = work(args)
    document = merge(args)
    from ctrlrl.engine.runfolder import write_json

    path = args.json or args.out / "losses.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, document)
    if args.plot is not None and document["table"]:
        plot(document["table"], args.plot)
    if args.markdown:
        print(markdown(document))
    if failed:
        sys.exit(f"{failed} runs failed and are missing from the table")


if __name__ == "__main__":
    main()
