"""Pairwise proximal policy optimisation: two sequences of a group, weighted by the difference of their returns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from ctrlrl.core import head, pairs, ratio, reduce
from ctrlrl.losses.base import Knobs, PolicyLoss, Prepared, register
from ctrlrl.losses.needs import Need, Slot
from ctrlrl.types import PolicyOutput, SequenceBatch


@register
@dataclass(frozen=True)
class P3O(PolicyLoss):
    """-mean_i mean_{j != i} min(d r_i / r_j, clip(r_i / r_j, 1 - eps, 1 + eps) d),  d = (R_i - R_j) / 2

    r is the ratio of the whole sequence. Clipping separately puts r_i in the place of r_i / r_j, with 2 d. Both
    give RLOO's gradient at ratio one, and neither changes when all returns of a group move together.
    """

    paper: ClassVar[str] = (
        "Pairwise Proximal Policy Optimization: Harnessing Relative Feedback for LLM Alignment, arXiv:2310.00212"
    )
    differs: ClassVar[str] = (
        "All pairs of a group, each in both orders, instead of one pair per prompt. The KL to a reference is folded "
        "into the return by the loop's kl_reward_coef. We know the gradient at ratio one; where exactly the clips sit "
        "is inferred."
    )
    slots: ClassVar[Mapping[Slot, str]] = {
        "mask": "clip, by pair",
        "ratio": "sequence product, of two sequences",
        "advantage": "differences of returns",
    }
    needs: ClassVar[frozenset[Need]] = frozenset({"whole_rows", "groups", "sequence_return"})
    critics: ClassVar[tuple[str, ...]] = ()

    eps: float = 0.2
    """Half-width of the band in which a ratio earns a gradient."""
    clip: Literal["joint", "separate"] = "joint"
    """Clip the ratio of the two sequences' ratios (the paper's V2), or each of them by itself (V1)."""

    def together(self, batch: SequenceBatch) -> Tensor | None:
        return batch.group

    def prepare(self, batch: SequenceBatch, knobs: Knobs) -> Prepared:
        return Prepared({}, *reduce.sequence_mean_token_mean(batch.mask, batch.advantage.dtype))

    def metrics(self, batch: SequenceBatch, out: PolicyOutput, knobs: Knobs) -> dict[str, Tensor]:
        found = super().metrics(batch, out, knobs)
        del found["clip_fraction"]  # of positions, while the clip here is of pairs
        return found

    def per_token(self, batch: SequenceBatch, out: PolicyOutput, knobs: Knobs) -> Tensor:
        assert batch.sequence_return is not None and batch.group is not None
        total = ratio.log_ratio(out.logp, batch.logp_old, batch.mask).sum(-1)
        difference = batch.sequence_return.unsqueeze(-1) - batch.sequence_return
        if self.clip == "joint":
            r = ratio.ratio(total.unsqueeze(-1) - total)
            difference = 0.5 * difference
        else:
            r = ratio.ratio(total).unsqueeze(-1)
        gain = pairs.mean_over_others(head.clipped_surrogate(r, difference, self.eps, self.eps), batch.group)
        return -gain.unsqueeze(-1).expand(batch.mask.shape)
