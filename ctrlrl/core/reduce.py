"""Sums over valid positions, and the weights that turn a sum into a mean of one's choice.

A normaliser returns ``(weight, denominator)``: the objective is ``weighted_sum(x, weight) / denominator``.
Both are computed once on the whole update batch, so that adding up micro-batches changes nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor


def masked_sum(x: Tensor, mask: Tensor) -> Tensor:
    """Sum over valid positions; whatever stands elsewhere, NaN included, is not looked at.

    sum_i 1[mask_i] x_i

    ======  =====  ==========================
    x       any    values
    mask    as x   bool, True where valid
    return  []     scalar
    ======  =====  ==========================
    """
    return torch.where(mask, x, x.new_zeros(())).sum()


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean over valid positions; 0 if there are none.

    masked_sum(x, mask) / max(1, sum_i mask_i)

    ======  =====  ==========================
    x       any    values
    mask    as x   bool, True where valid
    return  []     scalar
    ======  =====  ==========================
    """
    return masked_sum(x, mask) / mask.sum().clamp(min=1)


def weighted_sum(x: Tensor, weight: Tensor) -> Tensor:
    """Weighted sum over the positions of positive weight; NaN at weight zero is harmless.

    sum_{i: w_i > 0} w_i x_i;  gradient w_i

    ======  ===============  ======================================================
    x       as w, or [B, 1]  values; one per row counts at all positions of the row
    weight  [B, T]           w, non-negative; zero = absent
    return  []               scalar
    ======  ===============  ======================================================
    """
    if x.shape != weight.shape:
        weight = weight.sum_to_size(x.shape)
    return torch.where(weight > 0, x, x.new_zeros(())).mul_(weight).sum()


def token_mean(mask: Tensor, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    """Every valid position counts the same.

    w_it = mask_it,  D = max(1, sum_it mask_it)

    ======  ======  ==============================================
    mask    [B, T]  bool, True where valid
    dtype           of the result; None is torch's default dtype
    weight  [B, T]  weights
    D       []      denominator
    ======  ======  ==============================================
    """
    weight = _float(mask, dtype)
    return weight, weight.sum().clamp(min=1.0)


def sequence_mean_token_mean(mask: Tensor, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    """Every sequence counts the same; within it, every valid position. Empty sequences do not count.

    w_it = mask_it / L_i,  D = max(1, #{i: L_i > 0}),  L_i = sum_t mask_it

    ======  ======  ==============================================
    mask    [B, T]  bool, True where valid
    dtype           of the result; None is torch's default dtype
    weight  [B, T]  weights
    D       []      denominator
    ======  ======  ==============================================
    """
    valid = _float(mask, dtype)
    return valid / valid.sum(-1, keepdim=True).clamp(min=1.0), _sequences(mask, valid.dtype)


def sequence_mean_token_sum(mask: Tensor, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    """Mean over sequences of the sum over their valid positions. Empty sequences do not count.

    w_it = mask_it,  D = max(1, #{i: L_i > 0})

    ======  ======  ==============================================
    mask    [B, T]  bool, True where valid
    dtype           of the result; None is torch's default dtype
    weight  [B, T]  weights
    D       []      denominator
    ======  ======  ==============================================
    """
    weight = _float(mask, dtype)
    return weight, _sequences(mask, weight.dtype)


def constant(mask: Tensor, length: float | Tensor, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    """Divide by a fixed length, so that neither long nor short sequences are favoured (Dr. GRPO, arXiv 2503.20783).

    w_it = mask_it,  D = max(1, B * length)

    ======  ======  ==============================================
    mask    [B, T]  bool, True where valid
    length          the fixed length, in positions
    dtype           of the result; None is torch's default dtype
    weight  [B, T]  weights
    D       []      denominator; every row counts, also empty ones
    ======  ======  ==============================================
    """
    weight = _float(mask, dtype)
    denominator = torch.ones((), dtype=weight.dtype, device=mask.device) * (mask.shape[0] * length)
    return weight, denominator.clamp(min=1.0)


def dense_ids(ids: Tensor) -> Tensor:
    """Rank of each id among the distinct ids of its row: any integers become 0, 1, 2, ...

    Shapes do not depend on the data, so it compiles.

    ======  ========  =====================================
    ids     [..., N]  integers
    return  [..., N]  int64 in [0, N)
    ======  ========  =====================================
    """
    ordered, order = ids.sort(dim=-1, stable=True)
    first = torch.zeros_like(order[..., :1])
    rank = torch.cat([first, (ordered[..., 1:] != ordered[..., :-1]).long().cumsum(-1)], dim=-1)
    return torch.zeros_like(order).scatter(-1, order, rank)


def segment_sum(x: Tensor, ids: Tensor) -> Tensor:
    """Sum over all elements of the row that share the id, given back to each of them.

    y_n = sum_{m: ids_m = ids_n} x_m

    ======  ========  =====================================
    x       [..., N]  values
    ids     [..., N]  integers
    return  [..., N]  sums
    ======  ========  =====================================
    """
    rank = dense_ids(ids)
    return torch.zeros_like(x).scatter_add(-1, rank, x).gather(-1, rank)


def _float(mask: Tensor, dtype: torch.dtype | None) -> Tensor:
    return mask.to(torch.get_default_dtype() if dtype is None else dtype)


def _sequences(mask: Tensor, dtype: torch.dtype) -> Tensor:
    return mask.any(-1).sum().to(dtype).clamp(min=1.0)
