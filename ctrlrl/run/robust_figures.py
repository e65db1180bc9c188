"""An evaluation over an uncertainty set as a picture, and as a table in the terminal."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.table import Table

from ctrlrl.engine.robust import RobustEvaluation
from ctrlrl.run.report_figures import short, style_of

_INK, _MAP = "#24292f", "viridis"
_MARKS: dict[str, dict[str, Any]] = {
    "worst": {"marker": "X", "ms": 9, "mfc": "#D55E00", "mec": "white", "mew": 1.2, "ls": "", "zorder": 4},
    "nominal": {"marker": "o", "ms": 8, "mfc": "white", "mec": _INK, "mew": 1.5, "ls": "", "zorder": 3},
}
MAX_COLUMNS = 12
"""Widest grid that is shown in a terminal."""


def picture(result: RobustEvaluation, title: str) -> bytes:
    """PNG: a line for one parameter, a heat map for two, one slice for each value of the third for three.

    With more parameters it is the heat map of the first two, each cell at its worst over the others. The worst cell
    and the nominal parameters are marked; nominal parameters may lie outside the set, and between two slices the
    nearer one has the mark.
    """
    if len(result.axes) == 1:
        figure, ((axes,),) = _figure(1, 1, 5.6, 3.6)
        _line(axes, result)
    elif len(result.axes) == 3:
        figure = _slices(result)
    else:
        figure, ((axes,),) = _figure(1, 1, 5.6, 4.4)
        _colour_bar(figure, _heat(axes, result, _limits([_seen(result)])), axes)
    figure.suptitle(title, fontsize=10, color=_INK)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    for other in figure.axes[1:]:
        for handle, label in zip(*other.get_legend_handles_labels(), strict=True):
            if label not in labels:
                handles, labels = [*handles, handle], [*labels, label]
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False, fontsize=9)
    return _png(figure)


def comparison(rows: Mapping[str, Mapping[str, RobustEvaluation]]) -> bytes:
    """PNG: a row for each task and a column for each method, with one scale of colours in a row."""
    methods = list(dict.fromkeys(method for row in rows.values() for method in row))
    figure, panels = _figure(len(rows), len(methods), 2.6, 2.4)
    for line, (task, row) in zip(panels, rows.items(), strict=True):
        limits = _limits([_seen(r) for r in row.values()])
        shown = []
        for axes, method in zip(line, methods, strict=True):
            if method not in row:
                axes.set_visible(False)
                continue
            result = row[method]
            if len(result.axes) == 1:
                _line(axes, result)
            else:
                shown.append((axes, _heat(axes, result, limits)))
            name = method.partition(",")[0]  # settings that follow it would not fit
            axes.set_title("  ".join(filter(None, (task, name, axes.get_title()))), fontsize=9, color=_INK)
        if shown:
            _colour_bar(figure, shown[-1][1], [axes for axes, _ in shown])
    return _png(figure)


def table(result: RobustEvaluation) -> Table | None:
    """A coloured table of a grid of two parameters, the first across and the second upwards, as in the picture.

    A star marks the worst cell. None for other numbers of parameters, or where it does not fit.
    """
    if len(result.axes) != 2 or len(result.axes[0]) > MAX_COLUMNS:
        return None
    columns, rows = result.axes
    found = Table(box=None, pad_edge=False, padding=0, show_header=False)
    low, high = _limits([result.grid])
    worst = np.unravel_index(result.by_cell.argmin(), result.grid.shape)
    for _ in range(len(columns) + 1):
        found.add_column(justify="right", no_wrap=True)
    for j in reversed(range(len(rows))):
        cells = [_shaded(result.grid[i, j], low, high, (i, j) == worst) for i in range(len(columns))]
        found.add_row(f"[bold]{short(rows[j])}[/bold] ", *cells)
    found.add_row("", *(f"[bold] {short(value)}[/bold]" for value in columns))
    return found


def _shaded(value: float, low: float, high: float, worst: bool) -> str:
    shade = matplotlib.colormaps[_MAP](0.0 if high == low else (value - low) / (high - low))
    colour = "#" + "".join(f"{round(255 * part):02x}" for part in shade[:3])
    ink = "#000000" if sum(shade[:3]) > 1.5 else "#ffffff"
    return f"[{ink} on {colour}] {'*' if worst else ''}{short(float(value))}[/]"


def _line(axes: Any, result: RobustEvaluation) -> None:
    (x,), (name,), colour = result.axes, result.names, style_of(0)[0]
    if result.returns.shape[1] > 1:
        axes.fill_between(x, result.returns.min(1), result.returns.max(1), color=colour, alpha=0.15, lw=0)
    axes.plot(x, result.by_cell, color=colour, lw=1.8)
    axes.plot(result.worst_params[name], result.worst, label="worst", **_MARKS["worst"])
    axes.plot(result.nominal[name], result.nominal_mean, label="nominal", **_MARKS["nominal"])
    axes.set_xlabel(name)
    axes.set_ylabel("return")


def _heat(axes: Any, result: RobustEvaluation, limits: tuple[float, float]) -> Any:
    mesh = _mesh(axes, result, _seen(result), limits)
    _mark(axes, result, result.worst_params, "worst")
    _mark(axes, result, result.nominal, "nominal")
    if len(result.axes) > 2:
        axes.set_title(f"lowest over {', '.join(result.names[2:])}", fontsize=9, color=_INK)
    return mesh


def _seen(result: RobustEvaluation) -> np.ndarray:
    """The first two parameters' grid, each cell at its worst over the others."""
    return result.grid.min(axis=tuple(range(2, len(result.axes))))


