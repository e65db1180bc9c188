"""An agent on an inventory problem as a picture: the network, how it orders, and how stock moves."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any, NamedTuple

import matplotlib
import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator

from ctrlrl.inventory import comparison
from ctrlrl.inventory.problem import Network, Simulator
from ctrlrl.run.report_figures import short, style_of

_INK, _FAINT, _GRID = "#24292f", "#8b949e", "#e4e7eb"
_BLUE, _RED, _GREEN = (style_of(k)[0] for k in range(3))
_GOLD = style_of(5)[0]
PERIODS = 600
"""Of drawn demand that are played for the picture, less where the split ends; a recorded series is played to its
end."""
SHOWN = 60
"""Last periods whose stock is drawn."""
LABELLED = (32, 12)
"""Links up to which each has its lead time written at it, where no place has two, and where some have; colours tell it
in any case."""


class Curve(NamedTuple):
    """Orders of the only store where only its stock on hand differs."""

    on_its_way: float
    """Units."""
    position: np.ndarray
    """[P] inventory position."""
    order: np.ndarray
    """[P]."""


class Trace(NamedTuple):
    """One scenario, period by period."""

    inventory: np.ndarray
    """[T, N, L] at the beginning of the period."""
    action: np.ndarray
    """[T, E] sent along links."""
    demand: np.ndarray
    """[T, S]."""
    warm: int = 0
    """First periods that a scatter leaves out: the stock at the start is arbitrary."""


def trace(agent: Any, simulator: Simulator, split: str = "test", seed: int = 0) -> Trace:
    """Play one scenario; of recorded series the one whose mean demand is the median one.

    Args:
        agent: See :func:`ctrlrl.inventory.comparison.play`.
        simulator: Of the environment.
        split: Of the problem.
        seed: Of the scenario.
    """
    taken, replay = simulator.problem.splits[split], comparison.recorded(simulator)
    periods = taken.periods if replay else min(taken.periods, PERIODS)
    state = comparison.begin(simulator, split, None if replay else 1, seed)
    means = state.drawn.demand.mean((1, 2))
    row = int(means.argsort()[len(means) // 2])
    played = [
        [x[row].cpu().numpy() for x in (p.inventory, p.action, p.demand)]
        for p in comparison.play(agent, simulator, state, periods)
    ]
    inventory, action, demand = (np.stack(x) for x in zip(*played, strict=True))
    return Trace(inventory, action, demand, taken.ignored if replay else min(taken.ignored, periods // 3))


def order_function(agent: Any, simulator: Simulator, found: Trace, split: str = "test") -> list[Curve]:
    """Of a problem with one store and drawn demand: what is ordered by stock on hand, for three pipelines out of
    ``found``, nearly the lightest, the middle and nearly the heaviest; one where a pipeline has no room for any."""
    met = found.inventory[found.warm :, 0]
    by_weight = met[:, 1:].sum(1).argsort()
    lowest, highest = met[:, 0].min(), met[:, 0].max()
    on_hand = np.linspace(lowest, highest + 0.25 * (highest - lowest) + 1e-3, 81, dtype=np.float32)
    if simulator.problem.demand.integer:
        on_hand = np.unique(on_hand.round())
    drawn = simulator.scenarios(len(on_hand), split, torch.Generator().manual_seed(0))
    curves = []
    for share in (0.1, 0.5, 0.9) if met.shape[1] > 1 else (0.5,):
        pipeline = met[by_weight[int(share * (len(met) - 1))], 1:]
        inventory = np.concatenate([on_hand[:, None], np.tile(pipeline, (len(on_hand), 1))], 1)[:, None]
        state = simulator.reset(None, drawn, inventory=torch.from_numpy(inventory))
        (period,) = comparison.play(agent, simulator, state, 1)
        curves.append(Curve(float(pipeline.sum()), inventory.sum((1, 2)), period.action.sum(1).cpu().numpy()))
    return curves


# -- the picture ----------------------------------------------------------------------------------


def picture(
    found: Trace, network: Network, title: str, learned: Sequence[Curve] = (), best: Sequence[Curve] = (),
    level: float | None = None,
) -> bytes:  # fmt: skip
    """PNG: the network, the first store's orders, and below the trajectory of stock, demand and orders.

    Args:
        found: See :func:`trace`.
        network: Its places and links.
        title: Above it all.
        learned: The order function, where there is one (see :func:`order_function`).
        best: That of the best policy, for the same pipelines.
        level: Of base stock, to compare with.
    """
    small = len(network.stores) + len(network.warehouses) == 1
    top = 2.9 if small else min(max(3.4, 0.2 * len(network.stores)), 7.0)
    below = 2 if small else 3
    figure = Figure(figsize=(11.0, top + 1.5 * below + 1.3), dpi=140, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    # parts of their own, so that neither has to leave room for the other's legends
    halves: Any = figure.subfigures(2, 1, height_ratios=[top + 0.4, 1.5 * below + 0.5])
    upper, lower = halves
    left, right = upper.subplots(1, 2, width_ratios=(0.6, 1.0) if small else (1.0, 1.0))
    rows = list(lower.subplots(below, 1, sharex=True))
    _network(left, network)
    _orders(upper, right, found, network, learned, best, level)
    _trajectory(rows, found, network)
    for axes in (right, *rows):
        _tidy(axes)
    figure.suptitle(title, fontsize=11, color=_INK, fontweight="bold")
    return _png(figure)


def _network(axes: Any, network: Network) -> None:
    """The supplier on the left, stores on the right; colours of links are lead times."""
    at, stores = _places(network), len(network.stores)
    times = sorted(set(network.lead_times))
    shades = matplotlib.colormaps["viridis_r"](np.linspace(0.25, 0.95, len(times)) if len(times) > 1 else [0.7])
    colour = {time: shades[k] for k, time in enumerate(times)}
    thin = 1.8 if len(network.links) <= 12 else 1.1
    labelled = len(network.links) <= LABELLED[len(set(network.targets)) < len(network.links)]
    ranks: dict[int, int] = {}
    for source, target, time in zip(network.sources, network.targets, network.lead_times, strict=True):
        start, end = at[source], at[target]
        axes.annotate(
            "", end, start,
            arrowprops={"arrowstyle": "-|>", "color": colour[time], "lw": thin, "shrinkA": 7, "shrinkB": 6,
                        "mutation_scale": 9},
        )  # fmt: skip
        if labelled:
            # to stores near the end, where links have spread; those that meet in one place have theirs in a row
            part = (0.78 if stores > 8 else 0.62) - 0.17 * ranks.get(target, 0) if target < stores else 0.45
            ranks[target] = ranks.get(target, 0) + 1
            axes.text(
                *(start + part * (end - start)), str(time), fontsize=7.5, ha="center", va="center", color=_INK,
                bbox={"boxstyle": "circle,pad=0.15", "fc": "white", "ec": colour[time], "lw": 0.8},
            )  # fmt: skip
    small = max(4.5, min(8.5, 150.0 / stores))
    unmet = "price" if network.objective == "profit" else "unmet"
    axes.plot(*at[-1], "D", ms=9, color=_FAINT, mec="white", zorder=3)
    _write(axes, at[-1], "supplier", 8.5)
    for place, warehouse in enumerate(network.warehouses, stores):
        axes.plot(*at[place], "s", ms=11, color=_GOLD, mec="white", zorder=3)
        _write(axes, at[place], f"{warehouse.name}\nholding {warehouse.holding_cost:.3g}", 8.5)
    for place, store in enumerate(network.stores):
        axes.plot(*at[place], "o", ms=min(11.0, small + 2), color=_BLUE, mec="white", zorder=3)
        costs = f"\nholding {store.holding_cost:.3g}\n{unmet} {store.unmet_cost:.3g}"
        text = store.name + costs if stores <= 8 else store.name
        axes.annotate(
            text, at[place], xytext=(8, 0), textcoords="offset points", fontsize=small, color=_INK, va="center"
        )
    axes.set_xlim(-0.08, 1.3)
    axes.set_ylim(-0.1, 1.12)
    axes.set_axis_off()
    _head(axes, "Network")
    axes.legend(
        handles=[Line2D([], [], color=colour[t], lw=2.5, label=str(t)) for t in times], title="lead time in periods",
        ncols=len(times), loc="lower left", fontsize=8, title_fontsize=8, frameon=False, labelcolor=_INK,
        bbox_to_anchor=(0.0, -0.02), handlelength=1.4, columnspacing=1.0,
    )  # fmt: skip


def _places(network: Network) -> dict[int, np.ndarray]:
    """Where each place is drawn, in the unit square; -1 is the supplier."""
    stores, places = len(network.stores), len(network.stores) + len(network.warehouses)
    depth = dict.fromkeys(range(-1, places), 0)
    for _ in range(places):  # goods never go round, so that this settles
        for source, target in zip(network.sources, network.targets, strict=True):
            depth[target] = max(depth[target], depth[source] + 1)
    last = max(depth.values())
    columns: dict[int, list[int]] = {}
    for place in (-1, *range(stores, places), *range(stores)):
        columns.setdefault(last if 0 <= place < stores else depth[place], []).append(place)
    at = {}
    for x, column in columns.items():
        heights = np.linspace(0.0, 1.0, len(column) * 2 + 1)[1::2][::-1]
        if len(column) > 8:
            heights = np.linspace(1.02, -0.02, len(column))
        for place, y in zip(column, heights, strict=True):
            at[place] = np.array([x / last, y])
    return at


def _write(axes: Any, at: np.ndarray, text: str, size: float) -> None:
    """Above a place, in front of the links."""
    axes.annotate(
        text, at, xytext=(0, 9), textcoords="offset points", fontsize=size, color=_INK, ha="center", va="bottom",
        zorder=4, bbox={"boxstyle": "round,pad=0.1", "fc": "white", "ec": "none", "alpha": 0.8},
    )  # fmt: skip


def _orders(
    figure: Any, axes: Any, found: Trace, network: Network, learned: Sequence[Curve], best: Sequence[Curve],
    level: float | None,
) -> None:  # fmt: skip
    """Orders against the inventory position of the first store: as a function, or as they were."""
    store, met, links = network.stores[0].name, slice(found.warm, None), _arriving(network, 0)
    position, order = found.inventory[met, 0].sum(1), found.action[met][:, links].sum(1)
    above = sorted({network.sources[k] for k in links if network.sources[k] >= 0})
    if above:
        there = found.inventory[met][:, above, 0].sum(1)
        name = network.warehouses[above[0] - len(network.stores)].name if len(above) == 1 else "its warehouses"
        low, high = float(there.min()), float(there.max())
        low = 0.0 if high - low < 0.01 * high else low
        size = 14 if len(there) > 100 else 30
        dots = axes.scatter(position, order, c=there, s=size, cmap="viridis", alpha=0.8, lw=0, vmin=low, vmax=high)
        bar = figure.colorbar(dots, ax=axes, pad=0.01, format=FuncFormatter(short))
        bar.set_label(f"on hand at {name}", color=_INK, fontsize=8.5)
        bar.ax.tick_params(labelsize=8, colors=_INK)
        bar.outline.set_visible(False)
    else:
        axes.plot(position, order, "o", ms=3, color=_INK, alpha=0.3, mew=0, zorder=3, label="met in the test")
    for k, curve in enumerate(learned):
        label = f"learned, {short(round(curve.on_its_way, 1))} on its way" if len(learned) > 1 else "learned"
        axes.plot(curve.position, curve.order, color=_shade(k, learned), lw=2.2, label=label)
    for k, curve in enumerate(best):
        axes.plot(curve.position, curve.order, color=_shade(k, best), lw=1.6, ls=":", label=None if k else "optimum")
    if level is not None:
        name = "best base stock" if network.unmet_demand == "backlogged" else "base stock as if demand waited"
        ends = [position, *(curve.position for curve in learned)]
        x = np.array([min(level, *(e.min() for e in ends)), level, max(level, *(e.max() for e in ends))])
        axes.plot(x, np.maximum(level - x, 0.0), color=_RED, lw=1.5, ls="--", label=f"{name}, level {level:.4g}")
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, fontsize=8.5, labelcolor=_INK, loc="best")
    _head(axes, f"Order function of {store}" if learned else f"Orders of {store} by its inventory position")
    top = max(1.05 * axes.get_ylim()[1], 1e-6)
    axes.set_ylim(min(0.0, float(order.min())) - 0.03 * top, top)
    axes.set_xlabel("inventory position (on hand and on its way)")
    axes.set_ylabel("order")


def _shade(k: int, curves: Sequence[Curve]) -> Any:
    return matplotlib.colormaps["Blues"](0.45 + 0.25 * k) if len(curves) > 1 else _BLUE


def _trajectory(rows: Sequence[Any], found: Trace, network: Network) -> None:
    """The last periods: the first store's stock with its demand, its orders, and the whole network."""
    periods = len(found.demand)
    part = slice(max(0, periods - SHOWN), None)
    t = np.arange(periods)[part] + 1
    stock, demand = found.inventory[part], found.demand[part, 0]
    on_hand, stores = stock[:, :, 0], len(network.stores)
    short_of = np.maximum(demand - on_hand[:, 0], 0.0)
    stocks, orders = rows[:2]
    stocks.fill_between(
        t, np.maximum(on_hand[:, 0], 0.0), step="mid", color=_BLUE, alpha=0.3, lw=0, label="on hand before demand"
    )
    stocks.plot(t, demand, color=_INK, lw=1.3, marker="o", ms=2.8, label="demand")
    waiting = "backlog" if network.unmet_demand == "backlogged" else "lost demand"
    stocks.bar(t, -short_of, width=0.8, color=_RED, label=waiting)
    stocks.axhline(0.0, color=_INK, lw=0.6)
    _head(stocks, f"Stock and demand of {network.stores[0].name} in one scenario")
    _head(orders, f"Orders of {network.stores[0].name}")
    orders.bar(t, found.action[part][:, _arriving(network, 0)].sum(1), width=0.8, color=_GREEN, label="ordered")
    orders.plot(t, stock[:, 0].sum(1), color=_BLUE, lw=1.4, label="inventory position")
    if len(rows) > 2:
        whole = rows[2]
        whole.plot(t, np.maximum(on_hand[:, :stores], 0.0).sum(1), color=_BLUE, lw=1.8, label="on hand in stores")
        for k, warehouse in enumerate(network.warehouses):
            colour = matplotlib.colormaps["YlOrBr"](0.45 + 0.5 * k / max(1, len(network.warehouses) - 1))
            whole.plot(t, on_hand[:, stores + k], color=colour, lw=1.3, label=warehouse.name)
        whole.plot(t, stock[:, :, 1:].sum((1, 2)), color=_FAINT, lw=1.3, ls="--", label="on its way")
        _head(whole, "Stock of the whole network")
    for axes in rows:
        axes.set_ylabel("units")
        axes.legend(
            loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=8.5, frameon=False, labelcolor=_INK,
            handlelength=1.4, labelspacing=0.35,
        )  # fmt: skip
        axes.set_xlim(t[0] - 0.8, t[-1] + 0.8)
        if axes is not rows[-1]:
            axes.tick_params(labelbottom=False)
    rows[-1].xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    rows[-1].set_xlabel("period")


def _arriving(network: Network, place: int) -> list[int]:
    return [k for k, target in enumerate(network.targets) if target == place]


def _head(axes: Any, text: str) -> None:
    axes.set_title(text, loc="left", fontsize=10, color=_INK, fontweight="bold")


def _tidy(axes: Any) -> None:
    axes.grid(color=_GRID, lw=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#9aa3ad")
    axes.tick_params(colors=_INK, labelsize=8.5)
    for label in (axes.xaxis.label, axes.yaxis.label):
        label.set(color=_INK, fontsize=9)
    axes.yaxis.set_major_formatter(FuncFormatter(short))


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": "ctrlrl"})
    return buffer.getvalue()
