"""Benchmarks as shards: a process and a JSON file for every run, so that a later call adds what is missing."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable, Collection
from pathlib import Path

Job = tuple[object, ...]
"""What tells one run from the others, as the words behind ``--worker``."""


def add_arguments(parser: argparse.ArgumentParser, out: str | None, words: int) -> None:
    """What every such benchmark takes; ``words`` are those of a job."""
    parser.add_argument("--minutes", type=float, default=60.0, help="no new run is started after this")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="runs at once")
    parser.add_argument("--out", type=Path, default=None if out is None else Path(out))
    parser.add_argument("--worker", nargs=words, default=None, help=argparse.SUPPRESS)


def flags(args: argparse.Namespace, *names: str) -> list[str]:
    """The arguments of these names as words of a command line, for a worker; a bool is a BooleanOptionalAction."""
    words: list[str] = []
    for name in names:
        value, word = getattr(args, name), name.replace("_", "-")
        words += [f"--{word if value else f'no-{word}'}"] if isinstance(value, bool) else [f"--{word}", str(value)]
    return words


def run_missing(
    args: argparse.Namespace,
    script: str,
    queue: list[Job],
    path: Callable[..., Path],
    words: list[str],
    ready: Callable[[Job, Collection[Job]], bool] = lambda job, running: True,
    quiet: bool = False,
) -> int:
    """Run the jobs whose file is missing, ``args.jobs`` at once, one thread each; how many failed.

    Args:
        args: With minutes and jobs.
        script: The benchmark, which is called again for each job.
        queue: Jobs, the first first.
        path: File of a job, called with its words.
        words: Of every worker's command line.
        ready: Whether a job may start beside those that run.
        quiet: Drop what workers print.
    """
    deadline = time.monotonic() + 60 * args.minutes
    queue = [job for job in queue if not path(*job).exists()]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    running: dict[Job, subprocess.Popen[bytes]] = {}
    failed = 0
    while running or (queue and time.monotonic() < deadline):
        while len(running) < args.jobs and time.monotonic() < deadline:
            job = next((j for j in queue if ready(j, running)), None)
            if job is None:
                break
            queue.remove(job)
            if not path(*job).exists():  # made by another call meanwhile
                command = [sys.executable, script, *words, "--worker", *map(str, job)]
                running[job] = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL if quiet else None)
        if not running:  # what is left waits for something that failed, or for time that is over
            break
        time.sleep(0.5)
        for job, process in list(running.items()):
            if process.poll() is not None:
                del running[job]
                failed += process.returncode != 0
                print("ran:" if process.returncode == 0 else "FAILED:", *job, flush=True)
    return failed


def plot(merged: dict, path: Path, label: str, grey: Callable[[str], bool]) -> None:
    """One panel per task of a table: a tick per run, a dot and a line for the mean and its interval.

    ``merged`` is rows by method by task, each with "runs", "iqm", "low" and "high"; ``grey`` says which are compared
    with.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(merged), figsize=(3.4 * len(merged), 2.6), constrained_layout=True)
    for axis, (env, rows) in zip([axes] if len(merged) == 1 else axes, merged.items(), strict=True):
        for y, (method, row) in enumerate(reversed(rows.items())):
            color = "#8a8f98" if grey(method) else "#0072b2"
            axis.plot(row["runs"], [y] * len(row["runs"]), "|", color=color, markersize=9, alpha=0.6)
            if row["low"] is not None:
                axis.plot([row["low"], row["high"]], [y, y], color=color, linewidth=2)
            axis.plot(row["iqm"], y, "o", color=color, markersize=6)
        axis.set_yticks(range(len(rows)), [m.replace("sb3_", "SB3 ") for m in reversed(rows)])
        axis.set_title(env, fontsize=10)
        axis.set_xlabel(label, fontsize=9)
        axis.set_xlim(left=min(0.0, axis.get_xlim()[0]))
        axis.grid(axis="x", alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def protocol(text: str | None, paragraph: int = 1) -> str:
    """A paragraph of a script's docstring on one line."""
    return " ".join((text or "").split("\n\n")[paragraph].split())
