"""QwenLong-L1.5's recipe: deviations by task, and no negative sequences while the entropy is too high."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ctrlrl.core import advantage as adv
from ctrlrl.losses.base import Knobs, Memory, Start, register
from ctrlrl.losses.group import ClippedGroupLoss
from ctrlrl.losses.needs import Need, Slot
from ctrlrl.types import SequenceBatch


@register
@dataclass(frozen=True)
class QwenLong(ClippedGroupLoss):
    """A_i = (R_i - group mean) / (std of R over the task's rows in the batch + floor)

    hot <- 1 if H > entropy_high, 0 if H < entropy_low, else as before;  while hot, sequences with A < 0 are masked.
    H is the mean over sequences of the mean entropy of their positions. One step per batch: the ratio is one.
    """

    paper: ClassVar[str] = "QwenLong-L1.5: Post-Training Recipe for Long-Context Reasoning, arXiv:2512.12967"
    differs: ClassVar[str] = (
        "The released listing keeps only positive sequences whenever the entropy lies between the bounds; this is the "
        "paper's rule. The paper's bounds belong to its model, the defaults here are ours. Batches with as many "
        "sequences of each task are up to the environment."
    )
    slots: ClassVar[Mapping[Slot, str]] = {
        "mask": "clip; negative sequences while the entropy is high",
        "ratio": "token, one",
        "advantage": "(R - group mean) / task std",
    }
    needs: ClassVar[frozenset[Need]] = frozenset({"step_dist", "groups", "sequence_return", "tasks"})
    # one step on each iteration's data, which is strictly on-policy; so a larger one
    loop_defaults: ClassVar[Mapping[str, Any]] = {"epochs": 1, "batch_size": None, "learning_rate": 4e-3}

    entropy_low: float = 0.3
    """Entropy, in nats per position, below which negative sequences come back."""
    entropy_high: float = 0.6
    """Entropy above which negative sequences are left out."""
    std_floor: float = 1e-6
    """Added to the task's deviation."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.entropy_low > self.entropy_high:
            raise ValueError(
                f"entropy_low={self.entropy_low} must not exceed entropy_high={self.entropy_high}: "
                "the mask is set above one and lifted below the other"
            )

    def memory(self) -> Memory:
        return {"hot": torch.tensor(False)}

    def begin(self, batch: SequenceBatch, knobs: Knobs, memory: Memory) -> Start:
        assert batch.entropy_old is not None
        mask = batch.mask
        entropy = torch.where(mask, batch.entropy_old, torch.zeros_like(batch.entropy_old)).sum(-1)
        entropy = (entropy / mask.sum(-1).clamp(min=1)).sum() / mask.any(-1).sum().clamp(min=1)
        hot = memory["hot"].to(mask.device)
        hot = (entropy > self.entropy_high) | (hot & ~(entropy < self.entropy_low))
        start = super().begin(batch, knobs, memory)
        kept = mask & ~(hot & (start.batch.advantage < 0))
        stats = {"hot": hot.to(entropy.dtype), "entropy_per_sequence": entropy}
        return Start(start.batch._replace(mask=kept), {"hot": hot}, stats)

    def outcome_advantage(self, batch: SequenceBatch) -> Tensor:
        assert batch.sequence_return is not None and batch.group is not None and batch.task is not None
        centred = adv.center_scale(batch.sequence_return, batch.group, "group", "none")
        return centred / (adv.group_std(batch.sequence_return, batch.task) + self.std_floor)
