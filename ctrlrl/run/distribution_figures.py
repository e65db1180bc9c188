"""Laws of returns side by side, and a policy over its stock, as one picture."""

from __future__ import annotations

import io
import itertools
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, MaxNLocator

from ctrlrl.core.distribution import Law
from ctrlrl.planning.distributional_problem import Answer
from ctrlrl.planning.distributional_table import END
from ctrlrl.run.report_figures import short, style_of

_INK, _GRID = "#24292f", "#e4e7eb"
FEW = 25
"""Returns up to which each has a bar; more are drawn as distribution functions."""
COLUMNS = 40
"""Steps or states that are shown at most; of states those that the policy visits most."""
RARE = 1e-3
"""Probability below which neither a return nor a (state, stock) is shown: it would stretch the axes."""
PAIRS = 20_000
"""(state, stock) that are followed at most to see where a policy goes."""


class Run(NamedTuple):
    """Neighbouring stocks of one column with the same action."""

    column: int
    low: float
    high: float
    action: int


class Chart(NamedTuple):
    """A policy over the stock; stocks are gamma^t C_t, in the money of the first step."""

    across: str
    """What the columns are."""
    labels: list[str]
    """Of the columns."""
    runs: list[Run]
    visits: list[tuple[int, float, float]]
    """(column, stock, probability) where the policy goes."""
    actions: int
    """How many there are."""


def chart_of(answer: Answer) -> Chart:
    """The actions of a plan: by step and stock where it only ever meets one state; else by state and stock at the step
    where it meets most pairs of them."""
    met = [{pair: p for pair, p in by_pair.items() if p >= RARE} for by_pair in _visited(answer)]
    met = met[: next((t for t, by_pair in enumerate(met) if not by_pair), len(met))]
    states = {s for by_pair in met for s, _ in by_pair}
    if len(states) == 1:
        (only,) = states
        columns, across = [(t, only) for t in range(min(len(met), COLUMNS))], "step"
    else:
        t = int(np.argmax([len(by_pair) for by_pair in met]))
        share: dict[int, float] = {}
        for (s, _), p in met[t].items():
            share[s] = share.get(s, 0.0) + p
        most = sorted(share, key=lambda s: -share[s])[:COLUMNS]
        columns, across = [(t, s) for s in sorted(most)], f"state at step {t}"
    visits = [(k, stock, p) for k, (t, s) in enumerate(columns) for (other, stock), p in met[t].items() if other == s]
    reached = [stock for _, stock, _ in visits]
    margin = max(1e-3, 0.5 * (max(reached) - min(reached))) if len(set(reached)) > 1 else 1.0
    low, high = min(reached) - margin, max(reached) + margin
    runs = [run for k, (t, s) in enumerate(columns) for run in _runs(answer, k, t, s, low, high)]
    labels = [str(s if across != "step" else t) for t, s in columns]
    return Chart(across, labels, runs, visits, answer.table.actions)


def _runs(answer: Answer, column: int, t: int, state: int, low: float, high: float) -> list[Run]:
    stocks, actions = answer.actions(t, state)
    stocks = stocks * float(answer.gamma) ** t
    keep = (stocks >= low) & (stocks <= high)
    if not keep.any():
        return [Run(column, low, high, answer.action(t, state, (low + high) / 2))]
    stocks, actions = stocks[keep], actions[keep]
    middles = (stocks[1:] + stocks[:-1]) / 2
    gap = float(np.diff(stocks).min()) if len(stocks) > 1 else 1.0
    edges = np.concatenate([[stocks[0] - gap / 2], middles, [stocks[-1] + gap / 2]])
    if answer.engine != "exact":  # stocks in between and beyond count, too
        edges[0], edges[-1] = low, high
    cuts = [0, *(np.flatnonzero(np.diff(actions)) + 1).tolist(), len(actions)]
    return [Run(column, float(edges[a]), float(edges[b]), int(actions[a])) for a, b in itertools.pairwise(cuts)]


def _visited(answer: Answer) -> list[dict[tuple[int, float], float]]:
    """By step, the probability of each (state, gamma^t times the stock); it ends where there are too many."""
    table, gamma, found = answer.table, float(answer.gamma), []
    now = {(s, float(answer.scan.stock)): float(p) for p, s in table.start}
    total, t = 0, 0
    while now and (answer.horizon is None or t < answer.horizon):
        total += len(now)
        if total > PAIRS and found:
            break
        found.append(now)
        after: dict[tuple[int, float], float] = {}
        for (s, told), weight in now.items():
            for p, n, r in table.rows[s][answer.action(t, s, told)]:
                if n != END:
                    key = (n, round(told + gamma**t * float(r), 9))
                    after[key] = after.get(key, 0.0) + weight * float(p)
        now, t = after, t + 1
    return found