def _slices(result: RobustEvaluation) -> Figure:
    name, values = result.names[2], result.axes[2]
    columns = min(5, len(values))
    figure, panels = _figure(-(-len(values) // columns), columns, 2.3, 2.2)
    flat, mesh = [axes for line in panels for axes in line], None
    limits = _limits([result.grid])
    marked = {
        "worst": (int(abs(values - result.worst_params[name]).argmin()), result.worst_params),
        "nominal": (int(abs(values - result.nominal[name]).argmin()), result.nominal),
    }
    for k, axes in enumerate(flat):
        if k >= len(values):
            axes.set_visible(False)
            continue
        mesh = _mesh(axes, result, result.grid[:, :, k], limits)
        axes.set_title(f"{name} = {short(values[k])}", fontsize=9, color=_INK)
        for label, (place, params) in marked.items():
            if place == k:
                _mark(axes, result, params, label)
    _colour_bar(figure, mesh, flat)
    return figure


def _mesh(axes: Any, result: RobustEvaluation, values: np.ndarray, limits: tuple[float, float]) -> Any:
    mesh = axes.pcolormesh(
        result.axes[0], result.axes[1], values.T, shading="nearest", cmap=_MAP, vmin=limits[0], vmax=limits[1]
    )
    axes.set_xlabel(result.names[0])
    axes.set_ylabel(result.names[1])
    return mesh


def _mark(axes: Any, result: RobustEvaluation, params: Mapping[str, float], label: str) -> None:
    axes.plot(params[result.names[0]], params[result.names[1]], label=label, **_MARKS[label])


def _limits(grids: Sequence[np.ndarray]) -> tuple[float, float]:
    return min(float(g.min()) for g in grids), max(float(g.max()) for g in grids)


def _colour_bar(figure: Figure, mesh: Any, axes: Any) -> None:
    figure.colorbar(mesh, ax=axes, pad=0.01, format=short).set_label("return", color=_INK, fontsize=9)


def _figure(rows: int, columns: int, width: float, height: float) -> tuple[Figure, Any]:
    """Panels [rows, columns] of a size in inches each."""
    size = (width * columns + 0.8, height * rows + 0.6)
    figure = Figure(figsize=size, dpi=160, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    panels = figure.subplots(rows, columns, squeeze=False)
    for axes in panels.flat:
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(colors=_INK, labelsize=8)
    return figure, panels


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": "ctrlrl"})
    return buffer.getvalue()
