"""What TD3 and the methods built on it share: a delayed policy, and noise on the target policy's actions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ctrlrl.engine.algorithm import Algorithm

if TYPE_CHECKING:
    from ctrlrl.engine.learner import Loss, Nets


@dataclass(frozen=True)
class Delayed(Algorithm):
    """Networks "actor" and "critic" with targets, which move at every ``policy_delay``-th update."""

    policy_delay: int = 2
    """Updates of the critics for one of the policy and of the targets."""
    target_noise: float = 0.2
    """Deviation of the noise on the target policy's actions, in half-ranges of the action."""
    target_noise_clip: float = 0.5
    """Largest size of that noise."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.policy_delay < 1:
            raise ValueError(f"policy_delay={self.policy_delay} must be at least 1")
        self._not_negative("target_noise target_noise_clip")

    def _not_negative(self, names: str) -> None:
        for name in names.split():
            if not getattr(self, name) >= 0.0:
                raise ValueError(f"{name}={getattr(self, name)} must not be negative")

    @property
    def period(self) -> int:
        """Updates after which the pattern repeats."""
        return self.policy_delay

    def noise(
        self, n: int, batch_size: int, action_size: int, generator: torch.Generator, params: int = 0
    ) -> dict[str, Tensor]:
        shape = (n, batch_size, action_size)
        return {"next_action": torch.randn(shape, generator=generator, device=generator.device)}

    def smoothed(self, x: Tensor, noise: Tensor) -> Tensor:
        """``x`` [B, k] in [-1, 1] with the target's clipped noise (Fujimoto et al. 2018, eq. 14)."""
        clip = self.target_noise_clip
        return (x + (self.target_noise * noise).clamp(-clip, clip)).clamp(-1.0, 1.0)

    def move(self, nets: Nets, loss: Loss, knobs: Mapping[str, Tensor], phase: int) -> dict[str, Tensor]:
        """One step of the policy on ``loss``, then of the targets, where it is their turn."""
        if phase != self.policy_delay - 1:
            return {}
        found = nets.descend("actor", loss)
        for network in ("actor", "critic"):
            nets.track(f"{network}_target", network, knobs["tau"])
        return found
