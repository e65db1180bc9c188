"""Rewards as labels: tell the solved sequences of a group from the unsolved ones by their log-ratios."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional

from ctrlrl.core import pairs, ratio, reduce
from ctrlrl.losses.base import Knobs, PolicyLoss, Prepared, register
from ctrlrl.losses.needs import Need, Slot
from ctrlrl.types import PolicyOutput, SequenceBatch


@register
@dataclass(frozen=True)
class REAL(PolicyLoss):
    """mean_g [ log(1 + sum_solved exp(-s_i / c)) + log(1 + sum_unsolved exp(s_j / c)) ],  s = mean_t log(pi / pi_old)

    The weights on either label sum to less than 1 / c, whatever the ratios, and what has been learned least weighs
    most. A group of one label only is left out, though it counts in the mean.
    """

    paper: ClassVar[str] = "Rewards as Labels: Revisiting RLVR from a Classification Perspective, arXiv:2602.05630"
    slots: ClassVar[Mapping[Slot, str]] = {
        "ratio": "sequence, geometric mean",
        "advantage": "solved or not, as a label",
        "likelihood": "classification of the log-ratio",
        "selection": "groups with both labels",
    }
    needs: ClassVar[frozenset[Need]] = frozenset({"whole_rows", "groups", "success"})
    critics: ClassVar[tuple[str, ...]] = ()

    label_temp: float = 0.5
    """Divides the log-ratios: the smaller, the sharper the border between the labels."""
    classifier: Literal["anchored", "bce"] = "anchored"
    """One soft maximum per label, anchored at zero; or a binary cross-entropy for each sequence by itself."""

    def together(self, batch: SequenceBatch) -> Tensor | None:
        return batch.group

    def prepare(self, batch: SequenceBatch, knobs: Knobs) -> Prepared:
        assert batch.group is not None and batch.success is not None
        weight, _ = reduce.sequence_mean_token_mean(batch.mask, batch.advantage.dtype)
        present = batch.mask.any(-1)
        rows, solved, unsolved = (
            reduce.segment_sum(x.to(weight.dtype), batch.group)
            for x in (present, present & batch.success, present & ~batch.success)
        )
        group_share = present / rows.clamp(min=1.0)
        # a group's value stands at each of its rows, a sequence's own only once
        row_share = group_share if self.classifier == "anchored" else torch.ones_like(group_share)
        share = torch.where((solved > 0) & (unsolved > 0), row_share, torch.zeros_like(row_share))
        return Prepared({}, weight * share.unsqueeze(-1), group_share.sum().clamp(min=1.0))

    def per_token(self, batch: SequenceBatch, out: PolicyOutput, knobs: Knobs) -> Tensor:
        assert batch.group is not None and batch.success is not None
        total = ratio.log_ratio(out.logp, batch.logp_old, batch.mask).sum(-1)
        logit = total / batch.mask.sum(-1).clamp(min=1) / self.label_temp
        wrong = torch.where(batch.success, -logit, logit)
        if self.classifier == "bce":
            row = functional.softplus(wrong)
        else:
            present = batch.mask.any(-1)
            row = pairs.anchored_logsumexp(wrong, present & batch.success, batch.group)
            row = row + pairs.anchored_logsumexp(wrong, present & ~batch.success, batch.group)
        return row.unsqueeze(-1).expand(batch.mask.shape)
