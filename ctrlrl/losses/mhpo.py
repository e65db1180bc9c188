"""A smooth bound on the ratio and a hazard that fades large moves out, in place of a clip."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import softplus

from ctrlrl.core import head, ratio
from ctrlrl.losses.base import Knobs, register
from ctrlrl.losses.group import GroupLoss
from ctrlrl.losses.needs import Slot
from ctrlrl.types import PolicyOutput, SequenceBatch


@register
@dataclass(frozen=True)
class MHPO(GroupLoss):
    """-mean_i mean_t exp(psi - sg zeta) A_i,  psi = c tanh(log r / c),
    zeta = (softplus(psi) / scale_up)^power_up + (softplus(-psi) / scale_down)^power_down

    A = (R - group mean) / group std. The weight on grad log pi is A sech^2(log r / c) exp(psi - zeta): with the
    defaults 0.265 A at ratio one and at most 0.396 A, at ratio 1.78. The learning rate has to make up for it.
    """

    paper: ClassVar[str] = (
        "MHPO: Modulated Hazard-aware Policy Optimization for Stable Reinforcement Learning, arXiv:2603.16929"
    )
    slots: ClassVar[Mapping[Slot, str]] = {
        "mask": "tanh of the log-ratio and a hazard",
        "ratio": "token",
        "advantage": "(R - group mean) / group std",
    }

    modulation: float = 1.5
    """c, the bound that the log-ratio approaches, in nats."""
    power_up: float = 1.5
    """Exponent of the hazard of positions that become likelier."""
    scale_up: float = 1.0
    """Where that hazard sets in, in nats."""
    power_down: float = 2.0
    """Exponent of the hazard of positions that become less likely."""
    scale_down: float = 0.8
    """Where that hazard sets in, in nats."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("modulation", "power_up", "scale_up", "power_down", "scale_down"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)} must be positive")

    def per_token(self, batch: SequenceBatch, out: PolicyOutput, knobs: Knobs) -> Tensor:
        assert batch.coef is not None
        log_ratio = ratio.log_ratio(out.logp, batch.logp_old, batch.mask)
        psi = self.modulation * torch.tanh(log_ratio / self.modulation)
        fixed = psi.detach()
        up = softplus(fixed)
        down = (up - fixed).relu_()  # softplus(-x) = softplus(x) - x
        up, down = up.div_(self.scale_up).pow_(self.power_up), down.div_(self.scale_down).pow_(self.power_down)
        return -head.ratio_advantage((psi - up.add_(down)).exp_(), batch.coef["advantage"])
