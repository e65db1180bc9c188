"""Ordering up to the newsvendor's quantile of a forecast."""

import pytest
import torch
from ctrlrl_envs.inventory.demand import Normal, Split
from ctrlrl_envs.inventory.network import SUPPLIER, Link, Network, Store
from ctrlrl_envs.inventory.simulator import InventorySimulator, Problem
from helpers.recorded_demand import (
    WINDOW,
    behind_warehouse,
    build_policy,
    costs,
    direct,
    normal_values,
    prepared,
    recorded,
)
from safetensors.torch import load_file, save_file

from ctrlrl.inventory.policies.base import PolicyError

NAME = "quantile_newsvendor"


def normal_problem(**series):
    """One store, lead time 4, p = 9, h = 1: levels of 29.585 and a cost of 6.279 are the best (method's table)."""
    return recorded(direct([4]), normal_values(250, 160), 80, **series)


@pytest.fixture(scope="module")
def of_normal():
    simulator = normal_problem()
    return simulator, prepared(NAME, simulator, steps=400, batch=512)


def test_orders_fill_up_to_the_newsvendor_level_of_independent_normal_demand(of_normal):
    simulator, policy = of_normal
    view = simulator.view(simulator.reset(None, split="test"))
    order = policy(view)
    level = order[:, 0] + view.inventory[:, 0].sum(1)
    assert (order > 0.0).float().mean() > 0.8
    assert level[order[:, 0] > 0.0].mean() == pytest.approx(29.585, abs=0.5)
    assert level[order[:, 0] > 0.0].std() < 0.25 * 3.578


def test_its_cost_is_near_the_optimum_of_independent_normal_demand(of_normal):
    simulator, policy = of_normal
    assert costs(simulator, policy, "test")[15:].mean() == pytest.approx(6.279, rel=0.06)


def test_each_series_is_met_to_the_ratio_of_its_own_costs(of_normal):
    """p of 1, 4 and 19: quantiles 1/2, 4/5 and 19/20 of N(25, 3.578)."""
    _, policy = of_normal
    simulator = normal_problem(unmet=torch.tensor([1.0, 4.0, 19.0]).repeat(84)[:250, None])
    view = simulator.view(simulator.reset(None, split="test", inventory=torch.zeros(250, 1, 4)))
    levels = torch.stack([policy(view)[kind::3].mean() for kind in range(3)])
    torch.testing.assert_close(levels, torch.tensor([25.0, 28.011, 30.885]), atol=0.6, rtol=0.0)


def test_an_inventory_position_above_the_level_orders_nothing(of_normal):
    simulator, policy = of_normal
    view = simulator.view(simulator.reset(None, split="test", inventory=torch.full((250, 1, 4), 25.0)))
    assert (policy(view) == 0.0).all()


def test_demand_after_the_train_split_changes_nothing():
    values = normal_values(12, 100)
    changed = values.clone()
    changed[:, :, WINDOW + 50 :] += 100.0
    one, two = (prepared(NAME, recorded(direct([2]), x, 50), steps=20) for x in (values, changed))
    for key, weight in one.state_dict().items():
        assert torch.equal(weight, two.state_dict()[key]), key
    changed[:, :, WINDOW + 49] += 100.0
    seen = prepared(NAME, recorded(direct([2]), changed, 50), steps=20)
    assert not torch.equal(one.forecaster.net[0].weight, seen.forecaster.net[0].weight)


