"""GDPO: channels are standardised in their group, added, and whitened over the batch."""

import math

import pytest
import torch
from losses.golden import batch_of, begun, weights

from ctrlrl.core import advantage as adv
from ctrlrl.losses.gdpo import GDPO
from ctrlrl.losses.grpo import GRPO

GROUP = torch.tensor([0, 0, 1, 1])
TWO = torch.tensor([[0, 0], [0, 1], [0, 0], [1, 1]], dtype=torch.float64)


def channels(rewards, mask=None):
    shape = (len(rewards), 1) if mask is None else mask.shape
    batch, out = batch_of(torch.ones(shape, dtype=torch.float64), torch.zeros(shape), mask)
    return batch._replace(rewards=rewards, group=GROUP, sequence_return=rewards.sum(-1), logp_ref=out.logp), out


def test_golden_table():
    """Totals (0, 1) and (0, 2): by channel -+1/sqrt 2 and -+2/sqrt 2; their squares add up to 5, so std = sqrt(5/3)."""
    batch, out = channels(TWO)
    loss = GDPO(std_floor=1e-12)
    a = torch.tensor([-1, 1, -2, 2], dtype=torch.float64) / math.sqrt(2) / math.sqrt(5 / 3)
    torch.testing.assert_close(weights(loss, begun(loss, batch), out)[:, 0], a)
    # GRPO on the sum cannot tell the groups apart
    on_sum = begun(GRPO(std_floor=0.0), batch).advantage[:, 0]
    torch.testing.assert_close(on_sum[:2], on_sum[2:])


def test_one_channel_is_grpo_whitened():
    g = torch.Generator().manual_seed(0)
    rewards = torch.randn(4, 1, generator=g, dtype=torch.float64)
    batch, _ = channels(rewards)
    grpo = begun(GRPO(std_floor=1e-12), batch).advantage
    want = adv.standardise(grpo, batch.mask, 1e-12)
    torch.testing.assert_close(begun(GDPO(std_floor=1e-12), batch).advantage, want)


def test_units_of_a_channel_do_not_matter():
    batch, _ = channels(TWO)
    other, _ = channels(TWO * torch.tensor([30.0, 0.2]) - 5.0)
    loss = GDPO(std_floor=1e-12)
    torch.testing.assert_close(begun(loss, other).advantage, begun(loss, batch).advantage)


def test_weights_of_channels():
    batch, _ = channels(TWO)
    only_second = begun(GDPO(weights="0, 1", std_floor=1e-12), batch).advantage[:, 0]
    half = math.sqrt(3) / 2
    torch.testing.assert_close(only_second, torch.tensor([-half, half, -half, half], dtype=torch.float64))
    with pytest.raises(ValueError, match="1 weights for 2 reward channels"):
        begun(GDPO(weights="1"), batch)
    with pytest.raises(ValueError, match="separated by commas"):
        GDPO(weights="1;2")


def test_whitening_over_positions_counts_long_sequences_more():
    mask = torch.tensor([[True, False, False], [True, True, True], [True, False, False], [True, True, True]])
    batch, _ = channels(TWO, mask)
    got = begun(GDPO(whiten="tokens", std_floor=1e-12), batch).advantage[mask]
    torch.testing.assert_close(got.mean().item(), 0.0, atol=1e-12, rtol=0)
    torch.testing.assert_close(got.std().item(), 1.0, atol=1e-9, rtol=0)
    rows = begun(GDPO(std_floor=1e-12), batch).advantage[:, 0]
    torch.testing.assert_close(rows.std().item(), 1.0, atol=1e-9, rtol=0)
    assert (got.max() - rows.max()).abs() > 0.1


def test_a_group_that_agrees_gives_exactly_nothing():
    batch, _ = channels(torch.tensor([[0.1, 0.3], [0.1, 0.3], [0, 1], [1, 1]], dtype=torch.float64))
    got = begun(GDPO(), batch).advantage
    assert got[:2].abs().max() == 0 and got[3] > 0
