"""Policies without networks."""

from __future__ import annotations

import torch


class NoisePolicy:
    """The action is the noise, clipped for the environment. Shape () and integers for a discrete one."""

    def __init__(self, size: int = 1, choices: int = 0, start: int = 0) -> None:
        self.action_shape = () if choices else (size,)
        self.action_dtype = torch.int64 if choices else torch.float32
        self.choices, self.start = choices, start

    def noise(self, n_steps, n_envs, generator):
        if self.choices:
            return torch.randint(self.choices, (n_steps, n_envs), generator=generator)
        return torch.randn(n_steps, n_envs, *self.action_shape, generator=generator)

    def act(self, obs, noise):
        return noise

    def to_env(self, obs, action):
        return action + self.start if self.choices else action.clamp(-1.0, 1.0)

    def sampler(self):
        return lambda obs, noise: (action := self.act(obs, noise), self.to_env(obs, action))


class FeedbackPolicy(NoisePolicy):
    """The action depends on the observation, so that any wrong observation shows."""

    def act(self, obs, noise):
        value = obs if isinstance(obs, torch.Tensor) else obs["vector"]
        return torch.tanh(0.3 * value.float().flatten(1).sum(1, keepdim=True) + noise)


def gen(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
