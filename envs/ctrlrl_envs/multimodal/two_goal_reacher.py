"""A point at a fork between two goals, of which a hidden one pays."""

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
    check,
    check_count,
    check_windows,
    hit_rates,
    window,
)

__all__ = ["TwoGoalReacher", "TwoGoalReacherVector", "expected_return", "gaussian_ceiling", "optimum"]

LENGTH = 2.0
"""From a corridor's mouth to its goal."""
STEPS = 3
"""D, the fewest steps from the fork to a goal: one into the mouth and strides of 1."""


class TwoGoalReacher(gym.Env[np.ndarray, np.ndarray]):
    """Find the goal that pays: two corridors lead forward from the fork, to goals at (-1, 2) and (1, 2).

    - Observation: the position (x, y), float32. Action: a move (dx, dy), each in [-bound, bound]; others are taken as
      they are.
    - At the fork, (0, 0), a move with ``|dx - 1| < tolerance`` enters the right corridor at (1, 0), one with
      ``|dx + 1| < tolerance`` the left one at (-1, 0). Any other misses: the point stays and the try is used up.
    - In a corridor its walls hold x, and y grows by dy cut to [0, 1].
    - Touching the paid goal, +1 or -1 with equal chances in each episode and never shown, gives reward 1 and ends the
      episode. Touching the other uses up the try and puts the point back at the fork. The end comes after ``tries``
      (K) tries. Each step costs ``cost`` (c). The registered limit is 30 steps; keep it at 3 K or more.
    - The last step's info has ``success`` and ``is_success``.

    The side is decided by one action, and back at the fork nothing is left of what happened before: no noise of the
    moves can break the tie, as it would if the point drifted to a side.

    **Optimum of all memoryless policies: (1 - 2^-K)(1 - 2 c D) = .88125** with D = 3; it wins 1 - 2^-K = .9375. Let a
    try reach the right goal with p and the left one with q, else miss; it takes at least
    E = 1 + (D - 1)(p + q) steps, and with S(p) = 1 + (1 - p) + ... + (1 - p)^(K - 1) tries if p finds the paid
    goal, the return is the mean of 1 - (1 - p)^K - c E S(p) and the same with q (:func:`expected_return`). For fixed
    p + q it is concave: best at p = q. There it is (1 - (1 - p)^K)(1 - c (2 D - 2 + 1 / p)), which grows to p = 1/2.

    **Best Gaussian: .4314** with K = 4, tolerance .2, c = .01; it wins at most .500. Of a Gaussian over (dx, dy), with
    any covariance, p and q are at most those of its dx, and all but its dx may be as narrow as one likes: the
    ceiling is the largest return over N(m, s^2) of dx. It is reached on one side, missing now and then on purpose:
    a miss is cheaper than a walk to the wrong goal. (Always walking right: .425.) Compare :class:`HiddenBit` for cut
    and squashed actions; the tests bound every cell of a grid over all m and s.

    Args:
        tries: K.
        tolerance: Half the width of each mouth, at most 1.
        cost: c, at least 0 and below 1 / (2 D) = 1/6, from where on nothing is worth a try.
        bound: Of the moves, above 1 + tolerance; infinite for none.

    Raises:
        ValueError: Arguments outside of these ranges.
    """

    metadata: dict[str, Any] = {"render_modes": []}  # noqa: RUF012 - as gymnasium declares it

    def __init__(self, tries: int = 4, tolerance: float = 0.2, cost: float = 0.01, bound: float = 3.0) -> None:
        check_count("tries", tries)
        check_windows(tolerance, bound=bound)
        _check_cost(cost)
        self.tries, self.tolerance, self.cost, self.bound = tries, tolerance, cost, bound
        self.observation_space = gym.spaces.Box(
            np.array([-1.0, 0.0], np.float32), np.array([1.0, LENGTH], np.float32), dtype=np.float32
        )
        self.action_space = gym.spaces.Box(-bound, bound, (2,), np.float32)
        self.bit, self._left, self._success = 0, 0, False
        self._side, self._y = 0, 0.0

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Draw the paid goal and begin at the fork."""
        super().reset(seed=seed)
        self.bit, self._left, self._success = int(bit_of(self.np_random.random())), self.tries, False
        self._side, self._y = 0, 0.0
        return self._observe(), {}

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Move once; after the end nothing changes any more."""
        if not self.bit:
            raise gym.error.ResetNeeded("call reset() before step()")
        reward = 0.0
        if self._left:
            reward = self._move(float(action[0]), float(action[1])) - self.cost
        info = {} if self._left else {"success": self._success, "is_success": self._success}
        return self._observe(), reward, not self._left, False, info

    def _move(self, dx: float, dy: float) -> float:
        if not self._side:
            if abs(abs(dx) - 1) < self.tolerance:
                self._side = 1 if dx > 0 else -1
            else:
                self._left -= 1
            return 0.0
        self._y = min(self._y + min(max(dy, 0.0), 1.0), LENGTH)
        if self._y < LENGTH:
            return 0.0
        if self._side == self.bit:
            self._left, self._success = 0, True
            return 1.0
        self._left -= 1
        self._side, self._y = 0, 0.0
        return 0.0

    def _observe(self) -> np.ndarray:
        return np.array((self._side, self._y), dtype=np.float32)


