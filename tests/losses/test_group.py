"""The bases of the losses on groups: what a subclass gets without writing a line."""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from losses.golden import batch_of, begun, knobs_of, weights

from ctrlrl.core import ratio
from ctrlrl.losses.group import AGGREGATIONS, ClippedGroupLoss, GroupLoss

MASK = torch.tensor([[True, True, True, True], [True, False, False, False]])
RATIOS = torch.tensor([[1.1, 1.3, 0.7, 0.9], [0.7, 1.0, 1.0, 1.0]], dtype=torch.float64)
SCALED = math.sqrt(0.5)
"""Of outcomes 1 and 0, both half a unit from their mean, over the unbiased deviation sqrt(1/2)."""


def two(returns=(1.0, 0.0)):
    batch, out = batch_of(RATIOS, torch.full_like(RATIOS, 7.0), MASK)
    returns = torch.tensor(returns, dtype=torch.float64)
    return batch._replace(sequence_return=returns, group=torch.tensor([0, 0])), out


def by_hand(per_position, shares):
    return torch.tensor(per_position, dtype=torch.float64) * torch.tensor(shares, dtype=torch.float64)


def test_every_position_gets_its_sequences_outcome_and_none_behind_the_end():
    advantage = begun(ClippedGroupLoss(), two()[0]).advantage
    expected = SCALED * torch.tensor([[1.0, 1.0, 1.0, 1.0], [-1.0, 0.0, 0.0, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(advantage, expected, atol=1e-5, rtol=0)


def test_an_advantage_by_position_stays_as_it_is():
    class ByPosition(GroupLoss):
        def outcome_advantage(self, batch):
            return torch.arange(8.0, dtype=torch.float64).view(2, 4)

    expected = torch.tensor([[0.0, 1.0, 2.0, 3.0], [4.0, 0.0, 0.0, 0.0]], dtype=torch.float64)
    assert begun(ByPosition(), two()[0]).advantage.equal(expected)


def test_the_three_ways_to_average():
    """Five positions in two sequences: a fifth each; a half by sequence, then a quarter or the whole of it."""
    found = {}
    for name in AGGREGATIONS:
        loss = type(name, (ClippedGroupLoss,), {"aggregation": name})()
        batch, out = two()
        batch = begun(loss, batch)
        found[name] = weights(loss, batch, out) / loss.prepare(batch, knobs_of(loss)).denominator / SCALED
    # the ratio counts, but 1.3 with a gain and 0.7 with a loss are out of the band
    inside = [[1.1, 0.0, 0.7, 0.9], [0.0, 0.0, 0.0, 0.0]]
    for name, share in (
        ("token_mean", 1 / 5), ("sequence_mean_token_mean", 1 / 8), ("sequence_mean_token_sum", 1 / 2)
    ):  # fmt: skip
        expected = by_hand(inside, [[share] * 4, [0.0] * 4])
        torch.testing.assert_close(found[name], expected, atol=1e-5, rtol=0)


def test_the_band_is_that_of_the_settings():
    loss = ClippedGroupLoss(eps_low=0.4, eps_high=0.05)
    batch, out = two()
    batch = begun(loss, batch)
    expected = by_hand([[0.0, 0.0, 0.7, 0.9], [-0.7, 0.0, 0.0, 0.0]], [[1 / 4] * 4, [1.0] * 4])
    torch.testing.assert_close(weights(loss, batch, out) / SCALED, expected, atol=1e-5, rtol=0)


@dataclass(frozen=True)
class BySequence(ClippedGroupLoss):
    level: ClassVar[ratio.Level] = "sequence"


def test_at_the_level_of_sequences_all_positions_share_one_ratio():
    """The geometric mean of the row's ratios, 0.9743, and the 0.7 of the other, which is clipped."""
    loss, (batch, out) = BySequence(), two()
    batch = begun(loss, batch)
    mean = (1.1 * 1.3 * 0.7 * 0.9) ** 0.25
    r = loss.log_ratio(batch, out).exp()
    torch.testing.assert_close(r[0].mean().item(), mean)
    expected = by_hand([[mean] * 4, [0.0] * 4], [[1 / 4] * 4, [1.0] * 4])
    torch.testing.assert_close(weights(loss, batch, out) / SCALED, expected, atol=1e-5, rtol=0)
    clipped = loss.metrics(batch, out, knobs_of(loss))["clip_fraction"]
    assert clipped[MASK].tolist() == [0.0, 0.0, 0.0, 0.0, 1.0]


def test_at_the_level_of_positions_each_counts_its_own_clipping():
    loss, (batch, out) = ClippedGroupLoss(), two()
    clipped = loss.metrics(begun(loss, batch), out, knobs_of(loss))["clip_fraction"]
    assert clipped[MASK].tolist() == [0.0, 1.0, 1.0, 0.0, 1.0]
