"""The token-level surrogate of the sequence's return: weights to the sampler, gates to the old policy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ctrlrl.core import advantage as adv
from ctrlrl.core import gate, head, ratio
from ctrlrl.losses.base import Knobs, register
from ctrlrl.losses.group import Aggregation, GroupLoss
from ctrlrl.losses.needs import Need, Slot
from ctrlrl.types import PolicyOutput, SequenceBatch


@register
@dataclass(frozen=True)
class MiniRL(GroupLoss):
    """-mean_i sum_t M_t sg[min(pi / mu, ratio_max)] A_i log pi,  A = R - group mean

    mu is the policy as the sampler computed it. pi / mu = (pi_old / mu) (pi / pi_old) corrects for numerical
    differences and for staleness at once; the gate M is PPO's clip of pi / pi_old alone.
    """

    paper: ClassVar[str] = (
        "Stabilizing Reinforcement Learning with LLMs: Formulation and Practices (MiniRL), arXiv:2512.01374"
    )
    differs: ClassVar[str] = (
        "The clip's bounds and the cap of the weight are recalled, not read. Routing replay is a hook for mixture "
        "policies, of which none is built in: one with a method route(obs) has its choice of branches stored under "
        "the collecting policy (the paper's R2) and gets it back as policy(obs, action, route); choices of the "
        "sampler itself (R3) are not stored."
    )
    slots: ClassVar[Mapping[Slot, str]] = {
        "mask": "clip by the ratio to the old policy",
        "ratio": "token, to the sampler, capped, constant",
        "advantage": "R - group mean",
        "likelihood": "log-probability",
    }
    needs: ClassVar[frozenset[Need]] = frozenset({"groups", "sequence_return", "logp_behaviour"})
    uses: ClassVar[frozenset[Need]] = frozenset({"routes"})
    aggregation: ClassVar[Aggregation] = "sequence_mean_token_sum"

    eps_low: float = 0.2
    """Distance below one at which a negative advantage stops earning a gradient."""
    eps_high: float = 0.27
    """Distance above one at which a positive advantage stops earning a gradient."""
    ratio_max: float = 5.0
    """Largest importance weight."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.ratio_max > 0:
            raise ValueError(f"ratio_max={self.ratio_max} must be positive")

    def outcome_advantage(self, batch: SequenceBatch) -> Tensor:
        assert batch.sequence_return is not None and batch.group is not None
        return adv.center_scale(batch.sequence_return, batch.group, scale="none")

    def per_token(self, batch: SequenceBatch, out: PolicyOutput, knobs: Knobs) -> Tensor:
        assert batch.coef is not None and batch.logp_behaviour is not None
        advantage = batch.coef["advantage"]
        stale = ratio.ratio(ratio.log_ratio(out.logp, batch.logp_old, batch.mask))
        weight = ratio.ratio(ratio.log_ratio(out.logp, batch.logp_behaviour, batch.mask)).clamp(max=self.ratio_max)
        kept = gate.clip_gate(stale, advantage, self.eps_low, self.eps_high)
        return -head.logp_advantage(out.logp, kept * weight * advantage)
