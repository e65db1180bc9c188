"""Advantage-weighted matching: the loss a flow is trained with, weighted by how good the action was."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ctrlrl.core import advantage as adv
from ctrlrl.losses.base import Knobs, register
from ctrlrl.losses.group import ClippedGroupLoss
from ctrlrl.losses.needs import Need, Slot
from ctrlrl.types import PolicyOutput, SequenceBatch


@register
@dataclass(frozen=True)
class AWM(ClippedGroupLoss):
    """-mean_i mean_k [ min(r A_i, clip(r, 1 - eps_low, 1 + eps_high) A_i) - c mean_d (v - v_ref)^2 ]

    l = -w(t) mean_d (v(x_t, t) - (eps - x0))^2 is minus the flow-matching loss at a fresh (t, eps), r = exp(l - l_old)
    at the same one. On-policy r = 1, and the gradient is A times that of l: any sampler may have made x0.
    A = clip((R - group mean) / (std of all R + floor), -m, m) / m.
    """

    paper: ClassVar[str] = (
        "Advantage Weighted Matching: Aligning RL with Pretraining in Diffusion Models, arXiv:2509.25050"
    )
    differs: ClassVar[str] = (
        "w(t) is the policy's matching_weight, uniform by default (released: ghuber). The released code clips at 1 "
        "and adds a second distance to a moving average of the policy, which is left out."
    )
    slots: ClassVar[Mapping[Slot, str]] = {
        "mask": "clip",
        "ratio": "of matching losses",
        "advantage": "(R - group mean) / std of all, in [-1, 1]",
        "likelihood": "minus the flow-matching loss",
        "regulariser": "distance to the reference's velocity",
    }
    needs: ClassVar[frozenset[Need]] = frozenset({"groups", "sequence_return", "matching", "logp_ref"})

    ref_kl_coef: float = 0.003
    """Weight of the squared distance to the reference policy's velocity."""
    advantage_max: float = 5.0
    """Bound on the advantage, by which it is then divided."""
    ddof: int = 0
    """Of the deviation: 0 population, as in the released code, 1 unbiased."""
    std_floor: float = 1e-4
    """Added to the deviation."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.advantage_max > 0:
            raise ValueError(f"advantage_max={self.advantage_max} must be positive")

    def required(self) -> frozenset[Need]:
        return self.needs if self.ref_kl_coef > 0 else self.needs - {"logp_ref"}

    def outcome_advantage(self, batch: SequenceBatch) -> Tensor:
        assert batch.sequence_return is not None and batch.group is not None
        bound = self.advantage_max
        scaled = adv.center_scale(batch.sequence_return, batch.group, scale="batch", eps=self.std_floor, ddof=self.ddof)
        return scaled.clamp(-bound, bound) / bound

    def per_token(self, batch: SequenceBatch, out: PolicyOutput, knobs: Knobs) -> Tensor:
        objective = super().per_token(batch, out, knobs)
        if self.ref_kl_coef == 0:
            return objective
        assert batch.dist_ref is not None
        gap = out.dist.params()["mean"] - batch.dist_ref["mean"]
        gap = torch.where(batch.mask.unsqueeze(-1), gap, torch.zeros_like(gap))
        return objective + self.ref_kl_coef * gap.square().mean(-1)
