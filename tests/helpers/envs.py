"""Tiny environments whose every number can be worked out by hand.

Observations of the counting ones are ``[10 * episode + step]``, so that an observation says where it comes from.
"""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np

FREE = gym.spaces.Box(-np.inf, np.inf, (1,), np.float64)
ONE = gym.spaces.Box(-1.0, 1.0, (1,), np.float32)


class Counter(gym.Env):
    """Reward t at step t = 1, 2, ...; how it ends after ``length`` steps is the subclass's."""

    ends = (False, True)
    observation_space = FREE
    action_space = ONE

    def __init__(self, length: int = 3) -> None:
        self.length, self.episode, self.t = length, 0, 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None):
        super().reset(seed=seed)
        self.episode, self.t = self.episode + 1, 0
        return self.obs(), {}

    def obs(self):
        return np.array([10.0 * self.episode + self.t])

    def render(self):
        return None

    def step(self, action):
        self.t += 1
        end = self.t == self.length
        return self.obs(), float(self.t), end and self.ends[0], end and self.ends[1], {}


class OnlyTruncates(Counter):
    ends = (False, True)


class OnlyTerminates(Counter):
    ends = (True, False)


class BothAtOnce(Counter):
    ends = (True, True)


class Noisy(gym.Env):
    """Random everything from the environment's own generator; ends at random."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (3,), np.float32)
    action_space = ONE

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None):
        super().reset(seed=seed)
        self.start = self.np_random.normal(size=3).astype(np.float32)
        return self.start, {}

    def step(self, action):
        obs = self.np_random.normal(size=3).astype(np.float32) + np.float32(action[0])
        return (
            obs,
            float(self.np_random.normal()),
            bool(self.np_random.random() < 0.1),
            bool(self.np_random.random() < 0.1),
            {},
        )


class ActionEcho(gym.Env):
    """Observation and reward are the action received."""

    observation_space = FREE
    action_space = ONE

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None):
        super().reset(seed=seed)
        return np.zeros(1), {}

    def step(self, action):
        return np.array(action, dtype=np.float64), float(action[0]), False, False, {}


class NaNAt(gym.Env):
    """The reward (or the observation) is NaN at the given step since the environment was built."""

    observation_space = FREE
    action_space = ONE

    def __init__(self, step: int = 5, where: str = "reward", fail: bool = False) -> None:
        self.at, self.where, self.fail, self.t = step, where, fail, 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None):
        super().reset(seed=seed)
        if seed is not None:
            self.mark = float(self.np_random.random())
        return np.array([self.mark]), {}

    def step(self, action):
        if self.fail and self.t > self.at:
            raise RuntimeError("the simulation blew up")
        bad, self.t = self.t == self.at, self.t + 1
        obs = np.array([np.nan if bad and self.where == "observation" else self.mark + float(action[0])])
        return obs, np.nan if bad and self.where == "reward" else float(self.t), False, False, {}


class NaNFinal(Counter):
    """The observation after the last step of every episode is infinite."""

    def obs(self):
        return np.array([np.inf]) if self.t == self.length else super().obs()


class DictObs(Counter):
    observation_space = gym.spaces.Dict(
        {"image": gym.spaces.Box(0, 255, (2, 2, 1), np.uint8), "vector": FREE, "mode": gym.spaces.Discrete(50)}
    )

    def obs(self):
        value = (10 * self.episode + self.t) % 256
        return {"image": np.full((2, 2, 1), value, np.uint8), "vector": np.array([float(value)]), "mode": self.t}


class Image(Counter):
    observation_space = gym.spaces.Box(0, 255, (3, 4, 4), np.uint8)

    def obs(self):
        return np.full((3, 4, 4), (10 * self.episode + self.t) % 256, np.uint8)


class Choice(Counter):
    """Discrete actions starting at 5; the reward is the action."""

    action_space = gym.spaces.Discrete(3, start=5)

    def step(self, action):
        obs, _, terminated, truncated, info = super().step(action)
        return obs, float(action), terminated, truncated, info


class ParametricToy(Counter):
    """Reward is the sticky parameter ``gain``."""

    parameter_space = gym.spaces.Box(0.0, 10.0, (1,), np.float64)

    def __init__(self, length: int = 3) -> None:
        super().__init__(length)
        self.nominal = {"gain": 1.0}
        self.gain = 1.0

    def set_params(self, params):
        self.gain = params["gain"]

    def step(self, action):
        obs, _, terminated, truncated, info = super().step(action)
        return obs, self.gain, terminated, truncated, info


class WrongShape(Counter):
    def obs(self):
        return np.zeros(2)


class WrongKind(Counter):
    observation_space = gym.spaces.Box(0, 255, (1,), np.uint8)


class Switches(Noisy):
    """Two choices at once."""

    action_space = gym.spaces.MultiDiscrete([2, 3])


class AddOne(gym.RewardWrapper):
    """A wrapper with an argument."""

    def __init__(self, env: gym.Env, amount: float = 1.0) -> None:
        super().__init__(env)
        self.amount = amount

    def reward(self, reward):
        return float(reward) + self.amount


NAMES = (
    "OnlyTruncates", "OnlyTerminates", "BothAtOnce", "Noisy", "ActionEcho", "NaNAt", "NaNFinal", "DictObs", "Image",
    "Choice", "ParametricToy", "Switches", "WrongShape", "WrongKind",
)  # fmt: skip

for _name in NAMES:
    if f"test/{_name}-v0" not in gym.registry:
        gym.register(f"test/{_name}-v0", f"{__name__}:{_name}")


def env_id(name: str) -> str:
    return f"{__name__}:test/{name}-v0"
