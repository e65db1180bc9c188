"""REINFORCE: the whole return on every log-probability."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import Tensor

from ctrlrl.core import advantage as adv
from ctrlrl.core import head
from ctrlrl.losses.base import Knobs, register
from ctrlrl.losses.group import Aggregation, GroupLoss
from ctrlrl.losses.needs import Need, Slot
from ctrlrl.types import PolicyOutput, SequenceBatch


@register
@dataclass(frozen=True)
class REINFORCE(GroupLoss):
    """-mean_i sum_t (R_i - b) log pi;  b = 0, or the mean return of the iteration

    No ratio: correct for the first step on a batch alone, so the loop's default is one step per iteration.
    """

    paper: ClassVar[str] = (
        "Simple Statistical Gradient-Following Algorithms for Connectionist Reinforcement Learning "
        "(Williams, Machine Learning 8, 1992), episodic REINFORCE"
    )
    slots: ClassVar[Mapping[Slot, str]] = {
        "mask": "none",
        "ratio": "none",
        "advantage": "return",
        "likelihood": "log-probability",
    }
    needs: ClassVar[frozenset[Need]] = frozenset({"sequence_return"})
    # one step per iteration, as there is no ratio to clip; so a larger one
    loop_defaults: ClassVar[Mapping[str, Any]] = {"epochs": 1, "batch_size": None, "learning_rate": 4e-3}
    aggregation: ClassVar[Aggregation] = "sequence_mean_token_sum"

    baseline: Literal["none", "batch"] = "none"
    """What is taken off every return: nothing, or the mean return of the iteration's episodes."""

    def outcome_advantage(self, batch: SequenceBatch) -> Tensor:
        assert batch.sequence_return is not None
        return adv.center_scale(batch.sequence_return, center=self.baseline, scale="none")

    def per_token(self, batch: SequenceBatch, out: PolicyOutput, knobs: Knobs) -> Tensor:
        assert batch.coef is not None
        return -head.logp_advantage(out.logp, batch.coef["advantage"])
