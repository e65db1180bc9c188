"""PPO with turn-level ratios, its gradient divided by the norm of what the clip takes away."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ctrlrl.core import gate, head
from ctrlrl.losses.base import GradientOf, Knobs, register
from ctrlrl.losses.needs import Slot
from ctrlrl.losses.turn_ppo import TurnPPO
from ctrlrl.types import PolicyOutput, SequenceBatch


@register
@dataclass(frozen=True)
class STPPO(TurnPPO):
    """grad J / max(norm_floor, |C|),  C = mean_i mean_t 1[clipped] w A_t grad log pi_t

    J is turn-level PPO, w its ratio, C the clipping bias: the part of the importance-weighted gradient that the
    clip drops. The more it drops, the smaller the step. Costs two more backward passes.
    """

    differs: ClassVar[str] = (
        "The paper divides by the norm itself, which is zero where nothing is clipped and enlarges the step where it "
        "is below one; the floor is ours. Only the policy objective is divided, not the value function's or the "
        "entropy's gradient."
    )
    slots: ClassVar[Mapping[Slot, str]] = {
        "mask": "clip, and division by the clipping bias",
        "ratio": "turn, geometric mean",
        "advantage": "GAE",
    }

    norm_floor: float = 1.0
    """Smallest divisor; below one, a small clipping bias enlarges the step."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.norm_floor > 0:
            raise ValueError(f"norm_floor={self.norm_floor} must be positive")

    def clipping_bias(self, batch: SequenceBatch, out: PolicyOutput) -> Tensor:
        """[B, T] a function whose gradient is what the clip drops."""
        assert batch.coef is not None
        r, advantage = self.importance(batch, out), batch.coef["advantage"]
        kept = gate.clip_gate(r, advantage, self.eps, self.eps) > 0
        return torch.where(kept, 0.0, head.logp_advantage(out.logp, r * advantage))

    def grad_transform(self, grad: Tensor, gradient_of: GradientOf, knobs: Knobs) -> Tensor:
        norm = torch.linalg.vector_norm(gradient_of(self.clipping_bias))
        policy = gradient_of(lambda batch, out: self.per_token(batch, out, knobs))
        return grad + (1.0 / norm.clamp(min=self.norm_floor) - 1.0) * policy
