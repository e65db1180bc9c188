"""Variance-aware sampling: GRPO on seeds whose outcomes vary."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from ctrlrl.core.select import Selector, VarianceSampling
from ctrlrl.losses.base import register
from ctrlrl.losses.group import ClippedGroupLoss
from ctrlrl.losses.needs import Need, Slot


@register
@dataclass(frozen=True)
class VAS(ClippedGroupLoss):
    """L_GRPO;  a share of the groups drawn ~ p (1 - p) scaled to [0, 1] over the pool of seeds, the rest uniformly

    p is the mean score of a seed's last episodes: p (1 - p) is the variance of a pass/fail outcome, and a group's
    advantages are zero just where its outcomes do not vary.
    """

    paper: ClassVar[str] = (
        "MMR1: Enhancing Multimodal Reasoning with Variance-Aware Sampling and Open Resources, arXiv:2509.21268"
    )
    differs: ClassVar[str] = (
        "The paper adds the diversity of trajectories to the variance, with a weight it does not give; the released "
        "settings leave it out, and so does this. Variances are renewed after every iteration. A seed not yet played "
        "counts as undecided, p = 1/2. Momentum weighs the old value; the released code's default freezes it."
    )
    slots: ClassVar[Mapping[Slot, str]] = {
        "mask": "clip",
        "ratio": "token",
        "advantage": "(R - group mean) / group std",
        "selection": "seeds by outcome variance",
    }
    needs: ClassVar[frozenset[Need]] = frozenset({"groups", "sequence_return", "score"})
    loop_defaults: ClassVar[Mapping[str, Any]] = {"seed_pool": 64}

    variance_share: float = 0.5
    """Part of the groups that is drawn by variance."""
    momentum: float = 0.0
    """Weight of a seed's old variance when it is played again."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("variance_share", "momentum"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"{name}={getattr(self, name)} must lie in [0, 1]")

    def selector(self) -> Selector:
        return VarianceSampling(self.variance_share, self.momentum)
