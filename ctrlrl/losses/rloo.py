"""REINFORCE with the other sequences of the group as the baseline."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from ctrlrl.core import advantage as adv
from ctrlrl.core import head
from ctrlrl.losses.base import Knobs, register
from ctrlrl.losses.group import Aggregation, GroupLoss
from ctrlrl.losses.needs import Slot
from ctrlrl.types import PolicyOutput, SequenceBatch


@register
@dataclass(frozen=True)
class RLOO(GroupLoss):
    """-mean_i sum_t (R_i - mean of the group's other R) log pi

    The baseline does not know the sequence it is used for, so the estimate is unbiased. No ratio: the loop's
    default is one step per iteration.
    """

    paper: ClassVar[str] = (
        "Back to Basics: Revisiting REINFORCE Style Optimization for Learning from Human Feedback in LLMs (RLOO), "
        "arXiv:2402.14740"
    )
    differs: ClassVar[str] = (
        "The paper takes a penalty for leaving the reference policy off the reward; R is the plain return here."
    )
    slots: ClassVar[Mapping[Slot, str]] = {
        "mask": "none",
        "ratio": "none",
        "advantage": "R - mean of the others",
        "likelihood": "log-probability",
    }
    # one step per iteration, as there is no ratio to clip; so a larger one
    loop_defaults: ClassVar[Mapping[str, Any]] = {"epochs": 1, "batch_size": None, "learning_rate": 4e-3}
    aggregation: ClassVar[Aggregation] = "sequence_mean_token_sum"

    def outcome_advantage(self, batch: SequenceBatch) -> Tensor:
        assert batch.sequence_return is not None and batch.group is not None
        return adv.center_scale(batch.sequence_return, batch.group, "leave_one_out", "none")

    def per_token(self, batch: SequenceBatch, out: PolicyOutput, knobs: Knobs) -> Tensor:
        assert batch.coef is not None
        return -head.logp_advantage(out.logp, batch.coef["advantage"])
