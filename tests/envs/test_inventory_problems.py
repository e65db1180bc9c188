"""Benchmark problems: their numbers against published bounds, optima and figures."""

import os

import numpy as np
import pytest
import torch
from ctrlrl_envs.inventory import InventorySimulator, Normal, Poisson, Series, Split, problems
from scipy.stats import norm

DATA = os.environ.get("CTRLRL_DATA")
needs_data = pytest.mark.skipif(DATA is None, reason="CTRLRL_DATA does not name the folder of recorded sales")


# -- recorded sales -------------------------------------------------------------------------------


def just_in_time(problem):
    """Profit per store and week, of the test weeks that count, of orders that know what is to come.

    As its authors define it: the last week goes on beyond the end, and the warehouse's order nets returns.
    """
    simulator = InventorySimulator(problem, dtype=torch.float64)
    network, split = problem.network, problem.splits["test"]
    state = simulator.reset(None, split="test")
    times = torch.tensor(network.lead_times[1:])
    each, profit = torch.arange(simulator.stores), 0.0
    for week in range(split.periods):
        view = simulator.view(state, clairvoyant=True)
        last = view.future.shape[1] - 1
        due = view.future[:, times.clamp_max(last), each]
        later = view.future[:, (times + network.lead_times[0]).clamp_max(last), each].sum(1, keepdim=True)
        sent = simulator.feasible(view.inventory, torch.cat([later, due], 1))
        state, cost = simulator.step(state, sent)
        profit -= float(cost.mean()) * (week >= split.ignored)
    return profit / simulator.stores / (split.periods - split.ignored)


@needs_data
@pytest.mark.parametrize(
    ("stores", "profit"), [(3, 749.2100), (5, 680.0223), (10, 571.9902), (15, 590.4260), (21, 700.6742)]
)
def test_orders_just_in_time_earn_what_was_published(stores, profit):
    """The weeks, the products, the lead times, the costs and the order of events are all in this number."""
    assert just_in_time(problems.real_stores(stores)) == pytest.approx(profit, abs=2e-4)


@needs_data
@pytest.mark.parametrize(("stores", "profit", "share"), [(3, 545.59, 0.8381), (21, 517.60, 0.8124)])
def test_fewer_products_are_the_first_ones(stores, profit, share):
    """Published with 64 products: profits of a policy, and which share of orders just in time that is."""
    assert just_in_time(problems.real_stores(stores, products=64)) == pytest.approx(profit / share, rel=1e-4)


@needs_data
def test_windows_of_recorded_sales():
    problem = problems.real_stores(4)
    sales = problem.demand
    assert isinstance(sales, Series) and sales.values.shape == (288, 4, 171)
    # weeks 0-111, 88-141 and 118-171, of which 16 are looked back on
    assert problem.splits == {"train": Split(95, 16, 16), "dev": Split(37, 16, 104), "test": Split(37, 16, 134)}
    drawn = InventorySimulator(problem).scenarios(None, "test")
    assert drawn.demand.shape == (288, 37, 4)
    torch.testing.assert_close(drawn.demand[7, :, 2], sales.values[7, 2, 134:171])
    torch.testing.assert_close(drawn.past[7, :, 2], sales.values[7, 2, 118:134])
    # 2015-07-28 is week 134 from 2013-01-01: 215 days after Christmas or 150 before the next
    assert drawn.time.shape == (37, 1) and float(drawn.time[0]) == -150.0
    assert drawn.unmet_cost.shape == (288, 4)
    assert float(drawn.unmet_cost.min()) >= 6.3 and float(drawn.unmet_cost.max()) <= 11.7
    assert (sales.values < 0).any(), "returns are part of the data"
    start = InventorySimulator(problem).reset(3, split="dev", generator=torch.Generator().manual_seed(0))
    assert float(start.inventory.abs().max()) == 0.0


