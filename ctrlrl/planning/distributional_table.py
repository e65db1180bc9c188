"""A transition table with the whole law of each step's reward, exact where its numbers are rational."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from numbers import Integral, Rational
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

END = -1
"""The successor of steps that terminate."""
SUM_TOLERANCE = 1e-8
"""How far the float probabilities of a row may be from summing to one."""

Outcome: TypeAlias = tuple[Any, int, Any]
"""(probability, next state or END, reward: a number, or a tuple of numbers)."""


class Arrays(NamedTuple):
    """A table of scalar rewards as arrays; its last state is the end, and rows are filled up with probability 0."""

    next_state: NDArray[np.int64]
    """[S + 1, A, B]"""
    probability: NDArray[np.float64]
    """[S + 1, A, B]"""
    reward: NDArray[np.float64]
    """[S + 1, A, B]"""


@dataclass(frozen=True)
class OutcomeTable:
    """What each action may lead to. Build it with ``OutcomeTable.of``."""

    rows: tuple[tuple[tuple[Outcome, ...], ...], ...]
    """By state, then action: the outcomes of positive probability, equal ones merged."""

    start: tuple[tuple[Any, int], ...]
    """(probability, state) where an episode starts."""

    dimension: int | None
    """None: rewards are numbers; m: they are vectors [m]."""

    exact: bool
    """All probabilities and rewards are rationals: Fraction or int."""

    @classmethod
    def of(cls, source: Any, start: Any = None) -> OutcomeTable:
        """From an environment with ``env.unwrapped.P``, a table of that form, or an OutcomeTable.

        The table is {state: {action: [(probability, next state, reward, terminated)]}} with states and actions
        counted from 0; rewards are numbers, or sequences of m numbers each. ``start``: a state, or probabilities [S];
        None takes ``initial_state_distrib`` of the environment, or state 0. Raises ValueError naming the row that is
        wrong, TypeError if there is no table.
        """
        if isinstance(source, OutcomeTable):
            begin = source.start if start is None else _start(start, len(source.rows))
            exact = source.exact and all(isinstance(p, Rational) for p, _ in begin)
            return cls(source.rows, begin, source.dimension, exact)
        bare = getattr(source, "unwrapped", source)
        table = getattr(bare, "P", bare)
        if not isinstance(table, Mapping):
            raise TypeError(f"{type(source).__name__} has no table P; expected {{state: {{action: [outcome]}}}}")
        if start is None:
            start = getattr(bare, "initial_state_distrib", 0)
        states, actions = len(table), len(table.get(0, ()))
        if (
            not actions
            or set(table) != set(range(states))
            or any(set(r) != set(range(actions)) for r in table.values())
        ):
            raise ValueError(f"states {_some(table)}; expected 0..{states - 1}, each with the same actions from 0")
        rows = tuple(tuple(_row(table[s][a], s, a, states) for a in range(actions)) for s in range(states))
        rewards = [reward for row in rows for outcomes in row for _, _, reward in outcomes]
        kinds = {len(r) if isinstance(r, tuple) else None for r in rewards}
        if len(kinds) != 1:
            raise ValueError(f"rewards have {sorted(map(str, kinds))} components; expected all alike")
        begin = _start(start, states)
        numbers = [p for row in rows for outcomes in row for p, _, _ in outcomes] + [p for p, _ in begin]
        numbers += [v for r in rewards for v in (r if isinstance(r, tuple) else (r,))]
        return cls(rows, begin, kinds.pop(), all(isinstance(v, Rational) for v in numbers))

    @property
    def states(self) -> int:
        return len(self.rows)

    @property
    def actions(self) -> int:
        return len(self.rows[0])

    @cached_property
    def moves(self) -> tuple[tuple[tuple[int, Any], ...], ...]:
        """By state: the different (next state, reward) over all actions."""
        return tuple(tuple({(n, r) for row in rows for _, n, r in row}) for rows in self.rows)

    @cached_property
    def reward_size(self) -> float:
        """The largest 1-norm of a reward."""
        return max(sum(abs(float(v)) for v in (r if isinstance(r, tuple) else (r,))) for m in self.moves for _, r in m)

    def as_float(self) -> OutcomeTable:
        """The same with float numbers."""

        def row(outcomes: tuple[Outcome, ...]) -> tuple[Outcome, ...]:
            return tuple((float(p), n, _float(r)) for p, n, r in outcomes)

        rows = tuple(tuple(row(outcomes) for outcomes in state) for state in self.rows)
        return OutcomeTable(rows, tuple((float(p), s) for p, s in self.start), self.dimension, False)

    def arrays(self) -> Arrays:
        """For engines on grids; raises ValueError on vector rewards."""
        if self.dimension is not None:
            raise ValueError(f"rewards are vectors [{self.dimension}]; grids take numbers only, use engine='exact'")
        width = max(len(outcomes) for row in self.rows for outcomes in row)
        to = np.full((self.states + 1, self.actions, width), self.states)
        probability, reward = np.zeros(to.shape), np.zeros(to.shape)
        probability[-1, :, 0] = 1.0
        for s, row in enumerate(self.rows):
            for a, outcomes in enumerate(row):
                for b, (p, n, r) in enumerate(outcomes):
                    to[s, a, b] = self.states if n == END else n
                    probability[s, a, b], reward[s, a, b] = float(p), float(r)
        return Arrays(to, probability, reward)

    def return_range(self, horizon: int, gamma: Any = 1) -> tuple[Any, Any]:
        """Least and largest return that any policy may meet from the start, scalar rewards."""
        low: list[Any] = [0] * self.states
        high: list[Any] = [0] * self.states
        for _ in range(horizon):
            low, high = (
                [pick(r + (gamma * v[n] if n != END else 0) for n, r in moves) for moves in self.moves]
                for pick, v in ((min, low), (max, high))
            )
        return min(low[s] for _, s in self.start), max(high[s] for _, s in self.start)


def _row(outcomes: Iterable[Any], s: int, a: int, states: int) -> tuple[Outcome, ...]:
    merged: dict[tuple[int, Any], Any] = {}
    total: Any = 0
    for probability, after, reward, terminated in outcomes:
        p = _number(probability, f"P[{s}][{a}]: probability")
        if p < 0:
            raise ValueError(f"P[{s}][{a}] has the probability {p}; expected >= 0")
        if not terminated and not 0 <= after < states:
            raise ValueError(f"P[{s}][{a}] leads to state {after}; expected 0..{states - 1}")
        key = (END if terminated else int(after), _reward(reward, f"P[{s}][{a}]: reward"))
        total += p
        if p > 0:
            merged[key] = merged.get(key, 0) + p
    if total != 1 if isinstance(total, Rational) else abs(total - 1) > SUM_TOLERANCE:
        raise ValueError(f"P[{s}][{a}] has probabilities that sum to {total}; expected one")
    return tuple((p, n, r) for (n, r), p in merged.items())


def _start(start: Any, states: int) -> tuple[tuple[Any, int], ...]:
    wrong = ValueError(f"start={start!r}; expected a state from 0 to {states - 1} or probabilities [{states}]")
    if isinstance(start, Integral):
        if not 0 <= int(start) < states:
            raise wrong
        return ((1, int(start)),)
    if np.shape(start) != (states,):
        raise wrong
    found = [(_number(p, "start"), s) for s, p in enumerate(start)]
    if min(p for p, _ in found) < 0 or abs(sum(p for p, _ in found) - 1) > SUM_TOLERANCE:
        raise ValueError("start: expected probabilities >= 0 that sum to one")
    return tuple((p, s) for p, s in found if p > 0)


def _reward(reward: Any, what: str) -> Any:
    return tuple(_number(v, what) for v in reward) if np.ndim(reward) else _number(reward, what)


def _number(value: Any, what: str) -> Any:
    """int, Fraction or finite float."""
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, Fraction):
        return value
    found = float(value)
    if not np.isfinite(found):
        raise ValueError(f"{what} is {found}; expected a finite number")
    return found


def _float(value: Any) -> Any:
    return tuple(float(v) for v in value) if isinstance(value, tuple) else float(value)


def _some(table: Mapping[Any, Any]) -> str:
    return f"{list(table)[:5]} and so on" if len(table) > 5 else str(list(table))
