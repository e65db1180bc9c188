"""STEER: GRPO with less weight on the positions that would move the entropy most."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ctrlrl.core import entropy, ratio
from ctrlrl.losses.base import Knobs, Prepared, register
from ctrlrl.losses.group import Aggregation, ClippedGroupLoss
from ctrlrl.losses.needs import Need, Slot
from ctrlrl.types import PolicyOutput, SequenceBatch

SMALLEST_PEAK = 0.02
"""Entropy change below which the largest of a batch is no reason to weigh it less."""


@register
@dataclass(frozen=True)
class STEER(ClippedGroupLoss):
    """lambda_t min(r A, clip(r) A),  lambda = clip(exp(-k |W|), weight_min, 1),  k = -log(weight_min) / max |W|

    W = r A dH/dc is the change of the entropy by a gradient step on the position; for A < 0 the surrogate stops at
    ratio_max A.
    """

    paper: ClassVar[str] = "Rethinking Entropy Interventions in RLVR: An Entropy Change Perspective, arXiv:2510.10150"
    differs: ClassVar[str] = (
        "The default W is the exact first-order change of a softmax's entropy, derived here; the released code's "
        "lacks a factor pi, which makes rare actions count 1/pi times too much. max |W| is that of the collecting "
        "policy over the update batch, so that a split changes nothing; the code takes the current policy's. For "
        "Gaussians W follows from the change of log sigma, whatever the form. Weights above one are left out."
    )
    slots: ClassVar[Mapping[Slot, str]] = {
        "mask": "clip, dual clip, times exp(-k |entropy change|)",
        "ratio": "token",
        "advantage": "(R - group mean) / group std",
    }
    needs: ClassVar[frozenset[Need]] = frozenset({"step_dist", "plain_action", "groups", "sequence_return", "dist_old"})
    aggregation: ClassVar[Aggregation] = "token_mean"

    eps_high: float = 0.28
    """Distance above one at which a positive advantage stops earning a gradient."""
    ratio_max: float = 10.0
    """Ratio beyond which a negative advantage stops earning a gradient."""
    weight_min: float = 0.8
    """Weight of the position that would move the entropy most; 1 for the same weight everywhere."""
    form: Literal["exact", "single_logit", "released"] = "exact"
    """How the entropy change of a choice is estimated, see ``core.entropy.entropy_change``."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 < self.weight_min <= 1.0:
            raise ValueError(f"weight_min={self.weight_min} must lie in (0, 1]")

    def prepare(self, batch: SequenceBatch, knobs: Knobs) -> Prepared:
        assert batch.dist_old is not None
        prepared = super().prepare(batch, knobs)
        advantage = prepared.coef["advantage"]
        change = (advantage * entropy.entropy_change(batch.dist_old, batch.action, self.form)).abs()
        peak = torch.where(batch.mask, change, torch.zeros_like(change)).amax().clamp(min=SMALLEST_PEAK)
        rate = (-math.log(self.weight_min) / peak).expand(advantage.shape)
        return prepared._replace(coef=prepared.coef | {"rate": rate})

    def per_token(self, batch: SequenceBatch, out: PolicyOutput, knobs: Knobs) -> Tensor:
        assert batch.coef is not None
        a, r = batch.coef["advantage"], ratio.ratio(self.log_ratio(batch, out)).detach()
        params = {k: v.detach() for k, v in out.dist.params().items()}
        change = r * a * entropy.entropy_change(params, batch.action, self.form)
        weight = torch.exp(-batch.coef["rate"] * change.abs()).clamp(min=self.weight_min)
        loss = super().per_token(batch, out, knobs)
        return weight * torch.where(a < 0, torch.minimum(loss, -self.ratio_max * a), loss)
