"""GRPO on a flow policy: every denoising step is an action with a density of its own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ctrlrl.core import advantage as adv
from ctrlrl.core import penalty
from ctrlrl.losses.base import Knobs, register
from ctrlrl.losses.group import ClippedGroupLoss
from ctrlrl.losses.needs import Need, Slot
from ctrlrl.types import PolicyOutput, SequenceBatch


@register
@dataclass(frozen=True)
class FlowGRPO(ClippedGroupLoss):
    """-mean_i mean_k [ min(r A_i, clip(r, 1 - eps_low, 1 + eps_high) A_i) - c |mu - mu_ref|^2 / (2 s^2) ]

    r is the ratio of denoising step k, A = (R - mean) / (std + floor) of the group, and the last term the exact
    KL between two steps with the same noise s.
    """

    paper: ClassVar[str] = "Flow-GRPO: Training Flow Matching Models via Online RL, arXiv:2505.05470"
    differs: ClassVar[str] = (
        "The released code clips at 1e-4, since it averages log-probabilities over the many dimensions of an image; "
        "with their sum over the few of an action, PPO's 0.2 is the same kind of bound. It also averages the KL."
    )
    slots: ClassVar[Mapping[Slot, str]] = {
        "mask": "clip",
        "ratio": "denoising step",
        "advantage": "(R - group mean) / group std",
        "likelihood": "Gaussian step of the denoising SDE",
        "regulariser": "closed-form KL to the reference",
    }
    needs: ClassVar[frozenset[Need]] = frozenset({"groups", "sequence_return", "denoising", "logp_ref"})

    ref_kl_coef: float = 0.04
    """Weight of the KL to the reference policy."""
    ddof: int = 0
    """Of the group's deviation: 0 population, as in the released code, 1 unbiased."""
    std_floor: float = 1e-4
    """Added to the group's deviation."""

    def required(self) -> frozenset[Need]:
        return self.needs if self.ref_kl_coef > 0 else self.needs - {"logp_ref"}

    def outcome_advantage(self, batch: SequenceBatch) -> Tensor:
        assert batch.sequence_return is not None and batch.group is not None
        return adv.center_scale(batch.sequence_return, batch.group, eps=self.std_floor, ddof=self.ddof)

    def per_token(self, batch: SequenceBatch, out: PolicyOutput, knobs: Knobs) -> Tensor:
        objective = super().per_token(batch, out, knobs)
        if self.ref_kl_coef == 0:
            return objective
        assert batch.dist_ref is not None
        return objective + self.ref_kl_coef * penalty.kl_between(out.dist.params(), batch.dist_ref, batch.mask)
