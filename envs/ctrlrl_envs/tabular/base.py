"""What the finite worlds share: exact tables, steps drawn from them, moves on a grid, and the vector form."""

from __future__ import annotations

import operator
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from fractions import Fraction
from numbers import Integral
from typing import Any, ClassVar, TypeAlias

import gymnasium as gym
import numpy as np

from ctrlrl_envs.multimodal.base import ToyVector, Uniforms, check

Table: TypeAlias = dict[int, dict[int, list[tuple[float, int, float, bool]]]]
"""What ``P`` is: (probability, next state, reward, terminated) by state and action, as in Gymnasium's toy text."""

Outcome: TypeAlias = tuple[Fraction, int, Fraction, bool]
"""One entry of the exact table."""

UP, RIGHT, DOWN, LEFT = (-1, 0), (0, 1), (1, 0), (0, -1)
MOVES = (UP, RIGHT, DOWN, LEFT)
"""What the actions 0 to 3 of a grid add to (row, column)."""


def rational(name: str, value: Any, expected: str, test: Callable[[Any], bool]) -> Fraction:
    """The exact number that ``value`` stands for: a float as it is written (0.1 is 1/10), a text such as "3/5".

    Raises:
        ValueError: It is none, or not as ``expected``.
    """
    try:
        if isinstance(value, bool):
            raise TypeError
        number = value if isinstance(value, Fraction) else Fraction(str(value))
    except (TypeError, ValueError, ZeroDivisionError):
        number = None
    if number is None or not test(number):
        raise ValueError(f"{name}={value!r} must be {expected}")
    return number


def probability(name: str, value: Any) -> Fraction:
    """:func:`rational` in [0, 1]."""
    return rational(name, value, "a number in [0, 1]", lambda p: 0 <= p <= 1)


def count(name: str, value: Any, least: int, most: int) -> int:
    """``value`` as an int.

    Raises:
        ValueError: It is none between ``least`` and ``most``.
    """
    expected = f"an integer between {least} and {most}"
    check(name, value, expected, lambda n: isinstance(n, Integral) and least <= int(n) <= most)
    return int(value)


def merged(outcomes: Iterable[Outcome]) -> list[Outcome]:
    """Outcomes that differ in nothing but their probability as one, those of probability 0 left out."""
    found: list[Outcome] = []
    for outcome in outcomes:
        # no dict: to hash a fraction takes longer than to look through so few
        same = next((i for i, other in enumerate(found) if other[1:] == outcome[1:]), None)
        if same is not None:
            found[same] = (found[same][0] + outcome[0], *outcome[1:])
        elif outcome[0]:
            found.append(outcome)
    return found


class TabularWorld(gym.Env[Any, Any], ABC):
    """A world of finitely many states that shows its transition table.

    ``P[state][action]`` is a list of (probability, next state, reward, terminated), as in Gymnasium's toy-text
    environments; every step is drawn from it, and ``info["prob"]`` is the probability of what was drawn.
    :meth:`exact` is the same table in rational numbers. ``initial_state_distrib`` [states] is where episodes begin,
    ``s`` the state now. States that no step leads to, and ends, stay where they are, without reward.

    **The observation is the state alone**: neither the number of the step nor the rewards so far are in it. The mean
    over an unlimited number of steps needs no more. With a limit of steps the best action depends on how many are
    left, and for most other functionals of the return also on what was collected. A planner over ``P`` keeps both by
    itself; a learner must be shown them, as ``ctrlrl.engine.stock:Stock`` does. The registered limit is Gymnasium's
    TimeLimit (``gymnasium.make(id, max_episode_steps=...)`` sets another one), which reports ``truncated``; where the
    return is meant to be that of so many steps it is an end (``Stock(..., finite_horizon=True)`` makes it one).
    """

    metadata: dict[str, Any] = {"render_modes": []}  # noqa: RUF012 - as gymnasium declares it

    def __init__(self, states: int, actions: int, start: int) -> None:
        self._size = states, actions
        self.observation_space = gym.spaces.Discrete(states)
        self.action_space = gym.spaces.Discrete(actions)
        self.initial_state_distrib = np.zeros(states)
        self.initial_state_distrib[start] = 1.0
        self._begins = np.cumsum(self.initial_state_distrib)
        self.P: Table = {
            s: {a: [(float(p), to, float(r), over) for p, to, r, over in row] for a, row in rows.items()}
            for s, rows in self.exact().items()
        }
        self.s: int | None = None

    @abstractmethod
    def _outcomes(self, state: int, action: int) -> list[Outcome]:
        """The exact row of ``state`` and ``action``."""

    def exact(self) -> dict[int, dict[int, list[Outcome]]]:
        """``P`` with probabilities and rewards as ``Fraction``, built anew."""
        states, actions = self._size
        return {s: {a: self._outcomes(s, a) for a in range(actions)} for s in range(states)}

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[int, dict[str, Any]]:
        """Draw the first state."""
        super().reset(seed=seed)
        self.s = int(self.first(self.np_random.random()))
        return self.s, {"prob": float(self.initial_state_distrib[self.s])}

    def first(self, uniform: Any) -> Any:
        """The first states that numbers in [0, 1) stand for."""
        return np.minimum(np.searchsorted(self._begins, uniform, side="right"), len(self._begins) - 1)

    def step(self, action: Any) -> tuple[int, float, bool, bool, dict[str, Any]]:
        """Draw what happens from ``P``."""
        if self.s is None:
            raise gym.error.ResetNeeded("call reset() before step()")
        state, chosen = self.s, operator.index(action)
        row = self.P[state].get(chosen)
        if row is None:
            raise ValueError(f"found action {chosen}; expected one of 0 to {len(self.P[state]) - 1}")
        which = _drawn([outcome[0] for outcome in row], self.np_random.random())
        _, self.s, reward, over = row[which]
        return self.s, reward, over, False, self._info(state, chosen, which)

    def _info(self, state: int, action: int, which: int) -> dict[str, Any]:
        """What is told of the outcome ``P[state][action][which]``."""
        return {"prob": self.P[state][action][which][0]}


