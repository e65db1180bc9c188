"""Statistics of outcomes, one number per sequence: within a group, over groups, and against tracked quantiles."""

from __future__ import annotations

import torch
from torch import Tensor

from ctrlrl.core import advantage as adv
from ctrlrl.core import reduce

BETA_WEIGHT_MAX = 1e6
"""Bound on the inverse of a Beta density, which is infinite where every outcome is 0 or every one is 1."""
MIN_SPREAD = 1e-8
"""Variance of the groups' means below which they say nothing about a Beta distribution."""


def first_of_group(group: Tensor) -> Tensor:
    """One row of each group, so that a statistic over groups counts each of them once.

    1[no earlier row has the same id]

    ======  ===  ============
    group   [B]  int, any ids
    return  [B]  bool
    ======  ===  ============
    """
    rank = reduce.dense_ids(group)
    place = torch.arange(len(group), device=group.device)
    earliest = torch.full_like(place, len(group)).scatter_reduce(0, rank, place, "amin")
    return earliest.gather(0, rank) == place


def standardise_groups(x: Tensor, group: Tensor, eps: float = 1e-6) -> Tensor:
    """How a group's mean compares with that of the other groups, given to each row.

    (m_g - mean_g m) / (std_g m + eps);  each group counts once, std is unbiased

    ======  ===  =====================================
    x       [B]  outcomes
    group   [B]  int, any ids
    eps          added to the deviation
    return  [B]  0 if there is one group or all agree
    ======  ===  =====================================
    """
    return reduce.segment_sum(adv.standardise(adv.group_mean(x, group), first_of_group(group), eps), group)


def beta_parameters(x: Tensor, group: Tensor) -> tuple[Tensor, Tensor]:
    """Parameters of BNPO's normaliser (arXiv 2506.02864), from the moments of the groups' pass rates.

    k = m (1 - m) / v - 1,  alpha = max(1, 1 + k m / 3),  beta = max(1, 1 + k (1 - m) / 3)

    m and v are mean and unbiased variance of the groups' means. One group, or groups that all agree,
    say nothing about the spread: alpha = beta = 1, a flat density.

    ======  ===  ========================
    x       [B]  outcomes in [0, 1]
    group   [B]  int, any ids
    return  []   alpha and beta, each >= 1
    ======  ===  ========================
    """
    rate, first = adv.group_mean(x, group), first_of_group(group)
    mean = reduce.masked_mean(rate, first)
    variance = reduce.masked_sum((rate - mean).square(), first) / (first.sum() - 1).clamp(min=1)
    concentration = mean * (1.0 - mean) / variance.clamp(min=MIN_SPREAD) - 1.0
    concentration = torch.where(variance > MIN_SPREAD, concentration, torch.zeros_like(variance))
    return (
        (1.0 + concentration * mean / 3.0).clamp(min=1.0),
        (1.0 + concentration * (1.0 - mean) / 3.0).clamp(min=1.0),
    )


