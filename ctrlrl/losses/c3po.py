"""C3PO: GRPO with a fixed budget of positions per optimiser step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from ctrlrl.losses.base import Knobs, Prepared, register
from ctrlrl.losses.grpo import GRPO
from ctrlrl.losses.needs import Slot
from ctrlrl.types import SequenceBatch


@register
@dataclass(frozen=True)
class C3PO(GRPO):
    """-(1 / budget) sum_{t in S} [ min(r A, clip(r) A) - c k3 ],  S = the first ``budget`` positions

    Rows of the update batch are taken in order and the last is cut. Every position weighs 1 / budget however long the
    episodes are, so the size of a step does not follow their length. Advantages are those of all episodes.
    """

    paper: ClassVar[str] = (
        "Ring-lite: Scalable Reasoning via C3PO-Stabilized Reinforcement Learning for LLMs, arXiv:2506.14731, sec. 3.2"
    )
    differs: ClassVar[str] = (
        "The paper's budget is 409600 tokens per step, of sequences drawn at random; the default is for small tasks, "
        "and sequences are taken in the order of the batch, which is shuffled unless batch_size is None. Its entropy "
        "bonus (5e-4, printed with the opposite sign) is the loop's entropy_coef; its router losses are for mixtures "
        "of experts."
    )
    slots: ClassVar[Mapping[Slot, str]] = {
        "mask": "clip; positions within the budget",
        "ratio": "token",
        "advantage": "(R - group mean) / group std",
        "regulariser": "k3 to the reference",
        "selection": "a fixed number of positions",
    }

    ref_kl_coef: float = 1e-3
    """Weight of the KL from the reference policy."""
    budget: int = 256
    """Positions per optimiser step."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.budget < 1:
            raise ValueError(f"budget={self.budget} must be at least 1")

    def prepare(self, batch: SequenceBatch, knobs: Knobs) -> Prepared:
        prepared = super().prepare(batch, knobs)
        place = batch.mask.flatten().long().cumsum(0).view_as(batch.mask)
        within = batch.mask & (place <= self.budget)
        weight = within.to(prepared.weight.dtype)
        return prepared._replace(weight=weight, denominator=weight.new_full((), self.budget))