@needs_data
def test_networks_of_several_warehouses_with_recorded_sales():
    for warehouses, reached in ((2, (19, 18)), (3, (19, 16, 20)), (4, (11, 11, 17, 9)), (5, (11, 11, 17, 7, 10))):
        network = problems.real_stores(21, warehouses).network
        sources = [x.source for x in network.links]
        assert tuple(sources.count(w.name) for w in network.warehouses) == reached
        assert [w.holding_cost for w in network.warehouses] == [0.3, 0.4, 0.2, 0.5, 0.1][:warehouses]
        assert {x.cost for x in network.links if x.source == "warehouse 2"} == {1.5}
        assert {x.cost for x in network.links if x.source == "supplier"} == {0.0}
    orders = problems.real_stores(21, 3, charge="orders").network
    times = [{x.lead_time for x in orders.links if x.source == f"warehouse {w}"} for w in (1, 2, 3)]
    assert times == [{5, 6}, {1, 2}, {4, 5, 6}]
    assert [x.cost for x in orders.links if x.source == "supplier"] == [0.5, 1.5, 0.7]
    assert {x.cost for x in orders.links if x.source != "supplier"} == {0.0}


@needs_data
def test_series_of_one_store_are_those_of_all():
    assert problems.real_one_store().demand.training == problems.real_stores(3).demand.training == 111
    problem = problems.real_one_store(lead_time=4)
    assert problem.demand.values.shape == (6048, 1, 171) and problem.demand.unmet.shape == (6048, 1)
    many = problems.real_stores().demand
    torch.testing.assert_close(problem.demand.values[21 * 5 + 3, 0], many.values[5, 3])


# -- drawn parameters -----------------------------------------------------------------------------


def lower_bound(problem):
    """Federgruen and Zipkin's, per store: all stock in one place, as soon as it leaves the warehouse."""
    links, store = problem.network.links, problem.network.stores[0]
    std, rho = problem.demand.std.double().numpy(), problem.demand.correlation
    matrix = np.outer(std, std) * (rho + (1 - rho) * np.eye(len(std)))
    variance = (links[1].lead_time + 1) * std.sum() ** 2 + links[0].lead_time * matrix.sum()
    z = norm.ppf(store.unmet_cost / (store.unmet_cost + store.holding_cost))
    return (store.unmet_cost + store.holding_cost) * np.sqrt(variance) * norm.pdf(z) / len(std)


@pytest.mark.parametrize(
    ("stores", "lead_time", "unmet_cost", "correlation", "bound"),
    [
        (3, 4, 9.0, 0.5, 8.533674), (5, 4, 9.0, 0.5, 7.902133), (10, 4, 9.0, 0.5, 8.296968),
        (20, 4, 9.0, 0.5, 8.731082), (30, 4, 9.0, 0.5, 8.377328), (50, 4, 9.0, 0.5, 8.118102),
        (3, 2, 4.0, 0.5, 5.753735), (10, 6, 9.0, 0.5, 9.460935), (3, 2, 9.0, 0.0, 6.458450),
    ],
)  # fmt: skip
def test_transshipment_has_the_published_lower_bound(stores, lead_time, unmet_cost, correlation, bound):
    problem = problems.transshipment(stores, lead_time, unmet_cost, correlation)
    assert lower_bound(problem) == pytest.approx(bound, abs=2e-6)
    assert problem.network.unmet_demand == "backlogged" and not problem.network.warehouses[0].holds
    drawn = problem.demand.draw(4000, Split(5), torch.Generator().manual_seed(0)).demand.flatten(0, 1)
    assert (drawn < 0).any(), "demand is not clipped"
    assert np.corrcoef(drawn[:, :2].T)[0, 1] == pytest.approx(correlation, abs=0.03)


