"""Proximal policy optimisation: the clipped surrogate."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ctrlrl.core import head, ratio
from ctrlrl.losses.base import Knobs, PolicyLoss, register, standardised
from ctrlrl.losses.needs import Need, Slot
from ctrlrl.types import PolicyOutput, SequenceBatch


@register
@dataclass(frozen=True)
class PPO(PolicyLoss):
    """-min(r A, clip(r, 1 - eps, 1 + eps) A)

    The gradient is that of |A| |r - (1 + eps sign A)| with a dead zone: zero once r has passed its target.
    """

    paper: ClassVar[str] = "Proximal Policy Optimization Algorithms, arXiv:1707.06347, eq. 7"
    slots: ClassVar[Mapping[Slot, str]] = {"mask": "clip", "ratio": "token", "advantage": "GAE"}
    needs: ClassVar[frozenset[Need]] = frozenset({"values"})

    eps: float = 0.2
    """Half-width of the band in which the ratio earns a gradient."""
    standardize_advantage: bool = True
    """Bring the advantages of each update batch to mean 0 and deviation 1."""

    def advantage(self, batch: SequenceBatch) -> Tensor:
        return standardised(batch) if self.standardize_advantage else batch.advantage

    def per_token(self, batch: SequenceBatch, out: PolicyOutput, knobs: Knobs) -> Tensor:
        assert batch.coef is not None
        r = ratio.ratio(ratio.log_ratio(out.logp, batch.logp_old, batch.mask))
        return -head.clipped_surrogate(r, batch.coef["advantage"], self.eps, self.eps)
