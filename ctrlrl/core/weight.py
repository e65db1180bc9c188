"""Targets for the probability ratio: where a bounded-ratio update wants each action to go.

Bounded Ratio RL (arXiv 2604.18578) maximises ``E_old[r Q]`` under ``|r - 1| <= eps`` and ``E_old[r] = 1`` in each
state, with a temperature ``lam`` on a two-sided (Fermi-Dirac) entropy of r. Its solution is a threshold rule.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def sign_target(advantage: Tensor, eps: float | Tensor) -> Tensor:
    """Edge of the band on the side of the advantage: what PPO and SPO pull to.

    1 + eps sign(A)

    =========  ======  ===============
    advantage  [B, T]  A
    eps                half-width
    return     [B, T]  target ratio
    =========  ======  ===============
    """
    return 1.0 + eps * torch.sign(advantage)


def tanh_target(gap: Tensor, eps: float | Tensor, lam: float | Tensor) -> Tensor:
    """Bounded-ratio optimum of a symmetric band (arXiv 2604.18578, theorem 4.1).

    1 + eps tanh((Q - mu) / (2 lam))

    ======  ======  =================================================================
    gap     [B, T]  Q - mu, mu the threshold of :func:`solve_threshold`
    eps             half-width
    lam             temperature, in units of the return
    return  [B, T]  target ratio, within eps of one
    ======  ======  =================================================================
    """
    return 1.0 + eps * torch.tanh(gap / (2.0 * lam))


def band_target(gap: Tensor, ratio_low: float | Tensor, ratio_high: float | Tensor, lam: float | Tensor) -> Tensor:
    """Logistic step between two bounds; a gap of 0 gives the middle of the band (GBPO, arXiv 2604.18578).

    c_l + (c_h - c_l) sigmoid(gap / lam)

    ==========  ======  =====================================
    gap         [B, T]  distance to the threshold
    ratio_low           c_l
    ratio_high          c_h
    lam                 temperature, in units of the gap
    return      [B, T]  target ratio in [c_l, c_h]
    ==========  ======  =====================================
    """
    return ratio_low + (ratio_high - ratio_low) * torch.sigmoid(gap / lam)


def sigmoid_target(gap: Tensor, ratio_low: float | Tensor, ratio_high: float | Tensor, lam: float | Tensor) -> Tensor:
    """Bounded-ratio optimum of any band around one; a gap of 0 gives a ratio of 1.

    c_l + (c_h - c_l) sigmoid((Q - mu) / lam + log((1 - c_l) / (c_h - 1)))

    With c_l, c_h = 1 -+ eps it is :func:`tanh_target`. With c_l = 0, c_h = 1/p and small lam it keeps the best
    fraction p of the old policy: the elite selection of the cross-entropy method.

    ==========  ======  =============================================
    gap         [B, T]  Q - mu, mu from :func:`solve_threshold`
    ratio_low           c_l < 1
    ratio_high          c_h > 1
    lam                 temperature, in units of the return
    return      [B, T]  target ratio in [c_l, c_h]
    ==========  ======  =============================================
    """
    shift = torch.log(torch.as_tensor((1.0 - ratio_low) / (ratio_high - 1.0), dtype=gap.dtype, device=gap.device))
    return ratio_low + (ratio_high - ratio_low) * torch.sigmoid(gap / lam + shift)


def median_dual(x: Tensor) -> Tensor:
    """Dual function whose minimiser in mu is the threshold: a smooth absolute value (arXiv 2604.18578).

    g(x) = log(2 cosh(x / 2)) = softplus(x) - x / 2;  mu = argmin_m E_old[g((Q - m) / lam)],  g'(x) = tanh(x / 2) / 2

    As lam g(. / lam) it tends to ``|.| / 2``: mu goes to the median for small lam and to the mean for large lam.

    ======  =====  ==========================
    x       any    (Q - m) / lam
    return  as x   g(x), finite for finite x
    ======  =====  ==========================
    """
    return torch.logaddexp(0.5 * x, -0.5 * x)


@torch.no_grad()
def solve_threshold(
    q: Tensor,
    p: Tensor,
    lam: float | Tensor,
    ratio_low: float = 0.0,
    ratio_high: float = 2.0,
    iterations: int = 100,
) -> Tensor:
    """Threshold that makes the bounded-ratio target a policy, by bisection.

    mu(s): E_p[tanh((Q - mu) / (2 lam))] = 0, for any symmetric band; in general E_p[sigmoid_target] = 1

    ==========  ======  =================================================
    q           [S, A]  action values
    p           [S, A]  old policy, each row sums to 1
    lam                 temperature; a number, or [S, 1]
    ratio_low           c_l; the default band is symmetric
    ratio_high          c_h
    iterations          halvings of the range of q
    return      [S]     mu
    ==========  ======  =================================================
    """
    absent = p <= 0
    low = torch.where(absent, torch.inf, q).amin(-1, keepdim=True)
    high = torch.where(absent, -torch.inf, q).amax(-1, keepdim=True)
    shift = math.log((1.0 - ratio_low) / (ratio_high - 1.0))
    share = (1.0 - ratio_low) / (ratio_high - ratio_low)
    for _ in range(iterations):
        middle = 0.5 * (low + high)
        excess = (p * (torch.sigmoid((q - middle) / lam + shift) - share)).sum(-1, keepdim=True)
        low = torch.where(excess > 0, middle, low)
        high = torch.where(excess > 0, high, middle)
    return (0.5 * (low + high)).squeeze(-1)


@torch.no_grad()
def lp_ratio(q: Tensor, p: Tensor, eps: float | Tensor) -> Tensor:
    """Exact bounded-ratio optimum without temperature: three levels, split at the weighted median m of q.

    1 + eps above m, 1 - eps below it, 1 + eps (P(Q < m) - P(Q > m)) / P(Q = m) at it

    The middle level is what normalises: a sign rule cannot, since a median of finitely many actions has mass.

    ======  ======  =================================
    q       [S, A]  action values
    p       [S, A]  old policy, each row sums to 1
    eps             half-width
    return  [S, A]  ratios with E_p[r] = 1
    ======  ======  =================================
    """
    order = q.argsort(dim=-1)
    mass = p.gather(-1, order).cumsum(-1)
    at = (mass >= 0.5 * mass[..., -1:]).long().argmax(-1, keepdim=True)
    median = q.gather(-1, order.gather(-1, at))
    zero = torch.zeros_like(p)
    above = torch.where(q > median, p, zero).sum(-1, keepdim=True)
    below = torch.where(q < median, p, zero).sum(-1, keepdim=True)
    middle = torch.where(q == median, p, zero).sum(-1, keepdim=True)
    level = ((below - above) / middle).clamp(-1.0, 1.0)
    return 1.0 + eps * torch.where(q == median, level, torch.sign(q - median))


@torch.no_grad()
def mean_ratio(q: Tensor, p: Tensor, eps: float | Tensor) -> Tensor:
    """The sign rule with the mean in the median's place, made a policy again by division.

    r = 1 + eps sign(Q - V),  V = E_p[Q];  returns r / E_p[r]

    Once the best action dominates, the others shrink by (1 - eps) / (1 + eps) per update, against 1 - eps
    under :func:`lp_ratio`: the division makes it leave the band.

    ======  ======  =================================
    q       [S, A]  action values
    p       [S, A]  old policy, each row sums to 1
    eps             half-width
    return  [S, A]  ratios with E_p[r] = 1
    ======  ======  =================================
    """
    below_best = q - q.amax(-1, keepdim=True)
    r = 1.0 + eps * torch.sign(below_best - (p * below_best).sum(-1, keepdim=True) / p.sum(-1, keepdim=True))
    return r / (p * r).sum(-1, keepdim=True)
