"""Distribution-centric policy optimisation: successes imitated as a hotter or cooler policy would have sampled them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ctrlrl.core import entropy, reduce
from ctrlrl.losses.base import Knobs, Memory, Start, register
from ctrlrl.losses.group import Aggregation, ClippedGroupLoss
from ctrlrl.losses.needs import Need, Slot
from ctrlrl.types import PolicyOutput, SequenceBatch


@register
@dataclass(frozen=True)
class DCPO(ClippedGroupLoss):
    """min(r A', clip(r) A'),  A' = (1 - a) A + a 1[success] pi_old^T(a_t) / pi_old(a_t),  a = c / (1 + c)

    c = min(|target - H|, gap_max) / q,  T = hot_temp if H <= target else cool_temp

    H is the mean of -log pi_old, q the share of successes; for A' < 0 the surrogate stops at ratio_max A'. At the
    target the loss is GRPO's.
    """

    paper: ClassVar[str] = (
        "Distribution-Centric Policy Optimization Dominates Exploration-Exploitation Trade-off, arXiv:2601.12730"
    )
    differs: ClassVar[str] = (
        "Without a success the added term is absent; the released code divides by zero there. The ratio to the "
        "tempered policy is bounded by ratio_tempered_max, since that of a Gaussian has no bound for T > 1; the bound "
        "is ours. Gaussians are tempered by their deviation, sigma sqrt(T)."
    )
    slots: ClassVar[Mapping[Slot, str]] = {
        "mask": "clip, dual clip",
        "ratio": "token",
        "advantage": "(R - group mean) / group std, plus tempered / old policy on successes",
        "regulariser": "REINFORCE under the tempered policy",
    }
    needs: ClassVar[frozenset[Need]] = frozenset({"plain_action", "groups", "sequence_return", "score", "step_dist"})
    aggregation: ClassVar[Aggregation] = "token_mean"

    eps_high: float = 0.28
    """Distance above one at which a positive advantage stops earning a gradient."""
    ratio_max: float = 10.0
    """Ratio beyond which a negative advantage stops earning a gradient."""
    entropy_target: float = 0.5
    """Entropy aimed at, in nats per position."""
    hot_temp: float = 1.2
    """Temperature while the entropy is at most the target."""
    cool_temp: float = 0.8
    """Temperature while it is above."""
    gap_max: float = 0.1
    """Largest distance from the target that counts."""
    score_min: float = 0.05
    """Score above which a sequence counts as a success."""
    ratio_tempered_max: float = 10.0
    """Bound on the ratio of the tempered to the old policy."""

    def begin(self, batch: SequenceBatch, knobs: Knobs, memory: Memory) -> Start:
        assert batch.dist_old is not None and batch.score is not None
        start = super().begin(batch, knobs, memory)
        mask, advantage = batch.mask, start.batch.advantage
        measured = reduce.masked_mean(-batch.logp_old, mask)
        hot, cool = torch.full_like(measured, self.hot_temp), torch.full_like(measured, self.cool_temp)
        temperature = torch.where(measured <= self.entropy_target, hot, cool)
        success = batch.score > self.score_min
        share = success.to(advantage.dtype).mean()
        gap = (measured - self.entropy_target).abs().clamp(max=self.gap_max)
        # c / (1 + c) with c = gap / share
        blend = torch.where(share > 0, gap / (gap + share), torch.zeros_like(gap))
        tempered = entropy.tempered_log_ratio(batch.dist_old, batch.action, temperature).exp()
        added = torch.where(success.unsqueeze(-1), tempered.clamp(max=self.ratio_tempered_max), 0.0)
        advantage = torch.where(mask, (1.0 - blend) * advantage + blend * added, torch.zeros_like(advantage))
        stats = {"sampled_entropy": measured, "tempered_blend": blend}
        return Start(start.batch._replace(advantage=advantage), memory, stats)

    def per_token(self, batch: SequenceBatch, out: PolicyOutput, knobs: Knobs) -> Tensor:
        assert batch.coef is not None
        loss, a = super().per_token(batch, out, knobs), batch.coef["advantage"]
        return torch.where(a < 0, torch.minimum(loss, -self.ratio_max * a), loss)
