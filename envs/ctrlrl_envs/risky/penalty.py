"""MuJoCo tasks with a rare, large penalty in risky states."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gymnasium as gym
import numpy as np

from ctrlrl_envs.multimodal.base import check


class StochasticPenalty(gym.Wrapper[np.ndarray, np.ndarray, np.ndarray, np.ndarray]):
    """Subtracts ``penalty`` with probability ``chance`` from the reward of every step that ends in a risky state.

    ``info["violation"]`` says whether it did, ``info["cost"]`` what was subtracted. The draws are those of a generator
    of its own, which ``reset(seed=...)`` seeds: the physics of a seed are those of the task without penalty.

    Source: Urpi, Curi, Krause 2021, Risk-Averse Offline Reinforcement Learning (arXiv:2102.05371), section 5. Their
    code also takes the forward reward away where a velocity is penalised; the paper does not, nor does this.

    Args:
        env: The task.
        risky: From its state and info to whether it is risky.
        penalty: Subtracted, at least 0.
        chance: Its probability, in [0, 1].

    Raises:
        ValueError: Arguments outside of these ranges.
    """

    def __init__(
        self, env: gym.Env[Any, Any], risky: Callable[[Any, dict[str, Any]], bool], penalty: float, chance: float
    ) -> None:
        super().__init__(env)
        check("penalty", penalty, "a number of at least 0", lambda p: p >= 0)
        check("chance", chance, "a number in [0, 1]", lambda p: 0 <= p <= 1)
        self.risky, self.penalty, self.chance = risky, float(penalty), float(chance)
        self._draws = np.random.default_rng()

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        if seed is not None:
            # not the physics' own stream, whose numbers would come again
            self._draws = np.random.default_rng([seed, 0x7E4A17])
        return self.env.reset(seed=seed, options=options)

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        obs, reward, terminated, truncated, info = self.env.step(action)
        violation = bool(self.risky(self.env.unwrapped, info))
        drawn = self._draws.random()  # in every step, so that draws do not depend on what was done before
        cost = self.penalty if violation and drawn < self.chance else 0.0
        return obs, float(reward) - cost, terminated, truncated, {**info, "violation": violation, "cost": cost}


def half_cheetah(max_velocity: float = 4.0, penalty: float = 70.0, chance: float = 0.1, **kwargs: Any) -> gym.Env:
    """HalfCheetah-v5, penalised above ``max_velocity`` in m/s: 4 for medium data, 10 for expert data in the paper."""
    from gymnasium.envs.mujoco.half_cheetah_v5 import HalfCheetahEnv

    check("max_velocity", max_velocity, "a number above 0", lambda v: v > 0)
    return StochasticPenalty(
        HalfCheetahEnv(**kwargs), lambda _, info: info["x_velocity"] > max_velocity, penalty, chance
    )


def hopper(max_angle: float = 0.1, penalty: float = 50.0, chance: float = 0.1, **kwargs: Any) -> gym.Env:
    """Hopper-v5, penalised where the torso is tilted by ``max_angle`` rad or more; at 0.2 the episode ends."""
    from gymnasium.envs.mujoco.hopper_v5 import HopperEnv

    return _tilted(HopperEnv(**kwargs), max_angle, penalty, chance)


def walker2d(max_angle: float = 0.5, penalty: float = 30.0, chance: float = 0.1, **kwargs: Any) -> gym.Env:
    """Walker2d-v5, penalised where the torso is tilted by ``max_angle`` rad or more; at 1 the episode ends."""
    from gymnasium.envs.mujoco.walker2d_v5 import Walker2dEnv

    return _tilted(Walker2dEnv(**kwargs), max_angle, penalty, chance)


def _tilted(env: gym.Env[Any, Any], max_angle: float, penalty: float, chance: float) -> gym.Env:
    check("max_angle", max_angle, "a number above 0", lambda a: a > 0)
    return StochasticPenalty(env, lambda task, _: abs(float(task.data.qpos[2])) >= max_angle, penalty, chance)
