"""MHPO's golden table: weight / A = sech^2(log r / c) exp(psi - zeta)."""

import math

import pytest
import torch
from losses.golden import batch_of, begun, column, weights

from ctrlrl.losses.mhpo import MHPO

#        ratio  weight / A
TABLE = [
    (0.2, 0.003696),
    (0.5, 0.054418),
    (1.0, 0.265062),
    (1.2, 0.330349),
    (1.782, 0.395814),
    (2.0, 0.390651),
    (5.0, 0.190816),
    (10.0, 0.082034),
]


def test_golden_table():
    batch, out = batch_of(column(*[r for r, _ in TABLE]), torch.ones(len(TABLE), 1, dtype=torch.float64))
    expected = column(*[w for _, w in TABLE])
    torch.testing.assert_close(weights(MHPO(), batch, out), expected, atol=1e-6, rtol=0)
    batch = batch._replace(advantage=-3 * batch.advantage)
    torch.testing.assert_close(weights(MHPO(), batch, out), -3 * expected, atol=3e-6, rtol=0)


def test_at_ratio_one_by_hand():
    """psi = 0, zeta = (log 2)^1.5 + (log 2 / .8)^2 = 1.327791."""
    zeta = math.log(2) ** 1.5 + (math.log(2) / 0.8) ** 2
    assert zeta == pytest.approx(1.327791, abs=1e-6)
    batch, out = batch_of(column(1.0), column(1.0))
    assert weights(MHPO(), batch, out).item() == pytest.approx(math.exp(-zeta), abs=1e-12)


def test_without_hazard_and_bound_it_is_the_importance_weighted_gradient():
    loss = MHPO(modulation=1e4, scale_up=1e9, scale_down=1e9)
    ratios = column(0.1, 1.0, 3.0, 50.0)
    batch, out = batch_of(ratios, column(1.0, -1.0, 2.0, 1.0))
    torch.testing.assert_close(weights(loss, batch, out), ratios * batch.advantage, rtol=1e-5, atol=0)


def test_each_hazard_acts_on_its_own_side():
    batch, out = batch_of(column(8.0, 1 / 8.0), column(1.0, 1.0))
    base = weights(MHPO(), batch, out)
    up, down = weights(MHPO(scale_up=2.0), batch, out), weights(MHPO(scale_down=1.6), batch, out)
    assert up[0] / base[0] > 2 > 1.2 > up[1] / base[1]
    assert down[1] / base[1] > 2 > 1.2 > down[0] / base[0]


def test_advantages_are_the_groups():
    batch, out = batch_of(column(1.0, 1.0, 1.0), column(0.0, 0.0, 0.0))
    batch = batch._replace(sequence_return=torch.tensor([2.0, 0.0, 0.3]).double(), group=torch.tensor([0, 0, 1]))
    a = 0.265062 / math.sqrt(2)
    torch.testing.assert_close(weights(MHPO(), begun(MHPO(), batch), out), column(a, -a, 0.0), atol=1e-6, rtol=0)


def test_fields_are_checked():
    with pytest.raises(ValueError, match="scale_up=0"):
        MHPO(scale_up=0.0)
