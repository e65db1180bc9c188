"""Policy filtration: PPO on a resampling of each group that trusts the reward where it is reliable."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from ctrlrl.core import outcome, reduce
from ctrlrl.losses.base import Knobs, Memory, Prepared, Start, register
from ctrlrl.losses.needs import Need, Slot
from ctrlrl.losses.ppo import PPO
from ctrlrl.types import SequenceBatch


@register
@dataclass(frozen=True)
class PFPPO(PPO):
    """PPO, each sequence weighted by its expected number of copies n w_i / sum_g w_j when its group is resampled

    best_random  w = best_to_other for the best of the group, 1 for the others
    best_worst   w = 1 for the best and for the worst, else 0
    best_of_n    w = 1 for the best, else 0
    power        w = |R|^2

    Equal weights are PPO.
    """

    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {}  # PPO's is for control
    paper: ClassVar[str] = "Policy Filtration in RLHF to Fine-Tune LLM for Code Generation (PF-PPO), arXiv:2409.06957"
    differs: ClassVar[str] = (
        "Copies are not drawn but weighted by how many there would be on average; ties share a place. The value "
        "function learns from all sequences, and advantages are standardised before the filter. The paper also picks "
        "the filter, by how well the kept rewards predict true scores; here the user does."
    )
    slots: ClassVar[Mapping[Slot, str]] = {
        "mask": "clip",
        "ratio": "token",
        "advantage": "GAE",
        "selection": "resampling by rank of the reward",
    }
    needs: ClassVar[frozenset[Need]] = frozenset({"values", "groups", "sequence_return"})

    keep_rule: Literal["best_random", "best_worst", "best_of_n", "power"] = "best_random"
    """Which sequences are likely to be drawn."""
    best_to_other: float = 4.0
    """How many times likelier the best is drawn than another one, under best_random."""
    scope: Literal["group", "batch"] = "group"
    """Where best and worst are looked for: in each group, or in the whole batch (released, in verl)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.best_to_other < 0:
            raise ValueError(f"best_to_other={self.best_to_other} must not be negative")

    def begin(self, batch: SequenceBatch, knobs: Knobs, memory: Memory) -> Start:
        assert batch.sequence_return is not None and batch.group is not None
        x = batch.sequence_return
        ids = batch.group if self.scope == "group" else torch.zeros_like(batch.group)
        w = self._chance(x, ids)
        one = torch.ones_like(x)
        total = reduce.segment_sum(w, ids)
        copies = torch.where(total > 0, reduce.segment_sum(one, ids) * w / torch.where(total > 0, total, one), one)
        return Start(batch._replace(coef={"copies": copies.unsqueeze(-1).expand(batch.mask.shape)}), memory, {})

    def _chance(self, x: Tensor, ids: Tensor) -> Tensor:
        """[B] relative chance of being drawn."""
        if self.keep_rule == "power":
            return x.square()
        best = outcome.share_of_best(x, ids)
        if self.keep_rule == "best_random":
            return 1.0 + (self.best_to_other - 1.0) * best
        return best + outcome.share_of_best(-x, ids) if self.keep_rule == "best_worst" else best

    def prepare(self, batch: SequenceBatch, knobs: Knobs) -> Prepared:
        assert batch.coef is not None
        prepared = super().prepare(batch, knobs)
        copies = batch.coef["copies"].to(prepared.weight.dtype)
        weight = torch.where(batch.mask, prepared.weight * copies, torch.zeros_like(copies))
        return Prepared(prepared.coef | {"copies": copies}, weight, weight.sum().clamp(min=1.0))
