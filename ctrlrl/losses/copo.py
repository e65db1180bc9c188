"""Consistency-aware policy optimisation: a group that agrees learns from how it compares with other groups."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ctrlrl.core import advantage as adv
from ctrlrl.core import head, outcome, ratio
from ctrlrl.losses.base import Knobs, Memory, Prepared, Start, register
from ctrlrl.losses.group import ClippedGroupLoss
from ctrlrl.losses.needs import Need, Slot
from ctrlrl.types import PolicyOutput, SequenceBatch


@register
@dataclass(frozen=True)
class COPO(ClippedGroupLoss):
    """w L(A_local) + (1 - w) L(A_global),  w = sigmoid(sharpness (H_g - threshold))

    L is PPO's minimum; A_local standardises the outcome within its group, A_global the group's mean among the
    groups; H_g is the entropy of the group's answers in nats. A group needs more than exp(threshold) answers,
    4.5 by default, before its local part leads.
    """

    paper: ClassVar[str] = "COPO: Consistency-Aware Policy Optimization, arXiv:2508.04138"
    differs: ClassVar[str] = "That the global reward of a prompt is the mean outcome of its group is our reading."
    slots: ClassVar[Mapping[Slot, str]] = {
        "mask": "clip",
        "ratio": "token",
        "advantage": "within the group and between groups, blended by the entropy of the answers",
    }
    needs: ClassVar[frozenset[Need]] = frozenset({"groups", "sequence_return", "answers"})

    sharpness: float = 20.0
    """Slope of the blend, per nat."""
    threshold: float = 1.5
    """Entropy of the answers, in nats, at which both parts weigh the same."""
    std_floor: float = 1e-6
    """Added to the deviations, within a group and between groups."""

    def begin(self, batch: SequenceBatch, knobs: Knobs, memory: Memory) -> Start:
        assert batch.sequence_return is not None and batch.group is not None and batch.answer is not None
        x, group = batch.sequence_return, batch.group
        share = torch.sigmoid(self.sharpness * (outcome.answer_entropy(batch.answer, group, x.dtype) - self.threshold))
        local = adv.center_scale(x, group, eps=self.std_floor)
        between = outcome.standardise_groups(x, group, self.std_floor)
        first = outcome.first_of_group(group).to(x.dtype)

        def spread(row: Tensor) -> Tensor:
            return torch.where(batch.mask, row.unsqueeze(-1), torch.zeros((), dtype=x.dtype, device=x.device))

        batch = batch._replace(
            # the minimum is homogeneous in A, so the blend's weights can go into the advantages
            advantage=spread(share * local),
            coef={"global_advantage": spread((1.0 - share) * between)},
        )
        return Start(batch, memory, {"local_share": (share * first).sum() / first.sum()})

    def prepare(self, batch: SequenceBatch, knobs: Knobs) -> Prepared:
        assert batch.coef is not None
        prepared = super().prepare(batch, knobs)
        return prepared._replace(coef=prepared.coef | {"global_advantage": batch.coef["global_advantage"]})

    def per_token(self, batch: SequenceBatch, out: PolicyOutput, knobs: Knobs) -> Tensor:
        assert batch.coef is not None
        r = ratio.ratio(self.log_ratio(batch, out))
        between = head.clipped_surrogate(r, batch.coef["global_advantage"], self.eps_low, self.eps_high)
        return super().per_token(batch, out, knobs) - between
