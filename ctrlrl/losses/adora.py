"""Dynamic advantage weight: groups that look unhelpful for now count for less."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

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
class ADORA(ClippedGroupLoss):
    """A_i = w_g (R_i - group mean) / (group std + floor)

    w_g = 1 if max {length: success} > mean {length: failure, length < longest} in the group, else ``group_weight``
    """

    paper: ClassVar[str] = "ADORA: Training Reasoning Models with Dynamic Advantage Estimation, arXiv:2602.10019"
    differs: ClassVar[str] = (
        "No length is left out as truncated by default (released: failures from 4054 tokens on). The two released "
        "versions treat groups of one outcome in opposite ways, which matters for graded returns alone: one_sided."
    )
    slots: ClassVar[Mapping[Slot, str]] = {
        "mask": "clip",
        "ratio": "token",
        "advantage": "(R - group mean) / group std, times a weight of the group",
    }
    needs: ClassVar[frozenset[Need]] = frozenset({"groups", "sequence_return", "success"})

    group_weight: float = 0.1
    """Weight of a group that does not meet the rule; 1 is GRPO."""
    favour: Literal["long", "short"] = "long"
    """Whether successes should be longer than failures (released), or shorter: min {success} < mean {failure}."""
    longest: int | None = None
    """Failures of this length or more are not counted, having been cut off; the released code takes 4054."""
    one_sided: Literal["llm", "vl"] = "llm"
    """Groups with only one kind: without a success weight ``group_weight`` and without a failure 1, as the released
    code for language models has it, or the other way round, as that for vision has it."""
    ddof: int = 1
    """Of the group's deviation: 1 unbiased, 0 population."""
    std_floor: float = 1e-6
    """Added to the group's deviation."""

    def outcome_advantage(self, batch: SequenceBatch) -> Tensor:
        assert batch.sequence_return is not None and batch.group is not None and batch.success is not None
        advantage = adv.center_scale(batch.sequence_return, batch.group, eps=self.std_floor, ddof=self.ddof)
        helpful = self._helpful(batch.mask.sum(-1).to(advantage.dtype), batch.success, batch.group)
        return torch.where(helpful, advantage, self.group_weight * advantage)

    def _helpful(self, length: Tensor, success: Tensor, group: Tensor) -> Tensor:
        """[B] bool: the rule, given to each row of the group."""
        failure = ~success if self.longest is None else ~success & (length < self.longest)
        failures = reduce.segment_sum(failure.to(length.dtype), group)
        mean = reduce.segment_sum(torch.where(failure, length, 0.0), group) / failures.clamp(min=1.0)
        sign = 1.0 if self.favour == "long" else -1.0
        rank = reduce.dense_ids(group)
        signed = torch.where(success, sign * length, -torch.inf)
        best = torch.full_like(length, -torch.inf).scatter_reduce(0, rank, signed, "amax").gather(0, rank)
        helpful = best > sign * mean
        language = torch.full_like(success, self.one_sided == "llm")
        helpful = torch.where(failures == 0, language, helpful)
        return torch.where(best == -torch.inf, ~language, helpful)
