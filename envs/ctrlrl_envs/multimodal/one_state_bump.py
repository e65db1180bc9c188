"""One state, one step, one narrow bump of reward."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import gymnasium as gym
import numpy as np

from ctrlrl_envs.multimodal.base import ToyVector, check

__all__ = ["OneStateBump", "OneStateBumpVector", "expected_return"]


class OneStateBump(gym.Env[np.ndarray, np.ndarray]):
    """Reward ``exp(-(a - centre)^2 / (2 width^2))`` for one action, and the end.

    - Observation: the constant 1, float32 [1]. Action: one float, unbounded by default, so that no action map squashes
      it; ``bound`` is for policies that need finite bounds. Actions beyond it are taken as they are.
    - Nothing is random. Optimum 1, at ``a = centre``.
    - N(m, s^2) has the expected return ``width / r * exp(-(m - centre)^2 / (2 r^2))`` with ``r^2 = width^2 + s^2``
      (:func:`expected_return`): .016 for N(0, 1).

    For latent policies with a decoder: the task shows whether what the latent policy found outlives its own reset,
    as the start of such a policy, N(0, 1), is nearly worthless here.

    Args:
        centre: Where the bump is.
        width: Its standard deviation.
        bound: Of the actions.

    Raises:
        ValueError: A centre that is not finite; a width or bound that is not above 0.
    """

    metadata: dict[str, Any] = {"render_modes": []}  # noqa: RUF012 - as gymnasium declares it

    def __init__(self, centre: float = 2.5, width: float = 0.3, bound: float = math.inf) -> None:
        _check_bump(centre, width)
        check("bound", bound, "a number above 0", lambda b: b > 0)
        self.centre, self.width, self.bound = centre, width, bound
        self.observation_space = gym.spaces.Box(0.0, 1.0, (1,), np.float32)
        self.action_space = gym.spaces.Box(-bound, bound, (1,), np.float32)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Begin; all episodes are the same."""
        super().reset(seed=seed)
        return np.ones(1, dtype=np.float32), {}

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """The only step."""
        return np.ones(1, dtype=np.float32), float(self.reward(float(action[0]))), True, False, {}

    def reward(self, action: Any) -> Any:
        """Of a number or an array."""
        z = (action - self.centre) / self.width
        # not z**2, which Python and NumPy round differently
        return np.exp(-0.5 * z * z)


class OneStateBumpVector(ToyVector):
    """:class:`OneStateBump`, many at once; nothing counts as success."""

    def __init__(self, num_envs: int = 1, *, max_episode_steps: int | None = None, **kwargs: Any) -> None:
        self._single = OneStateBump(**kwargs)
        super().__init__(self._single, num_envs, max_episode_steps)

    def _begin(self, rows: np.ndarray, seeds: Sequence[int | None] | None) -> None:
        pass

    def _move(self, action: np.ndarray, live: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        return np.where(live, self._single.reward(action[:, 0]), 0.0), np.zeros_like(live), live

    def _observe(self) -> np.ndarray:
        return np.ones((self.num_envs, 1), dtype=np.float32)


def expected_return(mean: Any, std: Any, centre: float = 2.5, width: float = 0.3) -> Any:
    """Expected return of the actions N(mean, std^2): the integral of two bell curves' product.

    Args:
        mean: Number or array.
        std: Of the same shape; 0 is a deterministic policy.

    Raises:
        ValueError: A negative ``std``, or what the environment refuses.
    """
    _check_bump(centre, width)
    if not (np.asarray(std) >= 0).all():
        raise ValueError(f"std={std!r} must be at least 0")
    spread = width**2 + np.square(std)
    return width / np.sqrt(spread) * np.exp(-np.square(np.subtract(mean, centre)) / (2 * spread))


def _check_bump(centre: Any, width: Any) -> None:
    check("centre", centre, "a finite number", math.isfinite)
    check("width", width, "a finite number above 0", lambda w: 0 < w < math.inf)
