"""Base stock and echelon stock: published figures, closed forms, and a simulation that shares no code with them."""

import itertools
import math
import tracemalloc

import numpy as np
import pytest
import torch
from ctrlrl_envs.inventory.demand import Drawn, Normal, Split
from ctrlrl_envs.inventory.network import Link, Network, Store, Warehouse
from ctrlrl_envs.inventory.simulator import InventorySimulator, Problem

from ctrlrl.inventory.optimal_backlogged import (
    backlogged_store,
    clark_scarf,
    newsvendor,
    newsvendor_cost,
    normal_mean,
    serial_chain,
)

ONE_STORE = {  # lead time: cost at unmet costs of 4, 9, 19, 39; demand N(5, 1.6), holding cost 1
    1: (3.167, 3.971, 4.667, 5.290),
    4: (5.008, 6.279, 7.380, 8.364),
    7: (6.335, 7.942, 9.335, 10.580),
    10: (7.428, 9.313, 10.946, 12.406),
    15: (8.959, 11.232, 13.201, 14.962),
    20: (10.264, 12.868, 15.124, 17.141),
}
CHAINS = {  # places: (holding costs, lead times, cost, levels), the store first; demand N(5, 2) clipped, unmet cost 9
    3: ([1, 0.5, 0.1], [4, 3, 2], 9.869, (32.4, 48.4, 60.6)),
    4: ([1, 0.5, 0.2, 0.1], [4, 3, 4, 2], 10.734, (32.4, 49.0, 72.8, 83.2)),
    5: ([1, 0.5, 0.25, 0.2, 0.1], [4, 3, 1, 4, 2], 10.987, (32.4, 49.4, 55.8, 78.5, 88.7)),
    6: ([1, 0.5, 0.3, 0.25, 0.2, 0.1], [4, 3, 3, 1, 4, 2], 11.707, (32.4, 49.8, 68.5, 73.5, 95.1, 105.0)),
    7: (
        [1, 0.5, 0.4, 0.3, 0.25, 0.2, 0.1], [4, 3, 2, 3, 1, 4, 2], 12.289,
        (32.4, 51.0, 61.9, 79.8, 84.6, 105.9, 115.7),
    ),
}  # fmt: skip
FOUR_PLACES = {  # lead time of the store: cost at unmet costs of 4, 9, 19, 39
    1: (6.899, 8.367, 9.608, 10.701),
    2: (7.598, 9.261, 10.670, 11.913),
    3: (8.206, 10.037, 11.592, 12.965),
    4: (8.752, 10.734, 12.420, 13.910),
}
UNMET = (4, 9, 19, 39)


def path_costs(levels, holding, times, unmet, demand):
    """[B, T'] costs of each period of demand [B, T] under echelon levels, cohort by cohort: no state is kept."""
    past = np.concatenate([np.zeros((len(demand), 1)), demand.cumsum(1)], 1)
    periods = np.arange(sum(times), demand.shape[1])
    everywhen = np.arange(demand.shape[1])
    position = np.full(demand.shape, float(levels[-1]))
    cost = np.zeros(demand.shape)
    for level, cost_here, time in zip([None, *levels[:-1]][::-1], holding[::-1], times[::-1], strict=True):
        back = (everywhen - time).clip(0)
        if level is None:
            net = position[:, back] - (past[:, everywhen + 1] - past[:, back])
            cost += cost_here * net.clip(0) + unmet * (-net).clip(0)
        else:
            arrived = position[:, back] - (past[:, everywhen] - past[:, back])
            position = np.minimum(level, arrived)
            cost += cost_here * (arrived - position)
    return cost[:, periods]


def chain_simulator(holding, times, unmet, periods):
    names = ["store", *[f"echelon{i}" for i in range(1, len(holding))]]
    links = tuple(
        Link(sender, name, time) for sender, name, time in zip([*names[1:], "supplier"], names, times, strict=True)
    )
    warehouses = tuple(Warehouse(name, h) for name, h in zip(names[1:], holding[1:], strict=True))
    network = Network((Store("store", holding[0], unmet),), warehouses, links)
    demand = Normal(torch.tensor([5.0]), torch.tensor([2.0]))
    problem = Problem("chain", network, demand, {"test": Split(periods)})
    return InventorySimulator(problem, dtype=torch.float64)


def simulated(simulator, levels, demand):
    """[B, T] costs of each period under echelon levels in the simulator."""
    state = simulator.reset(len(demand), Drawn(torch.as_tensor(demand)[:, :, None]), torch.Generator().manual_seed(1))
    costs, limit = [], torch.tensor(levels, dtype=torch.float64)
    for _ in range(demand.shape[1]):
        echelons = state.inventory.sum(2).cumsum(1)
        upstream = torch.cat([state.inventory[:, 1:, 0], torch.full((len(demand), 1), torch.inf).double()], 1)
        state, cost = simulator.step(state, torch.minimum((limit - echelons).clamp_min(0.0), upstream))
        costs.append(cost)
    return torch.stack(costs, 1).numpy()


