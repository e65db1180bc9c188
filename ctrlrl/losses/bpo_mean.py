"""Bounded policy optimisation with the mean as baseline: no median network."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from ctrlrl.core import head, ratio, weight
from ctrlrl.losses.base import Knobs, PolicyLoss, register
from ctrlrl.losses.needs import Need, Slot
from ctrlrl.types import PolicyOutput, SequenceBatch


@register
@dataclass(frozen=True)
class BPOMean(PolicyLoss):
    """|r - t| |R - V|, with the target t = 1 + eps tanh((R - V) / (2 lam)).

    The paper's ablation: the value takes the place of the median. Cheaper, and the target is no longer
    normalised where returns are skewed.
    """

    paper: ClassVar[str] = "Bounded Ratio Reinforcement Learning (BPO), arXiv:2604.18578, ablation with the mean"
    slots: ClassVar[Mapping[Slot, str]] = {
        "mask": "distance to a bounded target ratio",
        "ratio": "token",
        "advantage": "return minus value",
    }
    needs: ClassVar[frozenset[Need]] = frozenset({"values"})
    loop_defaults: ClassVar[Mapping[str, Any]] = {"max_grad_norm": 1.0}

    eps: float = 0.3
    """Bound on the distance of the target ratio from one."""
    lam: float = 1e-3
    """Temperature of the bounded ratio, in units of the return: below the spread of returns it acts as a sign."""

    def target(self, batch: SequenceBatch, out: PolicyOutput) -> Tensor:
        """[B, T] the ratio that each action should reach."""
        gap = batch.value_target - out.values["value"]
        return weight.tanh_target(gap.detach(), self.eps, self.lam)

    def per_token(self, batch: SequenceBatch, out: PolicyOutput, knobs: Knobs) -> Tensor:
        r = ratio.ratio(ratio.log_ratio(out.logp, batch.logp_old, batch.mask))
        importance = (batch.value_target - out.values["value"]).abs().detach()
        return head.ratio_target(r, self.target(batch, out), importance, kind="l1")

    def metrics(self, batch: SequenceBatch, out: PolicyOutput, knobs: Knobs) -> dict[str, Tensor]:
        return {**super().metrics(batch, out, knobs), "target_excess": self.target(batch, out) - 1.0}
