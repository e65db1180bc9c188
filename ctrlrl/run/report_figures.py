"""The figures of a report, as PNG bytes drawn without a display."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from ctrlrl.run.report_statistics import Curve, Estimate

# Okabe and Ito's colours, told apart by colour-blind readers; line styles tell the rest.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#5F5F5F")
_STYLES = ("-", "--", "-.", ":")
_INK, _GRID = "#24292f", "#e4e7eb"


def style_of(index: int) -> tuple[str, str]:
    """Colour and line style of the ``index``-th method; the same in every figure."""
    return _COLOURS[index % len(_COLOURS)], _STYLES[(index // len(_COLOURS) + index) % len(_STYLES)]


def learning_curves(curves: Mapping[str, Curve], order: Sequence[str], x_label: str, y_label: str) -> bytes:
    """Mean line with a band from worst to best run per method, and every run as a thin line."""
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
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.set_xlim(left=0)
    axes.xaxis.set_major_formatter(FuncFormatter(short))
    axes.yaxis.set_major_formatter(FuncFormatter(short))
    axes.legend(frameon=False, fontsize=9, loc="best", labelcolor=_INK)
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


def _figure(width: float, height: float, rows: Sequence[int] = (1,)) -> tuple[Figure, list[Any]]:
    figure = Figure(figsize=(width, height), dpi=160, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    grid = figure.subplots(len(rows), 1, squeeze=False, gridspec_kw={"height_ratios": list(rows)})
    all_axes = [row[0] for row in grid]
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
