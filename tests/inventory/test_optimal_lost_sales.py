"""Lost sales: Zipkin's table, and tiny systems solved and evaluated by other means."""

from itertools import product

import numpy as np
import pytest
import torch
from ctrlrl_envs.inventory.demand import Poisson, Split
from ctrlrl_envs.inventory.network import Link, Network, Store
from ctrlrl_envs.inventory.simulator import InventorySimulator, Problem
from scipy.optimize import linprog
from scipy.stats import poisson

from ctrlrl.inventory.optimal_lost_sales import lost_sales_store

ZIPKIN = {  # lead time: cost at unmet costs of 4, 9, 19, 39; demand Poisson(5), holding cost 1
    1: (4.0407, 5.4382, 6.6757, 7.8359),
    2: (4.3953, 6.0936, 7.6644, 9.1064),
    3: (4.5987, 6.5314, 8.3625, 10.0385),
    4: (4.7285, 6.8360, 8.8872, 10.7944),
}


def transitions(law, state, order):
    """(probability, units left, units missing, next state) of each demand, at a state (on hand, arriving, ..)."""
    for demand, probability in enumerate(law):
        left = max(state[0] - demand, 0)
        line = (*state[1:], order)
        yield probability, left, max(demand - state[0], 0), (left + line[0], *line[1:])


@pytest.mark.parametrize("lead_time", ZIPKIN)
def test_costs_are_those_of_the_table(lead_time):
    costs = [lost_sales_store(5, 1, unmet, lead_time).cost for unmet in (4, 9, 19, 39)]
    assert costs == pytest.approx(ZIPKIN[lead_time], abs=1e-4)


@pytest.mark.parametrize("lead_time", [1, 2, 3])
def test_policy_costs_what_is_said(lead_time):
    """Its stationary distribution, over the states that it reaches."""
    best = lost_sales_store(1.2, 1, 5, lead_time, tolerance=1e-8)
    law, visited, cost = poisson.pmf(range(10), 1.2).tolist(), {(0,) * lead_time: 1.0}, 0.0
    for _ in range(40):
        cost, after = 0.0, {}
        for state, weight in visited.items():
            for probability, left, missing, following in transitions(law, state, best.orders[state]):
                cost += weight * probability * (left + 5 * missing)
                after[following] = after.get(following, 0.0) + weight * probability
        visited = after
    assert sum(visited.values()) == pytest.approx(1.0, abs=1e-4)
    assert cost == pytest.approx(best.cost, abs=3e-4)


@pytest.mark.parametrize("lead_time", [1, 2])
def test_no_policy_costs_less_by_linear_programming(lead_time):
    most, largest, mean, unmet = 8, 4, 1.0, 6.0
    law = poisson.pmf(range(20), mean).tolist()
    states = list(product(range(most + 1), *[range(largest + 1)] * (lead_time - 1)))
    number = {state: i for i, state in enumerate(states)}
    choices = [(state, order) for state in states for order in range(largest + 1)]
    costs, balance = np.zeros(len(choices)), np.zeros((len(states) + 1, len(choices)))
    for column, (state, order) in enumerate(choices):
        balance[number[state], column] += 1.0
        balance[-1, column] = 1.0
        for probability, left, missing, (on_hand, *line) in transitions(law, state, order):
            costs[column] += probability * (left + unmet * missing)
            balance[number[(min(on_hand, most), *line)], column] -= probability
    bound = linprog(costs, A_eq=balance, b_eq=[0.0] * len(states) + [1.0]).fun
    assert lost_sales_store(mean, 1, unmet, lead_time, tolerance=1e-8).cost == pytest.approx(bound, abs=1e-5)


def test_policy_reaches_its_cost_in_the_simulator():
    best = lost_sales_store(5, 1, 9, 3)
    network = Network((Store("store", 1.0, 9.0),), (), (Link("supplier", "store", 3),), unmet_demand="lost")
    simulator = InventorySimulator(Problem("lost", network, Poisson(torch.tensor([5.0])), {"test": Split(120)}))
    generator, costs = torch.Generator().manual_seed(3), []
    state = simulator.reset(2000, generator=generator, split="test")
    state = state._replace(inventory=state.inventory.round())
    for _ in range(120):
        orders = torch.from_numpy(best.order(state.inventory[:, 0].numpy())).float()
        state, cost = simulator.step(state, orders[:, None])
        costs.append(cost)
    means = torch.stack(costs[20:]).mean(0)
    error = float(means.std()) / len(means) ** 0.5
    assert error < 0.03 and abs(float(means.mean()) - 6.5314) < 4 * error


def test_orders_fall_with_stock_wherever_it_is():
    orders = lost_sales_store(5, 1, 9, 3).orders
    falls = [-np.diff(orders, axis=axis) for axis in range(3)]
    assert all((fall >= 0).all() and (fall <= 1).all() for fall in falls)  # a unit more never saves more than a unit
    assert falls[2].mean() > falls[0].mean()  # it saves most where it comes last
    assert orders[-1].max() == 0 and orders[0, 0, 0] == orders.max() > 0


def test_order_rounds_and_takes_much_for_the_most_of_the_table():
    best = lost_sales_store(5, 1, 9, 2)
    np.testing.assert_array_equal(best.order([[3.4, 4.6], [-0.2, 0.0]]), [best.orders[3, 5], best.orders[0, 0]])
    assert best.order([1000, 0]) == best.orders[-1, 0] and best.order([0, 1000]) == best.orders[0, -1]
    with pytest.raises(ValueError, match="3 slots; this policy is of lead time 2"):
        best.order([1, 2, 3])
    with pytest.raises(ValueError, match="read-only"):
        best.orders[0, 0] = 1


def test_numbers_out_of_range_are_refused():
    for numbers, message in (
        ((0, 1, 9, 2), "mean=0 must be above 0"),
        ((5, 0, 9, 2), "holding_cost=0 must"),
        ((5, 1, 9, 0), "lead_time=0 must be 1"),
        ((5, 1, 9, 12), "states, more than"),
    ):
        with pytest.raises(ValueError, match=message):
            lost_sales_store(*numbers)