def clipped_normal(rng, *shape):
    return rng.normal(5.0, 2.0, shape).clip(0.0)


# -- one store ------------------------------------------------------------------------------------


def test_newsvendors_of_the_textbook():
    first, second = newsvendor(120, 10, 2, 18), newsvendor(50, 8, 0.18, 0.70)
    assert (first.level, first.cost) == pytest.approx((132.815515655446, 35.09966638649737), rel=1e-9)
    assert (second.level, second.cost) == pytest.approx((56.60395592743389, 1.9976051931766445), rel=1e-9)


@pytest.mark.parametrize("lead_time", ONE_STORE)
def test_one_store_costs_what_the_table_says(lead_time):
    costs = [backlogged_store(5, 1.6, 1, unmet, lead_time).cost for unmet in UNMET]
    assert costs == pytest.approx(ONE_STORE[lead_time], abs=6e-4)


def test_levels_of_one_store():
    levels = [backlogged_store(5, 1.6, 1, unmet, 4).level for unmet in UNMET]
    assert levels == pytest.approx([28.011, 29.585, 30.885, 32.012], abs=6e-4)


def test_clipped_demand_costs_a_little_less():
    assert backlogged_store(5, 1.6, 1, 9, 4).cost == pytest.approx(6.2788, abs=5e-5)
    assert backlogged_store(5, 1.6, 1, 9, 4, clip=True).cost == pytest.approx(6.2769, abs=5e-5)


def test_every_level_has_its_cost_and_slope():
    def cost(level):
        return newsvendor_cost(level, 25, 1.6 * math.sqrt(5), 1, 9)

    assert [cost(s) for s in (26, 28, 29.585, 31)] == pytest.approx([10.827, 7.016, 6.279, 6.692], abs=6e-4)
    slopes = [(cost(s + 1e-4) - cost(s - 1e-4)) / 2e-4 for s in (26, 28, 29.585, 31)]
    assert slopes == pytest.approx([-2.899, -1.009, 0.0, 0.532], abs=6e-4)


def test_closed_form_and_grid_agree_on_one_place():
    grid, exact = clark_scarf([2.0], [4], 7.0, 3.0, 1.2), newsvendor(12.0, 2.4, 2.0, 7.0)
    assert grid.cost == pytest.approx(exact.cost, rel=2e-5) and grid.levels[0] == pytest.approx(exact.level, abs=0.012)


def test_mean_of_clipped_demand_is_that_of_draws():
    draws = np.random.default_rng(0).normal(1.0, 2.0, 400_000)
    assert normal_mean(1.0, 2.0, False) == 1.0
    assert normal_mean(1.0, 2.0, True) == pytest.approx(draws.clip(0).mean(), abs=0.01)
    assert normal_mean(1.0, 2.0, True) > 1.3


# -- chains ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("places", CHAINS)
def test_chains_have_the_levels_and_costs_of_the_table(places):
    holding, times, cost, levels = CHAINS[places]
    found = serial_chain(holding, times, 9, 5, 2, clip=True)
    assert found.cost == pytest.approx(cost, abs=6e-4)
    assert found.levels == pytest.approx(levels, abs=0.07)


@pytest.mark.parametrize("lead_time", FOUR_PLACES)
def test_four_places_have_the_costs_of_the_table(lead_time):
    holding, times = [1, 0.5, 0.2, 0.1], [lead_time, 3, 4, 2]
    costs = [serial_chain(holding, times, unmet, 5, 2, clip=True).cost for unmet in UNMET]
    assert costs == pytest.approx(FOUR_PLACES[lead_time], abs=6e-4)


def test_textbook_chains_that_charge_what_is_on_its_way():
    """Examples of the package stockpyl, whose grids leave its levels and costs .02 % to .3 % off."""
    example = clark_scarf([4, 3, 1], [1, 1, 2], 40, 10, 2)
    assert example.levels == pytest.approx((12.76, 23.50, 46.28), abs=0.04)
    assert example.cost == pytest.approx(86.03, rel=2e-4)
    book = clark_scarf([3, 2, 2], [1, 1, 2], 37.12, 5, 1)
    assert book.levels == pytest.approx((6.514, 12.012, 22.700), abs=0.03)
    assert book.cost == pytest.approx(47.6687, rel=2e-4)


def test_store_that_holds_at_the_cost_of_its_sender_is_one_with_it():
    chain, one = serial_chain([1, 1, 1], [2, 3, 1], 9, 5, 2), backlogged_store(5, 2, 1, 9, 6)
    assert chain.cost == pytest.approx(one.cost, rel=2e-5)
    assert chain.levels[-1] == pytest.approx(one.level, abs=0.02)


