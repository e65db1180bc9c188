"""Orders by hand, and lost sales at levels where a cap pays."""

import pytest
import torch
from ctrlrl_envs.inventory.demand import Poisson, Split
from ctrlrl_envs.inventory.simulator import InventorySimulator, Problem
from inventory.policies.small_networks import check_feasible, make, one_store, serial, view

from ctrlrl.inventory.policies.base import PolicyError, inverse_softplus


def policy(network, level, cap):
    made = make("capped_base_stock", network)
    made.theta.data = inverse_softplus(torch.tensor([level]))
    made.cap.data = inverse_softplus(torch.tensor([cap]))
    return made


def test_it_orders_what_the_position_lacks_to_the_level_between_nothing_and_the_cap():
    network = one_store(3)
    seen = view(network, [[[4.0, 3.0, 2.0]], [[4.0, 5.0, 6.0]], [[9.0, 9.0, 9.0]], [[-20.0, 1.0, 0.0]]])
    order = policy(network, 20.0, 7.0)(seen)
    torch.testing.assert_close(order, torch.tensor([[7.0], [5.0], [0.0], [7.0]]))


def test_first_orders_are_generous():
    made = make("capped_base_stock", one_store(4))
    assert made.levels.item() == pytest.approx(25.0) and made.caps.item() == pytest.approx(10.0)


def test_orders_are_feasible_and_gradients_finite():
    check_feasible(make("capped_base_stock", one_store()), one_store())


def test_only_stores_that_the_supplier_serves_have_one():
    with pytest.raises(PolicyError, match="serves"):
        make("capped_base_stock", serial())


def test_a_cap_saves_cost_where_demand_is_lost():
    """Poisson demand of 5, lead time 4, p = 4: the optimum is 4.7285 (Zipkin 2008); base stock is 10 % above it."""
    network = one_store(4, 4.0, "lost")
    problem = Problem("lost", network, Poisson(torch.tensor([5.0])), {"train": Split(160, 40)})
    simulator = InventorySimulator(problem)
    drawn = simulator.scenarios(256, generator=torch.Generator().manual_seed(0))

    @torch.no_grad()
    def cost(level, cap):
        made = policy(network, level, cap)
        state = simulator.reset(None, drawn, generator=torch.Generator().manual_seed(1))
        costs = []
        for _ in range(160):
            state, cost = simulator.step(state, made(simulator.view(state)))
            costs.append(cost.mean())
        return float(torch.stack(costs[40:]).mean())

    base = min(cost(level, 1000.0) for level in (24.0, 25.0, 26.0))
    capped = cost(26.0, 5.0)
    assert 4.7285 * 0.99 < capped < 0.95 * base