def test_one_warehouse_shares_the_demand_of_transshipment_but_clips_it():
    problem, other = problems.one_warehouse(10), problems.transshipment(10)
    torch.testing.assert_close(problem.demand.mean, other.demand.mean)
    torch.testing.assert_close(problem.demand.std, other.demand.std)
    assert float(problem.demand.draw(500, Split(20)).demand.min()) == 0.0
    network = problem.network
    assert network.unmet_demand == "lost" and network.warehouses[0].holds
    assert set(network.lead_times[1:]) == {2, 3} and network.lead_times[0] == 3
    assert set(problems.one_warehouse(20, lead_times=(2, 6)).network.lead_times[1:]) == {2, 3, 4, 5}
    for store in network.stores:
        assert 0.7 <= store.holding_cost <= 1.3 and 6.3 <= store.unmet_cost <= 11.7
    # the first numbers of the seeds 73 and 28
    assert network.stores[0].holding_cost == pytest.approx(0.7 + 0.6 * np.random.RandomState(73).rand())
    assert network.stores[0].unmet_cost == pytest.approx(6.3 + 5.4 * np.random.RandomState(28).rand())


@pytest.mark.parametrize(("stores", "warehouses"), [(10, 2), (20, 3), (30, 4), (40, 5), (50, 6)])
def test_many_warehouses_reach_every_store(stores, warehouses):
    network = problems.many_warehouses(stores).network
    assert (len(network.stores), len(network.warehouses)) == (stores, warehouses)
    assert [w.holding_cost for w in network.warehouses] == [0.3, 0.4, 0.2, 0.5, 0.1, 0.6][:warehouses]
    assert all(x.lead_time == 3 and x.cost == 0.0 for x in network.links if x.source == "supplier")
    assert {x.cost for x in network.links if x.source == "warehouse 1"} == {0.5}
    # near and far warehouses: each has times of its own
    spans = {w: {x.lead_time for x in network.links if x.source == f"warehouse {w}"} for w in (1, 2)}
    assert spans == {1: {5, 6}, 2: {1, 2}}


def test_the_smallest_network_of_many_warehouses_is_that_of_the_study():
    network = problems.many_warehouses(10).network
    far = {x.target: x.lead_time for x in network.links if x.source == "warehouse 1"}
    assert far == {"store 3": 6, "store 4": 6, "store 5": 6, "store 7": 6, "store 8": 5, "store 9": 6}
    near = [x.target for x in network.links if x.source == "warehouse 2"]
    assert near == [f"store {i}" for i in (1, 2, 3, 4, 5, 6, 8, 9, 10)]


def test_edge_costs_are_charged_where_one_says():
    shipped, ordered = (problems.many_warehouses(10, charge=c).network for c in ("shipments", "orders"))
    assert [x.cost for x in ordered.links[:2]] == [0.5, 1.5] and {x.cost for x in ordered.links[2:]} == {0.0}
    assert {x.cost for x in shipped.links[:2]} == {0.0} and {x.cost for x in shipped.links[2:]} == {0.5, 1.5}


# -- chains and single stores ---------------------------------------------------------------------


def test_serial_levels_cost_what_clark_and_scarf_say():
    """Four echelons, by the exact levels from the store up: 10.734 per period; shifts of one period cost per cents."""
    problem, levels = problems.serial(), torch.tensor([83.2, 72.8, 49.0, 32.4])  # from the supplier down
    assert problem.network.names == ("store", "echelon 1", "echelon 2", "echelon 3")
    assert problem.network.lead_times == (2, 4, 3, 4)
    assert problem.network.targets == (1, 2, 3, 0)
    simulator, generator = InventorySimulator(problem), torch.Generator().manual_seed(0)
    demand = simulator.problem.demand.draw(3000, Split(160), generator)
    state, total, counted = simulator.reset(None, demand, generator), 0.0, 0
    for period in range(160):
        view = simulator.view(state)
        stock = view.inventory.sum(2)[:, [1, 2, 3, 0]]
        echelon = stock.flip(1).cumsum(1).flip(1)
        sent = simulator.feasible(view.inventory, levels - echelon)
        state, cost = simulator.step(state, sent)
        if period >= 60:
            total, counted = total + float(cost.mean()), counted + 1
    assert total / counted == pytest.approx(10.734, rel=0.01)


