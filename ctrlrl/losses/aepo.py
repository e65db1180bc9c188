"""Arbitrary entropy policy optimisation: GRPO plus imitation of successes sampled at another temperature."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch

from ctrlrl.core import advantage as adv
from ctrlrl.core.control import BangBang, Controller
from ctrlrl.losses.base import Knobs, Memory, Prepared, Start, register
from ctrlrl.losses.group import AGGREGATIONS, Aggregation, ClippedGroupLoss
from ctrlrl.losses.needs import Need, Slot
from ctrlrl.types import TEMPERED, SequenceBatch


@register
@dataclass(frozen=True)
class AEPO(ClippedGroupLoss):
    """grad J = grad J_GRPO + c E_{a ~ pi_T}[ 1[A > advantage_min] grad log pi ],  pi_T ~ pi^(1 / T)

    T = hot_temp while the entropy is at most its target, else cool_temp

    Imitating samples of pi_T pulls the policy towards pi_T: its entropy rises for T > 1 and falls for T < 1.
    """

    paper: ClassVar[str] = (
        "Arbitrary Entropy Policy Optimization Breaks The Exploration Bottleneck of Reinforcement Learning, "
        "arXiv:2510.08141"
    )
    differs: ClassVar[str] = (
        "Tempered rows are added; the released code overwrites the first 60 rows of its batch with them (30 when "
        "cooling). c is implicit there, and here by default. Both terms pass through PPO's clip, as in the code. "
        "Gaussians are tempered by their deviation, sigma sqrt(T)."
    )
    slots: ClassVar[Mapping[Slot, str]] = {
        "mask": "clip",
        "ratio": "token",
        "advantage": "(R - group mean) / group std; 1 on tempered successes",
        "regulariser": "REINFORCE on tempered samples",
        "selection": "tempered successes",
    }
    needs: ClassVar[frozenset[Need]] = frozenset({"groups", "sequence_return", "tempered"})
    aggregation: ClassVar[Aggregation] = "token_mean"

    entropy_target: float = 0.5
    """Entropy aimed at, in nats per position."""
    hot_temp: float = 1.2
    """Temperature while the entropy is at most the target."""
    cool_temp: float = 0.8
    """Temperature while it is above."""
    advantage_min: float = 0.05
    """Group advantage above which a tempered sample counts as a success."""
    tempered_coef: float | None = None
    """c. None: a tempered success weighs as much as any other row, so c is their share of the batch."""

    def controllers(self) -> dict[str, Controller]:
        return {"temperature": BangBang("temperature", "entropy", self.entropy_target, self.cool_temp, self.hot_temp)}

    def begin(self, batch: SequenceBatch, knobs: Knobs, memory: Memory) -> Start:
        assert batch.sequence_return is not None and batch.group is not None
        hot = batch.came_from(TEMPERED)
        # a group's tempered rows are compared with each other: what is sampled beside GRPO's rows must not move them
        advantage = adv.center_scale(batch.sequence_return, 2 * batch.group + hot.long())
        success = hot & (advantage > self.advantage_min)
        one = torch.ones_like(advantage)
        if self.tempered_coef is not None:  # the mean over all tempered positions, failures too
            own, other = ((batch.mask & which.unsqueeze(-1)).sum().to(one.dtype) for which in (~hot, hot))
            one = one * self.tempered_coef * own / other.clamp(min=1.0)
        advantage = torch.where(success, one, advantage).unsqueeze(-1)
        mask = batch.mask & (success | ~hot).unsqueeze(-1)
        advantage = torch.where(mask, advantage, torch.zeros_like(advantage))
        kept = success.sum() / hot.sum().clamp(min=1)
        return Start(batch._replace(advantage=advantage, mask=mask), memory, {"tempered_kept": kept})

    def prepare(self, batch: SequenceBatch, knobs: Knobs) -> Prepared:
        prepared = super().prepare(batch, knobs)
        if self.tempered_coef is None:
            return prepared
        own = batch.mask & ~batch.came_from(TEMPERED).unsqueeze(-1)
        _, denominator = AGGREGATIONS[self.aggregation](own, batch.advantage.dtype)
        return prepared._replace(denominator=denominator)
