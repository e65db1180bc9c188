"""Agents to export, and what onnxruntime makes of the files."""

import json

import gymnasium as gym
import numpy as np
import onnxruntime
import torch

from ctrlrl import api
from helpers.agents import NOISY, tiny

Box = gym.spaces.Box
VECTOR = Box(-np.inf, np.inf, (3,), np.float32)
UNEVEN = Box(np.float32([-1.0, 0.0]), np.float32([2.0, 0.5]))
GORL = {
    "n_steps": 16, "batch_size": 16, "epochs": 2, "actor_hidden": (8,), "critic_hidden": (8,), "device": "cpu",
    "threads": 1, "eval_every": None, "decoder_hidden": (8, 8), "decoder_steps": 3, "refine_epochs": 3,
    "refine_steps": 40, "n_envs": 2, "stages": (0.5, 0.5),
}  # fmt: skip


class Still(gym.Env):
    """Any spaces; nothing happens."""

    def __init__(self, observation, action):
        self.observation_space, self.action_space = observation, action

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self.observation_space.sample(), {}

    def step(self, action):
        return self.observation_space.sample(), 0.0, False, False, {}


def make(name="ppo", observation=VECTOR, action=UNEVEN, **settings):
    """An on-policy agent whose parameters are no longer small."""
    agent = api.make(name, Still(observation, action), **tiny(name, **settings))
    shake(agent.policy)
    return agent


def shake(module, seed=0):
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            size = max(1, parameter[:1].numel())  # activations keep theirs, however wide the layers are
            parameter.add_(torch.randn(parameter.shape, generator=g) / size**0.5)


def rows(count, *shape, seed=1):
    return np.random.default_rng(seed).normal(size=(count, *shape)).astype(np.float32)


def infer(path, **inputs):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return session.run(None, inputs)[0]


def about(path):
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return json.loads(session.get_modelmeta().custom_metadata_map["ctrlrl"])


def assert_acts_as(agent, path, **inputs):
    """On all rows at once, and on the first alone."""
    for count in (len(next(iter(inputs.values()))), 1):
        some = {k: v[:count] for k, v in inputs.items()}
        obs = some["obs"] if "obs" in some else {k.removeprefix("obs/"): v for k, v in some.items()}
        expected, _ = agent.predict(obs, deterministic=True)
        found = infer(path, **some)
        assert found.shape == expected.shape
        if expected.dtype.kind == "f":
            assert found.dtype == np.float32
            np.testing.assert_allclose(found, expected, atol=1e-5, rtol=0)
            assert count == 1 or np.ptp(found, axis=0).max() > 0.05  # it does look at the observation
        else:
            assert found.dtype == np.int64
            np.testing.assert_array_equal(found, expected)
            assert count == 1 or len(np.unique(found, axis=0)) > 1


def linear_agent():
    """mean = W clip((x - m) / s, +-10) + b, deviation exp(log_std), actions cut at the bounds."""
    agent = api.make("ppo", NOISY, **tiny("ppo", actor_hidden=(), normalize_obs=True))
    agent.policy.update_normalizer(torch.from_numpy(rows(400, 1, 3) * 5.0 + 100.0), torch.ones(400, 1, dtype=bool))
    with torch.no_grad():
        agent.policy.head.linear.weight.copy_(torch.tensor([[0.5, -1.0, 0.25]]))
        agent.policy.head.linear.bias.fill_(0.125)
        agent.policy.head.log_std.fill_(np.log(0.5))
    return agent