def beta_weight(rate: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
    """Inverse of a Beta density. With alpha = beta = 3/2 it is pi/8 over the deviation of a coin.

    min(1e6, 1 / f(p; alpha, beta)),  f = p^(alpha - 1) (1 - p)^(beta - 1) / B(alpha, beta)

    ======  ===  ==================
    rate    [B]  p in [0, 1]
    alpha   []   first parameter
    beta    []   second parameter
    return  [B]  weights
    ======  ===  ==================
    """
    p = rate.clamp(0.0, 1.0)
    log_norm = torch.lgamma(alpha) + torch.lgamma(beta) - torch.lgamma(alpha + beta)
    log_density = torch.xlogy(alpha - 1.0, p) + torch.xlogy(beta - 1.0, 1.0 - p) - log_norm
    return (-log_density).exp().clamp(max=BETA_WEIGHT_MAX)


def rank_normal(x: Tensor, group: Tensor) -> Tensor:
    """Normal quantile of each outcome's rank in its group: the optimal transport of the group onto N(0, 1).

    z_(j) = Phi^-1((j - 1/2) / n);  equal outcomes share the mean of their z

    ======  ===  ========================================================
    x       [B]  outcomes
    group   [B]  int, any ids
    return  [B]  zero sum in each group; exactly 0 where a group agrees
    ======  ===  ========================================================
    """
    ids = reduce.dense_ids(group)
    by_value = x.argsort(stable=True)
    order = by_value[ids[by_value].argsort(stable=True)]
    ids_sorted, x_sorted = ids[order], x[order]
    count = reduce.segment_sum(torch.ones_like(x), ids)[order]
    place = torch.arange(len(x), device=x.device)
    start = torch.full_like(place, len(x)).scatter_reduce(0, ids_sorted, place, "amin").gather(0, ids_sorted)
    z = torch.special.ndtri((place - start + 0.5).to(x.dtype) / count)
    changes = (ids_sorted[1:] != ids_sorted[:-1]) | (x_sorted[1:] != x_sorted[:-1])
    tie = torch.cat([torch.zeros_like(ids_sorted[:1]), changes.long().cumsum(0)])
    tied = reduce.segment_sum(torch.ones_like(z), tie)
    mean = torch.where(tied == count, torch.zeros_like(z), reduce.segment_sum(z, tie) / tied)
    return torch.zeros_like(x).scatter(0, order, mean)


def share_of_best(x: Tensor, group: Tensor) -> Tensor:
    """Chance of being taken as the best of the group, ties broken by lot. Of ``-x``: as the worst.

    1[x_i = max_g x] / #{j in g: x_j = max_g x}

    ======  ===  ======================
    x       [B]  outcomes
    group   [B]  int, any ids
    return  [B]  sums to 1 in a group
    ======  ===  ======================
    """
    ids = reduce.dense_ids(group)
    top = torch.full_like(x, -torch.inf).scatter_reduce(0, ids, x, "amax").gather(0, ids)
    best = (x == top).to(x.dtype)
    return best / reduce.segment_sum(best, ids)


def answer_entropy(answer: Tensor, group: Tensor, dtype: torch.dtype) -> Tensor:
    """Entropy, in nats, of the answers that a group gives.

    H_g = -sum_a p_a log p_a,  p_a the share of the group's rows whose answer is a

    ======  ===  ===========================
    answer  [B]  int; equal ids agree
    group   [B]  int, any ids
    dtype        of the result
    return  [B]  entropy of the row's group
    ======  ===  ===========================
    """
    ids, kind = reduce.dense_ids(group), reduce.dense_ids(answer)
    one = torch.ones(answer.shape, dtype=dtype, device=answer.device)
    size = reduce.segment_sum(one, ids)
    share = reduce.segment_sum(one, ids * len(answer) + kind) / size
    # a row stands for 1 / (size share) of its answer, so the mean of -log p over rows is the entropy
    return -reduce.segment_sum(share.log(), ids) / size


def distinct_mean_gap(x: Tensor, score: Tensor, group: Tensor, present: Tensor, gap: float) -> Tensor:
    """Mean difference to the members of the group that are told apart from the row; gap 0 gives x - group mean.

    1/n_g sum_{j in g} 1[|s_i - s_j| >= gap] (x_i - x_j)

    =======  ===  =====================================================
    x        [B]  outcomes
    score    [B]  s, what tells rows apart
    group    [B]  int, any ids
    present  [B]  bool; rows that are not count nowhere and get 0
    gap           smallest difference of s that counts
    return   [B]  zero sum over the present rows of a group
    =======  ===  =====================================================
    """
    both = (group[:, None] == group[None, :]) & present[:, None] & present[None, :]
    distinct = both & ((score[:, None] - score[None, :]).abs() >= gap)
    difference = torch.where(distinct, x[:, None] - x[None, :], torch.zeros((), dtype=x.dtype, device=x.device))
    return difference.sum(-1) / both.sum(-1).clamp(min=1)


def optimal_baseline_gap(x: Tensor, norm: Tensor, group: Tensor) -> Tensor:
    """Distance to the baseline of least variance: the mean weighted by squared score norms.

    x_i - sum_g n_j x_j / sum_g n_j;  the plain mean where all norms of a group are 0

    ======  ===  ==================================================
    x       [B]  outcomes
    norm    [B]  n = |grad log pi|^2 >= 0
    group   [B]  int, any ids
    return  [B]  exactly 0 where a group agrees
    ======  ===  ==================================================
    """
    ids = reduce.dense_ids(group)
    n = torch.where(reduce.segment_sum(norm, ids) > 0, norm, torch.ones_like(norm))
    # relative to the group's smallest outcome, so that equal outcomes leave no rounding behind
    low = torch.full_like(x, torch.inf).scatter_reduce(0, ids, x, "amin").gather(0, ids)
    return (x - low) - reduce.segment_sum(n * (x - low), ids) / reduce.segment_sum(n, ids)


def track_quantile(quantile: Tensor, level: Tensor, x: Tensor, rate: float) -> Tensor:
    """One step of a quantile tracker: no drift at the true quantile, upwards from below it.

    q + rate (level - mean_j 1[x_j < q])

    ========  ===  ======================
    quantile  [K]  q before
    level     [K]  in [0, 1]
    x         [M]  new observations
    rate           size of the step
    return    [K]  q after
    ========  ===  ======================
    """
    below = (x[None, :] < quantile[:, None]).to(x.dtype).mean(-1)
    return quantile + rate * (level - below)


def mixed_value_at_risk(
    x: Tensor, q_low: Tensor, q_high: Tensor, alpha: float, beta: float, tail_weight: float
) -> Tensor:
    """Piecewise linear advantage that follows the lower tail and is flat above an upper quantile.

    ([ (x - qa)^+ - (x - qb)^+ + qa - qb ] / (beta - alpha) - w (qa - x)^+ / alpha) / (1 + w)

    The tail's term is absent at alpha = 0, where there is no tail.

    ===========  ===  ===============================
    x            [M]  outcomes
    q_low        []   qa, quantile at level alpha
    q_high       []   qb, quantile at level beta
    alpha             lower level
    beta              upper level, above alpha
    tail_weight       w of the tail below qa
    return       [M]  never positive for qa <= qb
    ===========  ===  ===============================
    """
    middle = ((x - q_low).clamp(min=0.0) - (x - q_high).clamp(min=0.0) + q_low - q_high) / (beta - alpha)
    tail = -(q_low - x).clamp(min=0.0) / alpha if alpha > 0 else torch.zeros_like(x)
    return (tail_weight * tail + middle) / (1.0 + tail_weight)


def push(queue: Tensor, count: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Append to a first-in-first-out queue of fixed size; the newest entries stand last.

    queue <- (queue, x)[-N:],  count <- min(N, count + M)

    ======  ===  =================================
    queue   [N]  entries; only the last count hold
    count   []   int, how many hold
    x       [M]  new entries, oldest first
    return       new queue [N] and new count []
    ======  ===  =================================
    """
    size = len(queue)
    return torch.cat([queue, x])[-size:], (count + len(x)).clamp(max=size)


def queue_median(queue: Tensor, count: Tensor) -> Tensor:
    """Median of what a queue of :func:`push` holds, halfway between the middle two of an even number.

    Q50(queue[N - count:]);  NaN of an empty queue

    ======  ===  =================================
    queue   [N]  entries; only the last count hold
    count   []   int, how many hold
    return  []   median
    ======  ===  =================================
    """
    empty = torch.arange(len(queue), device=queue.device) < len(queue) - count
    return torch.where(empty, torch.nan, queue).nanquantile(0.5)
