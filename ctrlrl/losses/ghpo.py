"""Guided hybrid policy optimisation: GRPO, with a part of the solution shown where a whole group failed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ctrlrl.core import advantage as adv
from ctrlrl.core import reduce
from ctrlrl.losses.base import register
from ctrlrl.losses.group import Aggregation, ClippedGroupLoss
from ctrlrl.losses.needs import Need, Slot
from ctrlrl.types import SequenceBatch


@register
@dataclass(frozen=True)
class GHPO(ClippedGroupLoss):
    """L_GRPO;  a group that failed throughout is drawn again from the first 1/4 (then 1/2, 3/4) of the solution

    A = (R - mean) / (std + floor). The hint is no choice of the policy: its positions are masked. A group that still
    fails gives nothing.
    """

    paper: ClassVar[str] = (
        "GHPO: Adaptive Guidance for Stable and Efficient LLM Reinforcement Learning, arXiv:2507.10628"
    )
    differs: ClassVar[str] = (
        "The hint is a prefix of the sequence, not of the prompt. The cold start of 20 steps with half the solution "
        "is left out."
    )
    slots: ClassVar[Mapping[Slot, str]] = {
        "mask": "clip; hints",
        "ratio": "token",
        "advantage": "(R - group mean) / group std",
        "selection": "failed groups drawn again with hints",
    }
    needs: ClassVar[frozenset[Need]] = frozenset({"groups", "sequence_return", "score", "hints"})
    aggregation: ClassVar[Aggregation] = "token_mean"
    hint_ratios: ClassVar[tuple[float, ...]] = (0.25, 0.5, 0.75)
    """Parts of the solution that a group is shown, one after the other, while it keeps failing."""

    std_floor: float = 1e-4
    """Added to the group's deviation."""

    def outcome_advantage(self, batch: SequenceBatch) -> Tensor:
        assert batch.sequence_return is not None and batch.group is not None
        return adv.center_scale(batch.sequence_return, batch.group, eps=self.std_floor)

    def hard(self, score: Tensor, group: Tensor) -> Tensor:
        """[B] bool: rows of groups in which no sequence scored."""
        return reduce.segment_sum((score > 0).to(torch.int64), group) == 0
