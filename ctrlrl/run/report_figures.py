"""The figures of a report, as PNG bytes drawn without a display."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from statistics import NormalDist
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator, PercentFormatter

from ctrlrl.run.report_statistics import Curve, Estimate

# Okabe and Ito's colours, told apart by colour-blind readers; line styles tell the rest.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#5F5F5F")
_STYLES = ("-", "--", "-.", ":")
_INK, _GRID = "#24292f", "#e4e7eb"
MATCHED = "Gaussian of the same mean and covariance"


def style_of(index: int) -> tuple[str, str]:
    """Colour and line style of the ``index``-th method; the same in every figure."""
    return _COLOURS[index % len(_COLOURS)], _STYLES[(index // len(_COLOURS) + index) % len(_STYLES)]


def learning_curves(
    curves: Mapping[str, Curve],
    order: Sequence[str],
    x_label: str,
    y_label: str,
    fits: Mapping[str, Sequence[float]] | None = None,
) -> bytes:
    """Mean line with a band from worst to best run per method, and every run as a thin line.

    ``fits`` says where decoders of a method were fitted: a dashed vertical each.
    """
    figure, (axes,) = _figure(6.4, 4.0)
    for label in [name for name in order if name in curves]:
        drawn, (colour, style) = curves[label], style_of(order.index(label))
        for x, y in drawn.runs:
            lone = len(x) == 1
            axes.plot(x, y, color=colour, lw=0.8, alpha=0.35, marker="o" if lone else None, ms=4)
        if len(drawn.x):
            n = len(drawn.runs)
            text = f"{label} ({n} run{'s' if n > 1 else ''})"
            marker = "o" if len(drawn.x) == 1 else None
            axes.plot(drawn.x, drawn.mean, color=colour, ls=style, lw=2.0, label=text, marker=marker, ms=5)
            axes.fill_between(drawn.x, drawn.low, drawn.high, color=colour, alpha=0.15, lw=0)
        else:
            axes.plot([], [], color=colour, lw=0.8, label=f"{label} (no common range)")
    fitted = {label: found for label, found in (fits or {}).items() if found}
    for turn, (label, found) in enumerate(fitted.items()):
        # methods take turns along a line, so that fits at one place show the colours of all
        dashes = (7 * turn, (4, 7 * len(fitted) - 4))
        for x in found:
            axes.axvline(x, color=style_of(order.index(label))[0], lw=1, ls=dashes, zorder=1.5)
    handles, _ = axes.get_legend_handles_labels()
    if fitted:
        handles.append(Line2D([], [], color=_INK, lw=1, ls=(0, (4, 3)), label="a decoder was fitted here"))
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.set_xlim(left=0)
    axes.xaxis.set_major_formatter(FuncFormatter(short))
    axes.yaxis.set_major_formatter(FuncFormatter(short))
    frame = {"frameon": bool(fitted), "framealpha": 0.9, "edgecolor": "none"}
    axes.legend(handles=handles, fontsize=9, loc="best", labelcolor=_INK, **frame)
    return _png(figure)


def intervals(
    panels: Mapping[str, Mapping[str, Estimate]],
    order: Sequence[str],
    x_label: str,
    middle: float | None = None,
    limits: tuple[float, float] | None = None,
) -> bytes:
    """A panel per title with a dot and an interval per row; ``middle`` draws a line of reference."""
    rows = [max(len(p), 1) for p in panels.values()]
    figure, all_axes = _figure(6.4, 0.55 + sum(0.36 * n + 0.62 for n in rows), rows)
    for axes, (title, panel) in zip(all_axes, panels.items(), strict=True):
        for position, (label, estimate) in enumerate(panel.items()):
            colour = style_of(order.index(label))[0] if label in order else _COLOURS[0]
            if estimate.low is not None:
                axes.plot(
                    [estimate.low, estimate.high], [position] * 2, color=colour, lw=7, alpha=0.3, solid_capstyle="butt"
                )
            axes.plot([estimate.value], [position], "o", color=colour, ms=7, mec="white", mew=1)
        axes.set_yticks(range(len(panel)), list(panel))
        axes.set_ylim(len(panel) - 0.4, -0.6)
        axes.grid(axis="y", visible=False)
        axes.spines["left"].set_visible(False)
        axes.tick_params(axis="y", length=0)
        axes.set_title(title, loc="left", fontsize=10, color=_INK, fontweight="bold")
        axes.xaxis.set_major_locator(MaxNLocator(6))
        axes.xaxis.set_major_formatter(FuncFormatter(short))
        if middle is not None:
            axes.axvline(middle, color=_INK, lw=1, ls=":")
        if limits is not None:
            axes.set_xlim(*limits)
    all_axes[-1].set_xlabel(x_label)
    return _png(figure)


def line_panels(panels: Mapping[str, Mapping[str, Curve]], x_label: str, y_label: str, unit: bool = False) -> bytes:
    """A panel per method with some of its lines, each with a band from lowest to highest run."""
    figure, all_axes = _stack(panels, x_label, y_label)
    names = list(dict.fromkeys(name for curves in panels.values() for name in curves))
    for axes, curves in zip(all_axes, panels.values(), strict=True):
        for name, drawn in curves.items():
            colour, style = style_of(names.index(name))
            marker = "o" if len(drawn.x) == 1 else None
            axes.plot(drawn.x, drawn.mean, color=colour, ls=style, lw=1.8, label=name, marker=marker, ms=5)
            axes.fill_between(drawn.x, drawn.low, drawn.high, color=colour, alpha=0.15, lw=0)
        axes.legend(frameon=False, fontsize=9, loc="best", labelcolor=_INK)
        if unit:
            axes.set_ylim(-0.02, 1.02)
    return _png(figure)


Bands = tuple[np.ndarray, np.ndarray, list[tuple[str, np.ndarray, np.ndarray]]]


def band_panels(panels: Mapping[str, Bands], x_label: str, y_label: str, middle: float) -> bytes:
    """A panel per method: a line in the midst of bands (text, lower end, upper end), from the outermost inwards."""
    figure, all_axes = _stack(panels, x_label, y_label)
    for axes, (x, line, bands) in zip(all_axes, panels.values(), strict=True):
        lone = len(x) == 1
        for depth, (text, low, high) in enumerate(bands, 1):
            look = {"color": _COLOURS[0], "alpha": 0.12 + 0.14 * depth, "label": text}
            if lone:
                axes.vlines(x, low, high, lw=3 * depth, **look)
            else:
                axes.fill_between(x, low, high, lw=0, **look)
        axes.plot(x, line, color=_INK, lw=1.4, marker="o" if lone else None, ms=4, label="median")
        axes.axhline(middle, color=_INK, lw=1, ls=":")
        lowest, highest = float(bands[0][1].min()), float(bands[0][2].max())
        if lowest > 0 and highest > 5 * lowest:
            axes.set_yscale("log")
        axes.yaxis.set_major_formatter(FuncFormatter(short))
        axes.legend(frameon=False, fontsize=9, loc="best", labelcolor=_INK)
    return _png(figure)


def heat_panels(
    panels: Mapping[str, tuple[np.ndarray, np.ndarray]],
    edges: Sequence[float],
    x_label: str,
    y_label: str,
    shade: str,
) -> bytes:
    """A panel per method: shares [S, bins] of histograms at steps [S]; all bins are drawn equally wide.

    Bins that are empty in every panel are cut off at both ends.
    """
    figure, all_axes = _stack(panels, x_label, y_label, 3.2)
    used = np.flatnonzero(sum(shares.sum(0) for _, shares in panels.values()))
    first, last = int(used[0]), int(used[-1]) + 1
    for axes, (steps, shares) in zip(all_axes, panels.values(), strict=True):
        half = np.diff(steps) / 2 if len(steps) > 1 else np.array([max(steps[0], 1.0) / 2])
        borders = np.concatenate([[steps[0] - half[0]], steps[:-1] + half[: len(steps) - 1], [steps[-1] + half[-1]]])
        mesh = axes.pcolormesh(
            borders, np.arange(first, last + 1), shares[:, first:last].T, cmap="viridis", norm=PowerNorm(0.5, 0.0)
        )
        # border k is edges[k - 1]; marked are zero and, counted from it, the same sizes on both sides
        middle = len(edges) // 2
        away = {
            k: middle - k if k <= middle else k - middle - 1 for k in range(max(first, 1), min(last, len(edges)) + 1)
        }
        every = next(n for n in (1, 2, 4, 5, 10, len(edges)) if len(away) <= 12 * n)
        marked = [k for k, distance in away.items() if distance and distance % every == 0]
        zero = [middle + 0.5] if first <= middle < last else []
        axes.set_yticks([*marked, *zero], [*(_fraction(edges[k - 1]) for k in marked), *("0" for _ in zero)])
        axes.grid(visible=False)
        figure.colorbar(mesh, ax=axes, pad=0.01).set_label(shade, color=_INK, fontsize=9)
    return _png(figure)


Drawn = tuple[str, np.ndarray]
"""A method's label and its actions [S, n, D] at S states."""