def _drawn(probabilities: Sequence[float], uniform: float) -> int:
    """The first place where the sum of the probabilities is above ``uniform``; the last one where rounding hides it."""
    total = 0.0
    for i, p in enumerate(probabilities):
        total += p
        if uniform < total:
            return i
    return len(probabilities) - 1


class GridWorld(TabularWorld):
    """A world whose states are cells, numbered ``row * width + column`` from the top left on.

    Actions: 0 up, 1 right, 2 down, 3 left. With probability ``slip`` the move goes to one of its two sides instead,
    half of it each. The edges stop a move.
    """

    def __init__(self, height: int, width: int, start: int, slip: Any) -> None:
        self.height, self.width, self.slip = height, width, probability("slip", slip)
        side = self.slip / 2
        self._ways = tuple(
            ((1 - self.slip, MOVES[a]), (side, MOVES[(a + 3) % 4]), (side, MOVES[(a + 1) % 4])) for a in range(4)
        )
        super().__init__(height * width, 4, start)

    def _after(self, state: int, move: tuple[int, int]) -> int:
        """The cell that ``move`` leads to."""
        row, column = state // self.width + move[0], state % self.width + move[1]
        return row * self.width + column if 0 <= row < self.height and 0 <= column < self.width else state


class TabularVector(ToyVector):
    """``num_envs`` episodes of a world at once, without a loop over them; equal to as many single environments.

    See :class:`ToyVector` for how rows are reset; infos are ``prob`` [num_envs], 0 in rows that have ended.
    """

    world: ClassVar[type[TabularWorld]]

    def __init__(self, num_envs: int = 1, *, max_episode_steps: int | None = None, **kwargs: Any) -> None:
        self.single: Any = self.world(**kwargs)
        super().__init__(self.single, num_envs, max_episode_steps)
        table = self.single.P
        self.P, self.initial_state_distrib = table, self.single.initial_state_distrib
        widest = max(len(row) for rows in table.values() for row in rows.values())
        shape = (len(table), len(table[0]), widest)
        self._prob, self._next = np.zeros(shape), np.zeros(shape, dtype=np.int64)
        self._reward, self._over = np.zeros(shape), np.zeros(shape, dtype=np.bool_)
        # the last outcome takes what rounding leaves
        self._edges = np.full(shape, np.inf)
        for s, rows in table.items():
            for a, row in rows.items():
                p, after, reward, over = zip(*row, strict=True)
                self._prob[s, a, : len(row)], self._next[s, a, : len(row)] = p, after
                self._reward[s, a, : len(row)], self._over[s, a, : len(row)] = reward, over
                self._edges[s, a, : len(row) - 1] = np.cumsum(p)[:-1]
        self.s, self._uniforms = np.zeros(num_envs, dtype=np.int64), Uniforms(num_envs)
        self._told = np.zeros(num_envs)

    def _begin(self, rows: np.ndarray, seeds: Sequence[int | None] | None) -> None:
        self.s[rows] = self.single.first(self._uniforms.draw(rows, seeds))
        self._told[rows] = self.initial_state_distrib[self.s[rows]]

    def _move(self, action: np.ndarray, live: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        chosen, actions = action.astype(np.int64), self._next.shape[1]
        if (chosen != action).any() or (chosen < 0).any() or (chosen >= actions).any():
            raise ValueError(f"found actions {action}; expected integers between 0 and {actions - 1}")
        rows = np.flatnonzero(live)
        state, chosen = self.s[rows], chosen[rows]
        which = (self._uniforms.draw(rows)[:, None] >= self._edges[state, chosen]).sum(1)
        self.s[rows] = self._next[state, chosen, which]
        self._told[:] = 0.0
        self._told[rows] = self._prob[state, chosen, which]
        reward, over = np.zeros(self.num_envs), np.zeros(self.num_envs, dtype=np.bool_)
        reward[rows], over[rows] = self._reward[state, chosen, which], self._over[state, chosen, which]
        self._note(rows, state, chosen, which)
        return reward, np.zeros_like(over), over

    def _note(self, rows: np.ndarray, state: np.ndarray, action: np.ndarray, which: np.ndarray) -> None:
        """Keep what the infos tell of the outcomes that ``rows`` drew."""

    def _observe(self) -> np.ndarray:
        return self.s.copy()

    def _infos(self) -> dict[str, Any]:
        return {"prob": self._told.copy()}
