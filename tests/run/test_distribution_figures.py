"""The picture of laws and of a policy over its stock."""

import io

import matplotlib.image
import numpy as np
import pytest

from ctrlrl import api
from ctrlrl.core.distribution import Law
from ctrlrl.run import distribution_figures as figures

LADDER = "ctrlrl/Ladder-v0"
SAFE, RISK = 0, 1


def answer(objective, env=LADDER, **settings):
    return api.make("distributional_dp", env, objective=objective, **settings).answer


def action(chart, column, stock):
    (found,) = (r.action for r in chart.runs if r.column == column and r.low <= stock < r.high)
    return found


@pytest.mark.parametrize("engine", ["exact", "lattice"])
def test_the_ladders_policy_is_drawn_by_step_and_stock(engine):
    chart = figures.chart_of(answer("cvar", tau=0.75, engine=engine))
    assert chart.across == "step" and chart.labels == ["0", "1", "2"]
    assert action(chart, 0, -1) == action(chart, 1, -2) == action(chart, 2, -1) == RISK
    assert action(chart, 1, 0) == action(chart, 2, 0) == SAFE
    where = {(column, stock): p for column, stock, p in chart.visits}
    assert where == pytest.approx({
        (0, -1.0): 1.0, (1, 0.0): 0.6, (1, -2.0): 0.4, (2, 0.0): 0.6, (2, -1.0): 0.24, (2, -3.0): 0.16,
    })  # fmt: skip


def test_a_discounted_stock_is_drawn_in_the_money_of_the_first_step():
    chart = figures.chart_of(answer("exceedance", goal=0.5, gamma=0.5))
    where = {(column, stock): p for column, stock, p in chart.visits}
    # a first gain, then a second gamble for a half
    assert where[0, -0.5] == 1.0 and where[1, 0.5] == 0.6 and where[2, 0.0] == pytest.approx(0.24)
    assert action(chart, 1, 0.5) == RISK and action(chart, 2, 1.0) == RISK
    # at the last step it may lose a quarter unless nothing is left: the stocks are half a unit apart there
    assert [(r.low, r.high) for r in chart.runs if r.column == 2 and r.action == SAFE] == [(-0.25, 0.25)]


def test_worlds_of_many_states_are_drawn_where_the_policy_spreads_most():
    found = answer("exceedance", "FrozenLake-v1", goal=1.0, horizon=8)
    chart = figures.chart_of(found)
    assert chart.across.startswith("state at step ") and len(chart.labels) > 2
    assert {column for column, _, _ in chart.visits} == set(range(len(chart.labels)))
    assert sum(p for _, _, p in chart.visits) <= 1.0 + 1e-9 and {r.action for r in chart.runs} <= set(range(4))


def test_what_hardly_ever_happens_does_not_stretch_the_axes():
    chart = figures.chart_of(answer("cvar", "ctrlrl/RiskyGrid-v0", tau=0.1, engine="lattice", horizon=15))
    assert min(p for _, _, p in chart.visits) >= figures.RARE
    law = Law.of([-1000.0, *range(-40, 1)], [1e-6, *[(1 - 1e-6) / 41] * 41])
    figure = figures.Figure()
    axes = figure.subplots()
    figures._laws(axes, {"exact": law}, None)
    assert axes.get_xlim() == pytest.approx((-40.8, 0.8))


def test_stocks_that_make_no_difference_are_one_run():
    chart = figures.chart_of(answer("mean", engine="lattice"))
    assert {run.action for run in chart.runs} == {RISK} and len(chart.runs) == 3


def test_few_returns_have_bars_and_many_have_steps():
    few, many = Law.of([0.0, 1.0], [0.25, 0.75]), Law.of(np.linspace(0, 1, 200))
    chart = figures.chart_of(answer("cvar", tau=0.75))
    pixels = [
        matplotlib.image.imread(io.BytesIO(figures.picture(laws, "title", below, goal)))
        for laws, below, goal in (
            ({"a": few}, None, 1.0),
            ({"a": few, "b": many}, chart, None),
            ({"a": few}, None, None),
        )
    ]
    assert all(p.std() > 0.05 for p in pixels) and pixels[1].shape[0] > pixels[0].shape[0] + 300
    assert (pixels[0] != pixels[2]).any()
