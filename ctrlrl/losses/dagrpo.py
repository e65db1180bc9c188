"""Distinctiveness-aware GRPO: members of a group that are nearly the same do not push against each other."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ctrlrl.core import advantage as adv
from ctrlrl.core import outcome, ratio, reduce
from ctrlrl.losses.base import Knobs, Memory, Start, register
from ctrlrl.losses.group import ClippedGroupLoss
from ctrlrl.losses.needs import Need, Slot
from ctrlrl.types import DEMONSTRATION, PolicyOutput, SequenceBatch

STD_FLOOR = 1e-6


@register
@dataclass(frozen=True)
class DaGRPO(ClippedGroupLoss):
    """A_i = (1/n) sum_j 1[|s_i - s_j| >= gap] (R_i - R_j) over the group, s a score in [0, 1]

    A group without a success is joined by its demonstration, whose ratio is pi / stop-gradient(pi): one, so that it
    is never clipped. Where a member succeeded the demonstration is left out. A gap of 0 is GRPO's numerator.
    """

    paper: ClassVar[str] = "DaGRPO: Distinctiveness-Aware Group Relative Policy Optimization, arXiv:2512.06337"
    differs: ClassVar[str] = (
        "The pair rule, its threshold and the demonstration's ratio are our reading of the abstract; the paper scores "
        "distinctiveness with a language model, here it is the difference of the outcome's score."
    )
    slots: ClassVar[Mapping[Slot, str]] = {
        "mask": "clip, and pairs that are told apart",
        "ratio": "token; one for demonstrations",
        "advantage": "mean gap to the distinct members of the group",
        "selection": "a demonstration for groups without a success",
    }
    needs: ClassVar[frozenset[Need]] = frozenset({"groups", "sequence_return", "score", "success"})
    uses: ClassVar[frozenset[Need]] = frozenset({"demonstrations"})

    score_gap: float = 0.1
    """Smallest difference of scores at which two members are compared."""
    divide_by_std: bool = False
    """Divide by the deviation of the group's returns, as GRPO does."""

    def begin(self, batch: SequenceBatch, knobs: Knobs, memory: Memory) -> Start:
        here = self._present(batch)
        return super().begin(batch._replace(mask=batch.mask & here.unsqueeze(-1)), knobs, memory)

    def outcome_advantage(self, batch: SequenceBatch) -> Tensor:
        assert batch.sequence_return is not None and batch.score is not None and batch.group is not None
        here = self._present(batch)
        advantage = outcome.distinct_mean_gap(batch.sequence_return, batch.score, batch.group, here, self.score_gap)
        if not self.divide_by_std:
            return advantage
        # absent rows stand in a group of their own
        among = torch.where(here, 2 * reduce.dense_ids(batch.group), 2 * len(here) + 1)
        return advantage / (adv.group_std(batch.sequence_return, among) + STD_FLOOR)

    def _present(self, batch: SequenceBatch) -> Tensor:
        """[B] bool: all rows but the demonstrations of groups that solved their task."""
        assert batch.success is not None and batch.group is not None
        demonstration = batch.came_from(DEMONSTRATION)
        solved = reduce.segment_sum((batch.success & ~demonstration).to(batch.advantage.dtype), batch.group) > 0
        return ~(demonstration & solved)

    def log_ratio(self, batch: SequenceBatch, out: PolicyOutput) -> Tensor:
        old = torch.where(batch.came_from(DEMONSTRATION).unsqueeze(-1), out.logp.detach(), batch.logp_old)
        return ratio.log_ratio(out.logp, old, batch.mask)
