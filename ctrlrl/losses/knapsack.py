"""Knapsack RL: GRPO with more episodes where they are likelier to tell something."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from ctrlrl.core.select import PassRateBudget, Selector
from ctrlrl.losses.base import register
from ctrlrl.losses.group import ClippedGroupLoss
from ctrlrl.losses.needs import Need, Slot


@register
@dataclass(frozen=True)
class Knapsack(ClippedGroupLoss):
    """L_GRPO;  sizes = argmax sum_g [1 - p_g^n_g - (1 - p_g)^n_g] p_g (1 - p_g)^2,  sum_g n_g = n_groups group_size

    p is a seed's pass rate so far. The bracket is the chance that a group of n has both outcomes, without which its
    advantages are zero.
    """

    paper: ClassVar[str] = (
        "Knapsack RL: Unlocking Exploration of LLMs via Optimizing Budget Allocation, arXiv:2509.25849"
    )
    differs: ClassVar[str] = (
        "The value is concave in n, so taking the best next episode is exact and no dynamic programme is needed (the "
        "released one counts the episodes that every group gets as worthless). Pass rates are smoothed and fade when "
        "a seed is played again; the paper takes those of the last epoch, with a rule for 0 and 1. Where scores are "
        "not 0 or 1 their mean stands for the pass rate, and chances of seeing both outcomes are only a measure of "
        "spread."
    )
    slots: ClassVar[Mapping[Slot, str]] = {
        "mask": "clip",
        "ratio": "token",
        "advantage": "(R - group mean) / group std",
        "selection": "group sizes by pass rate",
    }
    needs: ClassVar[frozenset[Need]] = frozenset({"groups", "sequence_return", "score"})
    loop_defaults: ClassVar[Mapping[str, Any]] = {"seed_pool": 64}

    size_min: int = 2
    """Fewest episodes of a group."""
    size_max: int = 128
    """Most episodes of a group."""
    prior: float = 0.5
    """Successes and failures that a seed is credited with beforehand."""
    decay: float = 0.5
    """Weight that a seed's earlier episodes keep when it is played again."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 2 <= self.size_min <= self.size_max:
            raise ValueError(f"size_min={self.size_min}, size_max={self.size_max}: expected 2 <= size_min <= size_max")
        if not self.prior > 0.0:
            raise ValueError(f"prior={self.prior} must be positive")
        if not 0.0 <= self.decay <= 1.0:
            raise ValueError(f"decay={self.decay} must lie in [0, 1]")

    def selector(self) -> Selector:
        return PassRateBudget(self.size_min, self.size_max, self.prior, self.decay)
