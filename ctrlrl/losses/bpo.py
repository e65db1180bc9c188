"""Bounded policy optimisation with a learned median."""

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
class BPO(PolicyLoss):
    """|r - t| |R - V|, with the target t = 1 + eps tanh((R - mu) / (2 lam)) and mu a learned median of R.

    R is the lambda-return, V the current value and mu the current median; t and the weight carry no gradient.
    mu minimises T g((R - mu) / T), g(x) = log(2 cosh(x / 2)), the dual of the normalisation E[t] = 1
    (Theorem 4.1); T = lam is what the theorem asks for.
    """

    paper: ClassVar[str] = "Bounded Ratio Reinforcement Learning (BPO), arXiv:2604.18578"
    differs: ClassVar[str] = (
        "The released code trains the median at temperature 1 in return units, with a median head stacked on the "
        "value trunk; here the temperature is lam (preset 'released': 1) and the median is a critic of its own. "
        "Returns are those of normalised rewards unless normalize_reward is off."
    )
    slots: ClassVar[Mapping[Slot, str]] = {
        "mask": "distance to a bounded target ratio",
        "ratio": "token",
        "advantage": "return minus median",
    }
    needs: ClassVar[frozenset[Need]] = frozenset({"values"})
    critics: ClassVar[tuple[str, ...]] = ("value", "median")
    loop_defaults: ClassVar[Mapping[str, Any]] = {"max_grad_norm": 1.0}
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "released": {
            "median_temp": 1.0,
            "normalize_obs": False,
            "normalize_reward": False,
            "actor_hidden": (256, 256),
            "critic_hidden": (256, 256),
            "activation": "relu",
        }
    }

    eps: float = 0.3
    """Bound on the distance of the target ratio from one."""
    lam: float = 1e-3
    """Temperature of the bounded ratio, in units of the return: below the spread of returns it acts as a sign."""
    median_temp: float | None = None
    """Temperature of the median's loss, in units of the return; None means lam."""
    median_coef: float = 0.5
    """Weight of the median's loss."""

    def target(self, batch: SequenceBatch, out: PolicyOutput) -> Tensor:
        """[B, T] the ratio that each action should reach."""
        gap = batch.value_target - out.values["median"]
        return weight.tanh_target(gap.detach(), self.eps, self.lam)

    def per_token(self, batch: SequenceBatch, out: PolicyOutput, knobs: Knobs) -> Tensor:
        r = ratio.ratio(ratio.log_ratio(out.logp, batch.logp_old, batch.mask))
        importance = (batch.value_target - out.values["value"]).abs().detach()
        return head.ratio_target(r, self.target(batch, out), importance, kind="l1")

    def critic_terms(self, batch: SequenceBatch, out: PolicyOutput, knobs: Knobs) -> dict[str, Tensor]:
        temp = self.lam if self.median_temp is None else self.median_temp
        gap = (batch.value_target - out.values["median"]) / temp
        return {"median": self.median_coef * temp * weight.median_dual(gap)}

    def metrics(self, batch: SequenceBatch, out: PolicyOutput, knobs: Knobs) -> dict[str, Tensor]:
        return {**super().metrics(batch, out, knobs), "target_excess": self.target(batch, out) - 1.0}
