"""Cross-entropy as a one-step policy gradient, with its reward shaped towards precision or diversity."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ctrlrl.core import head
from ctrlrl.losses.base import Knobs, register
from ctrlrl.losses.needs import Need, Slot
from ctrlrl.losses.sft import SFT
from ctrlrl.types import PolicyOutput, SequenceBatch

GAP_FLOOR = 1e-6
"""Smallest 1 - pi(y): below it a negative exponent would give an endless weight to what is learned already."""


@register
@dataclass(frozen=True)
class PrecisionDiversity(SFT):
    """-sum_a sg[pi(a) r(a)] log pi(a) at the demonstrations,  r(y) = (1 - pi(y))^b / pi(y),  b = ``exponent``

    Its gradient on the logits is pi (r - E_pi[r]). With b = 0 and no other rewards it is cross-entropy; b < 0 keeps
    pushing the actions that are nearly certain (precision), b > 0 lets go of them (diversity).
    """

    paper: ClassVar[str] = "Diversity or Precision? A Deep Dive into Next Token Prediction, arXiv:2512.22955"
    differs: ClassVar[str] = (
        "The exact shaping is inferred: we know the parameters, their signs and that b = 0 is cross-entropy. The "
        "rewards of other actions, by rank, are off; 1 - pi(y) is floored at 1e-6."
    )
    slots: ClassVar[Mapping[Slot, str]] = {
        "ratio": "none",
        "advantage": "(1 - pi)^b",
        "likelihood": "all actions, where others are rewarded",
        "selection": "demonstrations",
    }
    needs: ClassVar[frozenset[Need]] = frozenset({"demonstrations", "categorical"})

    exponent: float = -0.25
    """b: below 0 for precision, above for diversity."""
    top_reward: float = 0.0
    """Reward of each other action among the likeliest: above 0 keeps alternatives alive."""
    tail_reward: float = 0.0
    """Reward of each other action beyond them: below 0 clears the tail."""
    top_k: int = 3
    """How many of the likeliest actions, the demonstrated one among them, the first reward is for; of no effect while
    both rewards are 0."""

    def per_token(self, batch: SequenceBatch, out: PolicyOutput, knobs: Knobs) -> Tensor:
        logp = torch.where(batch.mask, out.logp, torch.zeros_like(out.logp))
        gap = -torch.expm1(logp)
        gain = head.logp_advantage(logp, gap.clamp(min=GAP_FLOOR) ** self.exponent)
        if self.top_reward == 0 and self.tail_reward == 0:
            return -gain
        return -gain - self.others(batch, out)

    def others(self, batch: SequenceBatch, out: PolicyOutput) -> Tensor:
        """[B, T] sum over the actions not demonstrated of sg[pi r] log pi."""
        logits = out.dist.params()["logits"]
        choice = torch.arange(logits.shape[-1], device=logits.device)
        present = batch.mask.unsqueeze(-1) & (logits > -torch.inf) & (choice != batch.action.unsqueeze(-1))
        log_p = torch.where(present, logits, torch.zeros_like(logits))
        rank = logits.detach().argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
        reward = torch.where(rank < self.top_k, log_p.new_full((), self.top_reward), self.tail_reward)
        share = torch.where(present, log_p.exp() * reward, torch.zeros_like(log_p))
        return head.logp_advantage(log_p, share).sum(-1)
