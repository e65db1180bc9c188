"""Bands found by search, and prices."""

import math

import pytest
import torch

from ctrlrl.core import control, trust

F64 = torch.float64
RATIO, ADVANTAGE = torch.tensor([[3.0], [0.4], [0.5]], dtype=F64), torch.tensor([[1.0], [-1.0], [-2.0]], dtype=F64)
ONES = torch.ones(3, 1, dtype=F64)


def share(low, high, count="value", weight=ONES):
    low, high = torch.tensor([low], dtype=F64), torch.tensor([high], dtype=F64)
    return trust.positive_share(RATIO, ADVANTAGE, weight, low, high, count).item()


def test_share_by_hand():
    """At (.6, 1.2): P = 1.2, N = .6 + 2 x .6 = 1.8, so .4."""
    table = {(0.6, 1.2): 0.4, (0.6, 1.75): 1.75 / 3.55, (0.6, 1.8): 0.5, (0.9, 1.2): 1.2 / 3.9, (0.3, 1.2): 1.2 / 2.6}
    for (low, high), expected in table.items():
        assert share(low, high) == pytest.approx(expected, abs=1e-12)
    assert (share(0.9, 1.2), share(0.3, 1.2)) == pytest.approx((0.307692, 0.461538), abs=1e-6)
    # by gradient 3 counts only below a bound of 3, .4 and .5 only above theirs
    assert share(0.45, 3.0, "gradient") == pytest.approx(3 / 4)
    assert share(0.3, 3.0, "gradient") == pytest.approx(3 / 4.4)
    assert share(0.45, 1.2, "gradient") == 0.0
    # of weights only the proportions count; weight zero is absent, whatever stands there
    assert share(0.6, 1.2, weight=7 * ONES) == pytest.approx(0.4)
    assert share(0.6, 1.2, weight=torch.tensor([[1.0], [0.0], [2.0]], dtype=F64)) == pytest.approx(1.2 / 3.6)
    assert share(0.6, 1.2, weight=0 * ONES) == 1.0


def test_masked_positions_are_not_looked_at():
    ratio, advantage = torch.cat([RATIO, RATIO * torch.nan]), torch.cat([ADVANTAGE, ADVANTAGE * torch.nan])
    weight = torch.cat([ONES, 0 * ONES])
    low, high = torch.tensor([0.6], dtype=F64), torch.tensor([1.2], dtype=F64)
    assert trust.positive_share(ratio, advantage, weight, low, high).item() == pytest.approx(0.4)


def test_monotone():
    """By value the share rises with the upper bound and falls with the lower one; by gradient it rises with both."""
    g = torch.Generator().manual_seed(1)
    lows, highs = torch.linspace(0.3, 0.95, 14, dtype=F64), torch.linspace(1.0, 4.0, 14, dtype=F64)
    for _ in range(50):
        r = (0.8 * torch.randn(20, 2, generator=g, dtype=F64)).exp()
        a, w = torch.randn(20, 2, generator=g, dtype=F64), torch.rand(20, 2, generator=g, dtype=F64)
        for count, sign in (("value", -1), ("gradient", 1)):
            upper = trust.positive_share(r, a, w, lows[:1], highs, count)
            lower = trust.positive_share(r, a, w, lows, highs[:1], count)
            assert (upper.diff() >= -1e-12).all() and (sign * lower.diff() >= -1e-12).all()


def search(target, lows=(0.6,), highs=(1.2,), count="value", high_first=True):
    lows, highs = torch.tensor(lows, dtype=F64), torch.tensor(highs, dtype=F64)
    found = trust.balanced_band(RATIO, ADVANTAGE, ONES, lows, highs, target, count, high_first)
    return pytest.approx(tuple(x.item() for x in found))


HIGHS = [1.2 + 0.05 * k for k in range(37)]


def test_search():
    # S(1.75) = .4930 and S(1.8) = .5: the first to reach .499
    assert search(0.499, highs=HIGHS) == (0.6, 1.8)
    # reached at once: the band stays as it was
    assert search(0.39, lows=(0.6, 0.9), highs=HIGHS) == (0.6, 1.2)
    # never reached: both end at their last values
    assert search(0.99, lows=(0.6, 0.7, 0.9), highs=HIGHS) == (0.9, 3.0)
    # the other order; by value raising the lower bound cannot help, so it runs to its end
    assert search(0.45, lows=(0.6, 0.7, 0.9), highs=HIGHS, high_first=False) == (0.9, 2.25)
    # by gradient a lower bound above .5 silences both negatives
    assert search(0.8, lows=(0.3, 0.45, 0.55, 0.6), highs=(1.2, 3.0), count="gradient") == (0.55, 3.0)


def test_no_negative_advantage_no_search():
    a = torch.tensor([[1.0], [0.0], [2.0]], dtype=F64)
    low, high = trust.balanced_band(RATIO, a, ONES, torch.tensor([0.6, 0.9]), torch.tensor([1.2, 3.0]), 1.0)
    assert (low.item(), high.item()) == pytest.approx((0.6, 1.2))


def test_the_price_rises_while_the_constraint_is_broken():
    dual = trust.DualAscent("k", "var", target=0.01, rate=0.1, start=0.002)
    assert isinstance(dual, control.Controller)
    state = dual.initial()
    assert dual.step(state, {})[1] == {"k": 0.002}
    state, knobs = dual.step(state, {"var": 0.06})
    assert knobs["k"] == pytest.approx(0.007) and knobs == state
    assert dual.step(state, {"var": math.nan})[1] == knobs
    assert dual.step(state, {"var": math.inf})[1] == knobs
    for _ in range(10):
        state, knobs = dual.step(state, {"var": 0.0})
    assert knobs["k"] == 0.0
