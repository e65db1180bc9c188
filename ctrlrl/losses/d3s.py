"""Dynamic dual-level down-sampling: GRPO on the rows of largest advantage variance and their most telling steps."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ctrlrl.core import budget
from ctrlrl.core.control import Controller, LinearSchedule
from ctrlrl.losses.base import Knobs, Memory, Start, register
from ctrlrl.losses.group import ClippedGroupLoss
from ctrlrl.losses.needs import Need, Slot
from ctrlrl.types import SequenceBatch


@register
@dataclass(frozen=True)
class D3S(ClippedGroupLoss):
    """L_GRPO over {(i, t) : i in S, |A_i| H_it among the largest share K},  S = argmax {Var(A_S) : |S| = n B}

    n and K are shares of the rows and steps and move in a straight line over the run. Advantages are those
    of the whole groups.
    """

    paper: ClassVar[str] = (
        "Learning More with Less: A Dynamic Dual-Level Down-Sampling Framework for Efficient Policy Optimization, "
        "arXiv:2509.22115"
    )
    differs: ClassVar[str] = (
        "The schedule's ends are chosen here so that about a sixth of the steps is used over a run (the paper reports "
        "less than a fifth). Where a density's entropy is negative, twice its smallest value is taken off, so that "
        "steps keep their order."
    )
    slots: ClassVar[Mapping[Slot, str]] = {
        "mask": "clip; largest |A| H",
        "ratio": "token",
        "advantage": "(R - group mean) / group std",
        "selection": "rows of largest advantage variance",
    }
    needs: ClassVar[frozenset[Need]] = frozenset({"step_dist", "groups", "sequence_return"})

    rows_start: float = 0.5
    """Share of the rows kept at the start of the run."""
    rows_end: float = 1.0
    """Share of the rows kept at its end."""
    steps_start: float = 0.1
    """Share of the kept rows' steps that is used at the start."""
    steps_end: float = 0.3
    """Share of the kept rows' steps that is used at the end."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("rows_start", "rows_end", "steps_start", "steps_end"):
            if not 0.0 < getattr(self, name) <= 1.0:
                raise ValueError(f"{name}={getattr(self, name)} must lie in (0, 1]")

    def controllers(self) -> dict[str, Controller]:
        return {
            "rows": LinearSchedule("kept_rows", self.rows_start, self.rows_end),
            "steps": LinearSchedule("kept_steps", self.steps_start, self.steps_end),
        }

    def begin(self, batch: SequenceBatch, knobs: Knobs, memory: Memory) -> Start:
        assert batch.entropy_old is not None
        start = super().begin(batch, knobs, memory)
        total = batch.mask.shape[0]
        count = min(total, max(2, round(float(knobs["kept_rows"]) * total)))
        rows = budget.max_variance_subset(self.outcome_advantage(batch), count)
        kept = batch.mask & rows.unsqueeze(-1)
        chosen = top_steps(start.batch.advantage, batch.entropy_old, kept, float(knobs["kept_steps"]))
        stats = {"used_steps": chosen.sum() / batch.mask.sum().clamp(min=1)}
        return Start(start.batch._replace(mask=chosen), memory, stats)


def top_steps(advantage: Tensor, entropy: Tensor, mask: Tensor, share: float) -> Tensor:
    """[B, T] bool: the ``share`` of the valid positions where |A| H is largest, at least one if there is any."""
    entropy = torch.where(mask, entropy, torch.zeros_like(entropy))
    gain = advantage.abs() * (entropy - 2.0 * entropy.min().clamp(max=0.0))
    order = torch.where(mask, gain, -torch.inf).flatten().argsort(descending=True, stable=True)
    # a share of 0.1 of 10 must be 1, whatever binary fractions make of it
    chosen = torch.zeros_like(order, dtype=torch.bool)
    chosen[order[: math.ceil(share * int(mask.sum()) - 1e-6)]] = True
    return chosen.view_as(mask) & mask
