"""Proximal policy optimisation: the clipped surrogate."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from ctrlrl.core import head, ratio
from ctrlrl.losses.base import Knobs, PolicyLoss, register, standardised
from ctrlrl.losses.needs import Need, Slot
from ctrlrl.types import PolicyOutput, SequenceBatch


@register
@dataclass(frozen=True)
class PPO(PolicyLoss):
    """-min(r A, clip(r, 1 - eps, 1 + eps) A)

    The gradient is that of |A| |r - (1 + eps sign A)| with a dead zone: zero once r has passed its target.
    """

    paper: ClassVar[str] = "Proximal Policy Optimization Algorithms, arXiv:1707.06347, eq. 7"
    slots: ClassVar[Mapping[Slot, str]] = {"mask": "clip", "ratio": "token", "advantage": "GAE"}
    needs: ClassVar[frozenset[Need]] = frozenset({"values"})
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        # GoRL's latent policy (arXiv:2512.02581) without a decoder: what GoRL is to be compared with
        "gorl": {
            "actor_hidden": (32, 32, 32, 32), "critic_hidden": (256, 256, 256, 256, 256), "activation": "silu",
            "std": "state", "head_gain": 0.0, "action_map": "tanh", "gamma": 0.995, "value_coef": 0.25,
            "entropy_coef": 0.01, "max_grad_norm": None,
        }
    }  # fmt: skip

    eps: float = 0.2
    """Half-width of the band in which the ratio earns a gradient."""
    standardize_advantage: bool = True
    """Bring the advantages of each update batch to mean 0 and deviation 1."""

    def advantage(self, batch: SequenceBatch) -> Tensor:
        return standardised(batch) if self.standardize_advantage else batch.advantage

    def per_token(self, batch: SequenceBatch, out: PolicyOutput, knobs: Knobs) -> Tensor:
        assert batch.coef is not None
        r = ratio.ratio(ratio.log_ratio(out.logp, batch.logp_old, batch.mask))
        return -head.clipped_surrogate(r, batch.coef["advantage"], self.eps, self.eps)
