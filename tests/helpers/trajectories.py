"""Episodes, windows and small networks for the tests of trajectory policies."""

import gymnasium as gym
import numpy as np
import torch

from ctrlrl import api
from ctrlrl.data.dataset import Dataset, DatasetInfo
from ctrlrl.engine.wrappers import space_told
from ctrlrl.nets.actors import QNetworkConfig
from ctrlrl.nets.causal import TrajectoryActor
from ctrlrl.types import EnvSpec
from helpers.offline import recorded, tiny

K, WIDTH = 4, 16
OBS = gym.spaces.Box(-np.inf, np.inf, (3,), np.float32)
ACTIONS = gym.spaces.Box(np.float32([-2, 0]), np.float32([2, 3]))
SMALL = {"context": K, "width": WIDTH, "layers": 2, "heads": 2, "timesteps": 8, "return_scale": 5.0}
"""Settings with which Decision Transformer trains in milliseconds."""


class Paid(gym.Env):
    """Three steps; reward 5 where the action is positive. The observation tells nothing."""

    observation_space = gym.spaces.Box(-1, 1, (1,), np.float32)
    action_space = gym.spaces.Box(-1, 1, (1,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t = 0
        return np.zeros(1, np.float32), {}

    def step(self, action):
        self.t += 1
        return np.zeros(1, np.float32), 5.0 * float(action[0] > 0), self.t == 3, False, {}


PAID = f"{__name__}:trajectories/Paid-v0"
if "trajectories/Paid-v0" not in gym.registry:
    gym.register("trajectories/Paid-v0", f"{__name__}:Paid", disable_env_checker=True)


class Scripted(gym.Env):
    """Gives ``rewards`` one after the other; the observation is the number of the step."""

    observation_space, action_space = OBS, ACTIONS

    def __init__(self, rewards):
        self.rewards = rewards

    def reset(self, *, seed=None, options=None):
        self.t = 0
        return np.zeros(3, np.float32), {"reset": options}

    def step(self, action):
        self.t += 1
        return np.full(3, self.t, np.float32), self.rewards[self.t - 1], False, self.t == len(self.rewards), {"t": 1}


def dataset(lengths, rewards=None, actions=None, obs=None, ends="terminals", env=None, space=OBS, action_space=ACTIONS):
    """Episodes of ``lengths``; the first number of every observation is that of its row."""
    n = sum(lengths)
    rng = np.random.default_rng(0)
    if obs is None:
        obs = np.c_[np.arange(n), rng.normal(size=(n, 2))].astype(np.float32)
    if actions is None:
        actions = np.stack([action_space.sample() for _ in range(n)])
    end = np.zeros(n, bool)
    end[np.cumsum(lengths) - 1] = True
    none = np.zeros(n, bool)
    rewards = rng.normal(size=n) if rewards is None else rewards
    return Dataset(
        obs, np.asarray(actions, np.float32), np.asarray(rewards, np.float32), end if ends == "terminals" else none,
        end if ends == "timeouts" else none, np.roll(obs, -1, 0), ~end, space, action_space,
        DatasetInfo("toy", None if env is None else EnvSpec(env)),
    )  # fmt: skip


def make(data=None, env=None, **settings):
    return api.make(
        "decision_transformer",
        env,
        dataset=recorded() if data is None else data,
        **tiny("decision_transformer", **SMALL | settings),
    )


def actor(space=OBS, context=K, layers=2, dropout=0.25, timesteps=32, seed=0, **network):
    torch.manual_seed(seed)
    made = TrajectoryActor(
        space_told(space), ACTIONS, QNetworkConfig(**network), context=context, width=WIDTH, layers=layers, heads=2,
        dropout=dropout, return_scale=10.0, timesteps=timesteps,
    )  # fmt: skip
    for parameter in made.parameters():  # as it starts, the outputs hardly differ
        if parameter.dim() > 1:
            parameter.data.mul_(10.0)
    return made


def steps(batch, length, seed=0, first=0):
    """Observations and actions [batch * length, ...] of windows one after the other, and their mask."""
    g = torch.Generator().manual_seed(seed)
    when = (first + torch.arange(length)).repeat(batch).unsqueeze(-1)
    n = batch * length
    obs = {"observation": torch.randn(n, 3, generator=g), "return_to_go": 10 * torch.randn(n, 1, generator=g)}
    there = torch.ones(batch, length, dtype=torch.bool)
    return {**obs, "timestep": when}, torch.rand(n, 2, generator=g) * 2 - 1, there
