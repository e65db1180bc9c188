"""Gaussian GRPO's golden table: figure 2 of the paper."""

import torch
from losses.golden import batch_of, begun, column, weights

from ctrlrl.losses.g2rpo import G2RPO


def grouped(returns, ratios=None, group=None):
    rows = len(returns)
    batch, out = batch_of(torch.ones(rows, 1, dtype=torch.float64) if ratios is None else ratios, torch.zeros(rows, 1))
    return batch._replace(
        sequence_return=torch.tensor(returns, dtype=torch.float64),
        group=torch.zeros(rows, dtype=torch.long) if group is None else torch.tensor(group),
    ), out


def test_golden_table():
    """Ranks .1 and .9 of five are -+1.2816, .3 and .7 are -+.5244."""
    batch, out = grouped([0.1, 0.1, 0.1, 0.2, 1], column(1.0, 1.3, 0.7, 1.1, 1.3))
    got = weights(G2RPO(), begun(G2RPO(), batch), out)
    low = -(1.2815516 + 0.5244005) / 3
    torch.testing.assert_close(got, column(low, 1.3 * low, 0.0, 1.1 * 0.5244005, 0.0), atol=1e-6, rtol=0)


def test_only_ranks_matter_and_the_sign_turns():
    batch, _ = grouped([3.0, -1.0, 2.0, 2.0, 0.5, 9.0], group=[0, 0, 0, 0, 1, 1])
    got = begun(G2RPO(), batch).advantage
    exp = begun(G2RPO(), batch._replace(sequence_return=batch.sequence_return.exp())).advantage
    torch.testing.assert_close(exp, got)
    turned = begun(G2RPO(), batch._replace(sequence_return=-batch.sequence_return)).advantage
    torch.testing.assert_close(turned, -got)


def test_variance_of_distinct_outcomes_is_below_one():
    for size, variance in ((5, 0.7669), (8, 0.8511), (16, 0.9237), (64, 0.9803)):
        batch, _ = grouped(list(range(size)))
        got = begun(G2RPO(), batch).advantage.square().mean().item()
        torch.testing.assert_close(got, variance, atol=1e-4, rtol=0)


def test_a_group_that_agrees_gives_exactly_nothing():
    batch, _ = grouped([0.1] * 7)
    assert begun(G2RPO(), batch).advantage.abs().max() == 0
