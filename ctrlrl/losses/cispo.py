"""Clipped importance weights on the log-likelihood: the weight is bounded, no position is dropped."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ctrlrl.core import head, ratio
from ctrlrl.losses.base import Knobs, register
from ctrlrl.losses.group import Aggregation, GroupLoss
from ctrlrl.losses.needs import Slot
from ctrlrl.types import PolicyOutput, SequenceBatch


@register
@dataclass(frozen=True)
class CISPO(GroupLoss):
    """-sg[clip(r, 1 - eps_low, 1 + eps_high)] A log pi, averaged over positions;  A = (R - group mean) / group std

    A ratio beyond a bound weighs what the bound weighs, so every position keeps a gradient.
    """

    paper: ClassVar[str] = (
        "MiniMax-M1: Scaling Test-Time Compute Efficiently with Lightning Attention (CISPO), arXiv:2506.13585, eq. 4"
    )
    differs: ClassVar[str] = (
        "The paper tunes the upper bound; the 5 here is what ScaleRL (arXiv:2510.13786) recommends. Three functions go "
        "by this name: this is the paper's, in which the clipped ratio is a constant factor of log pi. A reading that "
        "masks clipped positions, as PPO does, is not it."
    )
    slots: ClassVar[Mapping[Slot, str]] = {
        "mask": "none",
        "ratio": "token, clipped, constant",
        "advantage": "(R - group mean) / group std",
        "likelihood": "log-probability",
    }
    aggregation: ClassVar[Aggregation] = "token_mean"

    eps_low: float | None = None
    """Distance below one at which the weight stops falling; None, as in the paper, sets no lower bound."""
    eps_high: float = 4.0
    """Distance above one at which the weight stops growing: the ratio counts as 1 + eps_high at most."""

    def per_token(self, batch: SequenceBatch, out: PolicyOutput, knobs: Knobs) -> Tensor:
        assert batch.coef is not None
        r = ratio.ratio(ratio.log_ratio(out.logp, batch.logp_old, batch.mask))
        r = r.clamp(min=None if self.eps_low is None else 1 - self.eps_low, max=1 + self.eps_high)
        return -head.logp_advantage(out.logp, r * batch.coef["advantage"])
