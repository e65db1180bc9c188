"""One learned quantile for all."""

import pytest
import torch
from helpers.recorded_demand import behind_warehouse, build_policy, costs, direct, normal_values, prepared, recorded

from ctrlrl.inventory.policies.base import PolicyError

NAME = "fixed_quantile_newsvendor"


@pytest.fixture(scope="module")
def trained():
    """From 0.5, by the pathwise gradient of the cost of one store with p = 4."""
    simulator = recorded(direct([1], unmet_cost=4.0), normal_values(150, 140), 70)
    policy = prepared(NAME, simulator, steps=300, batch=512)
    policy.theta.data.zero_()
    optimizer = torch.optim.Adam([w for w in policy.parameters() if w.requires_grad], lr=0.15)
    for _ in range(35):
        optimizer.zero_grad()
        costs(simulator, policy, "train", stretch=10)[3:].mean().backward()
        optimizer.step()
    return simulator, policy


def test_the_quantile_moves_to_that_of_the_costs_where_it_is_optimal(trained):
    """Unmet demand waits, demand is independent: p / (p + h) = 0.8 is the best."""
    _, policy = trained
    assert float(policy.theta.detach().sigmoid()) == pytest.approx(0.8, abs=0.06)


def test_the_forecaster_stays_as_it_is_and_one_number_learns(trained):
    _, policy = trained
    assert [name for name, weight in policy.named_parameters() if weight.requires_grad] == ["theta"]
    assert all(weight.grad is None for weight in policy.forecaster.parameters())


def test_it_starts_at_the_mean_ratio_of_the_stores():
    simulator = recorded(direct([1], unmet_cost=3.0), normal_values(5, 80), 40)
    policy = build_policy(NAME, simulator)
    assert policy.trainable
    assert float(policy.theta.detach().sigmoid()) == pytest.approx(0.75)


def test_every_store_and_series_has_the_same_quantile_whatever_its_costs():
    unmet = torch.tensor([[1.0, 99.0], [50.0, 2.0]])
    values = torch.full((2, 2, 80), 6.0)
    simulator = recorded(direct([1, 1]), values, 40, unmet=unmet)
    policy = prepared(NAME, simulator, steps=2)
    view = simulator.view(simulator.reset(None, inventory=torch.zeros(2, 2, 1)))
    order = policy(view)
    torch.testing.assert_close(order, order[:1, :1].expand(2, 2))
    policy.theta.data += 1.0
    assert (policy(view) > order).all()


def test_stores_behind_a_warehouse_are_refused():
    simulator = recorded(behind_warehouse([2], 3), normal_values(5, 120), 60)
    with pytest.raises(PolicyError, match="fixed_quantile_newsvendor is for stores that the supplier serves"):
        build_policy(NAME, simulator)