def action_histograms(titles: Sequence[str], own: Drawn, other: Drawn | None, order: Sequence[str]) -> bytes:
    """A panel per state with a histogram of actions [S, n, 1], and the outline of the ``other``'s.

    Without an ``other``, the outline is the Gaussian of the same mean and variance.
    """
    (label, actions), rows = own, math.ceil(len(titles) / 2)
    figure, all_axes = _figure(6.4, 1.0 + 1.7 * rows, [1] * rows, min(len(titles), 2))
    low, high = _span(np.concatenate([each.ravel() for _, each in [own, *([other] if other else [])]]))
    bins, colour = np.linspace(low, high, 51), style_of(order.index(label))[0]
    for k, axes in enumerate(all_axes[: len(titles)]):
        mine = actions[k].ravel()
        axes.stairs(_shares(mine, bins), bins, fill=True, color=colour, alpha=0.45, lw=0, label=label)
        if other is not None:
            outline = {"color": style_of(order.index(other[0]))[0], "label": other[0]}
            axes.stairs(_shares(other[1][k].ravel(), bins), bins, lw=1.5, **outline)
        elif mine.std() > 0:
            normal = NormalDist(mine.mean(), mine.std())
            shares = np.diff([normal.cdf(x) for x in bins])
            axes.stairs(shares, bins, baseline=None, lw=1.3, ls="--", color=_INK, label=MATCHED)
        axes.set_xlim(low, high)
        axes.yaxis.set_major_locator(MaxNLocator(4))
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    figure.supxlabel("action", fontsize=10, color=_INK)
    figure.supylabel("share of the samples", fontsize=10, color=_INK)
    return _titled(figure, all_axes, titles)


