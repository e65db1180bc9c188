"""Off-policy agents that train in milliseconds, learners without an environment, and their networks in plain torch."""

from __future__ import annotations

import os
import signal

import gymnasium as gym
import numpy as np
import torch
from torch import nn
from torch.distributions import Normal, TanhTransform, TransformedDistribution

from ctrlrl import api
from ctrlrl.data.transitions import Transitions
from ctrlrl.engine import algorithm as algorithms
from ctrlrl.engine.algorithm import Spaces
from ctrlrl.engine.config import build
from ctrlrl.engine.learner import Learner
from ctrlrl.engine.off_policy_config import OffPolicyConfig
from ctrlrl.nets.q_ensemble import EnsembleLinear
from helpers.agents import NOISY
from helpers.envs import Noisy

TINY = {
    "replay_size": 48, "batch_size": 8, "learning_starts": 8, "iteration_steps": 8, "learning_rate": 1e-2,
    "actor_hidden": (8,), "critic_hidden": (8,), "image_features": 8, "device": "cpu", "threads": 1,
    "eval_every": None,
}  # fmt: skip
OWN = {
    "mdpo_off": {"refresh_steps": 12},
    "dqn": {"replay_ratio": 1.0, "target_steps": 20},
    "qr_dqn": {"replay_ratio": 1.0, "target_steps": 20, "quantiles": 4},
    "d_eta_n": {"replay_ratio": 1.0, "target_steps": 20},
}
"""Settings of a method's own without which a short run would not see all of it."""

OBS = gym.spaces.Box(-np.inf, np.inf, (3,), np.float32)
ACTIONS = gym.spaces.Box(-1.0, 1.0, (2,), np.float32)
CHOICES = gym.spaces.Discrete(3, start=5)


def tiny(name, **settings):
    """Settings with which ``name`` trains in milliseconds."""
    return TINY | OWN.get(name, {}) | settings


def make(name="sac", env=NOISY, n_envs=1, **settings):
    return api.make(name, env, **({"n_envs": n_envs} if isinstance(env, str) else {}), **tiny(name, **settings))


class Double(nn.Module):
    """An encoder that only widens, so that a method can be computed in float64 from end to end."""

    out_features = OBS.shape[0]

    def __init__(self, space):
        super().__init__()

    def forward(self, x):
        return x.double()


def learner(name, encoder=None, preset=None, compile=False, seed=0, obs=OBS, actions=ACTIONS, **settings):
    """A learner of ``name`` for observations [3] and actions [2], as an agent would build it."""
    settings = {"actor_hidden": (8, 8), "critic_hidden": (8, 8)} | settings
    config, algorithm = build(algorithms.get(name), settings, preset, loop=OffPolicyConfig)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        actor, trained, copies = algorithm.networks(Spaces(obs, actions), config, encoder)
    return Learner(algorithm, {"actor": actor, **trained}, copies, config, torch.device("cpu"), compile)


def transitions(n, seed=0):
    """``n`` rows of torch's default type, a third of them ends of episodes."""
    g = torch.Generator().manual_seed(seed)
    terminated = (torch.arange(n) % 3 == 1).to(torch.get_default_dtype())
    return Transitions(
        torch.randn(n, 3, generator=g).float(),
        torch.rand(n, 2, generator=g) * 2.0 - 1.0,
        torch.randn(n, generator=g),
        terminated,
        torch.randn(n, 3, generator=g).float(),
    )


def drawn(learner, count, size, seed=0):
    """The noise of ``count`` updates."""
    return learner.algorithm.noise(count, size, ACTIONS.shape[0], torch.Generator().manual_seed(seed))


# -- the same networks, with torch's own pieces -------------------------------------------------------


def linear(weight, bias):
    layer = nn.Linear(weight.shape[1], weight.shape[0])
    with torch.no_grad():
        layer.weight.copy_(weight)
        layer.bias.copy_(bias)
    return layer


def plain(sequence, member=0):
    """``sequence`` (of one member of an ensemble) as nn.Linear and nn.ReLU with copied weights."""
    layers = []
    for layer in sequence:
        if isinstance(layer, EnsembleLinear):
            layers.append(linear(layer.weight[member].T, layer.bias[member, 0]))
        elif isinstance(layer, nn.Linear):
            layers.append(linear(layer.weight, layer.bias))
        else:
            layers.append(nn.ReLU())
    return nn.Sequential(*layers)


