"""What the toys share: checks of their arguments, exact sums for Gaussian policies, and the vector form."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from numbers import Integral, Real
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
from gymnasium.utils import seeding
from gymnasium.vector import AutoresetMode
from gymnasium.vector.utils import batch_space
from scipy.special import ndtr


def check(name: str, value: Any, expected: str, test: Callable[[Any], bool]) -> None:
    """Raise ``ValueError`` unless ``value`` is a number that passes ``test``; ``expected`` says which these are."""
    if isinstance(value, bool) or not isinstance(value, Real) or not test(value):
        raise ValueError(f"{name}={value!r} must be {expected}")


def check_count(name: str, value: Any) -> None:
    """Raise ``ValueError`` unless ``value`` is an integer of at least 1."""
    check(name, value, "an integer of at least 1", lambda k: isinstance(k, Integral) and int(k) >= 1)


def check_windows(tolerance: Any, **bounds: Any) -> None:
    """Raise ``ValueError`` for a tolerance or bounds of the action that leave no two windows around -1 and +1."""
    check("tolerance", tolerance, "a number above 0 and at most 1, so that no action hits both", lambda t: 0 < t <= 1)
    expected = f"a number above 1 + tolerance = {1 + tolerance:g}, so that cutting an action never makes a hit"
    for name, value in bounds.items():
        check(name, value, expected, lambda b: b > 1 + tolerance)


# -- Gaussian policies --------------------------------------------------------------------------


class Ceiling(NamedTuple):
    """The best a Gaussian policy can do."""

    value: float
    """Largest value over all means and standard deviations."""
    mean: float
    """Of a Gaussian that reaches it."""
    std: float
    """Of a Gaussian that reaches it; the least one tried where smaller ones do as well."""


def window(tolerance: float, squash: float | None = None) -> tuple[float, float]:
    """The numbers that hit +1, ``|a - 1| < tolerance``, as (low, high); those that hit -1 are their mirror image.

    With ``squash`` they are those of ``u`` before the action map ``a = squash * tanh(u)``.
    """
    check_windows(tolerance)
    edges = 1 - tolerance, 1 + tolerance
    if squash is None:
        return edges
    check_windows(tolerance, squash=squash)
    return math.atanh(edges[0] / squash), math.atanh(edges[1] / squash)


def hit_rates(mean: Any, std: Any, tolerance: float, squash: float | None = None) -> tuple[Any, Any]:
    """P(hit +1) and P(hit -1) of one draw of N(mean, std^2) by the normal cdf; numbers or arrays of one shape."""
    if not (np.asarray(std) > 0).all():
        raise ValueError(f"std={std!r} must be above 0")
    low, high = window(tolerance, squash)
    return (
        ndtr((high - mean) / std) - ndtr((low - mean) / std),
        ndtr((-low - mean) / std) - ndtr((-high - mean) / std),
    )


def best_gaussian(
    value: Callable[[np.ndarray, np.ndarray], np.ndarray], means: tuple[float, float], stds: tuple[float, float]
) -> Ceiling:
    """The largest ``value(mean, std)`` in a box: a grid, then finer ones around its best point.

    Among equals, the largest mean and then the least std.
    """
    best = Ceiling(-math.inf, math.nan, math.nan)
    (a, b), (c, d) = means, (math.log(stds[0]), math.log(stds[1]))
    points = 161
    for _ in range(6):
        mean, log_std = np.linspace(b, a, points), np.linspace(c, d, points)
        found = value(mean[:, None], np.exp(log_std))
        i, j = np.unravel_index(found.argmax(), found.shape)
        if found[i, j] > best.value + 1e-12:  # less is rounding
            best = Ceiling(float(found[i, j]), float(mean[i]), float(np.exp(log_std[j])))
        # four cells to each side, so that a ridge across the grid is not lost
        wide, tall = 4 * (b - a) / (points - 1), 4 * (d - c) / (points - 1)
        a, b = max(a, mean[i] - wide), min(b, mean[i] + wide)
        c, d = max(c, log_std[j] - tall), min(d, log_std[j] + tall)
    return best


# -- many at once -------------------------------------------------------------------------------


class Uniforms:
    """Numbers in [0, 1) for ``n`` rows: in each those that a single environment of its seed draws one by one."""

    BLOCK = 64  # drawn ahead, so that a reset of many rows is no loop

    def __init__(self, n: int) -> None:
        self._streams: list[np.random.Generator | None] = [None] * n
        self._ahead = np.zeros((n, self.BLOCK))
        self._next = np.full(n, self.BLOCK)

    def draw(self, rows: np.ndarray, seeds: Sequence[int | None] | None = None) -> np.ndarray:
        """[M] for ``rows`` [M]; a row whose entry of ``seeds`` [n] is an int starts a new stream."""
        if seeds is not None:
            for row in rows.tolist():
                if seeds[row] is not None:
                    self._streams[row], self._next[row] = seeding.np_random(seeds[row])[0], self.BLOCK
        for row in rows[self._next[rows] == self.BLOCK].tolist():
            stream = self._streams[row] = self._streams[row] or seeding.np_random()[0]
            self._ahead[row], self._next[row] = stream.random(self.BLOCK), 0
        drawn = self._ahead[rows, self._next[rows]]
        self._next[rows] += 1
        return drawn


def bit_of(uniform: Any) -> Any:
    """+-1 from numbers in [0, 1)."""
    return np.where(np.asarray(uniform) < 0.5, 1, -1)


class ToyVector(gym.vector.VectorEnv[np.ndarray, np.ndarray, np.ndarray], ABC):
    """``num_envs`` episodes at once without a loop over them; equal to as many single environments.

    It does not reset by itself: an ended row stays as it is, with reward 0 and its flags repeated, until it is reset
    through ``reset(seed=[...], options={"reset_mask": mask})``. Infos are ``success`` and ``is_success`` [num_envs],
    False in rows that have not ended.

    Raises:
        ValueError: No environment, or what the single environment refuses.
    """

    def __init__(self, single: gym.Env[np.ndarray, np.ndarray], num_envs: int, max_episode_steps: int | None) -> None:
        check_count("num_envs", num_envs)
        if max_episode_steps is not None:
            check_count("max_episode_steps", max_episode_steps)
        self.num_envs, self.limit = num_envs, max_episode_steps
        self.metadata = {"autoreset_mode": AutoresetMode.DISABLED}
        self.single_observation_space, self.single_action_space = single.observation_space, single.action_space
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self._started = np.zeros(num_envs, dtype=np.bool_)
        self._terminated, self._truncated = np.zeros(num_envs, dtype=np.bool_), np.zeros(num_envs, dtype=np.bool_)
        self._success, self._steps = np.zeros(num_envs, dtype=np.bool_), np.zeros(num_envs, dtype=np.int64)

    @abstractmethod
    def _begin(self, rows: np.ndarray, seeds: Sequence[int | None] | None) -> None:
        """Start new episodes in ``rows`` [M]."""

    @abstractmethod
    def _move(self, action: np.ndarray, live: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Take ``action`` [n, A] float64 in the ``live`` rows: reward, success, terminated, each [n], 0 elsewhere."""

    @abstractmethod
    def _observe(self) -> np.ndarray:
        """A new array [n, ...] of observations."""

    def reset(
        self, *, seed: int | Sequence[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Reset all rows, or those of ``options["reset_mask"]`` (bool [num_envs]).

        Args:
            seed: One seed each; an int ``s`` gives row ``i`` the seed ``s + i``, None goes on with each row's stream.
            options: Nothing but ``reset_mask``.
        """
        n = self.num_envs
        options = dict(options or {})
        mask = np.asarray(options.pop("reset_mask", np.ones(n, dtype=np.bool_)))
        if mask.shape != (n,) or mask.dtype != np.bool_ or not mask.any():
            raise ValueError(f"reset_mask must be bool of shape ({n},) and true somewhere, found {mask!r}")
        if options:
            raise ValueError(f"unknown reset options {sorted(options)}; this environment knows: reset_mask")
        if isinstance(seed, int | np.integer):
            seed = [int(seed) + i for i in range(n)]
        if seed is not None and len(seed) != n:
            raise ValueError(f"found {len(seed)} seeds for {n} environments; give one seed each or a single int")
        self._begin(np.flatnonzero(mask), None if seed is None else [None if s is None else int(s) for s in seed])
        self._started |= mask
        for flags in (self._terminated, self._truncated, self._success):
            flags &= ~mask
        self._steps[mask] = 0
        return self._observe(), self._infos()

    def step(self, actions: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """Take one action [num_envs, A] in every row that runs."""
        if not self._started.all():
            raise gym.error.ResetNeeded("call reset() before step()")
        action = np.asarray(actions, dtype=np.float64)
        if action.shape != self.action_space.shape:
            raise ValueError(f"actions have shape {action.shape}; expected {self.action_space.shape}")
        live = ~(self._terminated | self._truncated)
        reward, success, over = self._move(action, live)
        self._success |= success
        self._terminated |= over
        if self.limit is not None:
            self._steps += live
            # as Gymnasium's TimeLimit: also where the last step terminates
            self._truncated |= live & (self._steps >= self.limit)
        return self._observe(), reward, self._terminated.copy(), self._truncated.copy(), self._infos()

    def _infos(self) -> dict[str, Any]:
        return {"success": self._success.copy(), "is_success": self._success.copy()}
