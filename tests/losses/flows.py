"""Flow policies with their rows, and a task of one step that they can learn in seconds."""

from __future__ import annotations

import gymnasium as gym
import numpy as np
import torch
from helpers.policies import gen
from torch import Tensor

from ctrlrl import api
from ctrlrl.engine.denoise import unfold
from ctrlrl.nets.actor_critic import NetworkConfig
from ctrlrl.nets.flow_policy import FlowPolicy, Likelihood
from ctrlrl.types import SequenceBatch


def flow(likelihood: Likelihood = "matching", **settings) -> FlowPolicy:
    """A policy of four steps over observations [3] and actions [2], without noise in its steps."""
    torch.manual_seed(0)
    network = NetworkConfig(actor_hidden=(16,), critic_hidden=(8,), head_gain=1.0)
    settings = {"flow_noise": 0.0, "matching_weight": "noise", "matching_times": 8} | settings
    return FlowPolicy(
        gym.spaces.Box(-np.inf, np.inf, (3,), np.float32), gym.spaces.Box(-1.0, 1.0, (2,), np.float32), network,
        denoising_steps=4, likelihood=likelihood, **settings,
    )  # fmt: skip


def acted(policy: FlowPolicy, n: int = 40) -> tuple[SequenceBatch, Tensor, Tensor]:
    """Rows of ``n`` actions of ``policy`` with what it says about them; the actions [n, 2]; their advantages [n]."""
    obs = torch.randn(n, 1, 3, generator=gen(1))
    with torch.no_grad():
        chain = policy.act(obs[:, 0], policy.noise(1, n, gen(2))[0]).unsqueeze(1)
    advantage, zero = torch.randn(n, 1, generator=gen(3)), torch.zeros(n, 1)
    batch = SequenceBatch(obs, chain, torch.ones(n, 1, dtype=torch.bool), zero, advantage, advantage, zero)
    batch = unfold(batch, policy, gen(4))
    with torch.no_grad():
        old = policy(batch.obs, batch.action)
    return batch._replace(logp_old=old.logp, dist_old=old.dist.params()), chain[:, 0, -1], advantage[:, 0]


class Target(gym.Env):
    """One step: 1 at action 0.6, little elsewhere."""

    observation_space = action_space = gym.spaces.Box(-1.0, 1.0, (1,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return np.zeros(1, np.float32), {}

    def step(self, action):
        return np.zeros(1, np.float32), float(np.exp(-(((action[0] - 0.6) / 0.3) ** 2))), True, False, {}


gym.register("losses/Target-v0", f"{__name__}:Target")


class Rewards(list):
    def on_update(self, agent, step, metrics):
        self.append(float(np.mean([r for r, _ in list(agent.recent)[-256:]])))


def learn(name: str, iterations: int, **settings) -> list[float]:
    """Mean reward on ``Target`` in each iteration of 256 actions."""
    agent = api.make(
        name, f"{__name__}:losses/Target-v0", seed=0, n_envs=32, backend="sync", n_steps=8, batch_size=64, epochs=4,
        learning_rate=3e-3, eval_every=None, diagnose_every=None, threads=1, device="cpu", **settings,
    )  # fmt: skip
    rewards = Rewards()
    agent.learn(256 * iterations, root=None, progress=False, callbacks=[rewards])
    return rewards
