"""R3L's golden table: perfect sequences are imitated, partial successes amplified, shared prefixes untouched."""

import torch
from losses.golden import batch_of, begun, column, objective, weights

from ctrlrl.losses.r3l import R3L
from ctrlrl.types import ON_POLICY, RETRIED


def scored(score, length=1, pivot=None, ratio=1.0):
    rows = len(score)
    batch, out = batch_of(torch.full((rows, length), ratio, dtype=torch.float64), torch.zeros(rows, length))
    return batch._replace(
        score=torch.tensor(score, dtype=torch.float64),
        group=torch.zeros(rows, dtype=torch.long),
        pivot=None if pivot is None else torch.tensor(pivot),
        source=torch.tensor([ON_POLICY, RETRIED] * (rows // 2)),
    ), out


def test_golden_table():
    """Mean 3/8: R = 1 is perfect, 1/2 is 3 x 1/8, the failures stay. No ratio enters."""
    batch, out = scored([1, 0.5, 0, 0], ratio=3.0)
    loss = R3L()
    batch = begun(loss, batch)
    torch.testing.assert_close(weights(loss, batch, out), column(1, 0.375, -0.375, -0.375))
    (gradient,) = torch.autograd.grad(objective(loss, batch, out), out.logp)
    torch.testing.assert_close(-gradient, column(1, 0.375, -0.375, -0.375) / (4 * 2))


def test_a_group_of_perfect_sequences_is_imitated():
    batch, out = scored([1, 1, 1, 1])
    torch.testing.assert_close(weights(R3L(), begun(R3L(), batch), out), column(1, 1, 1, 1))
    silent = R3L(perfect=None)
    assert weights(silent, begun(silent, batch), out).abs().max() == 0


def test_without_its_additions_it_is_reinforce_with_the_groups_mean():
    batch, out = scored([1, 0.5, 0, 0], pivot=[0, 0, 0, 0])
    loss = R3L(amplify=1.0, perfect=None, anchor_coef=0.0)
    batch = begun(loss, batch)
    (gradient,) = torch.autograd.grad(objective(loss, batch, out), out.logp)
    torch.testing.assert_close(-gradient, column(0.625, 0.125, -0.375, -0.375) / 4)


def test_a_shared_prefix_gets_no_gradient_in_the_base_nor_in_the_retry():
    batch, out = scored([0.8, 0.2, 0.5, 0.1], length=4, pivot=[2, 2, 0, 0])
    loss = R3L()
    got = weights(loss, begun(loss, batch), out)
    assert got[:2, :2].abs().max() == 0
    assert (got[:2, 2:] != 0).all() and (got[2:] != 0).all()
    assert loss.prepare(begun(loss, batch), {}).denominator == 2 * (2 + 2 + 4 + 4)
