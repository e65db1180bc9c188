"""A price on the variance of the ratio in place of a clip, which also makes old episodes usable."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ctrlrl.core import head, ratio
from ctrlrl.core.control import Controller
from ctrlrl.core.trust import DualAscent
from ctrlrl.losses.base import Knobs, PolicyLoss, register, standardised
from ctrlrl.losses.needs import Need, Slot
from ctrlrl.types import PolicyOutput, SequenceBatch


@register
@dataclass(frozen=True)
class R2VPO(PolicyLoss):
    """-(r A - k (r - 1)^2),  k <- max(0, k + dual_rate (mean (r - 1)^2 - variance_target)) after every iteration

    The constraint is E_old[(r - 1)^2] <= variance_target, a chi-squared trust region. The weight on grad log pi is
    r (A - 2 k (r - 1)), zero at r = 1 + A / (2 k): every position has a ratio of its own to go to. Old episodes
    count with the ratio to the policy that sampled them, and brake the more the further the policy has left it.
    """

    paper: ClassVar[str] = "Ratio-Variance Regularized Policy Optimization (R2VPO, ICML 2026), arXiv:2605.26784"
    differs: ClassVar[str] = (
        "Worked out from the abstract: the form of the Lagrangian follows from the constraint; its bound, the step "
        "and the start of the price are ours. The price moves once per iteration, on the mean over its optimiser "
        "steps. Earlier rows are replayed where rows are whole episodes (token sequences), not single transitions; "
        "the value function then learns from their old targets too."
    )
    slots: ClassVar[Mapping[Slot, str]] = {
        "mask": "none",
        "ratio": "token, to the policy that sampled the row",
        "advantage": "GAE",
        "regulariser": "variance of the ratio, dual price",
        "selection": "replay of earlier token sequences",
    }
    needs: ClassVar[frozenset[Need]] = frozenset({"values"})
    uses: ClassVar[frozenset[Need]] = frozenset({"replay"})

    variance_target: float = 0.01
    """Bound on the mean of (r - 1)^2; about twice the KL divergence allowed."""
    dual_rate: float = 0.1
    """Step of the price k."""
    dual_start: float = 1.0
    """k in the first iteration."""
    standardize_advantage: bool = True
    """Bring the advantages of each update batch to mean 0 and deviation 1."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("variance_target", "dual_rate", "dual_start"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name}={getattr(self, name)} must not be negative")

    def controllers(self) -> dict[str, Controller]:
        ascent = DualAscent("dual", "ratio_variance", self.variance_target, self.dual_rate, self.dual_start)
        return {"dual": ascent}

    def advantage(self, batch: SequenceBatch) -> Tensor:
        return standardised(batch) if self.standardize_advantage else batch.advantage

    def excess(self, batch: SequenceBatch, out: PolicyOutput) -> Tensor:
        """[B, T] r - 1."""
        return ratio.ratio_minus_one(ratio.log_ratio(out.logp, batch.logp_old, batch.mask))

    def per_token(self, batch: SequenceBatch, out: PolicyOutput, knobs: Knobs) -> Tensor:
        assert batch.coef is not None
        excess = self.excess(batch, out)
        return knobs["dual"] * excess.square() - head.ratio_advantage(1.0 + excess, batch.coef["advantage"])

    def metrics(self, batch: SequenceBatch, out: PolicyOutput, knobs: Knobs) -> dict[str, Tensor]:
        return {**super().metrics(batch, out, knobs), "ratio_variance": self.excess(batch, out).square()}
