"""Gaussian GRPO: outcomes count by their rank in the group, through normal quantiles."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ctrlrl.core import outcome
from ctrlrl.losses.base import register
from ctrlrl.losses.group import ClippedGroupLoss
from ctrlrl.losses.needs import Slot
from ctrlrl.types import SequenceBatch


@register
@dataclass(frozen=True)
class G2RPO(ClippedGroupLoss):
    """A_(j) = Phi^-1((j - 1/2) / n) for the j-th smallest outcome of a group; equal outcomes share their mean.

    The optimal transport of the group's outcomes onto N(0, 1): any increasing map of the outcomes leaves it as it is.
    Its variance is below one for finite groups (0.77 for five distinct outcomes).
    """

    paper: ClassVar[str] = "OpenVLThinkerV2 (Gaussian GRPO), arXiv:2604.08539"
    differs: ClassVar[str] = (
        "The rule for ranks and ties is inferred from the worked rows of the paper's figure 2, which it reproduces. "
        "The shaping of length and entropy is left out: its bounds are set by hand for each kind of question."
    )
    slots: ClassVar[Mapping[Slot, str]] = {
        "mask": "clip",
        "ratio": "token",
        "advantage": "normal quantile of the rank in the group",
    }

    def outcome_advantage(self, batch: SequenceBatch) -> Tensor:
        assert batch.sequence_return is not None and batch.group is not None
        return outcome.rank_normal(batch.sequence_return, batch.group)
