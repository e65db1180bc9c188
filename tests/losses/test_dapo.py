"""DAPO's golden table: eps 0.2 below and 0.28 above, every token alike, groups that agree left out."""

import math

import torch
from losses.golden import batch_of, begun, column, objective, weights

from ctrlrl.losses.dapo import DAPO


def grouped(ratios, returns, group, mask=None):
    batch, out = batch_of(ratios, torch.zeros_like(ratios), mask)
    returns = torch.tensor(returns, dtype=torch.float64)
    return batch._replace(sequence_return=returns, group=torch.tensor(group)), out


def test_golden_table():
    """R = (1, 0, 0, 0): A = (1.5, -.5, -.5, -.5). 1.27 earns its gradient, which GRPO's 0.2 would cut."""
    loss = DAPO(std_floor=0.0)
    for first, expected in ((1.27, 1.5 * 1.27), (1.29, 0.0)):
        batch, out = grouped(column(first, 1.3, 0.79, 0.81), [1, 0, 0, 0], [0] * 4)
        got = weights(loss, begun(loss, batch), out)
        torch.testing.assert_close(got, column(expected, -0.65, 0.0, -0.405), atol=1e-12, rtol=0)


def test_groups_that_agree_count_neither_in_the_sum_nor_in_its_length():
    """Two groups of two, the second in agreement: as if the first were alone. 0.1 is no binary number."""
    ratios = column(1.1, 1.0, 1.1, 1.1).expand(4, 3)
    both, out = grouped(ratios, [1, 0, 0.1, 0.1], [0, 0, 7, 7])
    alone, one = grouped(ratios[:2], [1, 0], [0, 0])
    loss = DAPO()
    expected = objective(loss, begun(loss, alone), one)
    assert expected.abs() > 0.03
    torch.testing.assert_close(objective(loss, begun(loss, both), out), expected, atol=1e-12, rtol=0)
    assert loss.begin(both, {}, {}).stats["informative_share"] == 0.5
    none, out = grouped(ratios, [0.1] * 4, [0] * 4)
    assert objective(loss, begun(loss, none), out) == 0


def test_every_token_counts_alike():
    mask = torch.tensor([[True, True, True], [True, False, False]])
    batch, out = grouped(torch.ones(2, 3, dtype=torch.float64), [1, 0], [0, 0], mask)
    loss = DAPO(std_floor=0.0)
    a = 1 / math.sqrt(2)
    torch.testing.assert_close(objective(loss, begun(loss, batch), out).item(), -(3 * a - a) / 4)


def test_the_length_penalty_is_soft():
    """L = 10, C = 4: nothing up to 6 positions, then a quarter each, one whole from 10 on."""
    lengths = torch.tensor([6, 7, 10, 12])
    mask = torch.arange(12) < lengths.unsqueeze(-1)
    batch, _ = grouped(torch.ones(4, 12, dtype=torch.float64), [1.0, 1.0, 1.0, 0.0], [0] * 4, mask)
    loss = DAPO(overlong_length=10, overlong_cache=4, std_floor=0.0)
    penalised = torch.tensor([1.0, 0.75, 0.0, -1.0], dtype=torch.float64)
    expected = (penalised - penalised.mean()) / penalised.std()
    torch.testing.assert_close(begun(loss, batch).advantage[:, 0], expected)
