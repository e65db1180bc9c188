"""Beta normalisation: the group's deviation gives way to a Beta density fitted to the pass rates of the batch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from ctrlrl.core import advantage as adv
from ctrlrl.core import outcome
from ctrlrl.losses.base import register
from ctrlrl.losses.group import Aggregation, ClippedGroupLoss
from ctrlrl.losses.needs import Need, Slot
from ctrlrl.types import SequenceBatch


@register
@dataclass(frozen=True)
class BNPO(ClippedGroupLoss):
    """-mean_i sum_t min(r A_i, clip(r) A_i),  A_i = (R_i - p_g) / f(p_g; alpha, beta)

    R in [0, 1], p_g the group's mean, f a Beta density whose parameters follow the pass rates of all groups.
    A flat density is REINFORCE with the group's mean; alpha = beta = 3/2 is GRPO times pi/8 for rewards of 0 and 1.
    """

    paper: ClassVar[str] = "BNPO: Beta Normalization Policy Optimization, arXiv:2506.02864"
    differs: ClassVar[str] = (
        "Where all groups have the same pass rate the released code divides by zero; here the density is then flat, "
        "which is what it takes for a single group. A channel of rewards is brought to [0, 1] by its own range."
    )
    slots: ClassVar[Mapping[Slot, str]] = {
        "mask": "clip",
        "ratio": "token",
        "advantage": "(R - group mean) / Beta density",
    }
    needs: ClassVar[frozenset[Need]] = frozenset({"groups", "score", "rewards"})
    aggregation: ClassVar[Aggregation] = "sequence_mean_token_sum"

    eps_high: float = 0.28
    """Distance above one at which a positive advantage stops earning a gradient."""
    decompose: Literal["none", "sum", "mean"] = "none"
    """Normalise each reward channel by a density of its own, then add or average; none takes the score as it is."""

    def required(self) -> frozenset[Need]:
        return self.needs - ({"rewards"} if self.decompose == "none" else {"score"})

    def outcome_advantage(self, batch: SequenceBatch) -> Tensor:
        assert batch.group is not None
        if self.decompose == "none":
            assert batch.score is not None
            return _normalised(batch.score, batch.group)
        assert batch.rewards is not None
        low, high = batch.rewards.amin(0), batch.rewards.amax(0)
        unit = (batch.rewards - low) / (high - low).clamp(min=1e-8)
        total = sum((_normalised(x, batch.group) for x in unit.unbind(-1)), start=batch.rewards.new_zeros(()))
        return total if self.decompose == "sum" else total / batch.rewards.shape[-1]


def _normalised(x: Tensor, group: Tensor) -> Tensor:
    alpha, beta = outcome.beta_parameters(x, group)
    centred = adv.center_scale(x, group, "group", "none")
    return centred * outcome.beta_weight(adv.group_mean(x, group), alpha, beta)
