"""PPO in one file, on the core functions alone: what the library's layers do, with nothing between the lines.

Read from top to bottom: network, normalisation, rollout, advantages, update. It trains exactly what
``ctrlrl train ppo --backend sync`` trains with the same seed, step for step up to the library's first checkpoint
border (a test holds the two together), for environments with float observations and Box actions.

    python scripts/ppo_in_one_file.py --env HalfCheetah-v5 --steps 200_000
"""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass

import gymnasium as gym
import numpy as np
import torch
import tyro
from torch import Tensor, nn

from ctrlrl.core import advantage, head, penalty, ratio, reduce


@dataclass(frozen=True)
class Config:
    env: str = "HalfCheetah-v5"
    """Gymnasium id; float observations, Box actions."""
    steps: int = 200_000
    """Environment steps."""
    seed: int = 0
    """Seed of everything."""
    n_steps: int = 2048
    """Steps per iteration."""
    batch_size: int = 64
    """Rows per optimiser step."""
    epochs: int = 10
    """Passes over each rollout."""
    learning_rate: float = 3e-4
    """Adam's learning rate."""
    gamma: float = 0.99
    """Discount per step."""
    gae_lambda: float = 0.95
    """Decay of the advantage estimator."""
    eps: float = 0.2
    """Half-width of the clip."""
    value_coef: float = 0.5
    """Weight of the value's squared error."""
    max_grad_norm: float = 0.5
    """Bound on the gradient's norm."""


# -- randomness: every stream is a function of the seed and of the iteration ----------------------


def stream(seed: int, *keys: str | int) -> torch.Generator:
    words = [zlib.crc32(k.encode()) if isinstance(k, str) else k for k in keys]
    return torch.Generator().manual_seed(int(np.random.SeedSequence([seed, *words]).generate_state(1)[0] >> 1))


# -- network: separate actor and critic, orthogonal weights ---------------------------------------


