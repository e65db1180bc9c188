"""Small inventory problems whose demand is a record: what newsvendors with a forecaster are for."""

from functools import partial

import torch
from ctrlrl_envs.inventory.demand import Series, Split
from ctrlrl_envs.inventory.network import SUPPLIER, Link, Network, Store, Warehouse
from ctrlrl_envs.inventory.simulator import InventorySimulator, Problem

from ctrlrl.inventory.policies.base import Demanded, InventoryPolicyConfig, build

WINDOW = 16


def direct(lead_times, unmet_cost=9.0, holding_cost=1.0, **more):
    """Stores that the supplier serves."""
    stores = tuple(Store(f"store {i}", holding_cost, unmet_cost) for i in range(len(lead_times)))
    links = tuple(Link(SUPPLIER, store.name, time) for store, time in zip(stores, lead_times, strict=True))
    return Network(stores, (), links, **more)


def behind_warehouse(lead_times, upstream, holds=True):
    """Stores behind one warehouse; its own link comes first."""
    stores = tuple(Store(f"store {i}", 1.0, 9.0) for i in range(len(lead_times)))
    links = tuple(Link("warehouse", store.name, time) for store, time in zip(stores, lead_times, strict=True))
    warehouse = Warehouse("warehouse", 0.3, holds=holds)
    return Network(stores, (warehouse,), (Link(SUPPLIER, "warehouse", upstream), *links))


def recorded(network, values, periods, **series):
    """A simulator of recorded demand ``values`` [K, S, T]: ``periods`` to train on, the rest dev and test in halves."""
    rest = (values.shape[2] - WINDOW - periods) // 2
    splits = {
        "train": Split(periods, 0, WINDOW),
        "dev": Split(rest, 0, WINDOW + periods),
        "test": Split(rest, 0, WINDOW + periods + rest),
    }
    demand = Series(values, WINDOW, **series)
    return InventorySimulator(Problem("recorded", network, demand, splits, initial=(1.0, 1.0)))


def build_policy(name, simulator, seed=0):
    """The policy of that name on a problem, not prepared."""
    torch.manual_seed(seed)
    demand = simulator.problem.demand
    told = Demanded(demand.mean, demand.std, demand.window, demand.features)
    return build(name, simulator.network, told, InventoryPolicyConfig())


def normal_values(series, periods, seed=0, mean=5.0, std=1.6):
    """[K, 1, T] independent normal demand."""
    noise = torch.randn(series, 1, periods, generator=torch.Generator().manual_seed(seed))
    return mean + std * noise


def costs(simulator, policy, split, stretch=None):
    """[T, B] cost by period of all recorded series."""
    state = simulator.reset(None, split=split)
    found = []
    for _ in range(stretch or simulator.problem.splits[split].periods):
        state, cost = simulator.step(state, policy(simulator.view(state)))
        found.append(cost)
    return torch.stack(found)


def prepared(name, simulator, steps=300, batch=256, seed=0):
    """The same after a short ``prepare``."""
    policy = build_policy(name, simulator, seed)
    policy.forecaster.fit = partial(policy.forecaster.fit, steps=steps, batch=batch)
    policy.prepare(simulator, torch.Generator().manual_seed(seed))
    return policy
