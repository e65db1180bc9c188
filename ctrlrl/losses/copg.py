"""Contrastive policy gradient: the differences of regularised returns within a group must vanish."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ctrlrl.core import advantage as adv
from ctrlrl.core import ratio, reduce
from ctrlrl.losses.base import Knobs, PolicyLoss, Prepared, register
from ctrlrl.losses.needs import Need, Slot
from ctrlrl.types import PolicyOutput, SequenceBatch


@register
@dataclass(frozen=True)
class CoPG(PolicyLoss):
    """mean_g [ 1 / (k - 1) sum_{i > j} (x_i - x_j)^2 ] / k,  x = R - c log(pi / pi_ref)(sequence),  c = ``kl_temp``

    The sum over a group of k is sum_i (x_i - mean)(x_i - mean of the others). Its gradient is -2 c times that of
    RLOO on x, without a ratio, so the sequences may come from any policy; where all are covered, the minimum is
    pi_ref exp(R / c) / Z.
    """

    paper: ClassVar[str] = (
        "Contrastive Policy Gradient: Aligning LLMs on Sequence-Level Scores in a Supervised-Friendly Fashion, "
        "arXiv:2406.19185"
    )
    differs: ClassVar[str] = (
        "The form for k samples, of which the paper's pair is k = 2; averaged over sequences. The default "
        "temperature is ours."
    )
    slots: ClassVar[Mapping[Slot, str]] = {
        "ratio": "none",
        "advantage": "regularised return - mean of the others",
        "likelihood": "squared differences of sequences",
        "regulariser": "sequence log-ratio to the reference, in the return",
    }
    needs: ClassVar[frozenset[Need]] = frozenset({"whole_rows", "groups", "sequence_return", "logp_ref"})
    critics: ClassVar[tuple[str, ...]] = ()

    kl_temp: float = 0.1
    """Return that is worth one nat of distance from the reference."""

    def together(self, batch: SequenceBatch) -> Tensor | None:
        return batch.group

    def prepare(self, batch: SequenceBatch, knobs: Knobs) -> Prepared:
        return Prepared({}, *reduce.sequence_mean_token_mean(batch.mask, batch.advantage.dtype))

    def per_token(self, batch: SequenceBatch, out: PolicyOutput, knobs: Knobs) -> Tensor:
        assert batch.sequence_return is not None and batch.group is not None and batch.logp_ref is not None
        log_ratio = ratio.log_ratio(out.logp, batch.logp_ref, batch.mask).sum(-1)
        regularised = batch.sequence_return - self.kl_temp * log_ratio
        from_mean = adv.center_scale(regularised, batch.group, "group", "none")
        from_others = adv.center_scale(regularised, batch.group, "leave_one_out", "none")
        return (from_mean * from_others).unsqueeze(-1).expand(batch.mask.shape)