@pytest.mark.parametrize(("echelons", "times"), [(3, 9), (5, 14), (6, 17), (7, 19)])
def test_longer_and_shorter_chains(echelons, times):
    network = problems.serial(echelons).network
    assert sum(network.lead_times) == times and network.lead_times[-1] == 4
    holding = [w.holding_cost for w in network.warehouses] + [network.stores[0].holding_cost]
    assert len(holding) == echelons and holding == sorted(holding) and holding[0] == 0.1


def test_one_store_problems():
    backlogged, lost = problems.one_store_backlogged(7, 19.0), problems.one_store_lost(3, 4.0)
    assert backlogged.network.lead_times == (7,) and backlogged.network.stores[0].unmet_cost == 19.0
    assert backlogged.network.unmet_demand == "backlogged" and lost.network.unmet_demand == "lost"
    assert float(backlogged.demand.std) == pytest.approx(1.6) and not backlogged.demand.integer
    assert lost.demand.integer and float(lost.demand.mean) == 5.0
    assert backlogged.splits == {"train": Split(50, 30), "dev": Split(50, 30), "test": Split(500, 300)}
    many = problems.independent_stores(4)
    assert many.network.sources == (-1,) * 4 and many.network.lead_times == (3,) * 4
    assert many.initial == (0.0, 0.0)


def test_stock_at_the_start_is_up_to_the_mean_demand_of_a_period():
    simulator = InventorySimulator(problems.one_warehouse(3))
    state = simulator.reset(2000, generator=torch.Generator().manual_seed(1))
    stock = state.inventory[:, :3, 0] / simulator.problem.demand.mean
    assert float(stock.min()) >= 0.0 and 0.98 < float(stock.max()) <= 1.0
    assert float(state.inventory[:, 3].abs().max()) == 0.0


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: problems.serial(9), "echelons=9 .* 3, 4, 5, 6, 7"),
        (lambda: problems.many_warehouses(11), "stores=11 .* 10, 20, 30, 40, 50"),
        (lambda: problems.many_warehouses(10, charge="both"), "charge='both'"),
        (lambda: problems.transshipment(0), "stores=0"),
        (lambda: problems.real_stores(22), "stores=22 .* 1 to 21"),
        (lambda: problems.real_stores(products=289), "products=289"),
        (lambda: problems.real_stores(21, 6), "warehouses=6"),
        (lambda: problems.one_store_lost(0), "lead time 0"),
        (lambda: problems.serial(4.0), "echelons=4.0"),
        # what cannot be
        (lambda: problems.one_store_lost(mean=-5), "mean=-5 must be a finite number of at least 0"),
        (lambda: problems.one_store_lost(mean=float("inf")), "mean=inf must be a finite number"),
        (lambda: problems.independent_stores(3, mean=(1.0, 2.0)), r"mean=\(1.0, 2.0\) must be .* or 3 of them"),
        (lambda: problems.one_store_backlogged(std=-1), "std=-1 must be a finite number"),
        (lambda: problems.one_store_backlogged(mean="5"), "mean='5' must be a finite number"),
        (lambda: problems.one_store_backlogged(unmet_cost="9"), "store: unmet_cost '9' must be a finite number"),
        (lambda: problems.serial(mean=float("nan")), "mean=nan must be a finite number"),
        (lambda: problems.serial(std=-1), "std=-1 must be a finite number"),
        (lambda: problems.one_warehouse(lead_times=(4, 2)), r"lead_times=\(4, 2\) must be \(low, high\)"),
        (lambda: problems.one_warehouse(lead_times=(3, 3)), r"lead_times=\(3, 3\) must be"),
        (lambda: problems.one_warehouse(lead_times=(1,)), r"lead_times=\(1,\) must be"),
        (lambda: problems.one_warehouse(lead_times=(0, 2)), r"lead_times=\(0, 2\) must be .* 1 <= low < high"),
        (lambda: problems.one_warehouse(lead_times=(1.0, 2)), r"lead_times=\(1.0, 2\) must be"),
        (lambda: problems.one_warehouse(lead_times=3), "lead_times=3 must be"),
        (
            lambda: problems.one_warehouse(5, correlation=1.0),
            r"above -0.25 \(with 5 stores\) and below 1, or .*found 1.0",
        ),
        (lambda: problems.transshipment(5, correlation=-0.9), "found -0.9"),
        (lambda: problems.transshipment(5, correlation=-0.25), "found -0.25"),
        (lambda: problems.many_warehouses(correlation="0.5"), "found '0.5'"),
    ],
)
def test_what_was_not_studied_or_cannot_be_is_refused(make, text):
    with pytest.raises(ValueError, match=text):
        make()


