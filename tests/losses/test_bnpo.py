"""BNPO's golden table: pass rates 1/4, 1/2, 3/4 fit a density with alpha = beta = 3/2."""

import math

import pytest
import torch
from losses.golden import batch_of, begun, column, weights

from ctrlrl.losses.bnpo import BNPO
from ctrlrl.losses.grpo import GRPO

QUARTERS = [1, 0, 0, 0, 1, 0, 1, 0, 1, 1, 0, 1]


def outcomes(score, per_group, ratios=None, rewards=None):
    score = torch.tensor(score, dtype=torch.float64)
    rows = len(score)
    batch, out = batch_of(torch.ones(rows, 1, dtype=torch.float64) if ratios is None else ratios, torch.zeros(rows, 1))
    return batch._replace(
        score=score, sequence_return=score, group=torch.arange(rows) // per_group, rewards=rewards, logp_ref=out.logp
    ), out


def test_golden_table():
    """1/f(1/4) = (pi/8) / sqrt(3/16) = 0.906900, 1/f(1/2) = pi/4."""
    batch, out = outcomes(QUARTERS, 4)
    loss = BNPO()
    got = weights(loss, begun(loss, batch), out)
    edge, middle = 0.906900, math.pi / 4
    expected = [0.75 * edge, *[-0.25 * edge] * 3, *[0.5 * middle, -0.5 * middle] * 2]
    expected += [0.25 * edge, 0.25 * edge, -0.75 * edge, 0.25 * edge]
    torch.testing.assert_close(got, column(*expected), atol=1e-6, rtol=0)
    torch.testing.assert_close(got[0].item(), 0.680175, atol=1e-6, rtol=0)


def test_the_clip_is_wider_above():
    batch, out = outcomes(QUARTERS, 4, column(1.27, 1.0, 1.0, 0.79, 1.29, *[1.0] * 7))
    got = weights(BNPO(), begun(BNPO(), batch), out)[:, 0]
    assert got[0] > 0 and got[3] == 0 and got[4] == 0


def test_at_three_halves_it_is_grpo_times_pi_over_eight():
    batch, _ = outcomes(QUARTERS, 4)
    grpo = begun(GRPO(ddof=0, std_floor=1e-300), batch).advantage
    torch.testing.assert_close(begun(BNPO(), batch).advantage, math.pi / 8 * grpo)


def test_one_group_or_groups_that_agree_are_reinforce_with_the_groups_mean():
    for score, size in (([1, 0, 0, 0], 4), ([1, 0, 0, 1], 2)):
        batch, _ = outcomes(score, size)
        got = begun(BNPO(), batch).advantage[:, 0]
        torch.testing.assert_close(got, batch.score - batch.score.view(-1, size).mean(-1).repeat_interleave(size))


def test_a_group_that_fails_or_solves_everything_gives_exactly_nothing():
    batch, out = outcomes([0, 0, 1, 1, 1, 0], 2)
    got = weights(BNPO(), begun(BNPO(), batch), out)
    assert got[:4].abs().max() == 0 and got[4] > 0


def test_long_sequences_count_by_their_positions():
    batch, _ = outcomes([1, 0], 2)
    mask = torch.tensor([[True, True, True], [True, False, False]])
    batch, out = batch_of(torch.ones(2, 3, dtype=torch.float64), torch.zeros(2, 3), mask)
    batch = batch._replace(score=torch.tensor([1.0, 0.0], dtype=torch.float64), group=torch.zeros(2, dtype=torch.long))
    got = weights(BNPO(), begun(BNPO(), batch), out)
    torch.testing.assert_close(got.sum(-1), torch.tensor([1.5, -0.5], dtype=torch.float64))
    assert BNPO().prepare(begun(BNPO(), batch), {}).denominator == 2


@pytest.mark.parametrize(("decompose", "factor"), [("sum", 1.0), ("mean", 0.5)])
def test_channels_are_normalised_apart(decompose, factor):
    """Channel 0 is the table's; channel 1 is the same in other units and group order."""
    score = torch.tensor(QUARTERS, dtype=torch.float64)
    rewards = torch.stack([score, 7.0 - 3.0 * score], -1)
    batch, _ = outcomes(QUARTERS, 4, rewards=rewards)
    loss = BNPO(decompose=decompose)
    assert loss.required() == {"groups", "rewards"} and BNPO().required() == {"groups", "score"}
    got = begun(loss, batch).advantage
    # the second channel's advantages are the first's with their sign turned
    assert got.abs().max() < 1e-12
    only = begun(loss, batch._replace(rewards=torch.stack([score, torch.zeros_like(score)], -1))).advantage
    torch.testing.assert_close(only, factor * begun(BNPO(), batch).advantage)
