"""Dr. GRPO's golden table: A = R - mean, and one length for all."""

import pytest
import torch
from losses.golden import batch_of, begun, column, objective, weights

from ctrlrl.losses.dr_grpo import DrGRPO


def grouped(ratios, returns, mask=None):
    batch, out = batch_of(ratios, torch.zeros_like(ratios), mask)
    group = torch.zeros(len(ratios), dtype=torch.long)
    return batch._replace(sequence_return=torch.tensor(returns, dtype=torch.float64), group=group), out


def test_golden_table():
    """R = (1, 0, 0, 0): A = (.75, -.25, -.25, -.25), whatever the spread."""
    batch, out = grouped(column(1.1, 1.3, 0.7, 0.9), [1, 0, 0, 0])
    expected = column(0.825, -0.325, 0.0, -0.225)
    torch.testing.assert_close(weights(DrGRPO(), begun(DrGRPO(), batch), out), expected, atol=1e-12, rtol=0)
    batch, out = grouped(column(1.1, 1.3, 0.7, 0.9), [10, 0, 0, 0])
    torch.testing.assert_close(weights(DrGRPO(), begun(DrGRPO(), batch), out), 10 * expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize(("length", "denominator"), [(None, 8.0), (100, 200.0), (1, 2.0)])
def test_the_denominator_does_not_depend_on_the_lengths(length, denominator):
    mask = torch.tensor([[True, True, True, False], [True, False, False, False]])
    batch, out = grouped(torch.ones(2, 4, dtype=torch.float64), [1, 0], mask)
    loss = DrGRPO(max_length=length)
    batch = begun(loss, batch)
    assert loss.prepare(batch, {}).denominator == denominator
    # ratio one: the objective is -sum of A L / D = -(.5 x 3 - .5 x 1) / D
    assert objective(loss, batch, out).item() == pytest.approx(-1.0 / denominator)
    # each position of the longer sequence weighs as much as the only one of the shorter
    assert weights(loss, batch, out)[mask].tolist() == pytest.approx([0.5, 0.5, 0.5, -0.5])


def test_a_group_that_agrees_gives_exactly_nothing():
    batch, out = grouped(column(1, 1.1, 0.9), [0.1, 0.1, 0.1])
    assert weights(DrGRPO(), begun(DrGRPO(), batch), out).abs().max() == 0


def test_the_length_is_checked():
    with pytest.raises(ValueError, match="max_length=0"):
        DrGRPO(max_length=0)
