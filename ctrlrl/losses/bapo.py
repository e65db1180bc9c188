"""PPO's clip with bounds searched in every update, so that positive advantages have their share in it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from ctrlrl.core import head, ratio, trust
from ctrlrl.losses.base import GradientOf, Knobs, register
from ctrlrl.losses.group import Aggregation, GroupLoss
from ctrlrl.losses.needs import Slot
from ctrlrl.types import PolicyOutput, SequenceBatch


@register
@dataclass(frozen=True)
class BAPO(GroupLoss):
    """-min(r A, clip(r, c_low, c_high) A), averaged over positions, with bounds such that
    sum_{A > 0} p |min(...)| / sum p |min(...)| >= positive_share

    p is the old policy's probability, A = (R - group mean) / group std. The search starts from a narrow band,
    raises c_high until the share is reached, then, if it is not, c_low. It has to see the ratios of a whole update
    batch, so ``loss`` holds the narrow band and ``grad_transform`` adds the difference: one more backward pass.
    """

    paper: ClassVar[str] = (
        "BAPO: Stabilizing Off-Policy Reinforcement Learning for LLMs via Balanced Policy Optimization with Adaptive "
        "Clipping, arXiv:2510.18927"
    )
    differs: ClassVar[str] = (
        "The released code does not weigh by p, raises c_low first and clips large ratios of negative advantages at 3, "
        "which is left out of the preset 'released'. By value, as both count, raising c_low can never help: a clipped "
        "negative advantage contributes more, not less; contribution='gradient' is ours and lets it."
    )
    slots: ClassVar[Mapping[Slot, str]] = {
        "mask": "clip with searched bounds",
        "ratio": "token",
        "advantage": "(R - group mean) / group std",
    }
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "released": {
            "positive_share": 0.5,
            "ratio_low_max": 0.8,
            "ratio_high_max": 2.0,
            "probability_weighted": False,
            "first": "low",
        }
    }
    aggregation: ClassVar[Aggregation] = "token_mean"

    positive_share: float = 0.4
    """Share of the objective that positive advantages must reach."""
    ratio_low: float = 0.6
    """c_low where the search starts."""
    ratio_low_max: float = 0.9
    """c_low where it ends."""
    low_step: float = 0.02
    """Its step."""
    ratio_high: float = 1.2
    """c_high where the search starts."""
    ratio_high_max: float = 3.0
    """c_high where it ends."""
    high_step: float = 0.05
    """Its step."""
    contribution: Literal["value", "gradient"] = "value"
    """What a clipped position contributes: its value, or, as it has no gradient, nothing."""
    probability_weighted: bool = True
    """Weigh each position of the share by the old policy's probability of its action."""
    first: Literal["high", "low"] = "high"
    """Which bound the search moves first."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for low, high in (("ratio_low", "ratio_low_max"), ("ratio_high", "ratio_high_max")):
            if not 0.0 < getattr(self, low) <= getattr(self, high):
                raise ValueError(f"{low}={getattr(self, low)} must lie in (0, {high}={getattr(self, high)}]")
        for name in ("low_step", "high_step"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)} must be positive")

    def surrogate(self, batch: SequenceBatch, out: PolicyOutput, low: float | Tensor, high: float | Tensor) -> Tensor:
        """[B, T] PPO's objective in a band."""
        assert batch.coef is not None
        return head.clipped_surrogate(self.importance(batch, out), batch.coef["advantage"], 1.0 - low, high - 1.0)

    def importance(self, batch: SequenceBatch, out: PolicyOutput) -> Tensor:
        """[B, T] ratio to the collecting policy."""
        return ratio.ratio(ratio.log_ratio(out.logp, batch.logp_old, batch.mask))

    def band(self, batch: SequenceBatch, out: PolicyOutput) -> tuple[Tensor, Tensor]:
        """The searched bounds, from a whole update batch."""
        assert batch.coef is not None
        r = self.importance(batch, out).detach()
        weight = batch.mask.to(r.dtype)
        if self.probability_weighted:
            # only proportions count, so the largest may be one; densities of continuous actions can be huge
            top = torch.where(batch.mask, batch.logp_old, -torch.inf).amax()
            weight = torch.where(batch.mask, (batch.logp_old - top).exp(), 0.0)
        return trust.balanced_band(
            r,
            batch.coef["advantage"],
            weight,
            _grid(self.ratio_low, self.ratio_low_max, self.low_step, r),
            _grid(self.ratio_high, self.ratio_high_max, self.high_step, r),
            self.positive_share,
            self.contribution,
            high_first=self.first == "high",
        )

    def per_token(self, batch: SequenceBatch, out: PolicyOutput, knobs: Knobs) -> Tensor:
        return -self.surrogate(batch, out, self.ratio_low, self.ratio_high)

    def grad_transform(self, grad: Tensor, gradient_of: GradientOf, knobs: Knobs) -> Tensor:
        def widening(batch: SequenceBatch, out: PolicyOutput) -> Tensor:
            searched = self.surrogate(batch, out, *self.band(batch, out))
            return self.surrogate(batch, out, self.ratio_low, self.ratio_high) - searched

        return grad + gradient_of(widening)


def _grid(start: float, end: float, step: float, like: Tensor) -> Tensor:
    """start, start + step, ..., and end itself as the last."""
    count = max(0, round((end - start) / step + 0.499))
    steps = start + step * torch.arange(count + 1, dtype=like.dtype, device=like.device)
    return steps.clamp(max=end)
