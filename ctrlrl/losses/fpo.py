"""Flow policy optimisation: PPO with a ratio of flow-matching losses."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import Tensor

from ctrlrl.core import head, ratio
from ctrlrl.losses.base import Knobs, register
from ctrlrl.losses.needs import Need, Slot
from ctrlrl.losses.ppo import PPO
from ctrlrl.types import PolicyOutput, SequenceBatch


@register
@dataclass(frozen=True)
class FPO(PPO):
    """-min(r A, clip(r, 1 - eps, 1 + eps) A),  r = exp(mean_k (l_k - l_k_old))

    l_k is minus the flow-matching loss of the action at its k-th pair of time and noise; the pairs are drawn once, when
    the action is collected. On-policy r = 1, and the gradient is A times that of minus the mean matching loss: any
    sampler may have made the action.

    A row [K] holds the pairs of one action, which share its advantage. The ratio is [B, 1] and clipped as a whole.
    """

    paper: ClassVar[str] = "Flow Matching Policy Gradients (FPO), arXiv:2507.21053"
    differs: ClassVar[str] = (
        "Times come from even slices of [0, 1], one from each, not independently. The released network scales its "
        "velocity by 1/4 and sees sines of the time; here head_gain sets how small the velocity starts, and the time "
        "enters as it is. Deterministic actions start from zero noise, released evaluations from random noise."
    )
    slots: ClassVar[Mapping[Slot, str]] = {
        "mask": "clip of the whole action",
        "ratio": "action, of matching losses",
        "advantage": "GAE",
        "likelihood": "minus the flow-matching loss",
    }
    needs: ClassVar[frozenset[Need]] = frozenset({"values", "matching"})
    loop_defaults: ClassVar[Mapping[str, Any]] = {
        "denoising_steps": 10,
        "flow_noise": 0.0,
        "matching_times": 8,
        "matching_weight": "noise",
    }
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        # the baseline of GoRL (arXiv:2512.02581)
        "gorl": {
            "actor_hidden": (32, 32, 32, 32), "critic_hidden": (256, 256, 256, 256, 256), "activation": "silu",
            "head_gain": 0.25, "action_map": "tanh", "gamma": 0.995, "value_coef": 0.25, "max_grad_norm": None,
        }
    }  # fmt: skip

    eps: float = 0.05
    """Half-width of the band in which the ratio earns a gradient."""
    ratio_of: Literal["action", "sample"] = "action"
    """One ratio for an action, of its mean losses, or one for each pair of time and noise, clipped by itself."""
    difference_max: float = 3.0
    """Bound on the difference of two losses of a pair, under ratio_of=sample; beyond it there is no gradient."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.difference_max > 0:
            raise ValueError(f"difference_max={self.difference_max} must be positive")

    def log_ratio(self, batch: SequenceBatch, out: PolicyOutput) -> Tensor:
        """[B, 1] log-ratio of each action, or [B, T] of each of its pairs."""
        mask = batch.mask
        if self.ratio_of == "sample":
            each = ratio.log_ratio(out.logp, batch.logp_old, mask)
            return each.clamp(-self.difference_max, self.difference_max)
        return ratio.sequence_log_ratio(
            out.logp, batch.logp_old, mask, mask.sum(-1, keepdim=True).clamp(min=1).to(out.logp.dtype)
        )

    def per_token(self, batch: SequenceBatch, out: PolicyOutput, knobs: Knobs) -> Tensor:
        assert batch.coef is not None
        r = ratio.ratio(self.log_ratio(batch, out))
        return -head.clipped_surrogate(r, batch.coef["advantage"], self.eps, self.eps)

    def metrics(self, batch: SequenceBatch, out: PolicyOutput, knobs: Knobs) -> dict[str, Tensor]:
        # as if each pair had the ratio that is clipped
        return super().metrics(batch, out._replace(logp=batch.logp_old + self.log_ratio(batch, out)), knobs)
