"""P3O's golden tables, and what pairs have in common with leaving one out."""

import itertools
import math

import pytest
import torch
from losses.golden import batch_of, column, weights

from ctrlrl.core import advantage as adv
from ctrlrl.losses.p3o import P3O

F64 = torch.float64


def grouped(ratios, returns, group=None, mask=None):
    ratios = torch.as_tensor(ratios, dtype=F64)
    batch, out = batch_of(ratios, torch.zeros_like(ratios), mask)
    group = torch.tensor([0] * len(returns) if group is None else group)
    return batch._replace(sequence_return=torch.tensor(returns, dtype=F64), group=group), out


def test_golden_table_of_separate_clips():
    """R = (3, 1): differences +-2. 1.3 with + is clipped, 1.1 with - is not; one pair, so no average."""
    batch, out = grouped([[1.3], [1.1]], [3.0, 1.0])
    torch.testing.assert_close(weights(P3O(clip="separate"), batch, out), column(0.0, -2.2))
    batch, out = grouped([[1.1], [0.7]], [3.0, 1.0])
    torch.testing.assert_close(weights(P3O(clip="separate"), batch, out), column(2.2, 0.0))


def test_golden_table_of_the_joint_clip():
    """Ratio of ratios 1.1 and 1/1.1, differences +-1: weight 1.1 + 1/1.1 on either, opposite signs."""
    both = 1.1 + 1 / 1.1
    batch, out = grouped([[1.21], [1.1]], [3.0, 1.0])
    torch.testing.assert_close(weights(P3O(), batch, out), column(both, -both))
    # 1.3 / 0.9 = 1.44 is beyond the band one way, 0.69 the other: no gradient, though 0.9 alone would have one
    batch, out = grouped([[1.3], [0.9]], [3.0, 1.0])
    assert weights(P3O(), batch, out).abs().max() == 0
    # the same two moved the wrong way keep theirs
    batch, out = grouped([[0.9], [1.3]], [3.0, 1.0])
    torch.testing.assert_close(weights(P3O(), batch, out), column(1, -1) * (0.9 / 1.3 + 1.3 / 0.9))


@pytest.mark.parametrize("clip", ["joint", "separate"])
def test_on_policy_all_pairs_are_leave_one_out(clip):
    group = [2, 2, 2, 5, 5, 5, 5, 7]
    returns = torch.randn(8, generator=torch.Generator().manual_seed(0)).tolist()
    mask = torch.tensor([[True, True], [True, False]] * 4)
    batch, out = grouped(torch.ones(8, 2), returns, group, mask)
    rloo = adv.center_scale(batch.sequence_return, batch.group, "leave_one_out", "none")
    got = weights(P3O(clip=clip), batch, out)
    torch.testing.assert_close(got, torch.where(mask, rloo.unsqueeze(-1), 0.0), atol=1e-12, rtol=0)
    moved = batch._replace(sequence_return=batch.sequence_return + 3.0 * batch.group)
    torch.testing.assert_close(weights(P3O(clip=clip), moved, out), got, atol=1e-12, rtol=0)


def test_differences_of_log_probabilities_give_the_policy_gradient_and_their_sum_gives_nothing():
    """Exact, over all pairs of three arms: a lost fraction bar, log of a product, would have expectation zero."""
    logits = torch.tensor([0.2, -0.4, 0.9], dtype=F64)
    p, returns = logits.softmax(0), torch.tensor([1.0, 0.0, 3.0], dtype=F64)
    score = torch.eye(3, dtype=F64) - p
    expected, product = torch.zeros(3, dtype=F64), torch.zeros(3, dtype=F64)
    for i, j in itertools.product(range(3), range(3)):
        batch, out = grouped(torch.ones(2, 1), [returns[i].item(), returns[j].item()])
        w = weights(P3O(), batch, out).squeeze(-1) / 2
        expected += p[i] * p[j] * (w[0] * score[i] + w[1] * score[j])
        product += p[i] * p[j] * (w[0] * score[i] - w[1] * score[j])
    true = p * (returns - (p * returns).sum())
    torch.testing.assert_close(expected, true)
    torch.testing.assert_close(true, torch.tensor([-0.27409, -0.30447, 0.57856], dtype=F64), atol=6e-6, rtol=0)
    assert product.abs().max() < 1e-15


def test_the_ratio_is_of_the_whole_sequence():
    batch, out = grouped([[1.1, 1.05], [1.0, 1.0]], [1.0, 0.0])
    got = weights(P3O(clip="separate"), batch, out)
    torch.testing.assert_close(got, torch.tensor([[1.155, 1.155], [-1.0, -1.0]], dtype=F64))


def test_long_episodes_and_equal_returns():
    far = torch.full((2, 3), math.exp(90.0), dtype=F64)
    far[1] = math.exp(-90.0)
    batch, out = grouped(far, [1.0, 0.0])
    assert all(weights(P3O(clip=c), batch, out).isfinite().all() for c in ("joint", "separate"))
    batch, out = grouped([[1.3], [0.6], [1.0]], [0.1, 0.1, 0.1])
    assert weights(P3O(), batch, out).abs().max() == 0
    assert P3O().together(batch) is batch.group
