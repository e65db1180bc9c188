"""Comparisons of the rows of a group with each other. Groups are ids, so they may differ in size and lie anywhere."""

from __future__ import annotations

import torch
from torch import Tensor

from ctrlrl.core import reduce


def mean_over_others(x: Tensor, group: Tensor) -> Tensor:
    """Mean of what each row has with the others of its group; 0 for a group of one.

    y_i = sum {x_ij : j != i, g_j = g_i} / (n_i - 1)

    ======  ======  ============================================================
    x       [B, B]  value of each ordered pair; other groups' are not looked at
    group   [B]     int, any ids
    return  [B]     means
    ======  ======  ============================================================
    """
    same = group.unsqueeze(-1) == group
    other = same & ~torch.eye(len(group), dtype=torch.bool, device=group.device)
    return torch.where(other, x, torch.zeros_like(x)).sum(-1) / other.sum(-1).clamp(min=1)


def anchored_logsumexp(x: Tensor, member: Tensor, group: Tensor) -> Tensor:
    """Soft maximum of the members' values and of an anchor at zero, given to each row of the group.

    y_i = log(1 + sum {exp(x_j) : j a member, g_j = g_i});  0 without members, finite for any finite x

    ======  ===  ==========================================
    x       [B]  values
    member  [B]  bool, rows that are summed over
    group   [B]  int, any ids
    return  [B]  soft maxima, at least 0
    ======  ===  ==========================================
    """
    zero = torch.zeros_like(x)
    inside = torch.where(member, x, zero)
    rank = reduce.dense_ids(group)
    top = zero.scatter_reduce(-1, rank, inside.detach(), "amax").gather(-1, rank)
    total = reduce.segment_sum(torch.where(member, torch.exp(inside - top), zero), group)
    return top + torch.log(torch.exp(-top) + total)


def rank_within(x: Tensor, group: Tensor) -> Tensor:
    """How many rows of the group come before this one: by larger value, among equals by place in the batch.

    r_i = #{j : g_j = g_i and (x_j > x_i or (x_j = x_i and j < i))}

    ======  ===  ============================
    x       [B]  values
    group   [B]  int, any ids
    return  [B]  int64, 0 for the group's best
    ======  ===  ============================
    """
    place = torch.arange(len(x), device=x.device)
    ahead = (x > x.unsqueeze(-1)) | ((x == x.unsqueeze(-1)) & (place < place.unsqueeze(-1)))
    return (ahead & (group == group.unsqueeze(-1))).sum(-1)