class PlainGaussian(nn.Module):
    """A squashed Gaussian policy; ``body``, ``mean`` and ``log_std`` are copies of an actor's."""

    def __init__(self, actor):
        super().__init__()
        self.body, self.mean, self.log_std = plain(actor.body), *plain([actor.mean, actor.log_std])

    def parts(self, obs):
        body = self.body(obs)
        return self.mean(body), self.log_std(body).clamp(-20, 2)

    def sample(self, obs, noise):
        """The action, how likely each of its dimensions is [B, A], and u before the squashing."""
        mean, log_std = self.parts(obs)
        u = mean + log_std.exp() * noise
        tanh = TanhTransform(cache_size=1)
        action = tanh(u)
        return action, TransformedDistribution(Normal(mean, log_std.exp()), [tanh]).log_prob(action), u

    def log_density(self, obs, u):
        mean, log_std = self.parts(obs)
        tanh = TanhTransform(cache_size=1)
        return TransformedDistribution(Normal(mean, log_std.exp()), [tanh]).log_prob(tanh(u))


def assert_like(plain_net, ours, member=0, tolerance=1e-7):
    """``ours`` (body and further layers, in the order of ``plain_net``) has the weights of ``plain_net``."""
    expected = [layer for layer in plain_net.modules() if isinstance(layer, nn.Linear)]
    found = [layer for layer in ours if isinstance(layer, nn.Linear | EnsembleLinear)]
    assert len(expected) == len(found)
    for a, b in zip(expected, found, strict=True):
        weight, bias = (b.weight[member].T, b.bias[member, 0]) if isinstance(b, EnsembleLinear) else (b.weight, b.bias)
        torch.testing.assert_close(weight, a.weight, rtol=0, atol=tolerance)
        torch.testing.assert_close(bias, a.bias, rtol=0, atol=tolerance)


def adam(*modules, lr):
    return torch.optim.Adam([p for m in modules for p in (m.parameters() if isinstance(m, nn.Module) else [m])], lr=lr)


def polyak(target, source, tau):
    with torch.no_grad():
        for t, s in zip(target.parameters(), source.parameters(), strict=True):
            t.copy_((1 - tau) * t + tau * s)


# -- environments ------------------------------------------------------------------------------------


class Told(gym.Env):
    """Notes the actions it is given; bounds are lopsided."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (1,), np.float32)
    action_space = gym.spaces.Box(np.float32([-0.1, -2.0]), np.float32([0.3, 7.0]))

    def __init__(self):
        self.told = []

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return np.zeros(1, np.float32), {}

    def step(self, action):
        assert self.action_space.contains(action), action
        self.told.append(np.array(action))
        return np.float32([len(self.told) % 7]), 0.0, len(self.told) % 7 == 0, False, {}


class Constant(gym.Env):
    """Reward 1 at every step and always the same observation; ends after five steps, one way or the other."""

    observation_space = gym.spaces.Box(-1, 1, (1,), np.float32)
    action_space = gym.spaces.Box(-1, 1, (1,), np.float32)

    def __init__(self, terminates=False):
        self.terminates = terminates

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t = 0
        return np.ones(1, np.float32), {}

    def step(self, action):
        self.t += 1
        end = self.t == 5
        return np.ones(1, np.float32), 1.0, end and self.terminates, end and not self.terminates, {}


class Stopping(gym.Env):
    """Ctrl-C once, at one of its steps; otherwise random."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (1,), np.float32)
    action_space = Constant.action_space
    steps, at = 0, None

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self.np_random.normal(size=1).astype(np.float32), {}

    def step(self, action):
        Stopping.steps += 1
        if Stopping.steps == Stopping.at:
            os.kill(os.getpid(), signal.SIGINT)
        end = self.np_random.random() < 0.1
        return self.np_random.normal(size=1).astype(np.float32), float(action[0]), bool(end), False, {}


class Choosy(Noisy):
    """Noisy with three actions."""

    action_space = CHOICES

    def step(self, action):
        assert self.action_space.contains(action), action
        return super().step([action - 6])


for _name in ("Constant", "Stopping", "Choosy"):
    if f"off_policy/{_name}-v0" not in gym.registry:
        gym.register(f"off_policy/{_name}-v0", f"{__name__}:{_name}")
CONSTANT, STOPPING, CHOOSY = (f"{__name__}:off_policy/{name}-v0" for name in ("Constant", "Stopping", "Choosy"))
