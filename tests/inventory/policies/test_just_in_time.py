"""The clairvoyant oracle on series made by hand, and on real sales where they are there."""

import os
from pathlib import Path

import pytest
import torch
from ctrlrl_envs.inventory import problems
from ctrlrl_envs.inventory.demand import Drawn
from ctrlrl_envs.inventory.network import Link, Network, Store, Warehouse
from ctrlrl_envs.inventory.simulator import InventorySimulator
from inventory.policies.small_networks import (
    ALL,
    check_feasible,
    demanded,
    make,
    one_store,
    simulator,
    two_warehouses,
    view,
)

from ctrlrl.inventory.policies.base import Demanded, InventoryPolicyConfig, PolicyError, build

DATA = Path(os.environ.get("CTRLRL_DATA", Path(__file__).parents[4] / "shared" / "data"))


def run(policy, system, state, periods):
    costs = []
    for _ in range(periods):
        state, cost = system.step(state, policy(system.view(state, clairvoyant=True)))
        costs.append(cost)
    return torch.stack(costs, 1), state


def test_a_store_orders_the_demand_of_the_period_in_which_the_order_can_be_sold():
    network = one_store(2)
    policy = make("just_in_time", network)
    future = torch.tensor([[3.0, 1.0, 4.0, -1.0, 5.0]]).unsqueeze(2)
    orders = [policy(view(network, [[[0.0]]], future=future[:, t:])).item() for t in range(5)]
    assert orders == [4.0, 0.0, 5.0, 5.0, 5.0]  # returns are not ordered; the last period stays


def test_after_the_lead_time_of_all_the_way_nothing_is_held_or_unmet():
    network = Network(
        (Store("a", 1.0, 9.0), Store("b", 1.0, 9.0)),
        (Warehouse("w", 0.3), Warehouse("top", 0.2)),
        (Link("supplier", "top", 2), Link("top", "w", 1), Link("w", "a", 1), Link("w", "b", 3)),
        "lost",
    )
    system = simulator(network)
    demand = torch.randint(0, 9, (4, 20, 2), generator=torch.Generator().manual_seed(0)).float()
    costs, _ = run(make("just_in_time", network), system, system.reset(None, Drawn(demand), split="train"), 20)
    assert (costs[:, 6:14] == 0.0).all() and (costs[:, :3] > 0.0).any()


def test_a_warehouse_orders_the_sum_of_its_stores_each_at_its_own_time_and_shares_what_is_scarce():
    network = two_warehouses()  # v-b 2, supplier-v 3, w-a 1, v-a 3, supplier-w 2, w-c 1
    future = torch.arange(1.0, 11.0).reshape(1, 10, 1) * torch.tensor([1.0, 10.0, 100.0])
    seen = view(network, [[[0.0], [0.0], [0.0], [15.0], [151.0]]], future=future)
    fastest = make("just_in_time", network)(seen)  # a by w
    torch.testing.assert_close(fastest, torch.tensor([[15.0, 60.0, 1.0, 0.0, 404.0, 150.0]]) * torch.tensor(
        [1.0, 1.0, 2.0 * 151.0 / 202.0, 1.0, 1.0, 200.0 / 150.0 * 151.0 / 202.0]
    ))  # fmt: skip
    cheapest = make("just_in_time", network, oracle_route="cheapest")(seen)  # a by v
    torch.testing.assert_close(cheapest, torch.tensor([[30.0 * 15.0 / 34.0, 67.0, 0.0, 60.0 / 34.0, 400.0, 151.0]]))


def test_the_cheapest_way_counts_what_the_supplier_charges_and_equals_are_decided_by_the_other_measure():
    def used(costs, times, **settings):
        network = Network(
            (Store("s", 1.0, 9.0),),
            (Warehouse("v", 0.3), Warehouse("w", 0.3)),
            (
                Link("supplier", "v", 1, cost=costs[0]),
                Link("supplier", "w", 1),
                Link("v", "s", times[0], cost=costs[1]),
                Link("w", "s", times[1], cost=1.0),
            ),
        )
        seen = view(network, [[[0.0], [50.0], [50.0]]], future=torch.ones(1, 9, 1))
        order = make("just_in_time", network, **settings)(seen)[0]
        return "v" if order[2] > 0.0 else "w"

    assert used((2.0, 0.5), (1, 4), oracle_route="cheapest") == "w"
    assert used((0.0, 0.5), (4, 1), oracle_route="cheapest") == "v"
    assert used((0.5, 0.5), (4, 1), oracle_route="cheapest") == "w"
    assert used((9.0, 9.0), (1, 4)) == "v"
    assert used((0.2, 0.3), (2, 2)) == "v" and used((0.7, 0.8), (2, 2)) == "w"


@pytest.mark.parametrize("kind", ALL)
def test_orders_are_feasible(kind):
    network = ALL[kind]()
    future = 9.0 * torch.rand(64, 12, len(network.stores)) - 1.0
    check_feasible(make("just_in_time", network), network, future=future)


def test_without_a_future_it_says_what_is_missing():
    with pytest.raises(PolicyError, match="clairvoyant=True"):
        make("just_in_time", one_store(), demanded(one_store()))(view(one_store(), [[[1.0]]]))


def profit(stores, warehouses, **settings):
    """Of a store and week, over the weeks that count of the test."""
    try:
        problem = problems.real_stores(stores, warehouses, data=DATA)
    except FileNotFoundError as error:
        pytest.skip(str(error))
    demand, split = problem.demand, problem.splits["test"]
    known = Demanded(demand.mean, demand.std, demand.window, demand.features)
    policy = build("just_in_time", problem.network, known, InventoryPolicyConfig(**settings))
    system = InventorySimulator(problem)
    costs, _ = run(policy, system, system.reset(None, split="test"), split.periods)
    return -float(costs[:, split.ignored :].double().mean()) / stores


@pytest.mark.parametrize(
    ("stores", "published"), [(3, 749.2100), (5, 680.0223), (10, 571.9902), (15, 590.4260), (21, 700.6742)]
)
def test_profit_on_real_sales_is_that_of_the_tables_to_every_digit(stores, published):
    assert profit(stores, 1) == pytest.approx(published, abs=2e-4)


@pytest.mark.parametrize(("warehouses", "published"), [(2, 649.76), (3, 659.45), (4, 650.71), (5, 651.57)])
def test_the_cheapest_way_from_several_warehouses_is_near_the_tables_whose_lead_times_are_one(warehouses, published):
    """Published: the shares of the clairvoyant, which are those of these profits."""
    assert published < profit(21, warehouses, oracle_route="cheapest") < published * 1.0025
