"""Order up to a level."""

import pytest
import torch
from ctrlrl_envs.inventory.demand import Normal, per_store
from ctrlrl_envs.inventory.network import Link, Network, Store, Warehouse
from ctrlrl_envs.inventory.simulator import InventorySimulator, Problem

from ctrlrl.inventory.policies.base import Demanded, InventoryPolicyConfig, PolicyError, build


def policy(network, mean=5.0):
    stores = len(network.stores)
    return build(
        "base_stock", network, Demanded(per_store(mean, stores), per_store(1.0, stores)), InventoryPolicyConfig()
    )


def one_store(lead_time=2):
    return Network((Store("a", 1.0, 9.0),), (), (Link("supplier", "a", lead_time),))


def test_it_orders_what_the_inventory_position_lacks_to_the_level():
    two = Network(
        (Store("a", 1.0, 9.0), Store("b", 1.0, 9.0)), (), (Link("supplier", "a", 2), Link("supplier", "b", 1))
    )
    simulator = InventorySimulator(Problem("x", two, Normal(per_store(5.0, 2), per_store(1.0, 2))))
    stock = torch.tensor([[[-3.0, 4.0], [2.0, 0.0]], [[30.0, 4.0], [10.5, 0.0]]])
    view = simulator.view(simulator.reset(2, inventory=stock))
    # levels start at the mean demand of the lead time and one period more
    torch.testing.assert_close(policy(two)(view), torch.tensor([[14.0, 8.0], [0.0, 0.0]]))


def test_a_store_without_demand_has_a_level_to_learn_from():
    found = policy(one_store(), mean=0.0)
    assert found.theta.isfinite().all() and found.levels.item() == pytest.approx(1e-3)


def test_stores_behind_a_warehouse_are_refused():
    behind = Network((Store("a", 1.0, 9.0),), (Warehouse("w", 0.1),), (Link("supplier", "w", 1), Link("w", "a", 1)))
    with pytest.raises(PolicyError, match="echelon_stock is for chains"):
        policy(behind)
