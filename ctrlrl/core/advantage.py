"""Advantage estimates over time, and statistics over valid positions, batches and groups."""

from __future__ import annotations

from typing import Literal, TypeAlias

import torch
from torch import Tensor

from ctrlrl.core import reduce

Center: TypeAlias = Literal["none", "group", "leave_one_out", "batch"]
Scale: TypeAlias = Literal["none", "group", "batch"]


def linear_recurrence(a_t: Tensor, b_t: Tensor, dim: int = 0, reverse: bool = False) -> Tensor:
    """First-order linear recurrence by doubling: O(T log T) work in O(log T) steps.

    x_t = b_t + a_t x_{t-1}  (``reverse``: x_{t+1}), zero before the start

    Stable for ``|a_t| <= 1``. A coefficient of exactly 0 stops the sum, also one that holds NaN or
    infinity; it receives no gradient itself.

    =======  ==========  =============================================
    a_t      [..T..]     coefficients, ``|a_t| <= 1``
    b_t      [..T..]     inputs, same shape
    dim                  the dimension of time
    reverse              run from the end
    return   [..T..]     x_t
    =======  ==========  =============================================
    """
    a, b = torch.broadcast_tensors(a_t, b_t)
    a, b = a.movedim(dim, 0), b.movedim(dim, 0)
    if reverse:
        a, b = a.flip(0), b.flip(0)
    step = 1
    while step < a.shape[0]:
        carried = torch.where(a[step:] == 0, torch.zeros_like(b[step:]), a[step:] * b[:-step])
        b = torch.cat([b[:step], b[step:] + carried])
        a = torch.cat([a[:step], a[step:] * a[:-step]])
        step *= 2
    return (b.flip(0) if reverse else b).movedim(0, dim)


def gae(
    reward_t: Tensor, discount_t: Tensor, cut_t: Tensor, value: Tensor, value_t: Tensor, lam: float | Tensor
) -> Tensor:
    """Generalised advantage estimate (arXiv 1506.02438), with every episode end told apart.

    delta_t = r_t + discount_t V(s_{t+1}) - V(s_t)
    A_t     = delta_t + lam discount_t (1 - cut_t) A_{t+1}

    A termination has ``discount_t = 0`` and drops the next value; a truncation keeps it and only stops
    the sum. The end of the window stops the sum too. The advantage plus ``value`` is the lambda-return.

    ==========  ======  ====================================================================
    reward_t    [T, N]  reward of the transition t
    discount_t  [T, N]  gamma x (1 - terminated)
    cut_t       [T, N]  bool, terminated or truncated
    value       [T, N]  value of the observation before the transition
    value_t     [T, N]  value of the true next observation, never of one after a reset
    lam                 trace parameter in [0, 1]
    return      [T, N]  advantages
    ==========  ======  ====================================================================
    """
    value_t = torch.where(discount_t == 0, torch.zeros_like(value_t), value_t)
    delta = reward_t + discount_t * value_t - value
    trace = torch.where(cut_t, torch.zeros_like(delta), lam * discount_t)
    return linear_recurrence(trace, delta, reverse=True)


def running_return(reward_t: Tensor, gamma: float | Tensor, cut_t: Tensor, initial: Tensor) -> Tensor:
    """Discounted sum of the rewards so far; its deviation is what rewards are scaled by.

    y_t = r_t + gamma y_{t-1},  restarted from zero at the step after a cut

    ========  ======  ==============================================================================
    reward_t  [T, N]  reward of the transition t
    gamma             discount
    cut_t     [T, N]  bool, terminated or truncated
    initial   [N]     y before the first step; carry ``torch.where(cut_t[-1], 0, y[-1])`` on to the next window
    return    [T, N]  y_t
    ========  ======  ==============================================================================
    """
    fresh = torch.cat([torch.zeros_like(cut_t[:1]), cut_t[:-1]])
    carry = torch.where(fresh, torch.zeros_like(reward_t), torch.ones_like(reward_t) * gamma)
    first = (reward_t[0] + gamma * initial).unsqueeze(0)
    return linear_recurrence(carry, torch.cat([first, reward_t[1:]]))


