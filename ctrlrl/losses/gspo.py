"""Group sequence policy optimisation: one ratio per sequence, clipped as a whole."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ctrlrl.core import head, ratio
from ctrlrl.losses.base import Knobs, Prepared, register
from ctrlrl.losses.group import ClippedGroupLoss
from ctrlrl.losses.needs import Slot
from ctrlrl.types import PolicyOutput, SequenceBatch


@register
@dataclass(frozen=True)
class GSPO(ClippedGroupLoss):
    """-mean_i min(s_i A_i, clip(s_i, 1 - eps_low, 1 + eps_high) A_i),  s_i = exp(mean_t log(pi / pi_old))

    A = (R - group mean) / group std. The gradient of s_i spreads evenly over its positions: s_i A_i / L_i each.
    Ratio, advantage and objective are [B, 1]; only the weights of the mean are [B, T]. A subclass whose advantages
    differ along a sequence takes ``ClippedGroupLoss.per_token``, which compares the one ratio with each of them.
    """

    paper: ClassVar[str] = "Group Sequence Policy Optimization, arXiv:2507.18071, eq. 5 and 7"
    slots: ClassVar[Mapping[Slot, str]] = {
        "mask": "clip of the whole sequence",
        "ratio": "sequence, geometric mean",
        "advantage": "(R - group mean) / group std",
    }
    level: ClassVar[ratio.Level] = "sequence"

    eps_low: float = 3e-4
    """Distance below one at which a negative advantage stops earning a gradient. Means over sequences move little."""
    eps_high: float = 4e-4
    """Distance above one at which a positive advantage stops earning a gradient."""

    def prepare(self, batch: SequenceBatch, knobs: Knobs) -> Prepared:
        prepared = super().prepare(batch, knobs)
        advantage, mask = prepared.coef["advantage"], batch.mask
        sequences = {
            "length": mask.sum(-1, keepdim=True).clamp(min=1).to(advantage.dtype),
            "sequence_advantage": advantage.gather(-1, mask.byte().argmax(-1, keepdim=True)),  # at the first valid one
        }
        return prepared._replace(coef=prepared.coef | sequences)

    def log_ratio(self, batch: SequenceBatch, out: PolicyOutput) -> Tensor:
        """[B, 1] log-ratio of each sequence to the collecting policy, per position."""
        assert batch.coef is not None
        return ratio.sequence_log_ratio(out.logp, batch.logp_old, batch.mask, batch.coef["length"])

    def per_token(self, batch: SequenceBatch, out: PolicyOutput, knobs: Knobs) -> Tensor:
        """[B, 1] objective of each sequence, which counts with the weights of all its positions."""
        assert batch.coef is not None
        r = ratio.ratio(self.log_ratio(batch, out))
        return -head.clipped_surrogate(r, batch.coef["sequence_advantage"], self.eps_low, self.eps_high)
