"""The part of a report that looks inside the updates: what ``engine.diagnose`` recorded, drawn and explained."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ctrlrl.engine.diagnose import QUANTILES, WEIGHT_EDGES
from ctrlrl.run import report_figures as figures
from ctrlrl.run import report_statistics as stats
from ctrlrl.run import report_words as words
from ctrlrl.run.report_page import Image, Section
from ctrlrl.run.report_runs import DIAGNOSES, Run

STEPS = "environment steps"
HISTOGRAM = f"{DIAGNOSES}gradient_weight"


@dataclass(frozen=True)
class _Plot:
    """Lines over training. One name: a figure of all methods; several: a panel per method."""

    id: str
    title: str
    lines: Mapping[str, str]
    """Name of each quantity, and what the legend calls it."""
    y_label: str
    meaning: str
    """What it shows and how to read it, in sentences."""
    unit: bool = False
    """Whether it lies between 0 and 1."""


PLOTS = (
    _Plot(
        "entropy", "Entropy", {"entropy": "entropy"}, "entropy (nats)",
        "How undecided the policy is, on average over the states of a batch. It falls as the policy settles on its "
        "actions; one that collapses early has stopped exploring. Of continuous actions it may be negative.",
    ),
    _Plot(
        "kl", "KL of an update", {"kl_k1": "k1", "kl_k2": "k2", "kl_k3": "k3"}, "KL (nats)",
        "How far an iteration moves the policy: three estimates of KL(collecting || updated) from the same samples. "
        "k1 = -log r is unbiased, noisy and of either sign; k2 = (log r)\N{SUPERSCRIPT TWO} / 2 is biased; "
        "k3 = r - 1 - log r is unbiased and never negative. They agree while updates are small; where they part, a "
        "few actions have become much more or less likely.",
    ),
    _Plot(
        "clip-shares", "Clip shares",
        {"clip_share_positive": "A > 0, ratio above the band", "clip_share_negative": "A < 0, ratio below the band"},
        "share of such positions",
        "How often the ratio ends beyond the loss's eps in the direction in which its advantage points, where a "
        "clipped loss gives no more gradient. One line well above the other: the update raises good actions and "
        "lowers bad ones at different speeds.", unit=True,
    ),
    _Plot(
        "positive-shares", "Positive shares",
        {"advantage_positive_share": "of the advantages", "weight_positive_share": "of the gradient weights"},
        "positive part / whole mass",
        "How much of an update praises rather than blames: the sum of the positive advantages over the sum of all "
        "their sizes, and the same for the gradient weights, where the method's clipping and scaling are in. "
        "At one half both weigh the same.", unit=True,
    ),
    _Plot(
        "zero-variance", "Zero-variance groups", {"zero_variance_share": "groups"}, "share of groups",
        "Groups of sequences from one start whose outcomes are all the same. Where the advantage compares within the "
        "group they teach nothing: the start is too easy, too hard, or leaves nothing to chance.", unit=True,
    ),
    _Plot(
        "lengths", "Lengths", {"length_correct": "solved", "length_incorrect": "not solved"}, "positions per sequence",
        "Mean length of the sequences that solved their task and of those that did not. Failures that keep growing "
        "while solutions do not are a sign of a length bias in the loss.",
    ),
)  # fmt: skip
BANDS = (("q01", "q99", "1 to 99 %"), ("q05", "q95", "5 to 95 %"), ("q25", "q75", "25 to 75 %"))
RATIO = (
    "Quantiles of the ratio of the updated to the collecting policy, over the positions of a batch; line: median. "
    "Wide outer bands around a narrow middle mean that few positions carry the update."
)
WEIGHTS = (
    "How hard each position pulls at the policy: the weight on the gradient of its log-probability, before the "
    "update's denominator divides it. Shade: share of the positions. Up: made more likely; down: less likely; in the "
    "middle: no gradient to speak of, clipped positions among them. Each bin is twice as wide as the one before."
)


def section(
    groups: Mapping[tuple[str, str], Sequence[Run]], order: Sequence[str], image: Callable[..., Image]
) -> Section | None:
    """The section "Inside the updates" on ``groups`` ((environment, label) to runs); None without any diagnosis.

    Args:
        groups: Runs by environment and label.
        order: All labels, which fixes their colours.
        image: Makes an Image of a name, PNG bytes, a description and a caption.
    """
    found = Section("Inside the updates", "updates")
    for env in sorted({env for env, _ in groups}):
        runs = {label: group for (name, label), group in groups.items() if name == env}
        for plot in PLOTS:
            found.images += _lines(env, plot, runs, order, image)
        found.images += _ratio(env, runs, image)
        found.images += _weights(env, runs, image)
    if not found.images:
        return None
    found.text.append(
        "Every few iterations the updated policy is asked once more about the batch that it has just learnt from. "
        "Nothing of it enters the training. Lines are means over runs, bands go from the lowest to the highest run."
    )
    return found


def _lines(
    env: str, plot: _Plot, runs: Mapping[str, Sequence[Run]], order: Sequence[str], image: Callable[..., Image]
) -> list[Image]:
    drawn = {label: _curves(group, plot.lines) for label, group in runs.items()}
    drawn = {label: curves for label, curves in drawn.items() if curves}
    if not drawn:
        return []
    ends = "; ".join(f"{label}, {name}: {words.number(c.mean[-1])}" for label, cs in drawn.items()
                     for name, c in cs.items() if len(c.mean))  # fmt: skip
    alt = f"{plot.title} on {env} over {STEPS}. At the end: {ends}."
    if len(plot.lines) == 1:
        single = {label: next(iter(curves.values())) for label, curves in drawn.items()}
        png = figures.learning_curves(single, order, STEPS, plot.y_label)
    else:
        png = figures.line_panels(drawn, STEPS, plot.y_label, plot.unit)
    return [image(f"updates-{words.slug(env)}-{plot.id}", png, alt, f"{plot.title}, {env}. {plot.meaning}")]


def _ratio(env: str, runs: Mapping[str, Sequence[Run]], image: Callable[..., Image]) -> list[Image]:
    named = {f"ratio_{name}": name for name in QUANTILES}
    panels: dict[str, tuple[np.ndarray, np.ndarray, list[tuple[str, np.ndarray, np.ndarray]]]] = {}
    for label, group in runs.items():
        curves = _curves(group, named)
        if len(curves) == len(named) and len(curves["q50"].x):
            bands = [(text, curves[low].mean, curves[high].mean) for low, high, text in BANDS]
            panels[label] = (curves["q50"].x, curves["q50"].mean, bands)
    if not panels:
        return []
    ends = "; ".join(
        f"{label}: {words.number(bands[0][1][-1])} to {words.number(bands[0][2][-1])}"
        for label, (_, _, bands) in panels.items()
    )
    alt = f"Quantiles of the ratio on {env} over {STEPS}. From 1 to 99 percent at the end: {ends}."
    png = figures.band_panels(panels, STEPS, "ratio", 1.0)
    return [image(f"updates-{words.slug(env)}-ratio", png, alt, f"Ratio, {env}. {RATIO}")]


def _weights(env: str, runs: Mapping[str, Sequence[Run]], image: Callable[..., Image]) -> list[Image]:
    panels, ends = {}, []
    for label, group in runs.items():
        steps, shares = histograms(group)
        if len(steps):
            panels[label] = (steps, shares)
            ends.append(f"{label}: {shares[-1, len(WEIGHT_EDGES) // 2]:.0%} next to nothing")
    if not panels:
        return []
    alt = f"Histograms of the gradient weights on {env} over {STEPS}. At the end: {'; '.join(ends)}."
    png = figures.heat_panels(panels, WEIGHT_EDGES, STEPS, "gradient weight", "share of positions")
    return [image(f"updates-{words.slug(env)}-weights", png, alt, f"Gradient weights, {env}. {WEIGHTS}")]


def histograms(group: Sequence[Run]) -> tuple[np.ndarray, np.ndarray]:
    """Steps [S] and shares [S, bins] of the gradient weights; runs that were diagnosed at the same step are added."""
    total: dict[int, np.ndarray] = {}
    for run in group:
        for row in run.diagnoses:
            counts = row.get(HISTOGRAM)
            # other bins than these are those of another version
            if isinstance(counts, list) and len(counts) == len(WEIGHT_EDGES) + 1 and sum(counts) > 0:
                step = int(row["step"])
                total[step] = total.get(step, 0) + np.array(counts, dtype=np.float64)
    steps = sorted(total)
    shares = [total[s] / total[s].sum() for s in steps]
    return np.array(steps, dtype=np.float64), np.array(shares).reshape(len(steps), len(WEIGHT_EDGES) + 1)


def _curves(group: Sequence[Run], names: Mapping[str, str]) -> dict[str, stats.Curve]:
    """Curves over steps by their name in the legend, of what was recorded."""
    found = {}
    for name, text in names.items():
        points = []
        for run in group:
            rows = [(row["step"], row[DIAGNOSES + name]) for row in run.diagnoses if DIAGNOSES + name in row]
            numbers = np.array([(s, np.nan if v is None else float(v)) for s, v in rows], dtype=np.float64)
            points.append(tuple(numbers.reshape(-1, 2).T))
        curve = stats.curve(points)
        if curve is not None:
            found[text] = curve
    return found
