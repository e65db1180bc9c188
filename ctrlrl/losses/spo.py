"""Simple policy optimisation: a quadratic pull to the edge of the band instead of a clip."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ctrlrl.core import head, ratio, weight
from ctrlrl.losses.base import Knobs, PolicyLoss, register, standardised
from ctrlrl.losses.needs import Need, Slot
from ctrlrl.types import PolicyOutput, SequenceBatch


@register
@dataclass(frozen=True)
class SPO(PolicyLoss):
    """|A| / (2 eps) (r - (1 + eps sign A))^2, which is -(r A - |A| (r - 1)^2 / (2 eps)) up to a constant.

    No dead zone: a ratio that has passed its target is pulled back.
    """

    paper: ClassVar[str] = "Simple Policy Optimization (ICML 2025), arXiv:2401.16025"
    slots: ClassVar[Mapping[Slot, str]] = {
        "mask": "quadratic pull to the edge of the band",
        "ratio": "token",
        "advantage": "GAE",
    }
    needs: ClassVar[frozenset[Need]] = frozenset({"values"})

    eps: float = 0.2
    """Distance from one at which the pull of the advantage and of the penalty balance."""
    standardize_advantage: bool = True
    """Bring the advantages of each update batch to mean 0 and deviation 1."""

    def advantage(self, batch: SequenceBatch) -> Tensor:
        return standardised(batch) if self.standardize_advantage else batch.advantage

    def per_token(self, batch: SequenceBatch, out: PolicyOutput, knobs: Knobs) -> Tensor:
        assert batch.coef is not None
        r = ratio.ratio(ratio.log_ratio(out.logp, batch.logp_old, batch.mask))
        advantage = batch.coef["advantage"]
        target = weight.sign_target(advantage, self.eps)
        return head.ratio_target(r, target, advantage.abs(), kind="l2") / (2.0 * self.eps)
