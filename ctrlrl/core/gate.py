"""Gates: 0/1 factors, without gradient, that say where the policy gradient is kept. They combine by product."""

from __future__ import annotations

import torch
from torch import Tensor


def clip_gate(ratio: Tensor, advantage: Tensor, eps_low: float | Tensor, eps_high: float | Tensor) -> Tensor:
    """Where PPO keeps its gradient (arXiv 1707.06347): until the ratio has moved far enough the way A points.

    0 if (A > 0 and r > 1 + eps_high) or (A < 0 and r < 1 - eps_low), else 1

    =========  ======  ========================================
    ratio      [B, T]  r
    advantage  [B, T]  A
    eps_low            distance from one allowed downwards
    eps_high           distance from one allowed upwards
    return     [B, T]  0.0 or 1.0
    =========  ======  ========================================
    """
    r, a = ratio.detach(), advantage.detach()
    return _keep(((a > 0) & (r > 1 + eps_high)) | ((a < 0) & (r < 1 - eps_low)), r)


def target_gate(ratio: Tensor, target: Tensor, advantage: Tensor) -> Tensor:
    """Where a ratio has not yet passed its target in the advantage's direction.

    0 if (r - target) A > 0, else 1. With target 1 + eps sign(A) this is :func:`clip_gate` of that eps.
    Stopping wherever ``|r - 1| > eps`` would be another rule: it also holds back a ratio that has to return.

    =========  ======  ===============
    ratio      [B, T]  r
    target     [B, T]  target ratio
    advantage  [B, T]  A
    return     [B, T]  0.0 or 1.0
    =========  ======  ===============
    """
    r, a = ratio.detach(), advantage.detach()
    gap = r - target.detach()
    return _keep(((a > 0) & (gap > 0)) | ((a < 0) & (gap < 0)), r)


def clipped(ratio: Tensor, eps_low: float | Tensor, eps_high: float | Tensor) -> Tensor:
    """Whether the ratio has left the band, on either side and whatever the advantage; for logging.

    r > 1 + eps_high or r < 1 - eps_low

    ========  ======  ========================================
    ratio     [B, T]  r
    eps_low           distance from one allowed downwards
    eps_high          distance from one allowed upwards
    return    [B, T]  bool
    ========  ======  ========================================
    """
    r = ratio.detach()
    return (r > 1 + eps_high) | (r < 1 - eps_low)


def _keep(drop: Tensor, like: Tensor) -> Tensor:
    return torch.where(drop, torch.zeros_like(like), torch.ones_like(like))
