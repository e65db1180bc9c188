"""``ctrlrl tuning RUN...``: what choosing among trained runs costs in evaluation episodes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ctrlrl.data.dataset import DatasetInfo, normalized
from ctrlrl.engine import runfolder
from ctrlrl.engine.checkpoint import atomic_path
from ctrlrl.run import report_figures, report_runs
from ctrlrl.run.report_statistics import Curve
from ctrlrl.run.tuning_cost import TuningCost, tuning_cost

AFTER = (1, 2, 5, 10, 20, 50, 100)
"""Evaluation episodes of which the table tells."""


@dataclass(frozen=True)
class Tuning:
    """How good the policy is that one would deploy after so many evaluation episodes, method by method."""

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Run folders, or folders above them: the settings and seeds to choose from."""
    out: Path | None = None
    """Folder for the picture and the numbers (tuning.png, tuning.json)."""
    pulls: int = 100
    """Evaluation episodes to spend."""
    subset: int = 20
    """Policies to choose from in each trial, drawn from those there are."""
    trials: int = 1000
    """Repetitions."""
    alpha: float = 2.0
    """Of the bandit's bonus."""
    seed: int = 0
    """Seed of everything."""


@dataclass(frozen=True)
class Group:
    """Runs of one method on one environment or dataset."""

    method: str
    env: str
    returns: list[np.ndarray]
    """Of the last evaluation of each; D4RL scores where ``scored``."""
    scored: bool
    spent: int
    """Evaluation episodes during training, all evaluations of all runs."""
    unevaluated: int
    """Runs without an evaluation."""


def main(words: Sequence[str]) -> int:
    """Entry point of the verb; returns the exit status."""
    options = tyro.cli(Tuning, args=list(words), prog="ctrlrl tuning")
    groups = collect(options.runs)
    costs = [
        tuning_cost(
            group.returns, pulls=options.pulls, subset=options.subset, trials=options.trials, alpha=options.alpha,
            unit=1.0 if group.scored else None, seed=options.seed,
        )
        for group in groups
    ]  # fmt: skip
    console = Console()
    console.print(table(groups, costs))
    console.print(*_notes(groups), sep="\n")
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
        runfolder.write_json(options.out / "tuning.json", document(groups, costs, options))
        with atomic_path(options.out / "tuning.png") as temporary:
            temporary.write_bytes(picture(groups, costs))
        console.print(f"Written: {options.out / 'tuning.png'}, {options.out / 'tuning.json'}", soft_wrap=True)
    return 0


def collect(paths: Sequence[Path]) -> list[Group]:
    """The runs at and below ``paths`` by environment and method.

    Raises:
        FileNotFoundError: A path that holds no run.
        ValueError: No run was evaluated.
    """
    found: dict[tuple[str, str], list[report_runs.Run]] = {}
    for run in report_runs.load(paths):
        found.setdefault((run.env, run.method), []).append(run)
    groups = [_group(env, method, runs) for (env, method), runs in found.items()]
    kept = [group for group in groups if group.returns]
    if not kept:
        raise ValueError(
            "none of these runs was evaluated during training, so there is nothing to choose by; train with eval_every"
        )
    return kept


def _group(env: str, method: str, runs: Sequence[report_runs.Run]) -> Group:
    evaluated = [run for run in runs if run.evaluations]
    returns = [np.array([_number(v) for v in run.evaluations[-1]["returns"]]) for run in evaluated]
    scores = [_scores(run, values) for run, values in zip(evaluated, returns, strict=True)]
    known = [values for values in scores if values is not None]
    scored = bool(known) and len(known) == len(returns)
    spent = sum(len(row["returns"]) for run in evaluated for row in run.evaluations)
    return Group(method, env, known if scored else returns, scored, spent, len(runs) - len(evaluated))


def _scores(run: report_runs.Run, returns: np.ndarray) -> np.ndarray | None:
    """D4RL's scores, where the run's data has references."""
    data = runfolder.read_config(run.path).get("data") or {}
    info = DatasetInfo("", ref_min_score=data.get("ref_min_score"), ref_max_score=data.get("ref_max_score"))
    return normalized(info, returns)


def table(groups: Sequence[Group], costs: Sequence[TuningCost]) -> Table:
    """The deployed policy's value after 1, 2, 5, ... evaluation episodes, with the range over trials."""
    after = [n for n in AFTER if n <= len(costs[0].mean)]
    found = Table(
        title="Value of the policy that one would deploy after so many evaluation episodes",
        caption="mean over trials, and the range of 95 % of them; 'spent' counts evaluation episodes during training",
        box=None, title_justify="left", caption_justify="left",
    )  # fmt: skip
    found.add_column("")
    for group in groups:
        found.add_column(escape(f"{group.method}\n{group.env}\n{'D4RL score' if group.scored else 'return'}"))
    found.add_row("policies", *(str(cost.candidates) for cost in costs))
    found.add_row("spent", *(f"{group.spent:,}" for group in groups))
    for n in after:
        cells = ("{:.4g} [dim]{:.4g} to {:.4g}[/dim]".format(*cost.after(n)) for cost in costs)
        found.add_row(f"after {n}", *cells)
    found.add_row("best", *(f"{max(float(r.mean()) for r in group.returns):.4g}" for group in groups))
    return found


def _notes(groups: Sequence[Group]) -> list[str]:
    said = []
    if any(len(group.returns) == 1 for group in groups):
        said.append("Where there is one policy there is nothing to choose: give runs of several settings and seeds.")
    for group in groups:
        few = min(len(r) for r in group.returns)
        if few < 20:
            said.append(
                f"{group.method} on {group.env}: a policy's worth is taken from {few} episodes; train with a larger "
                "eval_episodes for a sharper picture."
            )
        if group.unevaluated:
            said.append(f"{group.method} on {group.env}: {group.unevaluated} runs without an evaluation are left out.")
    said.append("A checkpoint picked by its evaluations during training ('best') has already cost what is spent.")
    return said


def picture(groups: Sequence[Group], costs: Sequence[TuningCost]) -> bytes:
    """PNG: a panel per environment with a line per method, and the range over trials as a band."""
    panels: dict[str, dict[str, Curve]] = {}
    for group, cost in zip(groups, costs, strict=True):
        x = np.arange(1.0, len(cost.mean) + 1.0)
        name = f"{group.method} ({cost.candidates} {'policy' if cost.candidates == 1 else 'policies'})"
        panels.setdefault(group.env, {})[name] = Curve([], x, cost.mean, cost.low, cost.high, False)
    kind = "D4RL score" if all(group.scored for group in groups) else "return"
    return report_figures.line_panels(panels, "evaluation episodes spent on choosing", f"{kind} of the chosen policy")


def document(groups: Sequence[Group], costs: Sequence[TuningCost], options: Tuning) -> dict[str, Any]:
    """Everything behind the picture, as JSON values."""
    rows = [
        {
            "env": group.env, "method": group.method, "scored": group.scored, "candidates": cost.candidates,
            "subset": cost.subset, "spent": group.spent, "returns": group.returns, "mean": cost.mean, "low": cost.low,
            "high": cost.high, "mean_low": cost.mean_low, "mean_high": cost.mean_high, "confidence": cost.confidence,
        }
        for group, cost in zip(groups, costs, strict=True)
    ]  # fmt: skip
    return {"trials": options.trials, "alpha": options.alpha, "seed": options.seed, "groups": rows}


def _number(value: Any) -> float:
    """A return as it lies in the file: null was NaN, strings were infinities."""
    return float("nan") if value is None else float(value)