# -- the picture ----------------------------------------------------------------------------------


def picture(laws: Mapping[str, Law], title: str, chart: Chart | None = None, goal: float | None = None) -> bytes:
    """PNG: the laws, and the policy below.

    Args:
        laws: Of returns, by name.
        title: Above it all.
        chart: See :func:`chart_of`.
        goal: A return to mark.
    """
    rows = 1 if chart is None else 2
    figure = Figure(figsize=(8.0, 3.6 * rows + 0.4), dpi=140, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    panels = figure.subplots(rows, 1, squeeze=False)[:, 0]
    _laws(panels[0], laws, goal)
    if chart is not None:
        _policy(panels[1], chart)
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(colors=_INK, labelsize=8.5)
        axes.yaxis.set_major_formatter(FuncFormatter(short))
        for label in (axes.xaxis.label, axes.yaxis.label):
            label.set(color=_INK, fontsize=9)
    figure.suptitle(title, fontsize=11, color=_INK, fontweight="bold")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": "ctrlrl"})
    return buffer.getvalue()


def _laws(axes: Any, laws: Mapping[str, Law], goal: float | None) -> None:
    low = min(float(law.quantile(RARE)) for law in laws.values())
    high = max(float(law.quantile(1 - RARE)) for law in laws.values())
    points = np.unique(np.concatenate([law.atoms.astype(float) for law in laws.values()]))
    points = points[(points >= low) & (points <= high)]
    few = len(points) <= FEW
    if len(points) > 1 and few:
        few = np.diff(points).min() > (points[-1] - points[0]) / 100  # or bars would be lines
    width = (np.diff(points).min() if len(points) > 1 else 1.0) * 0.8 / len(laws)
    for k, (name, law) in enumerate(laws.items()):
        colour, style = style_of(k)[0], ("-", "--", ":")[k % 3]
        atoms, p = law.atoms.astype(float), law.probabilities.astype(float)
        label = f"{name}, mean {short(float(p @ atoms))}"
        if few:
            atoms, p = atoms[(atoms >= low) & (atoms <= high)], p[(atoms >= low) & (atoms <= high)]
            axes.bar(atoms + (k - (len(laws) - 1) / 2) * width, p, width, color=colour, label=label)
        else:
            x = np.concatenate([[points[0]], atoms, [points[-1]]])
            axes.step(x, np.concatenate([[0.0], p.cumsum(), [1.0]]), color=colour, ls=style, where="post", label=label)
    if not few:
        axes.set_xlim(low - 0.02 * (high - low), high + 0.02 * (high - low))
    if goal is not None:
        axes.axvline(goal, color=_INK, lw=1.0, ls="--", label=f"goal {short(goal)}")
    axes.set_xlabel("return")
    axes.set_ylabel("probability" if few else "probability of at most")
    axes.grid(color=_GRID, lw=0.8, axis="y")
    axes.set_axisbelow(True)
    axes.xaxis.set_major_formatter(FuncFormatter(short))
    axes.legend(frameon=False, fontsize=8.5, labelcolor=_INK)
    _head(axes, "Law of the return")


def _policy(axes: Any, chart: Chart) -> None:
    for run in chart.runs:
        colour = style_of(run.action)[0]
        axes.bar(run.column, run.high - run.low, 0.9, run.low, color=colour, alpha=0.55, lw=0)
    x, y, p = (np.array(v) for v in zip(*chart.visits, strict=True))
    axes.scatter(x, y, s=6 + 60 * p / p.max(), color=_INK, zorder=3, lw=0)
    used = sorted({run.action for run in chart.runs})
    handles: list[Any] = [Patch(color=style_of(a)[0], alpha=0.55, label=f"action {a}") for a in used]
    handles.append(Line2D([], [], marker="o", ls="", color=_INK, ms=5, label="where the policy goes"))
    axes.legend(handles=handles, frameon=False, fontsize=8.5, labelcolor=_INK, loc="center left",
                bbox_to_anchor=(1.0, 0.5))  # fmt: skip
    axes.set_xticks(range(len(chart.labels)), chart.labels, rotation=90 if len(chart.labels) > 20 else 0)
    axes.set_xlabel(chart.across)
    axes.set_ylabel("stock")
    axes.yaxis.set_major_locator(MaxNLocator(nbins=9, steps=[1, 2, 5, 10]))
    _head(axes, "Policy over the stock")


def _head(axes: Any, text: str) -> None:
    axes.set_title(text, loc="left", fontsize=10, color=_INK, fontweight="bold")
