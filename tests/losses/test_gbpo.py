"""GBPO's golden table: weight = -r sign(r - t) |A|, t a step at the group's median."""

import math

import pytest
import torch
from losses.golden import batch_of, begun, column, objective, weights

from ctrlrl.losses.gbpo import GBPO, group_median

F64 = torch.float64
PLAIN = GBPO(eps_low=0.3, eps_high=0.3, ref_kl_coef=0.0, std_floor=1e-12)


def grouped(ratios, returns, group=None, mask=None):
    batch, out = batch_of(ratios, torch.zeros_like(ratios), mask)
    group = torch.zeros(len(ratios), dtype=torch.long) if group is None else torch.tensor(group)
    batch = batch._replace(sequence_return=torch.tensor(returns, dtype=F64), group=group, logp_ref=out.logp.detach())
    return batch, out


@pytest.mark.parametrize(
    ("returns", "targets"),
    [
        ([1, 0, 0, 0], [1.3, 1, 1, 1]),
        ([1, 1, 1, 0], [1, 1, 1, 0.7]),
        ([1, 1, 0, 0], [1.3, 1.3, 0.7, 0.7]),
        ([1, 1, 1, 1], [1, 1, 1, 1]),
        ([0.1, 0.2, 0.4, 0.9], [0.7, 0.7, 1.3, 1.3]),
    ],
)
def test_golden_targets(returns, targets):
    batch, _ = grouped(torch.ones(4, 1, dtype=F64), returns)
    assert begun(PLAIN, batch).coef["target"][:, 0].tolist() == pytest.approx(targets)


def test_golden_table():
    """R = (1, 0, 0, 0): |A| = (1.5, .5, .5, .5); the winner goes to 1.3, the others stay at 1."""
    for winner, expected in ((1.0, 1.5), (1.29, 1.29 * 1.5), (1.31, -1.31 * 1.5), (0.5, 0.75)):
        batch, out = grouped(column(winner, 1.0, 1.1, 0.8), [1, 0, 0, 0])
        want = column(expected, 0.0, -0.55, 0.4)
        torch.testing.assert_close(weights(PLAIN, begun(PLAIN, batch), out), want, atol=1e-9, rtol=0)


def test_the_band_may_be_uneven_and_soft():
    # gap = log 3 x T: sigmoid 3/4 of a band from .9 to 1.5
    batch, out = grouped(column(1.0, 1.0), [1, -1])
    temp = 1 / (math.sqrt(2) * math.log(3))
    loss = GBPO(eps_low=0.1, eps_high=0.5, target_temp=temp, std_floor=1e-12)
    assert begun(loss, batch).coef["target"][:, 0].tolist() == pytest.approx([1.35, 1.05])


def test_the_penalty_is_k3_towards_the_reference():
    batch, out = grouped(column(1.0, 1.0), [0, 0])
    batch = batch._replace(logp_ref=out.logp.detach() + math.log(2.0))
    loss = GBPO(ref_kl_coef=0.5)
    batch = begun(loss, batch)
    torch.testing.assert_close(weights(loss, batch, out), column(0.5, 0.5))
    torch.testing.assert_close(objective(loss, batch, out).item(), 0.5 * (2 - 1 - math.log(2)))


def test_a_group_that_agrees_gives_exactly_nothing():
    batch, out = grouped(column(1, 1.1, 0.9), [0.1, 0.1, 0.1])
    assert weights(PLAIN, begun(PLAIN, batch), out).abs().max() == 0


def test_every_position_counts_the_same():
    mask = torch.tensor([[True, True, True], [True, False, False]])
    batch, _ = grouped(torch.ones(2, 3, dtype=F64), [1, 0], mask=mask)
    assert PLAIN.prepare(begun(PLAIN, batch), {}).denominator == 4


def test_group_median():
    x = torch.tensor([5.0, 1.0, 2.0, 10.0, 3.0, 7.0], dtype=F64)
    got = group_median(x, torch.tensor([8, -1, -1, 8, -1, 3]))
    assert got.tolist() == [7.5, 2.0, 2.0, 7.5, 2.0, 7.0]
