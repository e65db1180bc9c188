"""Environments to make data in, and what several tests of it share."""

from __future__ import annotations

import gymnasium as gym
import numpy as np
from helpers import off_policy
from helpers.envs import Counter, env_id

from ctrlrl.engine.roll_out import roll_out
from ctrlrl.types import EnvSpec

LOW, HIGH = np.float32([-0.1, -2.0]), np.float32([0.3, 7.0])


class Lopsided(gym.Env):
    """Reward is the first action; notes what it is told; ends at random."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (3,), np.float64)
    action_space = gym.spaces.Box(LOW, HIGH)
    told: list = []  # noqa: RUF012 - all instances share it

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self.np_random.normal(size=3), {}

    def step(self, action):
        assert self.action_space.contains(action), action
        self.told.append(np.array(action))
        end = self.np_random.random(2) < 0.1
        return self.np_random.normal(size=3), float(action[0]), bool(end[0]), bool(end[1]), {}


class Forgetful(Counter):
    """Seven steps; the observation does not tell the episode."""

    def __init__(self):
        super().__init__(7)

    def obs(self):
        return np.array([float(self.t)])


for _cls in (Lopsided, Forgetful):
    if f"making/{_cls.__name__}-v0" not in gym.registry:
        gym.register(f"making/{_cls.__name__}-v0", f"{__name__}:{_cls.__name__}")
LOPSIDED, FORGETFUL = (f"{__name__}:making/{name}-v0" for name in ("Lopsided", "Forgetful"))


def zeros(obs, index):
    return np.zeros((len(index), 1), np.float32)


def counted(name, steps, **options):
    return roll_out(zeros, EnvSpec(env_id(name)), steps, n_envs=1, **options)


def assert_same(a, b, **tolerance):
    mine, theirs = a.columns(), b.columns()
    assert mine.keys() == theirs.keys()
    for name in mine:
        np.testing.assert_allclose(mine[name], theirs[name], err_msg=name, **{"rtol": 0, "atol": 0} | tolerance)


def sac(env=LOPSIDED, **settings):
    return off_policy.make("sac", env, seed=3, **settings)
