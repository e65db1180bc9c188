"""Bounded policy optimisation on groups: every ratio is pulled to a bounded target."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ctrlrl.core import advantage as adv
from ctrlrl.core import head, penalty, ratio, weight
from ctrlrl.losses.base import Knobs, Memory, Prepared, Start, register
from ctrlrl.losses.group import Aggregation, GroupLoss
from ctrlrl.losses.needs import Need, Slot
from ctrlrl.types import PolicyOutput, SequenceBatch


@register
@dataclass(frozen=True)
class GBPO(GroupLoss):
    """|r - t_i| |A_i| + c k3, averaged over positions,
    t = 1 - eps_low + (eps_low + eps_high) sigmoid(gap / target_temp)

    A = (R - mean) / (std + std_floor) and gap = (R - median) / (std + std_floor) within the group; k3 estimates
    KL(policy || reference). A sequence at the median is pulled to the middle of the band: with outcomes of 0 and 1
    the majority of a group stays where it is.
    """

    paper: ClassVar[str] = "Bounded Ratio Reinforcement Learning (GBPO), arXiv:2604.18578"
    differs: ClassVar[str] = (
        "The weight of the KL is ours. With eps_low != eps_high the median no longer makes the target ratios average "
        "to one; another quantile would, and the paper keeps the median."
    )
    slots: ClassVar[Mapping[Slot, str]] = {
        "mask": "distance to a bounded target ratio",
        "ratio": "token",
        "advantage": "(R - group mean) / group std, sign from the median",
        "regulariser": "k3 to the reference",
    }
    needs: ClassVar[frozenset[Need]] = frozenset({"groups", "sequence_return", "logp_ref"})
    aggregation: ClassVar[Aggregation] = "token_mean"

    eps_low: float = 0.2
    """Distance of the lowest target ratio from one."""
    eps_high: float = 0.2
    """Distance of the highest target ratio from one."""
    target_temp: float = 1e-4
    """Temperature of the target, in deviations of the group's outcomes: small is a step at the median."""
    ref_kl_coef: float = 1e-3
    """Weight of the KL from the reference policy."""
    std_floor: float = 1e-6
    """Added to the group's (unbiased) deviation."""

    def outcome_advantage(self, batch: SequenceBatch) -> Tensor:
        assert batch.sequence_return is not None and batch.group is not None
        return adv.center_scale(batch.sequence_return, batch.group, eps=self.std_floor)

    def begin(self, batch: SequenceBatch, knobs: Knobs, memory: Memory) -> Start:
        assert batch.sequence_return is not None and batch.group is not None
        start = super().begin(batch, knobs, memory)
        outcome = batch.sequence_return
        gap = (outcome - group_median(outcome, batch.group)) / (adv.group_std(outcome, batch.group) + self.std_floor)
        target = weight.band_target(gap, 1.0 - self.eps_low, 1.0 + self.eps_high, self.target_temp)
        target = target.unsqueeze(-1).expand(batch.mask.shape)
        return start._replace(batch=start.batch._replace(coef={"target": target}))

    def prepare(self, batch: SequenceBatch, knobs: Knobs) -> Prepared:
        assert batch.coef is not None
        prepared = super().prepare(batch, knobs)
        return prepared._replace(coef={**prepared.coef, "target": batch.coef["target"]})

    def per_token(self, batch: SequenceBatch, out: PolicyOutput, knobs: Knobs) -> Tensor:
        assert batch.coef is not None and batch.logp_ref is not None
        r = ratio.ratio(ratio.log_ratio(out.logp, batch.logp_old, batch.mask))
        pull = head.ratio_target(r, batch.coef["target"], batch.coef["advantage"].abs())
        if self.ref_kl_coef == 0:
            return pull
        return pull + self.ref_kl_coef * penalty.kl_k3(ratio.log_ratio(batch.logp_ref, out.logp, batch.mask))


def group_median(x: Tensor, group: Tensor) -> Tensor:
    """[B] median of the row's group, half-way between the middle two of an even number."""
    median = torch.empty_like(x)
    for k in group.unique():
        members = group == k
        median[members] = torch.quantile(x[members], 0.5)
    return median