def test_results_do_not_depend_on_units_or_on_the_grid():
    coarse = serial_chain([1, 0.5], [4, 3], 9, 5, 2, clip=True)
    fine = serial_chain([1, 0.5], [4, 3], 9, 5, 2, clip=True, step=0.004)
    grams = serial_chain([1, 0.5], [4, 3], 9, 5000, 2000, clip=True)
    assert coarse.cost == pytest.approx(fine.cost, rel=3e-5) and grams.cost == pytest.approx(1000 * coarse.cost)
    steady = serial_chain([1, 0.5], [4, 3], 9, 500, 2)  # a mean far above the deviation only moves the levels
    assert steady.cost == pytest.approx(serial_chain([1, 0.5], [4, 3], 9, 20, 2).cost, rel=1e-6)


def test_memory_does_not_grow_with_the_mean_and_clipping_stays_where_it_is():
    tracemalloc.start()
    steady = backlogged_store(5, 2e-3, 1, 9, 4, clip=True)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    exact = newsvendor(25, 2e-3 * math.sqrt(5), 1, 9)
    assert steady.cost == pytest.approx(exact.cost, rel=2e-5) and steady.level == pytest.approx(exact.level, abs=1e-4)
    assert peak < 5e6
    # demand that is clipped more often than not, by draws
    best = backlogged_store(1.0, 5.0, 1, 9, 2, clip=True)
    demand = np.random.default_rng(0).normal(1.0, 5.0, (200_000, 3)).clip(0.0).sum(1)
    costs = [(h := level - demand).clip(0).mean() + 9 * (-h).clip(0).mean() for level in (best.level, best.level + 1)]
    assert costs[0] == pytest.approx(best.cost, rel=0.01) and best.level == pytest.approx(
        np.quantile(demand, 0.9), 0.01
    )
    assert costs[0] < costs[1]


def test_a_chain_that_is_solved_is_remembered():
    assert clark_scarf([1.0, 0.5], [2, 3], 9.0, 5.0, 2.0) is clark_scarf((1.0, 0.5), (2, 3), 9.0, 5.0, 2.0)


@pytest.mark.parametrize("places", [2, 4])
def test_simulator_charges_the_costs_of_the_cohorts_period_by_period(places):
    """H2 without noise: an order of events that is off by one anywhere gives other costs on the same demand."""
    holding, times = ([1, 0.5], [3, 2]) if places == 2 else CHAINS[4][:2]
    levels = serial_chain(holding, times, 9, 5, 2, clip=True).levels
    demand = clipped_normal(np.random.default_rng(5), 24, 60)
    costs = simulated(chain_simulator(holding, times, 9.0, 60), levels, demand)
    np.testing.assert_allclose(costs[:, 30:], path_costs(levels, holding, times, 9.0, demand)[:, 30 - sum(times) :])


@pytest.mark.parametrize("places", [3, 4, 7])
def test_cost_is_the_mean_cost_of_cohorts(places):
    """H2: with the test above, the simulated cost of the levels is the one computed."""
    holding, times, cost, levels = CHAINS[places]
    demand = clipped_normal(np.random.default_rng(places), 12_000, sum(times) + 90)
    means = path_costs(serial_chain(holding, times, 9, 5, 2, clip=True).levels, holding, times, 9.0, demand).mean(1)
    error = means.std() / math.sqrt(len(means))
    assert error < 0.004 * cost and abs(means.mean() - cost) < 4 * error


def test_no_other_levels_cost_less():
    holding, times = [1, 0.5, 0.1], [4, 3, 2]
    best = np.array(serial_chain(holding, times, 9, 5, 2, clip=True).levels)
    demand = clipped_normal(np.random.default_rng(8), 4000, 90)
    cost = path_costs(best, holding, times, 9.0, demand).mean()
    for place, change in itertools.product(range(3), (-2.0, 2.0)):
        other = best + change * (np.arange(3) == place)
        assert path_costs(other, holding, times, 9.0, demand).mean() > cost + 0.01


@pytest.mark.slow
@pytest.mark.parametrize("places", [3, 4, 7])
def test_levels_cost_what_they_should_in_the_simulator(places):
    holding, times, cost, levels = CHAINS[places]
    demand = clipped_normal(np.random.default_rng(65), 8192, 250)
    costs = simulated(chain_simulator(holding, times, 9.0, 250), levels, demand)[:, 50:].mean()
    assert costs == pytest.approx(cost, rel=5e-3)


def test_numbers_out_of_range_are_refused():
    for wrong, message in (
        (lambda: newsvendor(5, 0, 1, 9), "std=0 must be above 0"),
        (lambda: backlogged_store(5, 1, 0, 9, 4), "holding_cost=0 must be above 0"),
        (lambda: backlogged_store(5, 1, 1, 9, 0), "lead_time=0 must be 1"),
        (lambda: serial_chain([1, 0.5], [4], 9, 5, 2), "2 holding costs and 1 lead times"),
        (lambda: serial_chain([1, 0.5], [4, 0], 9, 5, 2), "lead_time=0 must be 1"),
        (lambda: serial_chain([0.5, 1], [4, 3], 9, 5, 2), "must not be negative"),
        (lambda: serial_chain([1, 0.5], [4, 3], 9, 0, 2), "mean=0 must be above 0"),
    ):
        with pytest.raises(ValueError, match=message):
            wrong()
