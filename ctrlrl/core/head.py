"""Heads: the last step, through which alone the gradient reaches the policy.

Advantages, targets, weights and gates are held constant. A *surrogate* is to be maximised (negate it for a
loss); a *loss* is to be minimised. Nothing here is masked or averaged.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor


def ratio_advantage(ratio: Tensor, advantage: Tensor) -> Tensor:
    """Importance-weighted surrogate, to be maximised.

    r A;  gradient r A grad log pi

    =========  ======  =======================
    ratio      [B, T]  r, with gradient
    advantage  [B, T]  A
    return     [B, T]  surrogate
    =========  ======  =======================
    """
    return ratio * advantage.detach()


def clipped_surrogate(ratio: Tensor, advantage: Tensor, eps_low: float | Tensor, eps_high: float | Tensor) -> Tensor:
    """PPO's surrogate, to be maximised (arXiv 1707.06347).

    min(r A, clip(r, 1 - eps_low, 1 + eps_high) A);  gradient A grad r, or zero where the clip is the smaller

    =========  ======  =====================================================
    ratio      [B, T]  r, finite, with gradient; [B, 1] for whole sequences
    advantage  [B, T]  A
    eps_low            distance from one allowed downwards
    eps_high           distance from one allowed upwards
    return     [B, T]  surrogate
    =========  ======  =====================================================
    """
    a = advantage.detach()
    if ratio.shape != a.shape:
        ratio, a = torch.broadcast_tensors(ratio, a)
    r = ratio.detach()
    # two one-sided clamps, as a bound may be a float and the other a tensor; a float is never copied to a GPU
    clipped = r.clamp(min=1 - eps_low).clamp_(max=1 + eps_high).mul_(a)
    free = r * a
    lowest = clipped.clamp_(max=free)
    held = free.sub_(lowest).sign_()  # 1 where the clip is the smaller and the gradient stops, else 0
    return tangent(lowest, held.neg_().add_(1).mul_(a), ratio)


def tangent(value: Tensor, slope: Tensor, x: Tensor) -> Tensor:
    """A term whose derivative is known, so that no step that led to its value is kept or run backwards.

    value + slope (x - sg x);  the value is exact, and so is every derivative if the term is piecewise linear in x

    ======  ======  ============================================
    value   [B, T]  held constant
    slope   [B, T]  d value / d x, finite and held constant
    x       [B, T]  finite, with gradient
    return  [B, T]  value, with gradient slope grad x
    ======  ======  ============================================
    """
    return (x - x.detach()).mul_(slope.detach()).add_(value.detach())


def logp_advantage(logp: Tensor, advantage: Tensor) -> Tensor:
    """Score-function surrogate, to be maximised; A = 1 is the log-likelihood.

    A log pi;  gradient A grad log pi

    =========  ======  =======================
    logp       [B, T]  log pi, with gradient
    advantage  [B, T]  A
    return     [B, T]  surrogate
    =========  ======  =======================
    """
    return logp * advantage.detach()


def ratio_target(
    ratio: Tensor,
    target: Tensor,
    weight: Tensor,
    kind: Literal["l1", "l2"] = "l1",
    gate: Tensor | None = None,
) -> Tensor:
    """Pull the ratio to a target: one loss, to be minimised, whose settings are three algorithms.

    l1: w |r - c|,  l2: w (r - c)^2;  where the gate is 0 the value stays and the gradient goes.

    PPO (arXiv 1707.06347)  l1, c = 1 + eps sign(A), w = |A|, ``gate.target_gate``
    BPO (arXiv 2604.18578)  l1, c = 1 + eps tanh((Q - mu) / (2 lam)), w = |A|, no gate
    SPO (arXiv 2401.16025)  l2, c = 1 + eps sign(A), w = |A| / (2 eps), no gate

    ======  ======  =========================================
    ratio   [B, T]  r, with gradient
    target  [B, T]  c
    weight  [B, T]  w >= 0
    kind            l1 or l2
    gate    [B, T]  0 where the gradient is cut; None: never
    return  [B, T]  loss
    ======  ======  =========================================
    """
    gap = ratio - target.detach()
    if kind == "l1":
        loss = weight.detach() * gap.abs()
    elif kind == "l2":
        loss = weight.detach() * gap.square()
    else:
        raise ValueError(f"kind must be l1 or l2, not {kind!r}")
    return loss if gate is None else torch.where(gate.detach() > 0, loss, loss.detach())


def regression(target: Tensor, prediction: Tensor) -> Tensor:
    """Squared error towards a fixed target, to be minimised.

    (prediction - target)^2

    ==========  ======  ===============
    target      [B, T]  held constant
    prediction  [B, T]  with gradient
    return      [B, T]  loss
    ==========  ======  ===============
    """
    return (prediction - target.detach()).square()
