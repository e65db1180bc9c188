"""How off-policy methods choose the actions that they collect data with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ctrlrl.types import Obs


class Explorer:
    """Uniformly random Box actions during the warm-up, then those of the policy.

    Args:
        policy: A BoxActor.
        deterministic: Take the mode of the policy instead of what ``act`` draws.

    Attributes:
        ready: Whether the warm-up is over.
        progress: Share of the run's planned environment steps that is done.
    """

    def __init__(self, policy: Any, deterministic: bool = False) -> None:
        self.policy, self.mode = policy, deterministic
        self.action_shape, self.action_dtype = policy.action_shape, policy.action_dtype
        self.ready, self.progress = False, 0.0

    def noise(self, n_steps: int, n_envs: int, generator: torch.Generator) -> Tensor:
        """[n_steps, n_envs, A]: normal, or uniform in [-1, 1] during the warm-up."""
        if self.ready:
            return self.policy.noise(n_steps, n_envs, generator)
        return torch.rand(n_steps, n_envs, *self.action_shape, generator=generator) * 2.0 - 1.0

    def act(self, obs: Obs, noise: Tensor) -> Tensor:
        """Actions [N, A] in [-1, 1]."""
        if not self.ready:
            return noise
        return self.policy.mode(obs) if self.mode else self.policy.act(obs, noise)

    def to_env(self, obs: Obs, action: Tensor) -> Tensor:
        """The environment's actions."""
        return self.policy.to_env(obs, action)

    def sampler(self) -> Callable[[Obs, Tensor], tuple[Tensor, Tensor]]:
        """``act`` and ``to_env`` in one call."""

        def sample(obs: Obs, noise: Tensor) -> tuple[Tensor, Tensor]:
            action = self.act(obs, noise)
            return action, self.policy.to_env(obs, action)

        return sample

    def metrics(self) -> dict[str, float]:
        """What to log of the exploration."""
        return {}


class EpsilonGreedy(Explorer):
    """A uniformly random choice with probability epsilon, else the policy's own; always random during the warm-up.

    Args:
        policy: A DiscreteActor.
        start: Epsilon at step 0.
        end: Epsilon from ``share`` of the run's planned steps on; linear in between.
        share: In (0, 1].
    """

    def __init__(self, policy: Any, start: float, end: float, share: float) -> None:
        super().__init__(policy)
        self.start, self.end, self.share = start, end, share

    @property
    def epsilon(self) -> float:
        """Probability of a random choice at this point of the run."""
        if not self.ready:
            return 1.0
        return self.start + (self.end - self.start) * min(1.0, self.progress / self.share)

    def noise(self, n_steps: int, n_envs: int, generator: torch.Generator) -> Tensor:
        """[n_steps, n_envs, 2] uniform in [0, 1): whether to choose at random, and what."""
        return torch.rand(n_steps, n_envs, 2, generator=generator)

    def act(self, obs: Obs, noise: Tensor) -> Tensor:
        """Choices [N], counted from 0."""
        count = self.policy.n_actions
        drawn = (noise[:, 1] * count).long().clamp(max=count - 1)
        if not self.ready:
            return drawn
        return torch.where(noise[:, 0] < self.epsilon, drawn, self.policy.mode(obs))

    def metrics(self) -> dict[str, float]:
        return {"rollout/exploration_rate": self.epsilon}