class Network(nn.Module):
    def __init__(self, obs_size: int, action_size: int) -> None:
        super().__init__()
        self.actor = nn.Sequential(nn.Linear(obs_size, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh())
        self.mean = nn.Linear(64, action_size)
        self.log_std = nn.Parameter(torch.zeros(action_size))
        self.critic = nn.Sequential(nn.Linear(obs_size, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 1))
        for part, gain in ((self.actor, 2**0.5), (self.mean, 0.01), (self.critic, 2**0.5), (self.critic[-1], 1.0)):
            for layer in part.modules():
                if isinstance(layer, nn.Linear):
                    nn.init.orthogonal_(layer.weight, gain)
                    nn.init.zeros_(layer.bias)

    def log_prob(self, obs: Tensor, action: Tensor) -> Tensor:
        z = (action - self.mean(self.actor(obs))) * torch.exp(-self.log_std)
        return (-0.5 * z * z - self.log_std).sum(-1) - 0.5 * math.log(2 * math.pi) * action.shape[-1]


# -- normalisation: running mean and variance, merged batch by batch ------------------------------


class Moments:
    def __init__(self, size: int) -> None:
        self.mean, self.var = torch.zeros(size, dtype=torch.float64), torch.ones(size, dtype=torch.float64)
        self.count = 0

    def update(self, x: Tensor) -> None:
        x, n = x.double(), len(x)
        delta, total = x.mean(0) - self.mean, self.count + n
        m2 = self.var * self.count + x.var(0, correction=0) * n + delta**2 * self.count * n / total
        self.mean, self.var, self.count = self.mean + delta * n / total, m2 / total, total

    def normalize(self, x: Tensor) -> Tensor:
        if not self.count:
            return x.clamp(-10, 10)
        scale = torch.rsqrt(self.var + 1e-8)
        return torch.addcmul((-self.mean * scale).float(), x, scale.float()).clamp(-10, 10)


# -- training -------------------------------------------------------------------------------------


def train(config: Config, verbose: bool = True) -> Network:
    env = gym.make(config.env)
    low, high = (torch.as_tensor(b) for b in (env.action_space.low, env.action_space.high))
    obs_size, action_size = env.observation_space.shape[0], env.action_space.shape[0]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(stream(config.seed, "network").initial_seed())
        net = Network(obs_size, action_size)
    optimiser = torch.optim.Adam(net.parameters(), lr=config.learning_rate, eps=1e-5)
    obs_moments, return_moments = Moments(obs_size), Moments(1)
    running = torch.zeros(1, dtype=torch.float64)
    obs, _ = env.reset(seed=int(np.random.SeedSequence([config.seed, 0]).generate_state(1)[0] >> 1))
    score, scores = 0.0, []
    for iteration in range(math.ceil(config.steps / config.n_steps)):
        # collect: one row per step; the value of the true next observation is needed where an episode is cut
        noise = torch.randn(config.n_steps, 1, action_size, generator=stream(config.seed, "actions", iteration))
        rows, actions, rewards, ends, finals = [], [], [], [], {}
        with torch.no_grad():
            for t in range(config.n_steps):
                rows.append(torch.as_tensor(obs, dtype=torch.float32))
                features = net.actor(obs_moments.normalize(rows[-1][None]))
                actions.append(torch.addcmul(net.mean(features), net.log_std.exp(), noise[t])[0])
                obs, reward, terminated, truncated, _ = env.step(actions[-1].clamp(low, high).numpy())
                rewards.append(float(reward))
                ends.append((terminated, truncated and not terminated))
                score += float(reward)
                if terminated or truncated:
                    finals[t] = torch.as_tensor(obs, dtype=torch.float32)
                    obs, _ = env.reset()
                    scores.append(score)
                    score = 0.0

            # estimate: time runs along the first dimension, environments along the second
            states, action_t = torch.stack([*rows, torch.as_tensor(obs, dtype=torch.float32)]), torch.stack(actions)
            value = net.critic(obs_moments.normalize(states))
            value_t = value[1:].clone()
            for t, final in finals.items():
                value_t[t] = net.critic(obs_moments.normalize(final[None]))[0]
            states, value = states[:-1], value[:-1]
            terminated_t, truncated_t = torch.tensor(ends)[..., None].unbind(1)
            cut_t = terminated_t | truncated_t
            reward_t = torch.tensor(rewards)[:, None]
            sums = advantage.running_return(reward_t.double(), config.gamma, cut_t, running)
            return_moments.update(sums)
            running = torch.where(cut_t[-1], torch.zeros_like(running), sums[-1])
            reward_t = (reward_t.double() * torch.rsqrt(return_moments.var + 1e-8)).clamp(-10, 10).float()
            discount_t = config.gamma * (~terminated_t).float()
            gain = advantage.gae(reward_t, discount_t, cut_t, value, value_t, config.gae_lambda)
            target = gain + value
            inputs = obs_moments.normalize(states)
            logp_old = net.log_prob(inputs, action_t)[:, None]

        # update: the clipped surrogate and the value's squared error, in shuffled batches
        shuffle = stream(config.seed, "shuffle", iteration)
        mask = torch.ones(config.batch_size, 1, dtype=torch.bool)
        for _ in range(config.epochs):
            for index in torch.randperm(config.n_steps, generator=shuffle).split(config.batch_size):
                valid = mask[: len(index)]
                weight, denominator = reduce.token_mean(valid)
                logp = net.log_prob(inputs[index], action_t[index])[:, None]
                log_ratio = ratio.log_ratio(logp, logp_old[index], valid)
                scaled = advantage.standardise(gain[index], valid)
                surrogate = head.clipped_surrogate(ratio.ratio(log_ratio), scaled, config.eps, config.eps)
                policy_loss = -reduce.weighted_sum(surrogate, weight) / denominator
                value_loss = reduce.masked_mean((net.critic(inputs[index]) - target[index]) ** 2, valid)
                optimiser.zero_grad()
                (policy_loss + config.value_coef * value_loss).backward()
                nn.utils.clip_grad_norm_(net.parameters(), config.max_grad_norm)
                optimiser.step()
        # the statistics change between rollouts only, so that an observation means the same in all of one iteration
        obs_moments.update(states)
        if verbose and scores:
            kl = float(penalty.kl_k3(log_ratio.detach()).mean())
            print(f"{(iteration + 1) * config.n_steps:8} steps  return {np.mean(scores[-100:]):8.1f}  kl {kl:.4f}")
    env.close()
    return net


if __name__ == "__main__":
    train(tyro.cli(Config, description=__doc__))
