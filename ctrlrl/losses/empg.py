"""Entropy-modulated policy gradients: confident turns learn more, and clarity of the next turn is rewarded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ctrlrl.core import advantage as adv
from ctrlrl.core import reduce
from ctrlrl.losses.base import register
from ctrlrl.losses.group import ClippedGroupLoss
from ctrlrl.losses.needs import Need, Slot
from ctrlrl.types import SequenceBatch


@register
@dataclass(frozen=True)
class EMPG(ClippedGroupLoss):
    """A_s = A g_s + clarity_coef f_{s+1}, less its mean over all turns of the batch

    g_s = exp(-confidence h_s) / mean exp(-confidence h),  f_s = exp(-clarity h_s),  h_s = the turn's mean entropy
    brought to [0, 1] by the batch's range. A is GRPO's; a last turn gets no bonus. Where there are no turns, every
    position is one.
    """

    paper: ClassVar[str] = (
        "Harnessing Uncertainty: Entropy-Modulated Policy Gradients for Long-Horizon LLM Agents, arXiv:2509.09265"
    )
    slots: ClassVar[Mapping[Slot, str]] = {
        "mask": "clip",
        "ratio": "token",
        "advantage": "group z-score times confidence, plus the next turn's clarity",
    }
    needs: ClassVar[frozenset[Need]] = frozenset({"step_dist", "groups", "sequence_return"})
    uses: ClassVar[frozenset[Need]] = frozenset({"turns"})

    confidence: float = 1.0
    """How much more a confident turn learns than an uncertain one."""
    clarity: float = 1.0
    """How fast the bonus falls with the next turn's entropy."""
    clarity_coef: float = 0.1
    """Weight of the bonus."""
    center: bool = True
    """Subtract the mean over turns at the end."""
    std_floor: float = 1e-6
    """Added to the group's deviation."""

    def outcome_advantage(self, batch: SequenceBatch) -> Tensor:
        assert batch.sequence_return is not None and batch.group is not None and batch.entropy_old is not None
        entropy, zero = batch.entropy_old, torch.zeros_like(batch.entropy_old)
        base = adv.center_scale(batch.sequence_return, batch.group, eps=self.std_floor)
        base = base.unsqueeze(-1).expand(entropy.shape)
        place = torch.arange(entropy.shape[1], device=entropy.device).expand(entropy.shape)
        valid = batch.mask if batch.turn is None else batch.mask & (batch.turn >= 0)
        turn = torch.where(valid, place if batch.turn is None else batch.turn, -1)
        size = reduce.segment_sum(valid.to(entropy.dtype), turn).clamp(min=1.0)
        entropy = reduce.segment_sum(torch.where(valid, entropy, zero), turn) / size
        turns = torch.where(valid, 1.0 / size, zero)

        def mean(x: Tensor) -> Tensor:
            """Over turns: each of a turn's positions counts for its share."""
            return (torch.where(valid, x, zero) * turns).sum() / turns.sum().clamp(min=1.0)

        low = torch.where(valid, entropy, torch.inf).amin()
        high = torch.where(valid, entropy, -torch.inf).amax()
        h = torch.where(valid, (entropy - low) / (high - low + 1e-8), zero)
        gain = torch.exp(-self.confidence * h)
        gain = gain / (mean(gain) + 1e-8)
        modulated = base * gain + self.clarity_coef * _next_turn(torch.exp(-self.clarity * h), turn, valid)
        if self.center:
            modulated = modulated - mean(modulated)
        return torch.where(valid, modulated, base)


def _next_turn(x: Tensor, turn: Tensor, valid: Tensor) -> Tensor:
    """[B, T] the value that x has in the row's next turn, 0 in its last; x is constant within a turn."""
    # positions without a turn take the first rank, a row's turns those after it
    rank = reduce.dense_ids(torch.cat([torch.full_like(turn[:, :1], -1), turn], -1))[:, 1:]
    table = torch.zeros(x.shape[0], x.shape[1] + 2, dtype=x.dtype, device=x.device)
    table = table.scatter(-1, rank, torch.where(valid, x, torch.zeros_like(x)))
    return table.gather(-1, rank + 1)
