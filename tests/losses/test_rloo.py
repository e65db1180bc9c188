"""RLOO's golden table: A_i = R_i - mean of the group's others."""

import torch
from losses.golden import batch_of, begun, weights

from ctrlrl.losses.rloo import RLOO

F64 = torch.float64


def rollout(returns, group, length=1):
    rows = len(returns)
    batch, out = batch_of(torch.full((rows, length), 0.6, dtype=F64), torch.zeros(rows, length, dtype=F64))
    return batch._replace(sequence_return=torch.tensor(returns, dtype=F64), group=torch.tensor(group)), out


def test_golden_table():
    """(6, 3, 0): others' means 1.5, 3, 4.5. A pair: the difference. Alone: nothing."""
    batch, out = rollout([6.0, 3.0, 0.0, 1.0, 0.0, 9.0], [4, 4, 4, 7, 7, 1], length=2)
    batch = begun(RLOO(), batch)
    expected = torch.tensor([4.5, 0.0, -4.5, 1.0, -1.0, 0.0], dtype=F64).unsqueeze(-1).expand(6, 2)
    torch.testing.assert_close(weights(RLOO(), batch, out), expected)
    assert RLOO().prepare(batch, {}).denominator == 6


def test_it_is_the_mean_baseline_times_n_over_n_minus_one():
    returns = [0.3, 1.7, 2.0, -0.4]
    batch, _ = rollout(returns, [0, 0, 0, 0])
    centred = batch.sequence_return - batch.sequence_return.mean()
    torch.testing.assert_close(begun(RLOO(), batch).advantage[:, 0], centred * 4 / 3)


def test_a_group_that_agrees_gives_exactly_nothing():
    batch, out = rollout([0.1, 0.1, 0.1], [2, 2, 2])
    assert weights(RLOO(), begun(RLOO(), batch), out).abs().max() == 0
