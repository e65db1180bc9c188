"""SimpleTIR: GRPO without the sequences that contain a void turn."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from ctrlrl.losses.base import Knobs, Memory, Start, register
from ctrlrl.losses.group import Aggregation, ClippedGroupLoss
from ctrlrl.losses.needs import Need, Slot
from ctrlrl.types import SequenceBatch


@register
@dataclass(frozen=True)
class SimpleTIR(ClippedGroupLoss):
    """L_GRPO over {(i, t) : no turn of i is void}

    A void turn does nothing: it neither acts nor ends the task. Such sequences still count in their group's mean and
    deviation; what is left is not centred again.
    """

    paper: ClassVar[str] = (
        "SimpleTIR: End-to-End Reinforcement Learning for Multi-Turn Tool-Integrated Reasoning, arXiv:2509.02479"
    )
    differs: ClassVar[str] = (
        "Oversampling, and dropping groups that are nearly always or never right and sequences cut off, are left out. "
        "The released training script switches the mask off; the paper and the code's defaults have it on."
    )
    slots: ClassVar[Mapping[Slot, str]] = {
        "mask": "clip; sequences without void turns",
        "ratio": "token",
        "advantage": "(R - group mean) / group std",
    }
    needs: ClassVar[frozenset[Need]] = frozenset({"groups", "sequence_return", "turns"})
    aggregation: ClassVar[Aggregation] = "token_mean"

    def begin(self, batch: SequenceBatch, knobs: Knobs, memory: Memory) -> Start:
        assert batch.void is not None
        start = super().begin(batch, knobs, memory)
        void = (batch.void & batch.mask).any(-1)
        mask = batch.mask & ~void.unsqueeze(-1)
        return Start(start.batch._replace(mask=mask), memory, {"void_sequences": void.to(start.batch.advantage).mean()})
