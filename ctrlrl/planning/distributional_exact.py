"""Distributional dynamic programming on the stocks that can be reached, with sparse laws: exact in rationals."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from numbers import Rational
from typing import Any, TypeAlias

import numpy as np

from ctrlrl.core.distribution import Law
from ctrlrl.core.functional import Functional
from ctrlrl.planning.distributional_table import END, OutcomeTable

Node: TypeAlias = tuple[int, Any]
"""(state, stock)"""
Sparse: TypeAlias = dict[Any, Any]
"""A law as {atom: probability}; atoms are numbers or tuples."""

DIGITS = 12
"""Decimals to which float stocks and atoms are rounded, so that equal sums meet."""
TIE = 1e-11
"""Relative difference below which two float values are equal."""


class Arithmetic:
    """Stocks and returns of one problem: exact in rationals, otherwise floats rounded to DIGITS decimals.

    C' = (C + R) / gamma, and the return of a step and what follows is R + gamma G'.
    """

    def __init__(self, gamma: Any, dimension: int | None, exact: bool) -> None:
        self.dimension, self.exact = dimension, exact
        self.gamma: Any = (Fraction(gamma) if gamma != 1 else 1) if exact else float(gamma)
        self.zero: Any = (0,) * dimension if dimension else 0
        self.next_stock = self._lifted(self._divided)
        self.joined = self._lifted(self._shrunk)
        self.plus = self._lifted(self._added)

    def stock(self, value: Any) -> Any:
        """A stock given by a user as a key; raises ValueError if it does not fit the rewards."""
        if (np.shape(value) or None) != ((self.dimension,) if self.dimension else None):
            wanted = f"{self.dimension} numbers" if self.dimension else "a number"
            raise ValueError(f"stock {value!r}; expected {wanted}, as the rewards are")
        values = np.asarray(value, dtype=object).ravel().tolist()
        made = tuple(v if self.exact and isinstance(v, Rational) else round(float(v), DIGITS) for v in values)
        return made if self.dimension else made[0]

    def gained(self, gain: Any, reward: Any, discount: Any) -> Any:
        """gain + discount reward."""
        scaled = tuple(discount * r for r in reward) if self.dimension else discount * reward
        return self.plus(gain, scaled)

    def _lifted(self, function: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
        """The function on numbers, or component by component."""
        if self.dimension is None:
            return function
        return lambda a, b: tuple(map(function, a, b))

    def _divided(self, stock: Any, reward: Any) -> Any:
        total = stock + reward
        if self.gamma != 1:
            total = total / self.gamma
        return total if self.exact else round(total, DIGITS)

    def _shrunk(self, reward: Any, later: Any) -> Any:
        total = reward + self.gamma * later
        return total if self.exact else round(total, DIGITS)

    def _added(self, stock: Any, gain: Any) -> Any:
        total = stock + gain
        return total if self.exact else round(total, DIGITS)


@dataclass(frozen=True)
class ExactPlan:
    """Best policy on (time, state, stock), for every stock that can be reached from the initial ones."""

    table: OutcomeTable
    functional: Functional
    gamma: Any
    horizon: int
    stocks: tuple[Any, ...]
    """Initial stocks that were solved."""

    error_bound: float
    """``value`` is no further than this from the optimum without a horizon; 0 where there is a horizon."""

    history: tuple[tuple[Any, ...], ...]
    """By sweep of policy iteration: K of stock plus return from the start for each initial stock; one for DVI."""

    arithmetic: Arithmetic
    _chosen: tuple[dict[Node, int], ...]
    _laws: dict[Node, Sparse]

    def value(self, stock: Any, state: int | None = None) -> Any:
        """F = K of stock + return, from a state that episodes start in, or from their start."""
        return self.functional(self.law(stock, state).affine(1, self.arithmetic.stock(stock)))

    def law(self, stock: Any, state: int | None = None) -> Law:
        """Law of the return under the policy that begins with this initial stock; the stock is not part of it."""
        c = self.arithmetic.stock(stock)
        starts = self.table.start if state is None else ((1, state),)
        found: Sparse = {}
        for weight, s in starts:
            if (s, c) not in self._laws:
                raise ValueError(f"state {s} with stock {stock!r} was not solved; initial stocks: {_few(self.stocks)}")
            for x, p in self._laws[s, c].items():
                found[x] = found.get(x, 0) + weight * p
        return to_law(found, self.arithmetic.exact)

    def value_error(self, stock: Any) -> float:
        """Bound on the error of ``value`` at one initial stock."""
        return self.error_bound

    def action(self, t: int, state: int, stock: Any) -> int:
        """The action at time t (0 first) in a state with a stock; raises ValueError where policies never lead."""
        found = self._chosen[t].get((state, self.arithmetic.stock(stock))) if 0 <= t < self.horizon else None
        if found is None:
            raise ValueError(f"time {t}, state {state}, stock {stock!r} cannot be reached from the solved stocks")
        return found


def solve_exact(
    table: OutcomeTable,
    functional: Functional,
    gamma: Any,
    horizon: int,
    stocks: Sequence[Any],
    method: str = "value_iteration",
    max_nodes: int = 2_000_000,
    error_bound: float = 0.0,
) -> ExactPlan:
    """Distributional value or policy iteration on the reachable (time, state, stock); checks no property of K.

    The greedy action maximises K of stock + R + gamma G'; ties go to the larger mean, then to the lower index.
    Raises ValueError when more than ``max_nodes`` of them would be needed.
    """
    exact = table.exact and isinstance(gamma, Rational) and all(is_rational(c) for c in stocks)
    table = table if exact else table.as_float()
    rules = Arithmetic(gamma, table.dimension, exact)
    keys = tuple(dict.fromkeys(rules.stock(c) for c in stocks))
    levels = reachable(table, rules, [(s, c) for _, s in table.start for c in keys], horizon, max_nodes)
    sweeps = Sweeps(table, functional, rules, levels)
    if method == "value_iteration":
        chosen, laws = sweeps.value_iteration()
        history = []
    elif method == "policy_iteration":
        chosen, laws, history = sweeps.policy_iteration(keys)
    else:
        raise ValueError(f"method={method!r}; expected 'value_iteration' or 'policy_iteration'")
    return ExactPlan(table, functional, gamma, horizon, keys, error_bound, tuple(history), rules, tuple(chosen), laws)


def reachable(
    table: OutcomeTable, rules: Arithmetic, nodes: Iterable[Node], horizon: int, max_nodes: int
) -> list[list[Node]]:
    """By time, the (state, stock) that some policy reaches from the given ones."""
    levels, total = [list(nodes)], 0
    for t in range(horizon - 1):
        total += len(levels[-1])
        after = {(n, rules.next_stock(c, r)) for s, c in levels[-1] for n, r in table.moves[s] if n != END}
        if total + len(after) > max_nodes:
            found = f"{total + len(after)} (state, stock) pairs up to time {t + 1} of {horizon}"
            raise ValueError(f"{found}, max_nodes={max_nodes}; raise it, shorten the horizon or use engine='grid'")
        levels.append(list(after))
    return levels


class Sweeps:
    """Backward sweeps over the levels of one problem."""

    def __init__(
        self, table: OutcomeTable, functional: Functional, rules: Arithmetic, levels: list[list[Node]]
    ) -> None:
        self.table, self.functional, self.rules, self.levels = table, functional, rules, levels

    def law(self, node: Node, action: int, after: dict[Node, Sparse]) -> Sparse:
        """Law of R + gamma G' after an action, from the laws one step later; none of them: the horizon."""
        state, stock = node
        joined, found = self.rules.joined, {}
        for p, n, r in self.table.rows[state][action]:
            if n == END or not after:
                x = joined(r, self.rules.zero)
                found[x] = found.get(x, 0) + p
                continue
            for later, q in after[n, self.rules.next_stock(stock, r)].items():
                x = joined(r, later)
                found[x] = found.get(x, 0) + p * q
        return found

    def values(self, nodes: Sequence[Node], laws: Sequence[Sparse]) -> list[Any]:
        """K of stock + return for laws at nodes, all at once."""
        atoms: list[Any] = []
        weights: list[Any] = []
        starts: list[int] = []
        for (_, stock), law in zip(nodes, laws, strict=True):
            starts.append(len(atoms))
            atoms.extend(self.rules.plus(stock, x) for x in law)
            weights.extend(law.values())
        kind = object if self.rules.exact else float
        return self.functional.of_segments(np.array(atoms, dtype=kind), np.array(weights, dtype=kind), starts).tolist()

    def greedy(self, nodes: Sequence[Node], after: dict[Node, Sparse]) -> tuple[list[list[Any]], list[list[Sparse]]]:
        """Of each node the value and the law of each action."""
        count = self.table.actions
        laws = [self.law(node, a, after) for node in nodes for a in range(count)]
        values = self.values([node for node in nodes for _ in range(count)], laws)
        cut = range(0, len(laws), count)
        return [values[i : i + count] for i in cut], [laws[i : i + count] for i in cut]

    def best(self, values: list[Any], laws: list[Sparse]) -> int:
        top = max(values)
        tied = [a for a, v in enumerate(values) if v >= top - self.slack(top)]
        if len(tied) == 1 or self.rules.dimension:
            return tied[0]
        means = {a: sum(x * p for x, p in laws[a].items()) for a in tied}
        top = max(means.values())
        return next(a for a in tied if means[a] >= top - self.slack(top))

    def slack(self, value: Any) -> Any:
        return 0 if self.rules.exact else TIE * max(1.0, abs(value))

    def value_iteration(self) -> tuple[list[dict[Node, int]], dict[Node, Sparse]]:
        after: dict[Node, Sparse] = {}
        chosen: list[dict[Node, int]] = []
        for nodes in reversed(self.levels):
            values, laws = self.greedy(nodes, after)
            picked = [self.best(v, of) for v, of in zip(values, laws, strict=True)]
            chosen.append(dict(zip(nodes, picked, strict=True)))
            after = {node: of[a] for node, of, a in zip(nodes, laws, picked, strict=True)}
        return chosen[::-1], after

    def policy_iteration(
        self, stocks: Sequence[Any]
    ) -> tuple[list[dict[Node, int]], dict[Node, Sparse], list[tuple[Any, ...]]]:
        """From action 0 everywhere; an action is changed only where another is strictly better."""
        chosen = [dict.fromkeys(nodes, 0) for nodes in self.levels]
        history = []
        while True:
            laws: list[dict[Node, Sparse]] = [{}]
            for picked in reversed(chosen):
                laws.append({node: self.law(node, a, laws[-1]) for node, a in picked.items()})
            laws.reverse()
            history.append(tuple(self.start_value(laws[0], c) for c in stocks))
            changed = False
            for t, nodes in enumerate(self.levels):
                values, options = self.greedy(nodes, laws[t + 1])
                for node, v, of in zip(nodes, values, options, strict=True):
                    now = v[chosen[t][node]]
                    if max(v) > now + self.slack(now):
                        chosen[t][node], changed = self.best(v, of), True
            if not changed:
                return chosen, laws[0], history

    def start_value(self, laws: dict[Node, Sparse], stock: Any) -> Any:
        mixed: Sparse = {}
        for weight, s in self.table.start:
            for x, p in laws[s, stock].items():
                mixed[x] = mixed.get(x, 0) + weight * p
        return self.values([(0, stock)], [mixed])[0]


def to_law(sparse: Sparse, exact: bool) -> Law:
    """The law of {atom: probability}; in rationals even where all numbers are whole."""
    weights = [Fraction(p) for p in sparse.values()] if exact else list(sparse.values())
    return Law.of(list(sparse), weights)


def is_rational(stock: Any) -> bool:
    """A Fraction or int, or a sequence of them."""
    return all(isinstance(v, Rational) for v in (stock if isinstance(stock, tuple | list) else (stock,)))


def _few(values: Sequence[Any]) -> str:
    shown = ", ".join(map(str, values[:5]))
    return f"{shown}, ... ({len(values)})" if len(values) > 5 else shown
