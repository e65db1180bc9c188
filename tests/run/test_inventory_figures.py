"""Pictures of agents on inventory networks: what is drawn where, and that it can be read."""

import io

import matplotlib.image
import numpy as np
import pytest
import torch
from ctrlrl_envs.inventory import InventorySimulator, problems
from ctrlrl_envs.inventory.demand import Series, Split
from ctrlrl_envs.inventory.network import Link, Network, Store, Warehouse
from ctrlrl_envs.inventory.simulator import Problem
from matplotlib.collections import PathCollection

from ctrlrl.run import inventory_figures as figures
from ctrlrl.run.inventory_figures import Trace, order_function, picture, trace


def order_up_to(level):
    return lambda view: (level - view.inventory.sum(2)).relu()


def drawn(monkeypatch, *arguments, **more):
    """The figure itself, in place of its bytes."""
    monkeypatch.setattr(figures, "_png", lambda figure: figure)
    return picture(*arguments, **more)


def star(stores=21):
    """A warehouse and its stores, with a made-up trajectory of 70 periods."""
    network = problems.one_warehouse(stores).network
    rng, places, links = np.random.default_rng(0), stores + 1, stores + 1
    return Trace(rng.random((70, places, 3)), rng.random((70, links)), rng.random((70, stores)), 20), network


def titled(figure, start):
    (found,) = [axes for axes in figure.axes if axes.get_title(loc="left").startswith(start)]
    return found


# -- what is played -------------------------------------------------------------------------------


def test_a_trace_is_one_scenario_of_the_test_split():
    simulator = InventorySimulator(problems.one_store_backlogged(lead_time=2))
    found = trace(order_up_to(20.0), simulator)
    assert found.inventory.shape == (500, 1, 2) and found.action.shape == found.demand.shape == (500, 1)
    assert found.warm == 166
    left = found.inventory[:-1, 0, 0] - found.demand[:-1, 0] + found.inventory[:-1, 0, 1]
    assert found.inventory[1:, 0, 0] == pytest.approx(left, abs=1e-4)
    assert found.action[:, 0] == pytest.approx(np.maximum(20 - found.inventory[:, 0].sum(1), 0), abs=1e-4)


def test_of_recorded_series_it_is_the_middle_one_to_its_end():
    values = torch.tensor([9.0, 1.0, 5.0]).reshape(3, 1, 1).expand(3, 1, 30)
    network = Network((Store("s", 1.0, 5.0),), (), (Link("supplier", "s", 1),), "lost", "profit")
    simulator = InventorySimulator(Problem("p", network, Series(values, 4), {"test": Split(20, 8, 5)}))
    found = trace(order_up_to(5.0), simulator)
    assert found.demand.shape == (20, 1) and (found.demand == 5.0).all() and found.warm == 8


def test_the_order_function_of_a_base_stock_policy_is_one_line_for_every_pipeline():
    simulator = InventorySimulator(problems.one_store_backlogged(lead_time=3))
    found = trace(order_up_to(25.0), simulator)
    curves = order_function(order_up_to(25.0), simulator, found)
    assert len(curves) == 3 and curves[0].on_its_way < curves[1].on_its_way < curves[2].on_its_way
    for curve in curves:
        assert curve.order == pytest.approx(np.maximum(25.0 - curve.position, 0.0), abs=1e-4)
        assert curve.position.min() < 20 and curve.position.max() > 25
    # of a policy that looks at what is on hand alone, the pipelines are apart
    other = order_function(lambda v: 40.0 - v.inventory[:, :, 0], simulator, found)
    at = [np.interp(20.0, c.position, c.order) for c in other]
    assert at[2] - at[0] == pytest.approx(curves[2].on_its_way - curves[0].on_its_way, abs=1e-3)


def test_whole_units_are_asked_for_and_one_slot_has_one_curve():
    simulator = InventorySimulator(problems.one_store_lost(lead_time=1))
    policy = order_up_to(11.3)
    (curve,) = order_function(policy, simulator, trace(policy, simulator))
    assert np.array_equal(curve.position, np.arange(curve.position.min(), curve.position.max() + 1))
    assert np.array_equal(curve.order, np.maximum(11 - curve.position, 0))


# -- where it is drawn ----------------------------------------------------------------------------


def test_the_order_function_is_drawn_with_what_was_met_the_best_and_base_stock(monkeypatch):
    problem = problems.one_store_backlogged(lead_time=3)
    simulator = InventorySimulator(problem)
    found = trace(order_up_to(25.0), simulator)
    learned = order_function(order_up_to(25.0), simulator, found)
    best = order_function(order_up_to(24.0), simulator, found)
    axes = titled(drawn(monkeypatch, found, problem.network, "title", learned, best, 24.0), "Order function of store")
    lines = {line.get_label(): line for line in axes.lines}
    met = lines["met in the test"]
    assert np.array_equal(met.get_xdata(), found.inventory[found.warm :, 0].sum(1))
    assert np.array_equal(met.get_ydata(), found.action[found.warm :, 0])
    x, y = lines["best base stock, level 24"].get_data()
    assert y == pytest.approx(np.maximum(24.0 - x, 0.0)) and 24.0 in x
    assert np.array_equal(lines["optimum"].get_ydata(), best[0].order)
    assert sum(label.startswith("learned, ") for label in lines) == 3


