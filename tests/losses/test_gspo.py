"""GSPO's golden table: the weight of a position is s A / L, s the geometric mean of the sequence's ratios."""

import math

import torch
from losses.golden import batch_of, begun, objective, weights

from ctrlrl.losses.group import ClippedGroupLoss
from ctrlrl.losses.gspo import GSPO

F64 = torch.float64


def grouped(ratios, returns, mask=None):
    batch, out = batch_of(ratios, torch.zeros_like(ratios), mask)
    group = torch.zeros(len(ratios), dtype=torch.long)
    return batch._replace(sequence_return=torch.tensor(returns, dtype=F64), group=group), out


def test_golden_table():
    """R = (1, 0): A = +-1/sqrt 2. Ratios (e^.2, 1) have the mean e^.1 and share it; the second row has length one."""
    ratios = torch.tensor([[math.exp(0.2), 1.0], [0.9, 1.0]], dtype=F64)
    mask = torch.tensor([[True, True], [True, False]])
    batch, out = grouped(ratios, [1, 0], mask)
    loss = GSPO(eps_low=0.2, eps_high=0.2)
    batch = begun(loss, batch)
    a = 1 / math.sqrt(2)
    expected = torch.tensor([[math.exp(0.1) * a / 2, math.exp(0.1) * a / 2], [-0.9 * a, 0.0]], dtype=F64)
    torch.testing.assert_close(weights(loss, batch, out), expected, atol=2e-6, rtol=0)
    torch.testing.assert_close(objective(loss, batch, out).item(), -a * (math.exp(0.1) - 0.9) / 2, atol=2e-6, rtol=0)


def test_a_sequence_is_clipped_as_a_whole():
    # geometric means: e^.2 > 1.2 and e^-.3 < .8, in which single positions stay inside the band
    ratios = torch.tensor([[math.exp(0.4), 1.0], [math.exp(-0.6), 1.0]], dtype=F64)
    batch, out = grouped(ratios, [1, 0])
    loss = GSPO(eps_low=0.2, eps_high=0.2)
    assert weights(loss, begun(loss, batch), out).abs().max() == 0
    # beyond the band on the other side the gradient stays
    batch, out = grouped(ratios, [0, 1])
    assert (weights(loss, begun(loss, batch), out) != 0).all()


def test_the_default_band_is_the_papers():
    ratios = torch.exp(torch.tensor([[2.9e-4, 2.9e-4], [5e-4, 5e-4], [0.0, 0.0]], dtype=F64))
    batch, out = grouped(ratios, [1, 1, 0])
    got = weights(GSPO(), begun(GSPO(), batch), out)
    assert (got[0] > 0).all() and (got[1] == 0).all() and (got[2] < 0).all()


def test_single_positions_are_grpos_clip():
    batch, out = grouped(torch.tensor([[1.1], [1.3], [0.7], [0.9]], dtype=F64), [1, 0, 0, 0])
    loss = GSPO(eps_low=0.2, eps_high=0.2)
    expected = torch.tensor([[1.65], [-0.65], [0.0], [-0.45]], dtype=F64)
    torch.testing.assert_close(weights(loss, begun(loss, batch), out), expected, atol=1e-5, rtol=0)


def test_a_subclass_may_give_every_position_its_own_advantage():
    """s = e^.1, inside a wide band: the gradient at each position is s times the mean of the row's advantages."""

    class PerPosition(GSPO):
        per_token = ClippedGroupLoss.per_token

    batch, out = grouped(torch.tensor([[math.exp(0.2), 1.0]], dtype=F64), [1])
    batch = batch._replace(advantage=torch.tensor([[3.0, -1.0]], dtype=F64))
    found = weights(PerPosition(eps_low=0.2, eps_high=0.2), batch, out)
    torch.testing.assert_close(found, torch.full((1, 2), math.exp(0.1) * (3.0 - 1.0) / 2 / 2, dtype=F64))
    alone = weights(GSPO(eps_low=0.2, eps_high=0.2), batch, out)  # takes the first for all
    torch.testing.assert_close(alone, torch.full((1, 2), math.exp(0.1) * 3.0 / 2, dtype=F64))


def test_the_logged_clip_share_is_that_of_sequences():
    """Token ratios far off one whose geometric mean is one are not clipped."""
    batch, out = batch_of(torch.tensor([[2.0, 0.5], [2.0, 2.0]], dtype=torch.float64), torch.ones(2, 2).double())
    batch = batch._replace(coef=GSPO().prepare(batch, {}).coef)
    found = GSPO().metrics(batch, out, {})["clip_fraction"]
    assert found.tolist() == [[0.0, 0.0], [1.0, 1.0]]