def standardise(x: Tensor, mask: Tensor, eps: float = 1e-8) -> Tensor:
    """Mean 0 and deviation 1 over the valid positions; 0 elsewhere, and where all values agree.

    (x - mean) / (std + eps),  std unbiased as ``torch.std``

    ======  =====  ==========================
    x       any    values
    mask    as x   bool, True where valid
    eps            added to the deviation
    return  as x   standardised values
    ======  =====  ==========================
    """
    zero = torch.zeros_like(x)
    shifted = _shift(x, torch.where(mask, x, torch.full_like(x, torch.inf)).amin().detach(), mask)
    residual = torch.where(mask, shifted - reduce.masked_mean(shifted, mask), zero)
    variance = residual.square().sum() / (mask.sum() - 1).clamp(min=1)
    return residual / (variance.sqrt() + eps)


def group_mean(x: Tensor, group: Tensor) -> Tensor:
    """Mean of the row's group, given to each row.

    m_i = mean {x_j : g_j = g_i}

    ======  ===  ================
    x       [B]  values
    group   [B]  int, any ids
    return  [B]  means
    ======  ===  ================
    """
    return reduce.segment_sum(x, group) / _count(x, group)


def group_std(x: Tensor, group: Tensor, ddof: int = 1) -> Tensor:
    """Standard deviation of the row's group, given to each row; 0 for a group of one.

    s_i = sqrt( sum {(x_j - m_i)^2 : g_j = g_i} / max(1, n_i - ddof) )

    ======  ===  ===================================================
    x       [B]  values
    group   [B]  int, any ids
    ddof         1 unbiased (as ``torch.std``), 0 population
    return  [B]  deviations
    ======  ===  ===================================================
    """
    residual = x - group_mean(x, group)
    return (reduce.segment_sum(residual.square(), group) / (_count(x, group) - ddof).clamp(min=1.0)).sqrt()


def leave_one_out_mean(x: Tensor, group: Tensor) -> Tensor:
    """Mean of the others in the row's group (RLOO, arXiv 2402.14740).

    b_i = (sum {x_j : g_j = g_i} - x_i) / (n_i - 1);  a group of one has no others: b_i = x_i

    ======  ===  ================
    x       [B]  values
    group   [B]  int, any ids
    return  [B]  baselines
    ======  ===  ================
    """
    count = _count(x, group)
    others = (reduce.segment_sum(x, group) - x) / (count - 1.0).clamp(min=1.0)
    return torch.where(count > 1.0, others, x)


def center_scale(
    x: Tensor,
    group: Tensor | None = None,
    center: Center = "group",
    scale: Scale = "group",
    eps: float = 1e-6,
    ddof: int = 1,
) -> Tensor:
    """Outcomes made comparable within their group or the batch; equal outcomes give exactly 0.

    (x - c) / (s + eps) with c none, the group's mean, that of the others in the group, or the batch's;
    s none, the deviation of x in the group, or in the batch. GRPO (arXiv 2402.03300): group, group.
    Dr. GRPO (arXiv 2503.20783): group, none. RLOO: leave_one_out, none.

    ======  ===  =======================================================
    x       [B]  outcomes, one per sequence
    group   [B]  int, any ids; None where only the batch is looked at
    center       baseline that is subtracted
    scale        deviation that divides
    eps          added to the deviation
    ddof         1 unbiased, 0 population
    return  [B]  advantages
    ======  ===  =======================================================
    """
    batch = torch.zeros(x.shape, dtype=torch.long, device=x.device)
    if group is None and ("group" in (center, scale) or center == "leave_one_out"):
        raise ValueError(f"center={center!r}, scale={scale!r} need group: [B] integers")
    ids = batch if group is None else group
    if center == "none":
        centred = x
    else:
        within = batch if center == "batch" else ids
        shifted = x - _segment_min(x, within)
        baseline = leave_one_out_mean(shifted, ids) if center == "leave_one_out" else group_mean(shifted, within)
        centred = shifted - baseline
    if scale == "none":
        return centred
    within = batch if scale == "batch" else ids
    return centred / (group_std(x, within, ddof) + eps)


def _count(x: Tensor, group: Tensor) -> Tensor:
    return reduce.segment_sum(torch.ones_like(x), group)


def _shift(x: Tensor, start: Tensor, mask: Tensor) -> Tensor:
    """x - start where valid: equal values become exact zeros, so rounding cannot pass for a signal."""
    return torch.where(mask, x - start, torch.zeros_like(x))


def _segment_min(x: Tensor, ids: Tensor) -> Tensor:
    rank = reduce.dense_ids(ids)
    return torch.full_like(x, torch.inf).scatter_reduce(-1, rank, x.detach(), "amin").gather(-1, rank)
