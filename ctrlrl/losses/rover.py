"""Random policy valuation: regress the log-ratio on the value that a uniform policy would have."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ctrlrl.core import advantage as adv
from ctrlrl.core import head, ratio
from ctrlrl.losses.base import Knobs, register
from ctrlrl.losses.group import Aggregation, GroupLoss
from ctrlrl.losses.needs import Need, Slot
from ctrlrl.types import PolicyOutput, SequenceBatch

POSITIVE_SCALE, OTHER_SCALE = 5.0, 2.0
"""Of ``reward_mode="batch_asymmetric"``, as released."""


@register
@dataclass(frozen=True)
class ROVER(GroupLoss):
    """mean_it (q_t - sg[A_i + v_t])^2,  q_t = c log(pi / pi_old)(a_t),  v_t = c mean_a log(pi / pi_old)(a | s_t+1)

    c is ``q_temp``, A_i the return less its group's mean, and v_t = 0 where the sequence ends. The log-ratio plays
    the action value of the uniform policy, and sampling from the softmax of those values is the policy itself. Where
    states form a tree and the outcome is 0 or 1, acting greedily on the uniform policy's values is optimal.
    """

    paper: ClassVar[str] = (
        "Random Policy Valuation is Enough for LLM Reasoning with Verifiable Rewards, arXiv:2509.24981"
    )
    differs: ClassVar[str] = (
        "Between two turns the next state is the one before the policy's next own position. batch_asymmetric is the "
        "reward of the released mathematics code, which looks at the whole batch and not at groups."
    )
    slots: ClassVar[Mapping[Slot, str]] = {
        "ratio": "token, inside the regression",
        "advantage": "R - group mean + uniform next value",
        "likelihood": "regression of the log-ratio",
    }
    needs: ClassVar[frozenset[Need]] = frozenset({"categorical", "tree", "groups", "sequence_return", "dist_old"})
    aggregation: ClassVar[Aggregation] = "token_mean"

    q_temp: float = 1.0
    """Temperature at which the policy is the softmax of its action values."""
    reward_mode: Literal["group", "batch_asymmetric"] = "group"
    """Return less the group's mean; or positive returns +5 and others -2, each times the share of the other kind."""
    eps: float | None = None
    """Distance from one at which the ratio inside q is clamped; None is off."""
    assume_tree: bool = False
    """Run where states need not form a tree; the promise of optimality is void there."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.eps is not None and self.eps >= 1:
            raise ValueError(f"eps={self.eps} must be below 1, as the ratio is clamped to [1 - eps, 1 + eps]; or None")

    def required(self) -> frozenset[Need]:
        return self.needs - {"tree"} if self.assume_tree else self.needs

    def outcome_advantage(self, batch: SequenceBatch) -> Tensor:
        assert batch.sequence_return is not None and batch.group is not None
        if self.reward_mode == "group":
            return adv.center_scale(batch.sequence_return, batch.group, scale="none")
        positive = batch.sequence_return > 0
        share = positive.to(batch.advantage.dtype).mean()
        return torch.where(positive, POSITIVE_SCALE * (1.0 - share), -OTHER_SCALE * share)

    def per_token(self, batch: SequenceBatch, out: PolicyOutput, knobs: Knobs) -> Tensor:
        assert batch.coef is not None
        log_ratio = ratio.log_ratio(out.logp, batch.logp_old, batch.mask)
        if self.eps is not None:
            log_ratio = log_ratio.clamp(math.log1p(-self.eps), math.log1p(self.eps))
        return head.regression(batch.coef["advantage"] + self.next_value(batch, out), self.q_temp * log_ratio)

    def next_value(self, batch: SequenceBatch, out: PolicyOutput) -> Tensor:
        """[B, T] uniform average of the action values before the policy's next position; 0 after its last."""
        assert batch.dist_old is not None
        now, old = out.dist.params()["logits"].detach(), batch.dist_old["logits"]
        exists = batch.mask.unsqueeze(-1) & (old > -torch.inf)
        zero = torch.zeros_like(now)
        gap = torch.where(exists, now, zero) - torch.where(exists, old, zero)
        value = self.q_temp * gap.sum(-1) / exists.sum(-1).clamp(min=1)
        length = batch.mask.shape[-1]
        own = torch.where(batch.mask, torch.arange(length, device=value.device), length)
        first = own.flip(-1).cummin(-1).values.flip(-1)
        none = torch.full_like(first[:, :1], length)
        ended = torch.zeros_like(value[:, :1])
        return torch.cat([value, ended], -1).gather(-1, torch.cat([first[:, 1:], none], -1))
