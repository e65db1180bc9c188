"""The newsvendor who may send back."""

import pytest
import torch
from helpers.recorded_demand import behind_warehouse, build_policy, costs, direct, normal_values, prepared, recorded

from ctrlrl.inventory.policies.base import PolicyError, get

NAME = "returns_newsvendor"


@pytest.fixture(scope="module")
def pair():
    """It and quantile_newsvendor, with the same forecaster."""
    simulator = recorded(direct([2], unmet_cost=4.0), 1.5 * normal_values(60, 140, std=4.0), 70)
    policy = prepared(NAME, simulator, steps=200)
    other = build_policy("quantile_newsvendor", simulator)
    other.load_state_dict(policy.state_dict())
    return simulator, policy, other


def test_it_says_that_it_is_not_admissible():
    assert not get(NAME).admissible
    assert get("quantile_newsvendor").admissible
    assert not get(NAME).trainable


def test_it_sends_back_exactly_what_is_above_the_level(pair):
    simulator, policy, other = pair
    empty, full = (torch.full((60, 1, 2), stock) for stock in (0.0, 40.0))
    views = [simulator.view(simulator.reset(None, split="test", inventory=stock)) for stock in (empty, full)]
    level = other(views[0])
    torch.testing.assert_close(policy(views[0]), level)
    torch.testing.assert_close(policy(views[1]), level - 80.0)
    assert (policy(views[1]) < 0.0).all()
    assert (other(views[1]) == 0.0).all()


def test_inventory_positions_stay_at_the_level_and_cost_no_more(pair):
    simulator, policy, other = pair
    assert costs(simulator, policy, "test")[10:].mean() < costs(simulator, other, "test")[10:].mean() + 1e-3


def test_stores_behind_a_warehouse_are_refused():
    simulator = recorded(behind_warehouse([2], 3), normal_values(5, 120), 60)
    with pytest.raises(PolicyError, match="returns_newsvendor is for stores that the supplier serves"):
        build_policy(NAME, simulator)