def test_each_store_is_forecast_over_its_own_lead_time_whatever_the_order_of_the_links():
    """Demand that never changes: the level is that of the lead time and one period."""
    stores = (Store("a", 1.0, 9.0), Store("b", 1.0, 9.0))
    network = Network(stores, (), (Link(SUPPLIER, "b", 3), Link(SUPPLIER, "a", 1)))
    values = torch.tensor([[4.0], [10.0]]).expand(30, 2, 60) * torch.linspace(0.5, 2.0, 30)[:, None, None]
    simulator = recorded(network, values, 30)
    policy = prepared(NAME, simulator, steps=200)
    stock = torch.tensor([[[2.0, 0.0, 0.0], [3.0, 1.0, 0.0]]]).expand(30, 2, 3)
    order = policy(simulator.view(simulator.reset(None, split="test", inventory=stock)))
    wanted = torch.stack([4.0 * values[:, 1, 0] - 4.0, 2.0 * values[:, 0, 0] - 2.0], 1)
    torch.testing.assert_close(order, wanted, atol=0.3, rtol=0.02)


def test_features_reach_the_forecaster():
    """Stores, series and periods each keep theirs."""
    coin = (torch.rand(140, 1, generator=torch.Generator().manual_seed(0)) < 0.5).float()
    values = (6.0 + 4.0 * coin[:, 0]).expand(20, 2, -1)
    simulator = recorded(direct([1, 1]), values, 90, time=coin)
    policy = prepared(NAME, simulator, steps=300)
    state = simulator.reset(None, split="test", inventory=torch.zeros(20, 2, 1))
    first = WINDOW + 90 + 17
    tomorrow = 8.0  # mean of what no feature tells
    order = policy(simulator.view(state)).mean()
    assert simulator.problem.splits["test"].first == first
    # the quantile 0.9 of tomorrow's 6 or 10
    assert order == pytest.approx(6.0 + 4.0 * float(coin[first]) + tomorrow + 2.0, abs=0.8)


def test_a_loaded_policy_needs_no_preparation(of_normal, tmp_path):
    simulator, policy = of_normal
    save_file(policy.state_dict(), tmp_path / "policy.safetensors")
    fresh = build_policy(NAME, simulator, seed=1)
    fresh.load_state_dict(load_file(tmp_path / "policy.safetensors"))
    view = simulator.view(simulator.reset(None, split="test", inventory=torch.zeros(250, 1, 4)))
    assert torch.equal(fresh(view), policy(view))


def test_there_is_nothing_to_train(of_normal):
    _, policy = of_normal
    assert not policy.trainable
    assert not any(weight.requires_grad for weight in policy.parameters())
    assert not any(weight.requires_grad for weight in build_policy(NAME, normal_problem()).parameters())


def test_it_does_not_act_before_it_is_prepared():
    simulator = normal_problem()
    with pytest.raises(PolicyError, match=r"call prepare\(simulator\)"):
        build_policy(NAME, simulator)(simulator.view(simulator.reset(None)))


def test_problems_without_past_demand_are_refused():
    problem = Problem("normal", direct([4]), Normal(torch.tensor([5.0]), torch.tensor([1.6])))
    with pytest.raises(PolicyError, match="past demand"):
        build_policy(NAME, InventorySimulator(problem))


def test_views_and_scenarios_without_past_demand_are_refused(of_normal):
    simulator, policy = of_normal
    state = simulator.reset(None)
    with pytest.raises(PolicyError, match="past demand"):
        policy(simulator.view(state)._replace(past=None))
    bare = normal_problem()
    bare.scenarios = lambda count, split: simulator.scenarios(count, split)._replace(past=None)
    with pytest.raises(PolicyError, match="past demand"):
        build_policy(NAME, bare).prepare(bare)


def test_a_train_split_shorter_than_the_lead_time_is_refused():
    simulator = recorded(direct([4]), normal_values(5, 40), 80)
    simulator.problem.splits["train"] = Split(4, 0, WINDOW)
    with pytest.raises(PolicyError, match="4 recorded periods are fewer than the 5"):
        build_policy(NAME, simulator).prepare(simulator)


def test_stores_behind_a_warehouse_are_refused():
    simulator = recorded(behind_warehouse([2, 3], 3), normal_values(5, 120).expand(5, 2, -1), 60)
    with pytest.raises(PolicyError, match="stores that the supplier serves"):
        build_policy(NAME, simulator)
