"""DAPO: clip higher than low, all tokens alike, no groups that agree, a gentle push away from the length limit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ctrlrl.core import advantage as adv
from ctrlrl.losses.base import Knobs, Memory, Start, register
from ctrlrl.losses.group import Aggregation, ClippedGroupLoss
from ctrlrl.losses.needs import Slot
from ctrlrl.types import SequenceBatch


@register
@dataclass(frozen=True)
class DAPO(ClippedGroupLoss):
    """-sum_i sum_t min(r A_i, clip(r, 1 - eps_low, 1 + eps_high) A_i) / sum_i |y_i|  over groups whose returns differ

    A = (R' - group mean) / group std,  R' = R + p(|y|):  p = 0 up to L - C positions, then falls linearly to -1 at L.
    """

    paper: ClassVar[str] = "DAPO: An Open-Source LLM Reinforcement Learning System at Scale, arXiv:2503.14476"
    differs: ClassVar[str] = (
        "Groups whose returns agree are left out of the sum and of its length; the paper samples until the batch is "
        "full again. The length penalty is off unless overlong_length is set. Not direct_advantage, which has the same "
        "initials."
    )
    slots: ClassVar[Mapping[Slot, str]] = {
        "mask": "clip, higher than low",
        "ratio": "token",
        "advantage": "(R - group mean) / group std",
        "selection": "groups whose returns differ",
    }
    aggregation: ClassVar[Aggregation] = "token_mean"

    eps_high: float = 0.28
    """Distance above one at which a positive advantage stops earning a gradient."""
    overlong_length: int | None = None
    """L, in positions of the policy: length at which the penalty is a whole reward; None is off."""
    overlong_cache: int = 1
    """C: over how many positions before L the penalty grows."""
    std_floor: float = 1e-6
    """Added to the group's deviation."""

    def begin(self, batch: SequenceBatch, knobs: Knobs, memory: Memory) -> Start:
        assert batch.sequence_return is not None and batch.group is not None
        start = super().begin(batch, knobs, memory)
        # exactly 0 where all agree: center_scale subtracts the group's smallest return first
        spread = adv.group_std(adv.center_scale(batch.sequence_return, batch.group, scale="none"), batch.group)
        kept = batch.mask & (spread > 0).unsqueeze(-1)
        share = (spread > 0).to(spread.dtype).mean()
        return start._replace(batch=start.batch._replace(mask=kept), stats={"informative_share": share})

    def outcome_advantage(self, batch: SequenceBatch) -> Tensor:
        assert batch.sequence_return is not None and batch.group is not None
        returns = batch.sequence_return
        if self.overlong_length is not None:
            excess = batch.mask.sum(-1) - (self.overlong_length - self.overlong_cache)
            returns = returns - (excess / self.overlong_cache).clamp(0.0, 1.0).to(returns.dtype)
        return adv.center_scale(returns, batch.group, eps=self.std_floor)
