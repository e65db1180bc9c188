"""Two ways to CVaR that are known to fail, to compare with: greedy at each step, and dynamic programming on levels."""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Rational
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ctrlrl.core.distribution import Law
from ctrlrl.core.functional import CVaR
from ctrlrl.planning.distributional_exact import Arithmetic, Sweeps, to_law
from ctrlrl.planning.distributional_table import END, OutcomeTable

Array = NDArray[np.float64]

LEVEL_DIGITS = 12
"""Decimals of the risk levels that a policy carries along."""


@dataclass(frozen=True)
class Greedy:
    """A policy on (time, state) and what it attains."""

    value: Any
    """CVaR of the return from the start."""
    law: Law
    """Of the return from the start."""
    policy: NDArray[np.int64]
    """[horizon, S]"""


def cvar_greedy(source: Any, level: Any, horizon: int, gamma: Any = 1, start: Any = None) -> Greedy:
    """At each (time, state) the action whose return, followed by such choices, has the largest CVaR.

    What risk-sensitive versions of distributional agents do. The same level at every step is not consistent in time:
    the result is not optimal (on the ladder 0 instead of 11/75 at 3/4). Rational tables give exact answers.
    """
    table = OutcomeTable.of(source, start)
    exact = table.exact and isinstance(gamma, Rational)
    table = table if exact else table.as_float()
    rules = Arithmetic(gamma, table.dimension, exact)
    rules.next_stock = lambda stock, reward: stock
    nodes = [[(s, rules.zero) for s in range(table.states)]] * horizon
    chosen, laws = Sweeps(table, CVaR(level), rules, nodes).value_iteration()
    mixed: dict[Any, Any] = {}
    for weight, s in table.start:
        for x, p in laws[s, rules.zero].items():
            mixed[x] = mixed.get(x, 0) + weight * p
    law = to_law(mixed, exact)
    policy = np.array([[by_node[node] for node in nodes[0]] for by_node in chosen])
    return Greedy(law.cvar(level), law, policy)


@dataclass(frozen=True)
class LevelPlan:
    """What dynamic programming on risk levels claims, and the policy on (time, state, level) it stands for."""

    table: OutcomeTable
    gamma: float
    levels: Array
    """[K + 1] from 0 to 1."""
    tails: Array
    """[horizon + 1, S, K + 1] claimed level x CVaR at time t."""

    def claimed(self, level: float) -> float:
        """The CVaR from the start that it reports; never below the optimum, often above what any policy attains."""
        self._check(level)
        begin = self._pooled([(p, s, 0.0) for p, s in self.table.start], self.tails[0], 1.0)
        return float(np.interp(level, *_tail(begin)) / level)

    def law(self, level: float) -> Law:
        """Law of the return of its policy, which hands a level on to each successor."""
        self._check(level)
        begin = self._pooled([(p, s, 0.0) for p, s in self.table.start], self.tails[0], 1.0)
        levels = _handed_on(begin, level)
        mass = {(s, y, 0.0): float(p) for (p, s), y in zip(self.table.start, levels, strict=True)}
        ended: dict[float, float] = {}
        for t in range(len(self.tails) - 1):
            after: dict[tuple[int, float, float], float] = {}
            for (s, y, gain), weight in mass.items():
                outcomes = self.table.rows[s][self.action(t, s, y)]
                pooled = self._pooled(outcomes, self.tails[t + 1], self.gamma)
                for (p, n, r), later in zip(outcomes, _handed_on(pooled, y), strict=True):
                    total = round(gain + self.gamma**t * r, LEVEL_DIGITS)
                    if n == END or t == len(self.tails) - 2:
                        ended[total] = ended.get(total, 0.0) + weight * p
                    else:
                        after[n, later, total] = after.get((n, later, total), 0.0) + weight * p
            mass = after
        return Law.of(list(ended), list(ended.values()))

    def action(self, t: int, state: int, level: float) -> int:
        """Action at time t in a state whose tail of share ``level`` counts; 0 counts as the least level above it."""
        y = max(level, float(self.levels[1]))
        pools = [self._pooled(outcomes, self.tails[t + 1], self.gamma) for outcomes in self.table.rows[state]]
        tails = np.round([np.interp(y, *_tail(pooled)) for pooled in pools], LEVEL_DIGITS)
        return int(tails.argmax())

    def _pooled(self, outcomes: Any, after: Array, gamma: float) -> list[tuple[float, float, int]]:
        """(return, mass, which outcome) of all outcomes, ascending: the slopes of the tails stand for returns."""
        widths, pooled = np.diff(self.levels), []
        for i, (p, n, r) in enumerate(outcomes):
            if n == END:
                pooled.append((float(r), float(p), i))
                continue
            slopes = r + gamma * np.diff(after[n]) / widths
            pooled.extend(zip(slopes.tolist(), (p * widths).tolist(), [i] * len(widths), strict=True))
        return sorted(pooled)

    def _check(self, level: float) -> None:
        if not 0 < level <= 1:
            raise ValueError(f"level={level!r}; expected 0 < level <= 1")


def cvar_value_iteration(
    source: Any, horizon: int, gamma: float = 1.0, levels: ArrayLike | None = None, start: Any = None
) -> LevelPlan:
    """CVaR value iteration on risk levels (Chow et al. 2015), linear in level x CVaR between ``levels`` [K + 1].

    max over actions of min over xi of E xi (r + gamma CVaR_{y xi}(s')), 0 <= xi <= 1/y, E xi = 1. For a fixed policy
    that is exact; once actions are maximised it overestimates (Hau et al., NeurIPS 2023). ``levels``: 0, .02, ... 1.
    """
    table = OutcomeTable.of(source, start).as_float()
    grid = np.linspace(0.0, 1.0, 51) if levels is None else np.asarray(levels, dtype=np.float64)
    if grid.ndim != 1 or len(grid) < 2 or grid[0] != 0 or grid[-1] != 1 or (np.diff(grid) <= 0).any():
        raise ValueError(f"levels={levels!r}; expected numbers that ascend from 0 to 1")
    tails = np.zeros((horizon + 1, table.states, len(grid)))
    plan = LevelPlan(table, float(gamma), grid, tails)
    for t in reversed(range(horizon)):
        for s, row in enumerate(table.rows):
            pools = [plan._pooled(outcomes, tails[t + 1], plan.gamma) for outcomes in row]
            tails[t, s] = np.max([np.interp(grid, *_tail(pooled)) for pooled in pools], axis=0)
    return plan


def _tail(pooled: list[tuple[float, float, int]]) -> tuple[Array, Array]:
    """Points of the tail function y -> int_0^y q(u) du of pooled returns."""
    values, masses = np.array([v for v, _, _ in pooled]), np.array([m for _, m, _ in pooled])
    return np.append(0.0, masses.cumsum()), np.append(0.0, (values * masses).cumsum())


def _handed_on(pooled: list[tuple[float, float, int]], level: float) -> list[float]:
    """The level that each outcome gets: the share of its mass in the worst ``level``; equal returns share alike."""
    values, masses = np.array([v for v, _, _ in pooled]), np.array([m for _, m, _ in pooled])
    _, place = np.unique(np.round(values, 9), return_inverse=True)
    by_value = np.bincount(place, masses)
    taken = (level - (by_value.cumsum() - by_value)).clip(0.0, by_value) / by_value
    which = np.array([i for _, _, i in pooled])
    shares = np.bincount(which, masses * taken[place]) / np.bincount(which, masses)
    return np.round(shares, LEVEL_DIGITS).tolist()
