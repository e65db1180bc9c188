"""Group relative policy optimisation: PPO's minimum, with the group's mean and deviation in place of a critic."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ctrlrl.core import advantage as adv
from ctrlrl.core import penalty, ratio
from ctrlrl.losses.base import Knobs, register
from ctrlrl.losses.group import ClippedGroupLoss
from ctrlrl.losses.needs import Need, Slot
from ctrlrl.types import PolicyOutput, SequenceBatch


@register
@dataclass(frozen=True)
class GRPO(ClippedGroupLoss):
    """-mean_i mean_t [ min(r A_i, clip(r, 1 - eps_low, 1 + eps_high) A_i) - c k3 ],  A = (R - mean) / (std + floor)

    k3 estimates KL(policy || reference) at each position; its gradient, at given positions, is that of the reverse.
    """

    paper: ClassVar[str] = (
        "DeepSeekMath: Pushing the Limits of Mathematical Reasoning in Open Language Models, arXiv:2402.03300, eq. 3"
    )
    slots: ClassVar[Mapping[Slot, str]] = {
        "mask": "clip",
        "ratio": "token",
        "advantage": "(R - group mean) / group std",
        "regulariser": "k3 to the reference",
    }
    needs: ClassVar[frozenset[Need]] = frozenset({"groups", "sequence_return", "logp_ref"})

    ref_kl_coef: float = 0.04
    """Weight of the KL from the reference policy."""
    ddof: int = 1
    """Of the group's deviation: 1 unbiased, 0 population. The paper does not say; TRL and verl take 1."""
    std_floor: float = 1e-6
    """Added to the group's deviation."""

    def required(self) -> frozenset[Need]:
        return self.needs - ({"logp_ref"} if self.ref_kl_coef == 0 else set())

    def outcome_advantage(self, batch: SequenceBatch) -> Tensor:
        assert batch.sequence_return is not None and batch.group is not None
        return adv.center_scale(batch.sequence_return, batch.group, eps=self.std_floor, ddof=self.ddof)

    def per_token(self, batch: SequenceBatch, out: PolicyOutput, knobs: Knobs) -> Tensor:
        objective = super().per_token(batch, out, knobs)
        if self.ref_kl_coef == 0:
            return objective
        assert batch.logp_ref is not None
        return objective + self.ref_kl_coef * penalty.kl_k3(ratio.log_ratio(batch.logp_ref, out.logp, batch.mask))
