"""Utilities at hand-picked numbers, their homogeneity, and the objective that each is made for."""

import pytest
import torch

from ctrlrl.core.utility import Utility

X = torch.tensor([-2.0, -0.5, 0.0, 1.0])
EVERY = {
    "mean": ({}, [-2.0, -0.5, 0.0, 1.0]),
    "cvar": ({}, [-2.0, -0.5, 0.0, 0.0]),
    "target": ({}, [-2.0, -0.5, 0.0, -1.0]),
    "exceedance": ({}, [0.0, 0.0, 1.0, 1.0]),
    "mean_cvar": ({"level": 0.5, "mean_weight": 0.25}, [-3.5, -0.875, 0.0, 0.25]),
}


@pytest.mark.parametrize("objective", sorted(EVERY))
def test_utilities_are_those_of_the_table(objective):
    settings, expected = EVERY[objective]
    assert Utility(objective, **settings)(X).tolist() == pytest.approx(expected)


@pytest.mark.parametrize("objective", sorted(EVERY))
def test_the_order_of_actions_does_not_depend_on_the_money_it_is_counted_in(objective):
    """gamma^t (C + G) instead of C + G: every utility is positively homogeneous."""
    utility = Utility(objective, **EVERY[objective][0])
    g = torch.Generator().manual_seed(0)
    returns, stock = torch.randn(200, 3, 8, generator=g), torch.randn(200, generator=g)
    own = utility.of(returns, stock, torch.ones(200))
    scaled = utility.of(returns, 0.25 * stock, torch.full((200,), 0.25))
    assert torch.equal(own.argsort(dim=-1, stable=True), scaled.argsort(dim=-1, stable=True))
    if objective != "exceedance":
        torch.testing.assert_close(scaled, 0.25 * own)


def test_stock_and_return_are_added_in_the_same_money():
    """Stock -1 in the money of step 0, return 4 at a discount of 1/2: -1 + 2 = 1."""
    found = Utility("mean").of(torch.tensor([[[4.0]]]), torch.tensor([-1.0]), torch.tensor([0.5]))
    assert found.item() == pytest.approx(1.0)


def test_a_margin_forgives_what_is_missing():
    law = torch.tensor([[[-0.4, 0.0, -0.6, 1.0]]])
    one, zero = torch.ones(1), torch.zeros(1)
    assert Utility("exceedance").of(law, zero, one).item() == pytest.approx(0.5)
    assert Utility("exceedance", margin=0.5).of(law, zero, one).item() == pytest.approx(0.75)


def test_actions_within_the_tolerance_are_tied():
    utilities = torch.tensor([[1.0, 0.95, 0.8], [0.0, 0.0, 0.0]])
    assert Utility("mean", tolerance=0.1).ties(utilities).tolist() == [[True, True, False], [True] * 3]
    assert Utility("mean").ties(utilities).tolist() == [[True, False, False], [True] * 3]


@pytest.mark.parametrize("level", [0.25, 0.5, 1.0])
def test_the_scan_over_the_stock_is_the_conditional_value_at_risk(level):
    """Of four equally likely returns: the mean of the worst one, of the worst two, of all."""
    law = torch.tensor([[[3.0, -2.0, 5.0, 0.0]]])
    stocks = torch.linspace(-6, 6, 121)
    utility = Utility("cvar").of(law.expand(121, 1, 4), stocks, torch.ones(121)).squeeze(1)
    assert (-stocks + utility / level).max().item() == pytest.approx({0.25: -2.0, 0.5: -1.0, 1.0: 1.5}[level])


def test_the_scan_of_the_mix_is_the_mix_of_mean_and_conditional_value_at_risk():
    """Mean 1.5, worst half -1: a quarter of one and three quarters of the other."""
    law = torch.tensor([[[3.0, -2.0, 5.0, 0.0]]])
    stocks = torch.linspace(-6, 6, 121)
    mixed = Utility("mean_cvar", 0.5, 0.25).of(law.expand(121, 1, 4), stocks, torch.ones(121)).squeeze(1)
    assert (-stocks + mixed).max().item() == pytest.approx(0.25 * 1.5 - 0.75)
