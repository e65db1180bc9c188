"""Bases of the losses that compare whole sequences with each other: no critic, one outcome per sequence."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal, TypeAlias

import torch
from torch import Tensor

from ctrlrl.core import advantage as adv
from ctrlrl.core import gate, head, ratio, reduce
from ctrlrl.losses.base import Knobs, Memory, PolicyLoss, Prepared, Start
from ctrlrl.losses.needs import Need
from ctrlrl.types import PolicyOutput, SequenceBatch

Aggregation: TypeAlias = Literal["token_mean", "sequence_mean_token_mean", "sequence_mean_token_sum"]
AGGREGATIONS: dict[str, Callable[[Tensor, torch.dtype], tuple[Tensor, Tensor]]] = {
    "token_mean": reduce.token_mean,
    "sequence_mean_token_mean": reduce.sequence_mean_token_mean,
    "sequence_mean_token_sum": reduce.sequence_mean_token_sum,
}


@dataclass(frozen=True)
class GroupLoss(PolicyLoss):
    """A loss whose advantage is one number per sequence (or position), from outcomes of the whole iteration."""

    needs: ClassVar[frozenset[Need]] = frozenset({"groups", "sequence_return"})
    critics: ClassVar[tuple[str, ...]] = ()
    aggregation: ClassVar[Aggregation] = "sequence_mean_token_mean"
    """How positions are averaged; the key of a function of ``core.reduce``."""

    def begin(self, batch: SequenceBatch, knobs: Knobs, memory: Memory) -> Start:
        advantage = self.outcome_advantage(batch)
        if advantage.ndim == 1:
            advantage = advantage.unsqueeze(-1).expand(batch.mask.shape)
        batch = batch._replace(advantage=torch.where(batch.mask, advantage, torch.zeros_like(advantage)))
        return Start(batch, memory, {})

    def outcome_advantage(self, batch: SequenceBatch) -> Tensor:
        """[B] or [B, T] advantages, from the outcomes of all episodes of an iteration."""
        assert batch.sequence_return is not None and batch.group is not None
        return adv.center_scale(batch.sequence_return, batch.group)

    def prepare(self, batch: SequenceBatch, knobs: Knobs) -> Prepared:
        weight, denominator = AGGREGATIONS[self.aggregation](batch.mask, batch.advantage.dtype)
        return Prepared({"advantage": self.advantage(batch)}, weight, denominator)


@dataclass(frozen=True)
class ClippedGroupLoss(GroupLoss):
    """PPO's minimum with a group's advantage: GRPO without its KL, and what many variants change one part of."""

    level: ClassVar[ratio.Level] = "token"
    """Where the ratio is formed."""

    eps_low: float = 0.2
    """Distance below one at which a negative advantage stops earning a gradient."""
    eps_high: float = 0.2
    """Distance above one at which a positive advantage stops earning a gradient."""

    def log_ratio(self, batch: SequenceBatch, out: PolicyOutput) -> Tensor:
        """[B, T] log-ratio to the collecting policy, at this loss's level."""
        return ratio.log_ratio(out.logp, batch.logp_old, batch.mask, self.level, batch.turn)

    def metrics(self, batch: SequenceBatch, out: PolicyOutput, knobs: Knobs) -> dict[str, Tensor]:
        found = super().metrics(batch, out, knobs)
        if self.level == "token":
            return found
        r = ratio.ratio(self.log_ratio(batch, out).detach()).expand(batch.mask.shape)
        return found | {"clip_fraction": gate.clipped(r, self.eps_low, self.eps_high).to(r.dtype)}

    def per_token(self, batch: SequenceBatch, out: PolicyOutput, knobs: Knobs) -> Tensor:
        assert batch.coef is not None
        r = ratio.ratio(self.log_ratio(batch, out))
        return -head.clipped_surrogate(r, batch.coef["advantage"], self.eps_low, self.eps_high)
