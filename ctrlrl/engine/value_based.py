"""What DQN and the methods built on it share: one network of action values, its target, epsilon-greedy exploration."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from ctrlrl.engine.algorithm import Algorithm
from ctrlrl.engine.explore import EpsilonGreedy

if TYPE_CHECKING:
    from ctrlrl.engine.learner import Learner, Nets

CLEANRL: Mapping[str, Any] = {
    "learning_rate": 2.5e-4, "replay_size": 10_000, "batch_size": 128, "replay_ratio": 0.1, "learning_starts": 10_000,
    "critic_hidden": (120, 84),
}  # fmt: skip
"""What CleanRL's dqn.py sets for vector observations, beside the defaults below."""


@dataclass(frozen=True)
class ValueBased(Algorithm):
    """Discrete actions; the network "actor" values them and "actor_target" follows it.

    Widths and layer normalisation of the network are the settings for critics (``critic_hidden``), its learning rate
    is ``learning_rate``.
    """

    capabilities: ClassVar[frozenset[str]] = frozenset(
        ["resume", "vector", "discrete", "dict_obs", "image_obs", "gpu", "compile"]
    )

    target_steps: int | None = 500
    """Environment steps from one copy of the network into its target to the next; None moves the target a part ``tau``
    of the way in every update."""
    kappa: float = 1.0
    """Size of a temporal difference from which it counts linearly, not squared (Huber)."""
    epsilon_start: float = 1.0
    """Probability of a random action at the first step. All of the warm-up (learning_starts) is random."""
    epsilon_end: float = 0.05
    """The same from ``epsilon_share`` on; linear in the step in between."""
    epsilon_share: float = 0.5
    """Share of all steps planned so far after which epsilon stays as it is."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.target_steps is not None and self.target_steps < 1:
            raise ValueError(f"target_steps={self.target_steps} must be at least 1, or None for tau in every update")
        if not self.kappa >= 0.0:
            raise ValueError(f"kappa={self.kappa} must not be negative")
        for name in ("epsilon_start", "epsilon_end"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"{name}={getattr(self, name)} must lie in [0, 1]")
        if not 0.0 < self.epsilon_share <= 1.0:
            raise ValueError(f"epsilon_share={self.epsilon_share} must lie in (0, 1]")

    def explorer(self, policy: Any) -> EpsilonGreedy:
        return EpsilonGreedy(policy, self.epsilon_start, self.epsilon_end, self.epsilon_share)

    def noise(
        self, n: int, batch_size: int, action_size: int, generator: torch.Generator, params: int = 0
    ) -> dict[str, Tensor]:
        return {}

    def after_steps(self, learner: Learner, before: int, after: int) -> None:
        if self.target_steps is not None and after // self.target_steps > before // self.target_steps:
            learner.copy("actor_target", "actor")

    def follow(self, nets: Nets, knobs: Mapping[str, Tensor]) -> None:
        """Move the target after an update, where it moves at each."""
        if self.target_steps is None:
            nets.track("actor_target", "actor", knobs["tau"])
