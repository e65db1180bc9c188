"""``ctrlrl ope RUN --dataset ID_OR_PATH``: the value of a run's policy, without its environment."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import tyro
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ctrlrl.engine import runfolder
from ctrlrl.engine.fitted_q import FittedQConfig
from ctrlrl.engine.off_policy_evaluation import METHODS, Estimate, estimate

Method = Literal["fqe", "is", "pdis", "wis", "pdwis", "dr", "wdr"]
MEANINGS = {
    "fqe": "fitted Q evaluation",
    "is": "importance sampling",
    "pdis": "per-decision importance sampling",
    "wis": "weighted importance sampling",
    "pdwis": "weighted per-decision importance sampling",
    "dr": "doubly robust",
    "wdr": "weighted doubly robust",
}


@dataclass(frozen=True)
class Ope:
    """Estimate how good a run's policy is from recorded episodes alone."""

    run: Annotated[Path, tyro.conf.Positional]
    """Run folder."""
    dataset: str
    """D4RL or Minari id, or the path of a file."""
    gamma: float = 0.99
    """Discount per step; 1 is the plain return, which needs a horizon where episodes were cut."""
    horizon: int | None = None
    """Steps of an episode that count; all by default."""
    methods: tuple[Method, ...] = METHODS  # type: ignore[assignment]
    """Which estimates."""
    checkpoint: str = "last"
    """last, best or interrupted."""
    deterministic: bool = False
    """Evaluate the mode of the policy instead of the policy; fqe only."""
    behaviour: Path | None = None
    """Run whose policy collected the data, where the data does not say how likely its actions were."""
    confidence: float = 0.95
    """Of the intervals."""
    updates: int = FittedQConfig.updates
    """Updates of fitted Q evaluation."""
    resamples: int = FittedQConfig.resamples
    """Bootstrap samples of the episodes that its interval comes from."""
    seed: int = 0
    """Seed of everything."""
    like: str | None = None
    """D4RL id whose environment and time limit a file of your own has."""
    unfinished: Literal["error", "cut"] = "error"
    """cut: a last episode without an end is cut there."""
    out: Path | None = None
    """Also write the numbers to this JSON file."""


def main(words: Sequence[str]) -> int:
    """Entry point of the verb; returns the exit status."""
    from ctrlrl import api
    from ctrlrl.data.load import load

    options = tyro.cli(Ope, args=list(words), prog="ctrlrl ope")
    console = Console()
    agent = api.load(options.run, options.checkpoint)
    data = load(options.dataset, like=options.like, unfinished=options.unfinished)
    behaviour = None if options.behaviour is None else api.load(options.behaviour)
    with console.status("Estimating"):
        found = estimate(
            agent, data, gamma=options.gamma, horizon=options.horizon, methods=options.methods,
            confidence=options.confidence, deterministic=options.deterministic, behaviour=behaviour,
            fqe=FittedQConfig(updates=options.updates, resamples=options.resamples), seed=options.seed,
        )  # fmt: skip
    true = measured(options.run, agent.steps)
    sampled = getattr(agent.policy, "stochastic", True) and not options.deterministic
    kind = "stochastic" if sampled else "deterministic"
    console.print(
        f"{agent.method}, {options.checkpoint} checkpoint at {agent.steps:,} steps, {kind} policy, on "
        f"{len(data.episodes):,} episodes ({len(data):,} steps) of {escape(data.info.id)}",
        soft_wrap=True,
    )
    console.print(table(found, options.confidence))
    for line in notes(found):
        console.print(escape(line), style="dim")
    for line in _beside(true, options, data):
        console.print(line, soft_wrap=True)
    if options.out is not None:
        runfolder.write_json(options.out, document(options, found, true, agent.steps))
    return 0


def measured(run: Path, steps: int) -> dict[str, Any] | None:
    """The evaluation recorded at the checkpoint's step, or the last one; None if there is none."""
    rows = [row for row in runfolder.read_evaluations(run) if row.get("returns")]
    return next((row for row in reversed(rows) if row["step"] == steps), rows[-1] if rows else None)


def table(found: Mapping[str, Estimate], confidence: float) -> Table:
    """One row per method."""
    result = Table(title="Value of the policy, from data alone", box=None, title_justify="left", pad_edge=False)
    result.add_column("")
    for name in ("estimate", f"{100 * confidence:g} % interval", "Student", "effective"):
        result.add_column(name, justify="right")
    for name, one in found.items():
        if one.value is None:
            result.add_row(f"{name}: {MEANINGS[name]}", "refused")
            continue
        size = "" if one.effective_sample_size is None else f"{one.effective_sample_size:.1f} of {one.n_episodes:,}"
        ends = (one.low, one.high)
        row = (f"{one.value:.4g}", _interval(ends), _interval(one.student), size)
        result.add_row(f"{name}: {MEANINGS[name]}", *row)
    return result


def notes(found: Mapping[str, Estimate]) -> list[str]:
    """What each estimate is of, and what it rests on; methods that say the same share a line."""
    said: dict[str, list[str]] = {}
    for name, one in found.items():
        said.setdefault(one.note, []).append(name)
    return [f"{', '.join(methods)}: {note}." for note, methods in said.items() if note]


def document(options: Ope, found: Mapping[str, Estimate], true: Mapping[str, Any] | None, steps: int) -> dict[str, Any]:
    """The numbers as JSON values."""
    return {
        "run": options.run, "checkpoint": options.checkpoint, "steps": steps, "dataset": options.dataset,
        "gamma": options.gamma, "horizon": options.horizon, "deterministic": options.deterministic,
        "confidence": options.confidence, "seed": options.seed, "estimates": [asdict(one) for one in found.values()],
        "measured": true,
    }  # fmt: skip


def _interval(ends: tuple[float | None, float | None] | None) -> str:
    return "" if ends is None or ends[0] is None or ends[1] is None else f"{ends[0]:.4g} to {ends[1]:.4g}"


def _beside(true: Mapping[str, Any] | None, options: Ope, data: Any) -> list[str]:
    """What there is to compare with, and why it may differ."""
    discounted = np.mean([_discounted(data, one, options.gamma, options.horizon) for one in data.episodes])
    lines = [f"The data's own policy, in the same measure: {discounted:.4g} over {len(data.episodes):,} episodes."]
    if true is None:
        return [*lines, "The run has no evaluation in its environment to compare with."]
    returns = np.array([float("nan") if v is None else float(v) for v in true["returns"]])
    lines.append(
        f"In its environment at step {true['step']:,}: mean return {returns.mean():.4g} over {len(returns)} "
        "deterministic, undiscounted episodes."
    )
    if options.gamma < 1.0:
        lines.append("That is another measure: --gamma 1 estimates plain returns.")
    return lines


def _discounted(data: Any, episode: Any, gamma: float, horizon: int | None) -> float:
    rewards = np.asarray(data.rewards[episode.start : episode.stop], np.float64)[:horizon]
    return float(rewards @ gamma ** np.arange(len(rewards)))
