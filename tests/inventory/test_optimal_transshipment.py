"""Transshipment: the bound to its printed digits, and its policy next to the relaxed system on the same demand."""

import numpy as np
import pytest
import torch
from ctrlrl_envs.inventory.demand import Drawn, Normal, Split
from ctrlrl_envs.inventory.network import Link, Network, Store, Warehouse
from ctrlrl_envs.inventory.simulator import InventorySimulator, Problem

from ctrlrl.inventory.optimal_backlogged import backlogged_store
from ctrlrl.inventory.transshipment_bound import transshipment_bound, transshipment_flows

CASES = ((4, 9), (2, 4), (2, 9), (6, 4), (6, 9))  # lead time of the stores, unmet cost
BOUNDS = {  # stores: bound of each case, with a warehouse lead time of 3 and a correlation of .5
    3: (8.533674, 5.753735, 7.213631, 7.717182, 9.675263),
    5: (7.902133, 5.296388, 6.640241, 7.169472, 8.988583),
    10: (8.296968, 5.535855, 6.940467, 7.546230, 9.460935),
    20: (8.731082,),
    30: (8.377328,),
    50: (8.118102,),
}


def stores(count):
    mean = np.random.RandomState(33).uniform(2.5, 7.5, count).round(3)
    return mean, (mean * np.random.RandomState(92).uniform(0.25, 0.5, count)).round(3)


def normal_demand(mean, std, correlation, batch, periods, seed=0):
    matrix = correlation + (1 - correlation) * np.eye(len(mean))
    noise = np.random.default_rng(seed).normal(size=(batch, periods, len(mean)))
    return mean + std * (noise @ np.linalg.cholesky(matrix).T)


def relaxed_costs(level, mean, std, long, short, unmet, demand):
    """[B, T', S] costs of a system whose stores can give goods back; period t is that of demand t + long + short."""
    past = np.concatenate([np.zeros_like(demand[:, :1]), demand.cumsum(1)], 1)
    start = np.arange(demand.shape[1] - long - short)
    there = level - (past[:, start + long] - past[:, start]).sum(2, keepdims=True)
    spread = std / std.sum()
    levels = mean * (short + 1) + (there - (short + 1) * mean.sum()) * spread
    net = levels - (past[:, start + long + short + 1] - past[:, start + long])
    return net.clip(0) + unmet * (-net).clip(0)


def simulated(level, mean, std, long, short, unmet, demand):
    """[B, T] costs of the policy in the simulator, and the least and most that it left at the warehouse."""
    names = [f"store{i}" for i in range(len(mean))]
    network = Network(
        tuple(Store(name, 1.0, unmet) for name in names),
        (Warehouse("hub", 0.0, holds=False),),
        (Link("supplier", "hub", long), *[Link("hub", name, short) for name in names]),
    )
    law = Normal(torch.tensor(mean), torch.tensor(std), clip=False)
    simulator = InventorySimulator(
        Problem("transshipment", network, law, {"test": Split(demand.shape[1])}), dtype=torch.float64
    )
    state = simulator.reset(len(demand), Drawn(torch.as_tensor(demand)), torch.Generator().manual_seed(0))
    costs, left = [], []
    for _ in range(demand.shape[1]):
        ordered, sent = transshipment_flows(state.inventory, level, list(mean), list(std), short)
        assert float(sent.min()) >= 0.0 and float(ordered.min()) >= 0.0
        left.append(state.inventory[:, -1, 0] - sent.sum(1))
        state, cost = simulator.step(state, torch.cat([ordered[:, None], sent], 1))
        costs.append(cost)
    return torch.stack(costs, 1).numpy(), torch.stack(left).abs().max()


@pytest.mark.parametrize("count", BOUNDS)
def test_bounds_have_the_digits_of_the_table(count):
    mean, std = stores(count)
    for (short, unmet), expected in zip(CASES, BOUNDS[count], strict=False):
        assert transshipment_bound(mean, std, 0.5, 3, short, 1, unmet).cost == pytest.approx(expected, abs=6e-7)


def test_bound_depends_on_correlation_unlike_that_of_the_released_code():
    mean, std = stores(3)
    assert transshipment_bound(mean, std, 0.0, 3, 2, 1, 9).cost == pytest.approx(6.458450, abs=6e-7)
    assert transshipment_bound(mean, std, 0.0, 3, 2, 1, 4).cost == pytest.approx(5.151388, abs=6e-7)


