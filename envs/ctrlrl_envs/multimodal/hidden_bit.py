"""Guess a hidden bit in a few tries: what a policy with two modes is worth, as an exact number."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import gymnasium as gym
import numpy as np

from ctrlrl_envs.multimodal.base import (
    Ceiling,
    ToyVector,
    Uniforms,
    best_gaussian,
    bit_of,
    check_count,
    check_windows,
    hit_rates,
    window,
)

__all__ = ["HiddenBit", "HiddenBitVector", "gaussian_ceiling", "gaussian_win_rate", "optimum", "win_rate"]


class HiddenBit(gym.Env[np.ndarray, np.ndarray]):
    """Hit b, which is +1 or -1 with equal chances in each episode and never shown, in ``tries`` (K) tries.

    - Observation: the constant 1, float32 [1]. Action: one float in [-bound, bound]; others are taken as they are.
    - Reward 1 and the end at the first try with ``|a - b| < tolerance``, else 0; the end after K tries.
    - The last step's info has ``success`` and ``is_success``.

    **Optimum of all memoryless policies: 1 - 2^-K = .9375.** No action hits both, so a policy that hits +1 with p
    and -1 with q has p + q <= 1 and wins with 1 - [(1 - p)^K + (1 - q)^K] / 2, which is concave and increasing: best
    at p = q = 1/2, two narrow modes at +-1. (With memory: 1, by K >= 2.)

    **Best Gaussian: .500** with K = 4 and tolerance .2, reached by always playing +1. It holds for every N(m, s^2)
    of the action itself, cut at the bounds or not (``action_map="clip"``: beyond 1 + tolerance there is no hit); with
    ``action_map="tanh"`` for every N(m, s^2) before the map (``squash=bound``: .500 as well at the default bound, but
    .62 at 1.25, where the map folds a wide Gaussian into two modes at the bounds). By symmetry m >= 0; m > 1 and
    s > 2 + tolerance are never better, as both chances grow on the way back; what is left is compact, and the tests
    bound every cell of a grid over it. A Gaussian that imitates the optimum, N(0, 1), wins .335.

    Args:
        tries: K.
        tolerance: Half the width of each window, at most 1.
        bound: Of the actions, above 1 + tolerance; infinite for none.

    Raises:
        ValueError: Arguments outside of these ranges.
    """

    metadata: dict[str, Any] = {"render_modes": []}  # noqa: RUF012 - as gymnasium declares it

    def __init__(self, tries: int = 4, tolerance: float = 0.2, bound: float = 3.0) -> None:
        check_count("tries", tries)
        check_windows(tolerance, bound=bound)
        self.tries, self.tolerance, self.bound = tries, tolerance, bound
        self.observation_space = gym.spaces.Box(0.0, 1.0, (1,), np.float32)
        self.action_space = gym.spaces.Box(-bound, bound, (1,), np.float32)
        self.bit, self._left, self._success = 0, 0, False

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Draw a new bit."""
        super().reset(seed=seed)
        self.bit, self._left, self._success = int(bit_of(self.np_random.random())), self.tries, False
        return np.ones(1, dtype=np.float32), {}

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Try once; after the end nothing changes any more."""
        if not self.bit:
            raise gym.error.ResetNeeded("call reset() before step()")
        hit = self._left > 0 and abs(float(action[0]) - self.bit) < self.tolerance
        self._success |= hit
        self._left = 0 if hit else max(self._left - 1, 0)
        info = {} if self._left else {"success": self._success, "is_success": self._success}
        return np.ones(1, dtype=np.float32), float(hit), not self._left, False, info


class HiddenBitVector(ToyVector):
    """:class:`HiddenBit`, many at once."""

    def __init__(self, num_envs: int = 1, *, max_episode_steps: int | None = None, **kwargs: Any) -> None:
        single = HiddenBit(**kwargs)
        super().__init__(single, num_envs, max_episode_steps)
        self.tries, self.tolerance = single.tries, single.tolerance
        self.bit, self._left = np.zeros(num_envs, dtype=np.int64), np.zeros(num_envs, dtype=np.int64)
        self._uniforms = Uniforms(num_envs)

    def _begin(self, rows: np.ndarray, seeds: Sequence[int | None] | None) -> None:
        self.bit[rows], self._left[rows] = bit_of(self._uniforms.draw(rows, seeds)), self.tries

    def _move(self, action: np.ndarray, live: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        hit = live & (np.abs(action[:, 0] - self.bit) < self.tolerance)
        self._left -= live
        return hit.astype(np.float64), hit, live & (hit | (self._left == 0))

    def _observe(self) -> np.ndarray:
        return np.ones((self.num_envs, 1), dtype=np.float32)


# -- exact numbers --------------------------------------------------------------------------------


def optimum(tries: int = 4) -> float:
    """1 - 2^-K: the best win rate, and return, of a policy without memory."""
    check_count("tries", tries)
    return 1.0 - 0.5**tries


def gaussian_win_rate(mean: Any, std: Any, tries: int = 4, tolerance: float = 0.2, squash: float | None = None) -> Any:
    """Win rate of the actions N(mean, std^2), or of ``squash * tanh`` of them; numbers or arrays that broadcast.

    Raises:
        ValueError: ``std`` that is not above 0, or what the environment refuses (``squash``: as ``bound``).
    """
    check_count("tries", tries)
    return _win_rate(*hit_rates(mean, std, tolerance, squash), tries)


def gaussian_ceiling(tries: int = 4, tolerance: float = 0.2, squash: float | None = None) -> Ceiling:
    """The best :func:`gaussian_win_rate` with a mean and std that reach it (the mirror image does as well)."""
    low, high = window(tolerance, squash)
    centre = (low + high) / 2
    # at the lower end of the std's range a Gaussian at the centre misses with less than 1e-22
    return best_gaussian(
        lambda mean, std: gaussian_win_rate(mean, std, tries, tolerance, squash),
        means=(0.0, centre),
        stds=((high - low) / 20, centre + high),
    )


def win_rate(samples: Any, tries: int = 4, tolerance: float = 0.2) -> float:
    """Win rate of a policy that draws each action from ``samples`` [n], as the environment receives them.

    Raises:
        ValueError: Samples that are not one column of numbers.
    """
    check_count("tries", tries)
    check_windows(tolerance)
    action = np.asarray(samples, dtype=np.float64)
    if action.size == 0 or action.size != max(action.shape, default=0):
        raise ValueError(f"samples have shape {action.shape}; expected [n] or [n, 1] with n of at least 1")
    right, left = ((np.abs(action - bit) < tolerance).mean() for bit in (1, -1))
    return float(_win_rate(right, left, tries))


def _win_rate(right: Any, left: Any, tries: int) -> Any:
    return 1.0 - 0.5 * ((1.0 - right) ** tries + (1.0 - left) ** tries)
