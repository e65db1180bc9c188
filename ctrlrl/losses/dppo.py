"""Diffusion policy policy optimisation: PPO on denoising steps, as steps of a problem inside the environment's."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ctrlrl.core import gate, head, ratio, reduce
from ctrlrl.losses.base import Knobs, Prepared, register
from ctrlrl.losses.needs import Need, Slot
from ctrlrl.losses.ppo import PPO
from ctrlrl.types import PolicyOutput, SequenceBatch


@register
@dataclass(frozen=True)
class DPPO(PPO):
    """-mean_k min(r_k A_k, clip(r_k, 1 - eps_k, 1 + eps_k) A_k),  A_k = g^(K - 1 - k) A

    k counts the denoising steps from 0, out of pure noise, to K - 1, whose result is the action. r_k is the ratio of
    the k-th step's Gaussian, and A the advantage of the action, standardised before it is discounted: the noisier a
    step, the less it has to answer for. The value function sees the environment's state alone. With e_0 = eps_first

    eps_k = e_0 + (eps - e_0) (exp(c k / (K - 1)) - 1) / (exp(c) - 1)
    """

    paper: ClassVar[str] = "Diffusion Policy Policy Optimization, arXiv:2409.00588"
    differs: ClassVar[str] = (
        "The steps are those of a flow's SDE, not of a DDPM with a cosine schedule, and actions are chosen one at a "
        "time, not in chunks. The paper keeps the deviation of a step above 0.1; that of a flow's last step of ten is "
        "0.074, and step_std sets one for all. Log-probabilities are summed over dimensions (logp_reduce), not "
        "averaged and clamped. Steps that are not trained share the network; the paper keeps the pre-trained one there."
    )
    slots: ClassVar[Mapping[Slot, str]] = {
        "mask": "clip",
        "ratio": "denoising step",
        "advantage": "GAE, discounted by denoising steps to come",
        "likelihood": "Gaussian denoising step",
    }
    needs: ClassVar[frozenset[Need]] = frozenset({"values", "denoising"})
    loop_defaults: ClassVar[Mapping[str, Any]] = {"denoising_steps": 10}
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        # the baseline of GoRL (arXiv:2512.02581): equal noise, equal steps
        "gorl": {
            "eps": 0.2, "denoising_gamma": 1.0, "step_std": 0.05,
            "actor_hidden": (32, 32, 32, 32), "critic_hidden": (256, 256, 256, 256, 256), "activation": "silu",
            "head_gain": 0.25, "action_map": "tanh", "gamma": 0.995, "value_coef": 0.25, "max_grad_norm": None,
        }
    }  # fmt: skip

    eps: float = 0.1
    """Half-width of the band in which the ratio of the last denoising step earns a gradient. Released: 0.1 from
    scratch, 0.01 to fine-tune."""
    eps_first: float | None = None
    """The same at the first trained one; None: as at the last. In between it grows exponentially."""
    eps_rate: float = 3.0
    """c, how late it grows."""
    denoising_gamma: float = 0.99
    """g, discount per denoising step."""
    tuned_steps: int | None = None
    """Denoising steps that are trained, the last ones; None: all."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 < self.denoising_gamma <= 1.0:
            raise ValueError(f"denoising_gamma={self.denoising_gamma} must lie in (0, 1]")
        if self.tuned_steps is not None and self.tuned_steps < 1:
            raise ValueError(f"tuned_steps={self.tuned_steps} must be at least 1")

    def prepare(self, batch: SequenceBatch, knobs: Knobs) -> Prepared:
        left, advantage = self._left(batch), self.advantage(batch)
        weight, denominator = reduce.token_mean(batch.mask & (left < self._tuned(batch)), advantage.dtype)
        return Prepared({"advantage": advantage * self.denoising_gamma**left}, weight, denominator)

    def width(self, batch: SequenceBatch) -> float | Tensor:
        """[T] eps_k, or the one that all steps have."""
        if self.eps_first is None:
            return self.eps
        done = (1.0 - self._left(batch) / max(self._tuned(batch) - 1, 1)).clamp(min=0.0)
        grown = torch.expm1(self.eps_rate * done) / math.expm1(self.eps_rate)
        return self.eps_first + (self.eps - self.eps_first) * grown

    def per_token(self, batch: SequenceBatch, out: PolicyOutput, knobs: Knobs) -> Tensor:
        assert batch.coef is not None
        r = ratio.ratio(ratio.log_ratio(out.logp, batch.logp_old, batch.mask))
        width = self.width(batch)
        return -head.clipped_surrogate(r, batch.coef["advantage"], width, width)

    def metrics(self, batch: SequenceBatch, out: PolicyOutput, knobs: Knobs) -> dict[str, Tensor]:
        found, width = super().metrics(batch, out, knobs), self.width(batch)
        r = ratio.ratio(ratio.log_ratio(out.logp.detach(), batch.logp_old, batch.mask))
        return found | {"clip_fraction": gate.clipped(r, width, width).to(r.dtype)}

    def _left(self, batch: SequenceBatch) -> Tensor:
        """[T] denoising steps that follow each: K - 1, ..., 0."""
        like = batch.advantage
        return torch.arange(like.shape[-1] - 1, -1, -1, device=like.device, dtype=like.dtype)

    def _tuned(self, batch: SequenceBatch) -> int:
        steps = batch.mask.shape[-1]
        return steps if self.tuned_steps is None else min(self.tuned_steps, steps)
