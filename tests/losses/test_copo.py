"""COPO: what the group disagrees on is learnt within it, what it agrees on between groups."""

import math

import torch
from losses.golden import batch_of, begun, column, weights

from ctrlrl.losses.copo import COPO
from ctrlrl.losses.grpo import GRPO


def answered(returns, answer, per_group, ratios=None):
    rows = len(returns)
    batch, out = batch_of(torch.ones(rows, 1, dtype=torch.float64) if ratios is None else ratios, torch.zeros(rows, 1))
    return batch._replace(
        sequence_return=torch.tensor(returns, dtype=torch.float64),
        answer=torch.tensor(answer),
        group=torch.arange(rows) // per_group,
        logp_ref=out.logp,
    ), out


def test_golden_table():
    """Two groups of two with entropies log 2 and 0; at threshold log 2 and slope 1 the shares are 1/2 and 1/3.

    Local: +-1/sqrt 2 in the first, 0 in the second. Between: means 1/2 and 1, so -+1/sqrt 2.
    """
    batch, out = answered([1, 0, 1, 1], [3, 8, 3, 3], 2, column(1.1, 1.1, 0.7, 1.3))
    loss = COPO(sharpness=1.0, threshold=math.log(2), std_floor=1e-12)
    s = 1 / math.sqrt(2)
    # in the second group only the part between groups is left, positive: 0.7 counts, 1.3 is clipped
    expected = column(1.1 * (s - s) / 2, 1.1 * (-s - s) / 2, 0.7 * 2 / 3 * s, 0.0)
    torch.testing.assert_close(weights(loss, begun(loss, batch), out), expected)


def test_parts_of_opposite_sign_are_clipped_each_for_itself():
    """At r = 1.3 the positive part is silent and the negative one is not: their sum would be another loss."""
    batch, out = answered([1, 0, 1, 1], [3, 8, 3, 3], 2, column(1.3, 1.0, 1.0, 1.0))
    loss = COPO(sharpness=1.0, threshold=math.log(2), std_floor=1e-12)
    got = weights(loss, begun(loss, batch), out)[0]
    torch.testing.assert_close(got, column(-1.3 / math.sqrt(2) / 2)[0])


def test_a_group_that_agrees_still_learns_from_the_others():
    batch, out = answered([1, 1, 0, 0], [1, 1, 2, 2], 2)
    loss = COPO(std_floor=1e-12)
    start = loss.begin(batch, {}, {})
    assert start.batch.advantage.abs().max() == 0
    torch.testing.assert_close(weights(loss, start.batch, out), column(1, 1, -1, -1) / math.sqrt(2))
    torch.testing.assert_close(start.stats["local_share"].item(), 9.4e-14, atol=1e-14, rtol=0)


def test_with_a_threshold_far_below_it_is_grpo():
    batch, out = answered([1, 0, 1, 1], [3, 8, 3, 3], 2)
    got = weights(COPO(threshold=-100.0), begun(COPO(threshold=-100.0), batch), out)
    grpo = GRPO(ref_kl_coef=0.0)
    torch.testing.assert_close(got, weights(grpo, begun(grpo, batch), out))


def test_outcomes_that_all_agree_give_exactly_nothing():
    batch, out = answered([0.1] * 6, [1, 2, 3, 1, 1, 1], 3)
    assert weights(COPO(), begun(COPO(), batch), out).abs().max() == 0
