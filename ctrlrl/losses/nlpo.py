"""PPO on the likeliest actions only, as a lagged copy of the policy ranks them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ctrlrl.core import support
from ctrlrl.losses.base import Knobs, register
from ctrlrl.losses.needs import Need, Slot
from ctrlrl.losses.ppo import PPO
from ctrlrl.types import PolicyOutput, SequenceBatch


@register
@dataclass(frozen=True)
class NLPO(PPO):
    """-min(r A, clip(r, 1 - eps, 1 + eps) A),  r = pi~ / pi~_old,  pi~(a) = 1[a in S] pi(a) / pi(S)

    S holds the likeliest actions of a lagged copy of the policy, up to the probability mask_top_p; sampling keeps
    to it. It is stored with the sequence, so the ratio is one before the first step.
    """

    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {}  # PPO's is for control
    paper: ClassVar[str] = "Is Reinforcement Learning (Not) for Natural Language Processing (NLPO), arXiv:2210.01241"
    differs: ClassVar[str] = (
        "The released code finds S anew at every evaluation, when the masking policy may have changed; here it is "
        "the one that was sampled under. It keeps 100 tokens at least and copies the masking policy every 1000 "
        "iterations where a task does not say otherwise; the interval here is that of its IMDB task."
    )
    slots: ClassVar[Mapping[Slot, str]] = {
        "mask": "clip",
        "ratio": "token, of policies renormalised on the support",
        "advantage": "GAE",
        "likelihood": "top-p support of a lagged policy",
        "regulariser": "KL to the reference, in the reward",
    }
    needs: ClassVar[frozenset[Need]] = frozenset({"values", "support", "categorical", "logp_ref"})
    loop_defaults: ClassVar[Mapping[str, Any]] = {"kl_reward_coef": 0.1, "epochs": 5}

    mask_top_p: float = 0.9
    """Probability that the allowed actions cover under the masking policy; 1 allows all of them: PPO."""
    mask_every: int = 5
    """Iterations after which the masking policy becomes a copy of the policy."""
    mask_min_keep: int = 2
    """Smallest number of allowed actions; with one alone the policy could never leave it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 < self.mask_top_p <= 1.0:
            raise ValueError(f"mask_top_p={self.mask_top_p} must lie in (0, 1]")
        if self.mask_every < 1:
            raise ValueError(f"mask_every={self.mask_every} must be at least 1")
        if self.mask_min_keep < 2:
            raise ValueError(f"mask_min_keep={self.mask_min_keep} must be at least 2, or the policy may lock in")

    def lag(self) -> int:
        return self.mask_every

    def allowed(self, logits: Tensor) -> Tensor:
        return support.top_p_support(logits, self.mask_top_p, self.mask_min_keep)

    def restricted(self, batch: SequenceBatch, out: PolicyOutput) -> PolicyOutput:
        """The policy's output with the log-probabilities of the renormalised policy."""
        assert batch.support is not None
        logits = torch.where(batch.mask.unsqueeze(-1), out.dist.params()["logits"], 0.0)
        return out._replace(logp=support.restricted_logp(logits, batch.support, batch.action))

    def per_token(self, batch: SequenceBatch, out: PolicyOutput, knobs: Knobs) -> Tensor:
        return super().per_token(batch, self.restricted(batch, out), knobs)

    def metrics(self, batch: SequenceBatch, out: PolicyOutput, knobs: Knobs) -> dict[str, Tensor]:
        assert batch.support is not None
        found = super().metrics(batch, self.restricted(batch, out), knobs)
        return {**found, "support_size": batch.support.sum(-1).to(out.logp.dtype)}