def test_bound_of_one_store_is_its_optimum():
    bound, one = transshipment_bound([5.0], [2.0], 0.5, 3, 4, 1, 9), backlogged_store(5.0, 2.0, 1, 9, 7)
    assert (bound.cost, bound.level) == pytest.approx((one.cost, one.level))


def test_a_matrix_of_correlations_is_one_of_them():
    mean, std = stores(3)
    matrix = np.array([[1.0, 0.2, 0.0], [0.2, 1.0, -0.3], [0.0, -0.3, 1.0]])
    same = np.full((3, 3), 0.5) + 0.5 * np.eye(3)
    assert transshipment_bound(mean, std, same, 3, 4, 1, 9).cost == pytest.approx(8.533674, abs=6e-7)
    demand = np.random.default_rng(2).multivariate_normal(mean, matrix * np.outer(std, std), (4000, 3))
    spread = demand.sum(2).sum(1).var() + 5 * std.sum() ** 2
    expected = transshipment_bound(mean, std, 0.0, 3, 4, 1, 9)
    found = transshipment_bound(mean, std, matrix, 3, 4, 1, 9)
    free = 3 * (std**2).sum() + 5 * std.sum() ** 2
    assert found.cost / expected.cost == pytest.approx((spread / free) ** 0.5, rel=5e-3)


@pytest.mark.parametrize("correlation", [0.0, 0.5])
def test_bound_is_the_cost_of_the_relaxed_system(correlation):
    mean, std = stores(5)
    bound = transshipment_bound(mean, std, correlation, 3, 4, 1, 9)
    demand = normal_demand(mean, std, correlation, 20_000, 20)
    means = relaxed_costs(bound.level, mean, std, 3, 4, 9, demand).mean((1, 2))
    error = means.std() / len(means) ** 0.5
    assert error < 0.005 * bound.cost and abs(means.mean() - bound.cost) < 4 * error


@pytest.mark.parametrize("count", [3, 5, 10])
def test_policy_comes_close_to_the_bound(count):
    """H4, with the relaxed system on the same demand taken off: what is left has hardly any noise."""
    mean, std = stores(count)
    bound = transshipment_bound(mean, std, 0.5, 3, 4, 1, 9)
    demand = normal_demand(mean, std, 0.5, 128, 90, seed=count)
    costs, left = simulated(bound.level, mean, std, 3, 4, 9.0, demand)
    relaxed = relaxed_costs(bound.level, mean, std, 3, 4, 9, demand).mean(2)
    excess = costs[:, 40:].mean() / count - relaxed[:, 33:].mean()
    assert -2e-4 * bound.cost < excess < 0.003 * bound.cost
    assert left < 1e-9  # a hub that cannot hold sends all it has


def test_stores_with_too_much_get_nothing():
    inventory = torch.zeros(1, 4, 3)
    inventory[0, 0, 0], inventory[0, 3, 0] = 90.0, 6.0
    ordered, sent = transshipment_flows(inventory, 100.0, [5.0, 5.0, 5.0], [1.0, 1.0, 1.0], 2)
    assert ordered.tolist() == [4.0] and sent.tolist() == [[0.0, 3.0, 3.0]]
    inventory[0, :3, 1] = 40.0
    ordered, _ = transshipment_flows(inventory, 100.0, [5.0, 5.0, 5.0], [1.0, 1.0, 1.0], 2)
    assert ordered.tolist() == [0.0]


def test_numbers_out_of_range_are_refused():
    for wrong, message in (
        (([5.0, 5.0], [1.0], 0.0, 3, 4, 1, 9), "2 means and 1 deviations"),
        (([5.0], [1.0], 0.0, 0, 4, 1, 9), "lead times 0 and 4 must be 1"),
        (([5.0], [1.0], 0.0, 3, 0, 1, 9), "lead times 3 and 0 must be 1"),
        (([5.0], [0.0], 0.0, 3, 4, 1, 9), "std=0.0 must be above 0"),
        (([5.0], [1.0], 0.0, 3, 4, 1, 0), "unmet_cost=0 must be above 0"),
        (([5.0, 5.0], [1.0, 1.0], [[1.0]], 3, 4, 1, 9), r"matrix \[2, 2\]"),
    ):
        with pytest.raises(ValueError, match=message):
            transshipment_bound(*wrong)
