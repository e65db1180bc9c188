import math

import pytest
import torch

from ctrlrl.core import advantage as adv
from ctrlrl.core import outcome

F64 = torch.float64


def f64(*numbers):
    return torch.tensor(numbers, dtype=F64)


def close(got, want, atol=1e-12):
    torch.testing.assert_close(got, want, atol=atol, rtol=0)


def test_each_group_has_one_first_row():
    got = outcome.first_of_group(torch.tensor([7, -2, 7, 7, -2, 0]))
    assert got.tolist() == [True, True, False, False, False, True]


def test_groups_are_standardised_once_each_whatever_their_size():
    """Means 1/4 and 3/4: deviation sqrt(1/8), so +-1/sqrt(2); the second group has more rows and weighs no more."""
    got = outcome.standardise_groups(f64(0, 0.5, 1, 0.5, 1, 0.5), torch.tensor([0, 0, 1, 1, 1, 1]), eps=0.0)
    close(got, f64(-1, -1, 1, 1, 1, 1) / math.sqrt(2))
    assert outcome.standardise_groups(f64(0.3, 0.9), torch.tensor([4, 4])).abs().max() == 0


def test_beta_parameters_by_hand():
    """Pass rates 1/4, 1/2, 3/4: m = 1/2, v = 1/16, k = 3, a = b = 3/2, alpha = beta = 3/2."""
    x = f64(1, 0, 0, 0, 1, 0, 1, 0, 1, 1, 0, 1)
    alpha, beta = outcome.beta_parameters(x, torch.arange(12) // 4)
    close(torch.stack([alpha, beta]), f64(1.5, 1.5))
    # four prompts at 1/4, 1/2, 3/4, 1/2: v = 1/24, k = 5, alpha = beta = 11/6
    alpha, beta = outcome.beta_parameters(f64(0.25, 0.5, 0.75, 0.5), torch.arange(4))
    close(torch.stack([alpha, beta]), f64(11 / 6, 11 / 6))
    # m = 1/4, v = 1/32: k = 5, a = 5/4, b = 15/4
    alpha, beta = outcome.beta_parameters(f64(0.125, 0.375), torch.arange(2))
    close(torch.stack([alpha, beta]), f64(1 + 5 / 12, 1 + 15 / 12))


@pytest.mark.parametrize("rates", [(0.5,), (0.5, 0.5, 0.5), (0.0, 1.0), (1.0, 1.0)])
def test_beta_parameters_where_moments_say_nothing_are_flat(rates):
    """One group, no spread, and more spread than any Beta distribution has."""
    alpha, beta = outcome.beta_parameters(f64(*rates), torch.arange(len(rates)))
    assert alpha == 1 and beta == 1


def test_beta_weight_by_hand():
    p = f64(0.0, 0.25, 0.5, 1.0)
    assert (outcome.beta_weight(p, f64(1.0), f64(1.0)) == 1).all()
    got = outcome.beta_weight(p, f64(1.5), f64(1.5))
    close(got[1:3], math.pi / 8 / (p * (1 - p)).sqrt()[1:3])
    assert got[0] == got[3] == 1e6
    skewed = outcome.beta_weight(f64(0.25), f64(2.0), f64(3.0))  # f = 12 p (1 - p)^2
    close(skewed, f64(1 / (12 * 0.25 * 0.5625)))
    close(outcome.beta_weight(f64(0.25, 0.5), f64(11 / 6), f64(11 / 6)), f64(1 / 1.1238, 1 / 1.428251), atol=1e-4)


@pytest.mark.parametrize(
    ("x", "want"),
    [
        ([0, 0, 0, 0, 1], [-0.32, -0.32, -0.32, -0.32, 1.28]),
        ([0, 0, 1, 1, 1], [-0.90, -0.90, 0.60, 0.60, 0.60]),
        ([0.1, 0.1, 0.1, 0.2, 1], [-0.60, -0.60, -0.60, 0.52, 1.28]),
        ([0.81, 0.81, 0.82, 0.82, 0.83], [-0.90, -0.90, 0.26, 0.26, 1.28]),
    ],
)
def test_normal_ranks_are_those_of_the_papers_figure(x, want):
    close(outcome.rank_normal(f64(*x), torch.zeros(5, dtype=torch.long)), f64(*want), atol=5e-3)


def test_normal_ranks_of_interleaved_groups():
    g = torch.Generator().manual_seed(0)
    x = torch.randint(4, (40,), generator=g).to(F64)
    group = torch.randint(3, (40,), generator=g) * 5 - 2
    got = outcome.rank_normal(x, group)
    for k in group.unique():
        mine = group == k
        alone = outcome.rank_normal(x[mine], torch.zeros(int(mine.sum()), dtype=torch.long))
        close(got[mine], alone)
        close(got[mine].sum(), f64(0.0).squeeze())
    close(outcome.rank_normal(-x, group), -got)
    close(outcome.rank_normal(x.exp() * 3, group), got)
    for n in range(1, 40):
        assert outcome.rank_normal(torch.full((n,), 0.1, dtype=F64), torch.zeros(n, dtype=torch.long)).abs().max() == 0


def test_the_best_share_their_place():
    got = outcome.share_of_best(f64(1, 3, 3, 2, 5), torch.tensor([0, 0, 0, 0, 9]))
    assert got.tolist() == [0, 0.5, 0.5, 0, 1]


def test_entropy_of_answers():
    answer, group = torch.tensor([5, 5, 8, 9, 5, 5, 8, 5]), torch.tensor([0, 0, 0, 0, 1, 1, 2, 2])
    got = outcome.answer_entropy(answer, group, F64)
    close(got, f64(*[1.5 * math.log(2)] * 4, 0, 0, math.log(2), math.log(2)))


def test_gap_to_the_distinct():
    x, s = f64(1, 1, 0, 0), f64(0.9, 0.55, 0.5, 0.1)
    group, here = torch.zeros(4, dtype=torch.long), torch.ones(4, dtype=torch.bool)
    close(outcome.distinct_mean_gap(x, s, group, here, 0.2), f64(0.5, 0.25, -0.25, -0.5))
    close(outcome.distinct_mean_gap(x, s, group, here, 0.0), x - x.mean())
    assert outcome.distinct_mean_gap(x, s, group, here, 2.0).abs().max() == 0
    at_the_gap = outcome.distinct_mean_gap(f64(1, 0), f64(0.5, 0.25), group[:2], here[:2], 0.25)
    close(at_the_gap, f64(0.5, -0.5))
    here = torch.tensor([True, False, True, True])
    close(outcome.distinct_mean_gap(x, s, group, here, 0.0), f64(2 / 3, 0, -1 / 3, -1 / 3))


def test_the_optimal_baseline_has_no_variance_in_a_bandit_of_two_arms():
    """pi(1) = p, score norms 2 (1 - p)^2 and 2 p^2; over many draws b* = 1 - p."""
    p = 0.2
    reward, norm = f64(1, 0, 0, 0, 0), f64(2 * 0.8**2, *[2 * p**2] * 4)
    group = torch.zeros(5, dtype=torch.long)
    gap = outcome.optimal_baseline_gap(reward, norm, group)
    close(gap, f64(p, *[-(1 - p)] * 4))
    close(outcome.optimal_baseline_gap(reward, torch.full_like(norm, 3.0), group), reward - reward.mean())
    close(outcome.optimal_baseline_gap(reward, torch.zeros_like(norm), group), reward - reward.mean())
    assert outcome.optimal_baseline_gap(f64(0.1, 0.1, 0.1), f64(0.3, 0.7, 0.1), group[:3]).abs().max() == 0


def test_a_tracked_quantile_rests_at_the_quantile_only():
    x, level = f64(0, 1, 2, 3, 4), f64(0.2, 0.8)
    close(outcome.track_quantile(f64(1, 4), level, x, 0.1), f64(1, 4))
    close(outcome.track_quantile(f64(-1, 5), level, x, 0.1), f64(-1 + 0.02, 5 - 0.02))
    q = f64(0.0, 0.0)
    for _ in range(4000):
        q = outcome.track_quantile(q, f64(0.3, 0.7), x, 0.01)
    close(q, f64(1, 3), atol=0.05)


def test_mixed_value_at_risk_by_hand():
    s = f64(0, 1, 2, 3, 4, 5)
    got = outcome.mixed_value_at_risk(s, f64(1.0), f64(4.0), 0.2, 0.8, 1.5)
    close(got, f64(-5, -2, -4 / 3, -2 / 3, 0, 0))
    plain = outcome.mixed_value_at_risk(f64(0, 1, 3, 5), f64(0.0), f64(5.0), 0.0, 1.0, 0.0)
    close(plain, f64(-5, -4, -2, 0))


def test_a_queue_keeps_the_newest_and_its_median_is_interpolated():
    queue, count = torch.zeros(5, dtype=F64), torch.tensor(0)
    assert outcome.queue_median(queue, count).isnan()
    queue, count = outcome.push(queue, count, f64(0, 0.25, 0.5, 1))
    assert count == 4
    close(outcome.queue_median(queue, count), f64(0.375).squeeze())
    queue, count = outcome.push(queue, count, f64(2, 3, 4))
    assert queue.tolist() == [0.5, 1, 2, 3, 4] and count == 5
    queue, count = outcome.push(queue, count, torch.arange(9, dtype=F64))
    assert queue.tolist() == [4, 5, 6, 7, 8]


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_types_are_kept(dtype):
    x, group = torch.tensor([0.0, 1.0, 0.5], dtype=dtype), torch.tensor([0, 0, 1])
    here = torch.ones(3, dtype=torch.bool)
    made = [
        outcome.standardise_groups(x, group), *outcome.beta_parameters(x, group), outcome.rank_normal(x, group),
        outcome.share_of_best(x, group), outcome.answer_entropy(group, group, dtype),
        outcome.distinct_mean_gap(x, x, group, here, 0.1), outcome.optimal_baseline_gap(x, x, group),
        outcome.track_quantile(x, x, x, 0.1), outcome.mixed_value_at_risk(x, x[0], x[1], 0.2, 0.8, 1.5),
    ]  # fmt: skip
    assert all(m.dtype == dtype for m in made)
    assert math.isclose(adv.group_mean(x, group)[0], 0.5)
