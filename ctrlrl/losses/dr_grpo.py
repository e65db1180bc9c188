"""GRPO done right: neither the group's deviation nor the sequence's own length divides anything."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ctrlrl.core import advantage as adv
from ctrlrl.core import reduce
from ctrlrl.losses.base import Knobs, Prepared, register
from ctrlrl.losses.group import ClippedGroupLoss
from ctrlrl.losses.needs import Slot
from ctrlrl.types import SequenceBatch


@register
@dataclass(frozen=True)
class DrGRPO(ClippedGroupLoss):
    """-1/(B M) sum_i sum_t min(r A_i, clip(r, 1 - eps_low, 1 + eps_high) A_i),  A = R - group mean

    M is one length for all sequences: a longer one counts for more, and a group's spread is kept.
    """

    paper: ClassVar[str] = "Understanding R1-Zero-Like Training: A Critical Perspective (Dr. GRPO), arXiv:2503.20783"
    differs: ClassVar[str] = (
        "The paper's sum has no length at all, the released code divides by the longest response allowed, as here."
    )
    slots: ClassVar[Mapping[Slot, str]] = {"mask": "clip", "ratio": "token", "advantage": "R - group mean"}

    max_length: int | None = None
    """M, in positions. None takes the longest that an episode can be; 1 gives the paper's plain sum."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_length is not None and self.max_length < 1:
            raise ValueError(f"max_length={self.max_length} must be at least 1, or None")

    def outcome_advantage(self, batch: SequenceBatch) -> Tensor:
        assert batch.sequence_return is not None and batch.group is not None
        return adv.center_scale(batch.sequence_return, batch.group, scale="none")

    def prepare(self, batch: SequenceBatch, knobs: Knobs) -> Prepared:
        length = knobs.get("horizon", batch.mask.shape[1]) if self.max_length is None else self.max_length
        weight, denominator = reduce.constant(batch.mask, length, batch.advantage.dtype)
        return Prepared({"advantage": self.advantage(batch)}, weight, denominator)
