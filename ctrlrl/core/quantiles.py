"""Regression on quantiles: the Huber loss and its quantile form."""

from __future__ import annotations

import torch
from torch import Tensor


def huber(x: Tensor, kappa: float) -> Tensor:
    """|x| - kappa / 2 beyond ``kappa``, x^2 / (2 kappa) within [...]; |x| for kappa = 0.

    That is Huber's loss divided by ``kappa``, as in IQN (arXiv:1806.06923, eq. 3); with 1 it is the loss itself.

    ======  =====  ======================================
    x       [...]  errors
    kappa          size from which they count linearly
    return  [...]  losses
    ======  =====  ======================================
    """
    size = x.abs()
    if kappa == 0.0:
        return size
    return torch.where(size <= kappa, x * x / (2.0 * kappa), size - kappa / 2.0)


def midpoints(count: int, like: Tensor) -> Tensor:
    """The levels (2 i - 1) / (2 count), i = 1, ..., of that many quantiles (QR-DQN, lemma 2).

    ======  =======  ============================
    count            of quantiles
    like             tensor of the type and device
    return  [count]  in (0, 1)
    ======  =======  ============================
    """
    return (torch.arange(count, device=like.device, dtype=like.dtype) + 0.5) / count


def quantile_loss(quantiles: Tensor, atoms: Tensor, kappa: float, weights: Tensor | None = None) -> Tensor:
    """Loss of quantiles at the midpoint levels against a law, sum over i of E_j[rho_i(y_j - q_i)].

    rho_i(u) = |tau_i - 1{u < 0}| huber(u): QR-DQN (arXiv:1710.10044, algorithm 1).

    =========  ========  ==============================================
    quantiles  [..., m]  what is trained, q_i
    atoms      [..., k]  atoms of the target law, y_j
    kappa                of :func:`huber`
    weights    [..., k]  their probabilities; by default all are 1 / k
    return     [...]     loss
    =========  ========  ==============================================
    """
    u = atoms.unsqueeze(-2) - quantiles.unsqueeze(-1)
    tilt = (midpoints(quantiles.shape[-1], quantiles).unsqueeze(-1) - (u < 0.0).to(u.dtype)).abs()
    each = tilt * huber(u, kappa)
    mean = each.mean(-1) if weights is None else (each * weights.unsqueeze(-2)).sum(-1)
    return mean.sum(-1)
