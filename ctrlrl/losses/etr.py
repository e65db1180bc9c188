"""A clip that widens with the size of the advantage and with how undecided the group is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ctrlrl.core import advantage as adv
from ctrlrl.core import gate, head, penalty, reduce
from ctrlrl.core import ratio as ratios
from ctrlrl.losses.base import Knobs, Memory, Prepared, Start, register
from ctrlrl.losses.group import Aggregation, ClippedGroupLoss
from ctrlrl.losses.needs import Need, Slot
from ctrlrl.types import PolicyOutput, SequenceBatch


@register
@dataclass(frozen=True)
class ETR(ClippedGroupLoss):
    """-min(r A, clip(r, 1 - eps_low g, 1 + eps_high g) A), averaged over positions,
    g = (1 + advantage_coef min(|A|, a) / a) (1 + variance_coef 4 v)

    A = (R - group mean) / (group std + std_floor), a = advantage_max, and v the group's variance of the score in
    [0, 1]: for passed or failed p (1 - p), most where half of the group passes.
    """

    paper: ClassVar[str] = "ETR: Outcome-Guided Elastic Trust Regions for Policy Optimization, arXiv:2601.03723"
    differs: ClassVar[str] = (
        "Worked out from the abstract, which says what the width depends on and not how: this is the smallest such "
        "law, and its three constants are ours. Scores that are not 0 or 1 enter by their variance."
    )
    slots: ClassVar[Mapping[Slot, str]] = {
        "mask": "clip, wider for large advantages and undecided groups",
        "ratio": "token",
        "advantage": "(R - group mean) / group std",
    }
    needs: ClassVar[frozenset[Need]] = frozenset({"groups", "sequence_return", "score"})
    aggregation: ClassVar[Aggregation] = "token_mean"

    advantage_coef: float = 0.5
    """How much the largest advantages widen the band, as a share of its width."""
    advantage_max: float = 2.0
    """Size of the advantage beyond which the band widens no further."""
    variance_coef: float = 0.25
    """How much a group half of which passes widens the band, as a share of its width."""
    ddof: int = 1
    """Of the group's deviation in A: 1 unbiased, 0 population."""
    std_floor: float = 1e-6
    """Added to the group's deviation in A."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.advantage_max > 0:
            raise ValueError(f"advantage_max={self.advantage_max} must be positive")

    def outcome_advantage(self, batch: SequenceBatch) -> Tensor:
        assert batch.sequence_return is not None and batch.group is not None
        return adv.center_scale(batch.sequence_return, batch.group, eps=self.std_floor, ddof=self.ddof)

    def begin(self, batch: SequenceBatch, knobs: Knobs, memory: Memory) -> Start:
        assert batch.score is not None and batch.group is not None
        start = super().begin(batch, knobs, memory)
        advantage = start.batch.advantage
        undecided = 4.0 * adv.group_std(batch.score, batch.group, ddof=0).square()
        micro = 1.0 + self.advantage_coef * advantage.abs().clamp(max=self.advantage_max) / self.advantage_max
        width = micro * (1.0 + self.variance_coef * undecided.unsqueeze(-1))
        return start._replace(
            batch=start.batch._replace(coef={"width": width}),
            stats={"clip_width": reduce.masked_mean(width, batch.mask)},
        )

    def prepare(self, batch: SequenceBatch, knobs: Knobs) -> Prepared:
        assert batch.coef is not None
        prepared = super().prepare(batch, knobs)
        return prepared._replace(coef={**prepared.coef, "width": batch.coef["width"]})

    def per_token(self, batch: SequenceBatch, out: PolicyOutput, knobs: Knobs) -> Tensor:
        assert batch.coef is not None
        r = ratios.ratio(self.log_ratio(batch, out))
        width = batch.coef["width"]
        return -head.clipped_surrogate(r, batch.coef["advantage"], self.eps_low * width, self.eps_high * width)

    def metrics(self, batch: SequenceBatch, out: PolicyOutput, knobs: Knobs) -> dict[str, Tensor]:
        assert batch.coef is not None
        log_ratio, width = self.log_ratio(batch, out), batch.coef["width"]
        outside = gate.clipped(ratios.ratio(log_ratio), self.eps_low * width, self.eps_high * width)
        return {"approx_kl": penalty.kl_k3(log_ratio), "clip_fraction": outside.to(log_ratio.dtype)}
