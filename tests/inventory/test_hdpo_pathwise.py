"""Costs of simulated horizons and their gradients, against closed forms."""

import math

import hdpo_parts
import pytest
import torch

from ctrlrl.inventory.pathwise import (
    Descent,
    as_compared,
    available_memory,
    recorded,
    rows,
    saved_by_a_period,
    total_cost,
)
from ctrlrl.inventory.policies.base import Demanded, InventoryPolicyConfig, build


def base_stock(simulator, level):
    demand = simulator.problem.demand
    policy = build("base_stock", simulator.network, Demanded(demand.mean, demand.std), InventoryPolicyConfig())
    with torch.no_grad():
        policy.theta.fill_(level)  # softplus is the identity up here
    return policy


@pytest.mark.parametrize(("level", "cost"), [(26.0, 10.827), (28.0, 7.016), (29.585, 6.279), (31.0, 6.692)])
def test_gradient_and_cost_of_a_base_stock_level_are_the_newsvendors(level, cost):
    """d cost / d S = (h + p) Phi((S - 25) / 3.578) - p, in every period whose stock was ordered."""
    periods, lead = 40, 4
    simulator = hdpo_parts.Simulator(hdpo_parts.one_store(clip=False, splits={"train": (periods, 0)}))
    policy = base_stock(simulator, level)
    state = simulator.reset(2048, generator=torch.Generator().manual_seed(3))
    mean = total_cost(simulator, policy, state, periods, ignored=lead).mean() / (periods - lead)
    (slope,) = torch.autograd.grad(mean, [policy.theta])
    share = 0.5 * (1.0 + math.erf((level - 25.0) / (1.6 * math.sqrt(5.0)) / math.sqrt(2.0)))
    assert float(slope) == pytest.approx(10.0 * share - 9.0, abs=0.15)
    assert float(mean.detach()) == pytest.approx(cost, abs=0.3)


def test_periods_that_are_ignored_do_not_count():
    simulator = hdpo_parts.Simulator(hdpo_parts.one_store())
    state, policy = simulator.reset(4, generator=torch.Generator().manual_seed(0)), base_stock(simulator, 30.0)
    with torch.no_grad():
        whole, late = (total_cost(simulator, policy, state, 12, ignored=k) for k in (0, 5))
        early = total_cost(simulator, policy, state, 5)
    assert torch.allclose(whole, early + late) and (late > 0.0).all() and (early > 0.0).all()


@pytest.mark.parametrize("recompute", [1, 5, 12, 99])
def test_recomputing_changes_nothing(recompute):
    simulator = hdpo_parts.Simulator(hdpo_parts.one_store())
    policy = base_stock(simulator, 28.0)
    found = []
    for every in (None, recompute):
        state = simulator.reset(8, generator=torch.Generator().manual_seed(0))
        cost = total_cost(simulator, policy, state, 12, ignored=3, recompute=every).sum()
        found.append((cost.detach(), *torch.autograd.grad(cost, [policy.theta])))
    for one, other in zip(*found, strict=True):
        assert torch.allclose(one, other, rtol=1e-5) and one != 0.0


def test_a_period_keeps_what_its_gradient_needs_once():
    """Products of B numbers: each needs its factors, of which demand and the weight are those of all periods."""
    batch, theta = 24, torch.nn.Parameter(torch.ones(()))

    class Products:
        demand = torch.rand(batch, 50)

        def view(self, state, clairvoyant):
            return state[0]

        def step(self, state, action):
            stock, period = state
            left = stock * action * self.demand[:, period]
            return (left, period + 1), left

    # stock, which two of them need, and what is ordered
    assert saved_by_a_period(Products(), lambda stock: stock * theta, (torch.ones(batch), 0)) == 2 * 4 * batch


def test_the_memory_that_is_free_is_that_of_a_machine():
    free = available_memory(torch.device("cpu"))
    assert free is None or 2**20 < free < 2**50


def test_orders_are_rounded_only_where_demand_is_of_whole_units():
    view = None
    for kind, wanted in (("normal", 2.6), ("poisson", 3.0)):
        simulator = hdpo_parts.Simulator(hdpo_parts.one_store(kind=kind))
        view = simulator.view(simulator.reset(1, generator=torch.Generator().manual_seed(0)))
        assert as_compared(simulator, lambda v: torch.full((1, 1), 2.6))(view).item() == pytest.approx(wanted)


def test_only_recorded_series_have_an_end_and_rows_keep_the_time():
    assert recorded(hdpo_parts.Simulator(hdpo_parts.one_store()), "train") is None
    every = recorded(hdpo_parts.Simulator(hdpo_parts.one_store(kind="series")), "train")
    some = rows(every, torch.tensor([7, 2]))
    assert every.demand.shape == (10, 12, 1) and some.demand[:, 0, 0].tolist() == [8.0, 3.0]
    assert some.past[:, 0, 0].tolist() == [8.0, 3.0] and torch.equal(some.time, every.time)


def test_descent_clips_the_gradient_returns_its_norm_and_leaves_out_what_is_frozen():
    net = torch.nn.Linear(2, 1)
    net.bias.requires_grad_(False)
    bias = net.bias.clone()
    descent = Descent(net, max_grad_norm=1.0)
    norm = descent.step((net.weight * torch.tensor([[3.0, 4.0]])).sum(), 0.1)
    assert norm == pytest.approx(5.0)
    assert torch.allclose(net.weight.grad, torch.tensor([[0.6, 0.8]]), atol=1e-5)
    assert torch.equal(net.bias, bias) and list(descent.named) == ["weight"]
    free = Descent(net, max_grad_norm=None)
    free.step((net.weight * torch.tensor([[3.0, 4.0]])).sum(), 0.1)
    assert torch.allclose(net.weight.grad, torch.tensor([[3.0, 4.0]]))


def test_descent_goes_down_at_the_rate_it_is_given_and_not_along_what_is_not_finite():
    net = torch.nn.Linear(1, 1, bias=False)
    descent, before = Descent(net, None), net.weight.detach().clone()
    descent.step(net.weight.sum(), 0.25)
    assert torch.allclose(net.weight, before - 0.25, atol=1e-5)  # Adam's first step is the rate
    after = net.weight.detach().clone()
    assert not descent.step(net.weight.sum() * math.inf, 0.25).isfinite()
    assert torch.equal(net.weight, after)


def test_descent_restores_weights_and_moments():
    def loss(net):
        return (net.weight - 3.0).square().sum()

    one, other = (Descent(torch.nn.Linear(2, 1, bias=False), 1.0) for _ in range(2))
    for _ in range(3):
        one.step(loss(one.policy), 0.1)
    other.restore(one.tensors())
    for descent in (one, other):
        descent.step(loss(descent.policy), 0.1)
    assert torch.equal(one.policy.weight, other.policy.weight)
    one.begin(other.policy.state_dict())
    assert not any(k.startswith("moments") for k in one.tensors())
    assert torch.equal(one.policy.weight, other.policy.weight)
