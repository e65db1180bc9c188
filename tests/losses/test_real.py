"""REAL's golden table: two solved and two unsolved sequences, temperature 1/2."""

import math

import pytest
import torch
from losses.golden import batch_of, column, objective, weights

from ctrlrl.losses.real import REAL

F64 = torch.float64


def grouped(log_ratios, success, group=None, mask=None):
    ratios = torch.as_tensor(log_ratios, dtype=F64).exp()
    ratios = ratios if ratios.ndim == 2 else ratios.unsqueeze(-1)
    batch, out = batch_of(ratios, torch.zeros_like(ratios), mask)
    group = [0] * len(success) if group is None else group
    return batch._replace(success=torch.tensor(success), group=torch.tensor(group)), out


def test_golden_table():
    """Exponentials e^2 and e^-2: weights 2 e^2 / (1 + e^2 + e^-2) and its mirror; the least learned weighs most."""
    batch, out = grouped([-1.0, 1.0, -1.0, 1.0], [True, True, False, False])
    torch.testing.assert_close(weights(REAL(), batch, out), column(1.7336, 0.0318, -0.0318, -1.7336), atol=6e-5, rtol=0)
    assert objective(REAL(), batch, out).item() == pytest.approx(4.285863, abs=5e-7)


def test_on_policy_every_weight_is_one_over_temperature_and_one_more_than_the_label_has():
    batch, out = grouped([0.0] * 4, [True, False, True, False])
    assert objective(REAL(), batch, out).item() == pytest.approx(2 * math.log(3))
    batch, out = grouped([0.0] * 4, [True, False, False, False])
    third = 1 / (0.4 * 4)
    expected = column(1 / (0.4 * 2), -third, -third, -third)
    torch.testing.assert_close(weights(REAL(label_temp=0.4), batch, out), expected)


def test_weights_per_label_stay_below_one_over_temperature():
    batch, out = grouped([-30.0, -40.0, 35.0, 0.0], [True, True, False, False])
    got = weights(REAL(), batch, out)
    assert got.isfinite().all() and got[:2].sum() <= 2 and got[2:].sum() >= -2
    assert got[:2].sum() > 1.99


def test_the_mean_over_positions_makes_length_irrelevant():
    mask = torch.tensor([[True, True, True], [True, False, False]])
    batch, out = grouped(torch.zeros(2, 3), [True, False], mask=mask)
    got = weights(REAL(), batch, out)
    torch.testing.assert_close(got, torch.tensor([[1 / 3, 1 / 3, 1 / 3], [-1, 0, 0]], dtype=F64))


def test_groups_of_one_label_are_silent_but_count_in_the_mean():
    batch, out = grouped([0.0] * 4, [True, False, True, True], [3, 3, 8, 8])
    got = weights(REAL(), batch, out)
    assert (got[2:] == 0).all() and (got[:2] != 0).all()
    assert objective(REAL(), batch, out).item() == pytest.approx(2 * math.log(2) / 2)
    dead = batch._replace(mask=torch.zeros_like(batch.mask))
    assert objective(REAL(), dead, out) == 0


def test_an_empty_sequence_is_no_member():
    batch, out = grouped([0.0, 0.0, 0.0], [True, True, False], mask=torch.tensor([[True], [False], [True]]))
    assert objective(REAL(), batch, out).item() == pytest.approx(2 * math.log(2))


def test_plain_cross_entropy():
    batch, out = grouped([0.5, -0.5, 1.0], [True, True, False])
    loss = REAL(classifier="bce", label_temp=1.0)
    expected = math.log1p(math.exp(-0.5)) + math.log1p(math.exp(0.5)) + math.log1p(math.exp(1.0))
    assert objective(loss, batch, out).item() == pytest.approx(expected)


def test_a_group_is_one_unit():
    batch, _ = grouped([0.0] * 2, [True, False], [4, 4])
    assert REAL().together(batch) is batch.group
