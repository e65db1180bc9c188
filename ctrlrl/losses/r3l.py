"""Reflect then retry: credit only from where a retry left its base, and successes count more."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ctrlrl.core import advantage as adv
from ctrlrl.core import head
from ctrlrl.losses.base import Knobs, Memory, Prepared, Start, register
from ctrlrl.losses.group import Aggregation, GroupLoss
from ctrlrl.losses.needs import Need, Slot
from ctrlrl.types import PolicyOutput, SequenceBatch


@register
@dataclass(frozen=True)
class R3L(GroupLoss):
    """-mean_it [ A_i log pi ] / (1 + tau), over positions from the pivot on

    A_i = 1 if R_i >= perfect;  amplify s_i if s_i >= 0;  s_i else;  s_i = R_i - mean of the group

    A retry and its base share a prefix, which gets no gradient. Perfect sequences are imitated with weight one, also
    in a group where all are perfect.
    """

    paper: ClassVar[str] = "R3L: Reflect-then-Retry Reinforcement Learning, arXiv:2601.03715"
    differs: ClassVar[str] = (
        "Retries are sampled by the policy itself from a position drawn at random (with turns, the first of a random "
        "turn): there is no written reflection to choose the pivot, and so no likelihood term on it either. R is the "
        "outcome's score in [0, 1]; in control that is the return between the extremes so far, so that the best yet "
        "counts as perfect."
    )
    slots: ClassVar[Mapping[Slot, str]] = {
        "mask": "positions after the pivot",
        "ratio": "none: log-likelihood",
        "advantage": "R - group mean, amplified where positive; 1 for perfect outcomes",
        "selection": "half of a group retries from a pivot",
    }
    needs: ClassVar[frozenset[Need]] = frozenset({"groups", "score", "retries"})
    aggregation: ClassVar[Aggregation] = "token_mean"

    amplify: float = 3.0
    """Factor of advantages that are not negative."""
    perfect: float | None = 1.0
    """Score from which the advantage is one; None has no such rule."""
    anchor_coef: float = 1.0
    """tau: how strongly the policy is held back; the objective is divided by one plus it."""

    def begin(self, batch: SequenceBatch, knobs: Knobs, memory: Memory) -> Start:
        if batch.pivot is not None:
            place = torch.arange(batch.mask.shape[1], device=batch.mask.device)
            batch = batch._replace(mask=batch.mask & (place >= batch.pivot.unsqueeze(-1)))
        return super().begin(batch, knobs, memory)

    def outcome_advantage(self, batch: SequenceBatch) -> Tensor:
        assert batch.score is not None and batch.group is not None
        centred = adv.center_scale(batch.score, batch.group, "group", "none")
        advantage = torch.where(centred >= 0, self.amplify * centred, centred)
        if self.perfect is None:
            return advantage
        return torch.where(batch.score >= self.perfect, torch.ones_like(advantage), advantage)

    def prepare(self, batch: SequenceBatch, knobs: Knobs) -> Prepared:
        prepared = super().prepare(batch, knobs)
        return prepared._replace(denominator=prepared.denominator * (1.0 + self.anchor_coef))

    def per_token(self, batch: SequenceBatch, out: PolicyOutput, knobs: Knobs) -> Tensor:
        assert batch.coef is not None
        return -head.logp_advantage(out.logp, batch.coef["advantage"])
