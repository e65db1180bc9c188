"""Small networks of every kind, and what must hold for any policy on them."""

import torch
from ctrlrl_envs.inventory.demand import Normal
from ctrlrl_envs.inventory.network import Link, Network, Store, Warehouse
from ctrlrl_envs.inventory.simulator import InventorySimulator, Problem, View

from ctrlrl.inventory.policies.base import Demanded, InventoryPolicyConfig, build


def one_store(lead_time=4, unmet=9.0, unmet_demand="backlogged"):
    return Network((Store("s", 1.0, unmet),), (), (Link("supplier", "s", lead_time),), unmet_demand)


def serial():
    """The paper's four nodes; links from the supplier down, so that no order is that of the places."""
    return Network(
        (Store("s", 1.0, 9.0),),
        (Warehouse("w1", 0.5), Warehouse("w2", 0.2), Warehouse("w3", 0.1)),
        (Link("supplier", "w3", 2), Link("w3", "w2", 4), Link("w2", "w1", 3), Link("w1", "s", 4)),
    )


def warehouse(stores=5, holds=True, store_time=2, warehouse_time=3):
    names = [f"s{i}" for i in range(stores)]
    return Network(
        tuple(Store(n, 1.0, 5.0 + i) for i, n in enumerate(names)),
        (Warehouse("w", 0.3, holds=holds),),
        (Link("supplier", "w", warehouse_time), *(Link("w", n, store_time) for n in names)),
        "lost" if holds else "backlogged",
    )


def transshipment():
    return warehouse(4, holds=False)


def two_warehouses():
    """Store a is served by v and w, b by v alone, c by w alone."""
    return Network(
        (Store("a", 1.0, 9.0), Store("b", 1.0, 8.0), Store("c", 1.0, 7.0)),
        (Warehouse("v", 0.3), Warehouse("w", 0.4)),
        (
            Link("v", "b", 2),
            Link("supplier", "v", 3),
            Link("w", "a", 1, cost=1.5),
            Link("v", "a", 3, cost=0.5),
            Link("supplier", "w", 2),
            Link("w", "c", 1),
        ),
        "lost",
    )


ALL = {
    "one_store": one_store,
    "serial": serial,
    "warehouse": warehouse,
    "transshipment": transshipment,
    "two_warehouses": two_warehouses,
}


def demanded(network, mean=5.0, std=2.0, **more):
    stores = len(network.stores)
    return Demanded(torch.full((stores,), mean), torch.full((stores,), std), **more)


def make(name, network, demand=None, **settings):
    """A policy with settings of InventoryPolicyConfig; the seed is fixed, units are raw, as in the paper's formulas."""
    torch.manual_seed(0)
    config = InventoryPolicyConfig(**{"order_units": "raw"} | settings)
    return build(name, network, demand or demanded(network), config)


def simulator(network, mean=5.0, std=2.0, **more):
    demand = Normal(torch.full((len(network.stores),), mean), torch.full((len(network.stores),), std))
    return InventorySimulator(Problem("test", network, demand, **more))


def view(network, inventory, **more):
    """What is seen with an inventory [B, N, L]; shorter pipelines may be left out behind."""
    rows = [[[*x, *[0.0] * (network.slots - len(x))] for x in places] for places in inventory]
    return given(network, torch.tensor(rows), **more)


def given(network, inventory, **more):
    holding = torch.tensor([[p.holding_cost for p in network.places]])
    return View(inventory, holding, torch.tensor([[s.unmet_cost for s in network.stores]]), **more)


def random_inventory(network, batch=64):
    """Stores with stock or backlog, warehouses with stock, some of it none at all or very little."""
    stock = 20.0 * torch.rand(batch, len(network.places), network.slots)
    stock[:, : len(network.stores), 0] -= 8.0
    for place, length in enumerate(network.pipelines):
        stock[:, place, length:] = 0.0
    stock[0] = 0.0
    stock[1, len(network.stores) :, 0] = 1e-6
    stock[2, len(network.stores) :, 0] = -1e-7  # what rounding leaves
    return stock


def check_feasible(policy, network, **more):
    """Nothing negative, nothing that is not there, all of it where nothing can be held, and gradients that are finite,
    at weights as they are and at weights blown up."""
    for spread in (0.0, 3.0):
        for p in policy.parameters():
            p.data += spread * torch.randn_like(p)
        inventory = random_inventory(network).requires_grad_()
        flow = policy(given(network, inventory, **more))
        assert flow.shape == (len(inventory), len(network.links))
        assert (flow >= 0.0).all()
        for place, kind in enumerate(network.warehouses, len(network.stores)):
            out, there = flow[:, network.leaving(place)].sum(1), inventory[:, place, 0].clamp_min(0.0)
            assert (out <= there * (1.0 + 1e-5)).all()
            if not kind.holds:
                torch.testing.assert_close(out, there)
        if not flow.requires_grad:
            continue
        weight = torch.randn_like(flow)
        inputs = [inventory, *policy.parameters()]
        for gradient in torch.autograd.grad((weight * flow).sum(), inputs, materialize_grads=True):
            assert gradient.isfinite().all()