# -- demand of a user's own -----------------------------------------------------------------------

MATRIX = [[1.0, 0.8, -0.3], [0.8, 1.0, 0.1], [-0.3, 0.1, 1.0]]


@pytest.mark.parametrize("kind", [torch.tensor, np.array])
def test_demand_has_the_correlations_that_are_given(kind):
    given = kind(MATRIX)
    demand = Normal(torch.tensor([5.0, 6.0, 7.0]), torch.tensor([1.0, 2.0, 3.0]), given, clip=False)
    assert demand.correlation is given
    drawn = demand.draw(20000, Split(5), torch.Generator().manual_seed(0)).demand.flatten(0, 1)
    np.testing.assert_allclose(np.corrcoef(drawn.T), MATRIX, atol=0.015)
    np.testing.assert_allclose(drawn.mean(0), [5, 6, 7], atol=0.05)
    np.testing.assert_allclose(drawn.std(0), [1, 2, 3], rtol=0.02)


def test_a_number_is_the_matrix_that_it_stands_for():
    matrix = torch.full((3, 3), 0.5) + 0.5 * torch.eye(3)
    one, other = problems.transshipment(3, correlation=0.5), problems.transshipment(3, correlation=matrix)
    drawn = [p.demand.draw(4, Split(5), torch.Generator().manual_seed(0)).demand for p in (one, other)]
    torch.testing.assert_close(*drawn)


@pytest.mark.parametrize(
    ("matrix", "text"),
    [
        ([[1.0, 0.5], [0.5, 1.0]], r"found numbers of shape \(2, 2\)"),
        ([[1.0, 0.8, 0.3], [0.8, 1.0, 0.1], [-0.3, 0.1, 1.0]], "is not symmetric"),
        ([[1.0, 0.8, -0.3], [0.8, 2.0, 0.1], [-0.3, 0.1, 1.0]], r"found the diagonal \[1.0, 2.0, 1.0\]"),
        ([[1.0, 0.9, -0.9], [0.9, 1.0, 0.9], [-0.9, 0.9, 1.0]], "is not positive definite"),
        ([[1.0, float("nan"), 0.0], [float("nan"), 1.0, 0.0], [0.0, 0.0, 1.0]], "is not symmetric"),
        ([1.0, 0.5, 0.5], r"found numbers of shape \(3,\)"),
    ],
)
def test_correlations_that_cannot_be_are_refused(matrix, text):
    with pytest.raises(ValueError, match=rf"symmetric matrix \[3, 3\].*{text}"):
        Normal(torch.ones(3), torch.ones(3), np.array(matrix))


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: Normal(torch.ones(2), torch.ones(3)), r"std must be a tensor \[2\], .* found shape \(3,\)"),
        (lambda: Normal(torch.ones(2), torch.tensor([1.0, -1.0])), r"std=\[1.0, -1.0\] must be finite"),
        (lambda: Normal(torch.tensor([torch.nan]), torch.ones(1)), r"mean=\[nan\] must be finite"),
        (lambda: Normal(torch.tensor(5.0), torch.tensor(1.0)), r"mean must be a tensor \[S\], .* found shape \(\)"),
        (lambda: Poisson(torch.tensor([-5.0])), r"mean=\[-5.0\] must be finite"),
        (lambda: Poisson([5.0]), r"mean must be a tensor \[S\], .* found \[5.0\]"),
    ],
)
def test_demand_that_cannot_be_is_refused(make, text):
    with pytest.raises(ValueError, match=text):
        make()