class TwoGoalReacherVector(ToyVector):
    """:class:`TwoGoalReacher`, many at once."""

    def __init__(self, num_envs: int = 1, *, max_episode_steps: int | None = None, **kwargs: Any) -> None:
        single = TwoGoalReacher(**kwargs)
        super().__init__(single, num_envs, max_episode_steps)
        self.tries, self.tolerance, self.cost = single.tries, single.tolerance, single.cost
        self.bit, self._left = np.zeros(num_envs, dtype=np.int64), np.zeros(num_envs, dtype=np.int64)
        self._side, self._y = np.zeros(num_envs, dtype=np.int64), np.zeros(num_envs)
        self._uniforms = Uniforms(num_envs)

    def _begin(self, rows: np.ndarray, seeds: Sequence[int | None] | None) -> None:
        self.bit[rows], self._left[rows] = bit_of(self._uniforms.draw(rows, seeds)), self.tries
        self._side[rows], self._y[rows] = 0, 0.0

    def _move(self, action: np.ndarray, live: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        dx, dy = action[:, 0], action[:, 1]
        fork, walking = live & (self._side == 0), live & (self._side != 0)
        enters = fork & (np.abs(np.abs(dx) - 1) < self.tolerance)
        self._side[enters] = np.sign(dx[enters])
        self._y[walking] = np.minimum(self._y[walking] + np.clip(dy[walking], 0.0, 1.0), LENGTH)
        touched = walking & (self._y >= LENGTH)
        paid = touched & (self._side == self.bit)
        back = touched & ~paid
        self._side[back], self._y[back] = 0, 0.0
        self._left -= back | (fork & ~enters)
        return paid - self.cost * live, paid, live & (paid | (self._left == 0))

    def _observe(self) -> np.ndarray:
        return np.stack((self._side, self._y), axis=1).astype(np.float32)


# -- exact numbers --------------------------------------------------------------------------------


def optimum(tries: int = 4, cost: float = 0.01) -> float:
    """(1 - 2^-K)(1 - 2 c D): the best expected return of a policy without memory."""
    check_count("tries", tries)
    _check_cost(cost)
    return (1.0 - 0.5**tries) * (1.0 - 2.0 * cost * STEPS)


def expected_return(right: Any, left: Any, tries: int = 4, cost: float = 0.01) -> Any:
    """Expected return of a policy that enters the corridors with these chances and then walks with full strides.

    Args:
        right: Chance p of entering the right corridor in one move from the fork; number or array.
        left: Chance q of entering the left one, of the same shape; p + q is at most 1, the rest misses.

    Raises:
        ValueError: Chances below 0 or above 1 together, or what the environment refuses.
    """
    check_count("tries", tries)
    _check_cost(cost)
    p, q = np.asarray(right, dtype=np.float64), np.asarray(left, dtype=np.float64)
    if not ((p >= 0) & (q >= 0) & (p + q <= 1 + 1e-9)).all():
        raise ValueError(f"right={right!r} and left={left!r} must be chances that are at most 1 together")
    steps = 1 + (STEPS - 1) * (p + q)
    parts = [1 - (1 - one) ** tries - cost * steps * _tries_taken(one, tries) for one in (p, q)]
    return (parts[0] + parts[1]) / 2


def _tries_taken(chance: np.ndarray, tries: int) -> np.ndarray:
    """1 + (1 - p) + ... + (1 - p)^(K - 1)."""
    total = np.zeros_like(chance)
    for _ in range(tries):
        total = 1 + (1 - chance) * total
    return total


def gaussian_ceiling(
    tries: int = 4, tolerance: float = 0.2, cost: float = 0.01, squash: float | None = None
) -> Ceiling:
    """The best expected return of a policy that is Gaussian at the fork, with a mean and std of dx that reach it.

    With ``squash``, dx is ``squash * tanh`` of the Gaussian; its mirror image does as well.

    Raises:
        ValueError: What the environment refuses (``squash``: as ``bound``).
    """
    low, high = window(tolerance, squash)
    return best_gaussian(
        lambda mean, std: expected_return(*hit_rates(mean, std, tolerance, squash), tries, cost),
        means=(0.0, 2 * high),
        stds=((high - low) / 20, 4 * high),
    )


def _check_cost(cost: Any) -> None:
    check("cost", cost, f"a number of at least 0 and below 1/{2 * STEPS}", lambda c: 0 <= c < 1 / (2 * STEPS))