def action_scatters(
    titles: Sequence[str], own: Drawn, other: Drawn | None, axis_names: tuple[str, str], order: Sequence[str]
) -> bytes:
    """A panel per state with a dot per action [S, n, 2], and the ``other``'s in panels below.

    Without an ``other``, ellipses hold 50 and 95 % of the Gaussian of the same mean and covariance.
    """
    shown, columns = [own, *([other] if other else [])], len(titles)
    figure, all_axes = _figure(6.4, 1.0 + 1.5 * len(shown), [1] * len(shown), columns)
    limits = [_span(np.concatenate([actions[..., d].ravel() for _, actions in shown])) for d in (0, 1)]
    panels = [(label, points) for label, actions in shown for points in actions]
    for k, (axes, (label, points)) in enumerate(zip(all_axes, panels, strict=True)):
        axes.plot(*points.T, ".", color=style_of(order.index(label))[0], ms=2.2, mew=0, alpha=0.5, label=label)
        if other is None:
            for part in (0.5, 0.95):
                axes.plot(*_ellipse(points, part), color=_INK, lw=1.1, ls="--", label=MATCHED)
        axes.set_xlim(*limits[0])
        axes.set_ylim(*limits[1])
        axes.xaxis.set_major_locator(MaxNLocator(3))
        axes.yaxis.set_major_locator(MaxNLocator(4))
        axes.yaxis.set_major_formatter(FuncFormatter(short))
        axes.tick_params(labelleft=k % columns == 0, labelbottom=k // columns == len(shown) - 1)
    figure.supxlabel(axis_names[0], fontsize=10, color=_INK)
    figure.supylabel(axis_names[1], fontsize=10, color=_INK)
    return _titled(figure, all_axes, titles)


def _titled(figure: Figure, all_axes: Sequence[Any], titles: Sequence[str]) -> bytes:
    """The first panels with their titles, the others empty or below these, and one legend above all."""
    for axes, title in zip(all_axes, titles, strict=False):
        axes.set_title(title, loc="left", fontsize=10, color=_INK, fontweight="bold")
    entries: dict[str, Any] = {}
    for axes in all_axes:
        axes.xaxis.set_major_formatter(FuncFormatter(short))
        if not axes.has_data():
            axes.set_visible(False)
        for handle, text in zip(*axes.get_legend_handles_labels(), strict=True):
            entries.setdefault(text, handle)
    legend = figure.legend(
        list(entries.values()), list(entries), loc="outside upper left", frameon=False, fontsize=9, labelcolor=_INK,
        markerscale=4, ncols=2 if sum(map(len, entries)) <= 70 else 1,
    )  # fmt: skip
    for handle in legend.legend_handles:
        if isinstance(handle, Line2D) and handle.get_marker() == ".":
            handle.set_alpha(1.0)
    return _png(figure)


def _shares(values: np.ndarray, bins: np.ndarray) -> np.ndarray:
    return np.histogram(values, bins)[0] / len(values)


def _span(values: np.ndarray) -> tuple[float, float]:
    """From the lowest to the highest value, with room beside them."""
    low, high = float(values.min()), float(values.max())
    room = 0.04 * (high - low) or 0.05 * max(abs(low), 1.0)
    return low - room, high + room


def _ellipse(points: np.ndarray, part: float) -> np.ndarray:
    """[2, P] the border of the ellipse that holds ``part`` of the Gaussian with the moments of ``points`` [n, 2]."""
    variances, directions = np.linalg.eigh(np.cov(points.T))
    turn = np.linspace(0, 2 * np.pi, 121)
    # the squared radius of two standard normals is exponential with mean 2
    circle = math.sqrt(-2 * math.log(1 - part)) * np.stack([np.cos(turn), np.sin(turn)])
    return points.mean(0)[:, None] + directions @ (np.sqrt(variances.clip(min=0))[:, None] * circle)


def short(value: float, _: object = None) -> str:
    """``1500000`` as ``1.5M``; small numbers with as many digits as they need."""
    text = f"{value:.4g}"
    for size, letter, first in ((1e9, "G", 1e9), (1e6, "M", 1e6), (1e3, "k", 1e4)):
        if abs(value) >= first:
            text = f"{value / size:.4g}{letter}"
            break
    return text.replace("-", "\N{MINUS SIGN}", 1) if value < 0 else text


def _fraction(value: float) -> str:
    """Sizes below one as ``1/16``."""
    if abs(value) >= 1:
        return short(value)
    return ("\N{MINUS SIGN}" if value < 0 else "") + f"1/{1 / abs(value):,.0f}"


def _stack(panels: Mapping[str, Any], x_label: str, y_label: str, height: float = 2.5) -> tuple[Figure, list[Any]]:
    """A panel below the other for each title, over the same kind of x."""
    figure, all_axes = _figure(6.4, 0.5 + height * len(panels), [1] * len(panels))
    for axes, title in zip(all_axes, panels, strict=True):
        axes.set_title(title, loc="left", fontsize=10, color=_INK, fontweight="bold")
        axes.set_ylabel(y_label)
        axes.xaxis.set_major_formatter(FuncFormatter(short))
    all_axes[-1].set_xlabel(x_label)
    return figure, all_axes


def _figure(width: float, height: float, rows: Sequence[int] = (1,), columns: int = 1) -> tuple[Figure, list[Any]]:
    figure = Figure(figsize=(width, height), dpi=160, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    grid = figure.subplots(len(rows), columns, squeeze=False, gridspec_kw={"height_ratios": list(rows)})
    all_axes = list(grid.flat)
    for axes in all_axes:
        axes.grid(color=_GRID, lw=0.8)
        axes.set_axisbelow(True)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
        for side in ("left", "bottom"):
            axes.spines[side].set_color("#9aa3ad")
        axes.tick_params(colors=_INK, labelsize=9)
        axes.xaxis.label.set_color(_INK)
        axes.yaxis.label.set_color(_INK)
    return figure, all_axes


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": "ctrlrl"})
    return buffer.getvalue()