def test_orders_behind_a_warehouse_are_coloured_by_what_it_has(monkeypatch):
    found, network = star(3)
    figure = drawn(monkeypatch, found, network, "title")
    (dots,) = [x for x in titled(figure, "Orders of store 1 by").collections if isinstance(x, PathCollection)]
    # link 0 leads to the warehouse, which is the place after the stores
    assert dots.get_offsets().tolist() == pytest.approx(
        np.stack([found.inventory[20:, 0].sum(1), found.action[20:, 1]], 1)
    )
    assert np.array_equal(dots.get_array(), found.inventory[20:, 3, 0])
    assert "on hand at warehouse" in [axes.get_ylabel() for axes in figure.axes]


def test_the_last_periods_of_the_first_store_are_drawn(monkeypatch):
    found, network = star(3)
    figure = drawn(monkeypatch, found, network, "title")
    stocks = titled(figure, "Stock and demand of store 1")
    (demand,) = [line for line in stocks.lines if line.get_label() == "demand"]
    assert np.array_equal(demand.get_xdata(), np.arange(11, 71))
    assert np.array_equal(demand.get_ydata(), found.demand[10:, 0])
    (lost,) = stocks.containers
    short = np.maximum(found.demand[10:, 0] - found.inventory[10:, 0, 0], 0.0)
    assert lost.get_label() == "lost demand" and [-bar.get_height() for bar in lost] == pytest.approx(short)
    (ordered,) = next(a for a in figure.axes if a.get_title(loc="left") == "Orders of store 1").containers
    assert [bar.get_height() for bar in ordered] == pytest.approx(found.action[10:, 1])
    whole = {line.get_label(): line.get_ydata() for line in titled(figure, "Stock of the whole").lines}
    assert whole["on hand in stores"] == pytest.approx(found.inventory[10:, :3, 0].sum(1))
    assert whole["warehouse"] == pytest.approx(found.inventory[10:, 3, 0])
    assert whole["on its way"] == pytest.approx(found.inventory[10:, :, 1:].sum((1, 2)))


def test_a_network_runs_from_the_supplier_to_its_stores():
    at = figures._places(problems.serial(4).network)
    x = [at[place][0] for place in (-1, 1, 2, 3, 0)]
    assert x == pytest.approx([0.0, 0.25, 0.5, 0.75, 1.0]) and len({point[1] for point in at.values()}) == 1
    network = Network(
        (Store("near", 1.0, 1.0), Store("far", 1.0, 1.0)), (Warehouse("w", 0.1),),
        (Link("supplier", "near", 1), Link("supplier", "w", 2), Link("w", "far", 4)),
    )  # fmt: skip
    at = figures._places(network)
    assert [at[place][0] for place in (-1, 2, 0, 1)] == pytest.approx([0.0, 0.5, 1.0, 1.0])
    assert at[0][1] > at[1][1]


def test_every_link_is_an_arrow_in_the_colour_of_its_lead_time(monkeypatch):
    found, network = star(8)
    axes = titled(drawn(monkeypatch, found, network, "title"), "Network")
    arrows = [t.arrow_patch for t in axes.texts if getattr(t, "arrow_patch", None) is not None]
    colours = dict(zip(network.lead_times, (a.get_edgecolor() for a in arrows), strict=False))
    assert len(arrows) == 9 and len(set(map(tuple, colours.values()))) == len(set(network.lead_times))
    assert [a.get_edgecolor() for a in arrows] == [colours[time] for time in network.lead_times]
    legend = axes.get_legend()
    assert [t.get_text() for t in legend.get_texts()] == [str(t) for t in sorted(set(network.lead_times))]
    assert sorted(t.get_text() for t in axes.texts if t.get_text().isdigit()) == sorted(map(str, network.lead_times))


def test_names_and_lead_times_of_21_stores_are_apart(monkeypatch):
    found, network = star(21)
    figure = drawn(monkeypatch, found, network, "title")
    figure.canvas.draw()
    texts = [t for t in titled(figure, "Network").texts if t.get_text()]
    names = [t.get_window_extent() for t in texts if t.get_text().startswith("store ")]
    times = [t.get_window_extent() for t in texts if t.get_text().isdigit()]
    assert len(names) == 21 and len(times) == 22
    for boxes in (names, times):
        assert not any(a.overlaps(b) for k, a in enumerate(boxes) for b in boxes[:k])


def test_the_picture_is_a_png():
    found, network = star(2)
    assert matplotlib.image.imread(io.BytesIO(picture(found, network, "title"))).std() > 0.05
