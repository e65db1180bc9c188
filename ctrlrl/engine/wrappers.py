"""Wrappers that tell a policy something beside the observation. They are part of a run's EnvSpec, by their path."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import gymnasium as gym
import numpy as np

from ctrlrl.nets.causal import OBSERVATION, RETURN_TO_GO, TIMESTEP
from ctrlrl.types import EnvSpec


class ReturnToGo(gym.Wrapper, gym.utils.RecordConstructorArgs):
    """Tells the policy which return is still to be reached, and how many steps the episode has behind it.

    The observation becomes a Dict of ``observation``, ``return_to_go`` ([1] float32, in the reward's units: the target
    less the rewards so far) and ``timestep`` ([1] int64, from 0 on). A Dict keeps its entries beside the latter two.
    Rewards and ends are the environment's own.

    Args:
        env: The environment.
        target_return: Return-to-go at the beginning of every episode.

    Raises:
        ValueError: The target is not finite, or the observation has one of the two entries already.
    """

    def __init__(self, env: gym.Env, target_return: float) -> None:
        if not math.isfinite(target_return):
            raise ValueError(f"target_return={target_return} must be finite")
        gym.utils.RecordConstructorArgs.__init__(self, target_return=target_return)
        gym.Wrapper.__init__(self, env)
        self.observation_space = space_told(env.observation_space)
        self.target_return = self.return_to_go = float(target_return)
        self.timestep = 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        obs, info = self.env.reset(seed=seed, options=options)
        self.return_to_go, self.timestep = self.target_return, 0
        return self._tell(obs), info

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        obs, reward, terminated, truncated, info = self.env.step(action)
        self.return_to_go -= float(reward)
        self.timestep += 1
        return self._tell(obs), reward, terminated, truncated, info

    def _tell(self, obs: Any) -> dict[str, Any]:
        return told(obs, np.array([self.return_to_go], np.float32), np.array([self.timestep], np.int64))


def told(obs: Any, return_to_go: np.ndarray, timestep: np.ndarray) -> dict[str, Any]:
    """One observation, or columns of them, together with the two numbers [..., 1]."""
    own = obs if isinstance(obs, Mapping) else {OBSERVATION: obs}
    return {**own, RETURN_TO_GO: return_to_go, TIMESTEP: timestep}


def space_told(space: gym.Space) -> gym.spaces.Dict:
    """The space of what :func:`told` gives for observations of ``space``."""
    own = dict(space.spaces) if isinstance(space, gym.spaces.Dict) else {OBSERVATION: space}
    taken = own.keys() & {RETURN_TO_GO, TIMESTEP}
    if taken:
        raise ValueError(f"the observation has the entry {', '.join(sorted(taken))} already; rename it")
    return gym.spaces.Dict(
        {
            **own,
            RETURN_TO_GO: gym.spaces.Box(-np.inf, np.inf, (1,), np.float32),
            TIMESTEP: gym.spaces.Box(0, np.iinfo(np.int32).max, (1,), np.int64),  # a wider one cannot be sampled
        }
    )


PATH = f"{__name__}:ReturnToGo"


def target_of(env: str | EnvSpec) -> float | None:
    """The target return of ``env``; None where it is in no ReturnToGo that has one."""
    for path, kwargs in () if isinstance(env, str) else env.wrappers:
        if path == PATH and "target_return" in kwargs:
            return float(kwargs["target_return"])
    return None


def aimed(env: str | EnvSpec, target_return: float) -> EnvSpec:
    """``env`` in ReturnToGo with that target, whether it was before or not."""
    spec = EnvSpec(env) if isinstance(env, str) else env
    own = tuple(wrapper for wrapper in spec.wrappers if wrapper[0] != PATH)
    return dataclasses.replace(spec, wrappers=(*own, (PATH, {"target_return": float(target_return)})))
