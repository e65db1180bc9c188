"""The exact law of the return of any policy on (time, state, stock), and the risk-neutral policy to compare with."""

from __future__ import annotations

from collections.abc import Callable
from numbers import Integral, Rational
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from ctrlrl.core.distribution import Law
from ctrlrl.planning.distributional_exact import TIE, Arithmetic, Sparse, is_rational, to_law
from ctrlrl.planning.distributional_table import END, OutcomeTable

Rule: TypeAlias = Callable[[int, int, Any], Any]
"""(time, state, stock) to an action, or to the probabilities of all actions."""


def evaluate(source: Any, policy: Any, horizon: int, gamma: Any = 1, stock: Any = None, start: Any = None) -> Law:
    """Law of the return of a policy, by pushing the mass of all (state, stock, return so far) forward.

    ``policy``: what ``solve`` returns; a function of (time, state, stock) that gives an action or probabilities [A];
    integers [S] or [horizon, S]; probabilities [S, A] or [horizon, S, A]. ``stock``: the initial one, 0 by default.
    Rational tables, gamma and stock give an exact law. Raises ValueError if the policy fits nothing.
    """
    table = OutcomeTable.of(source, start)
    exact = table.exact and isinstance(gamma, Rational) and (stock is None or is_rational(stock))
    table = table if exact else table.as_float()
    rules, rule = Arithmetic(gamma, table.dimension, exact), as_rule(policy, table, horizon)
    begin = rules.zero if stock is None else rules.stock(stock)
    mass: dict[tuple[int, Any, Any], Any] = {}
    for p, s in table.start:
        mass[s, begin, rules.zero] = p
    ended: Sparse = {}
    discount: Any = 1
    for t in range(horizon):
        after: dict[tuple[int, Any, Any], Any] = {}
        for (s, c, gain), weight in mass.items():
            for share, action in _shares(rule(t, s, c), table.actions):
                for p, n, r in table.rows[s][action]:
                    total = rules.gained(gain, r, discount)
                    arriving = weight * share * p
                    if n == END or t == horizon - 1:
                        ended[total] = ended.get(total, 0) + arriving
                    else:
                        key = (n, rules.next_stock(c, r), total)
                        after[key] = after.get(key, 0) + arriving
        mass, discount = after, discount * rules.gamma
    return to_law(ended, exact)


def risk_neutral(source: Any, horizon: int, gamma: Any = 1) -> NDArray[np.int64]:
    """Actions [horizon, S] of the policy of the largest mean return, scalar rewards; ties go to the lowest index."""
    table = OutcomeTable.of(source)
    if table.dimension is not None:
        raise ValueError(f"rewards are vectors [{table.dimension}]; expected numbers")
    values: list[Any] = [0] * table.states
    chosen = np.zeros((horizon, table.states), dtype=np.int64)
    for t in reversed(range(horizon)):
        q = [
            [sum(p * (r + (gamma * values[n] if n != END else 0)) for p, n, r in outcomes) for outcomes in row]
            for row in table.rows
        ]
        values = [max(row) for row in q]
        slack = [0 if table.exact else TIE * max(1.0, abs(v)) for v in values]
        for s, (row, top, e) in enumerate(zip(q, values, slack, strict=True)):
            chosen[t, s] = next(a for a, v in enumerate(row) if v >= top - e)
    return chosen


def as_rule(policy: Any, table: OutcomeTable, horizon: int) -> Rule:
    """Any form that ``evaluate`` takes as a function of (time, state, stock)."""
    if callable(getattr(policy, "action", None)):
        return policy.action
    if callable(policy):
        return policy
    found, s, a = np.asarray(policy), table.states, table.actions
    if np.issubdtype(found.dtype, np.integer) and found.shape in ((s,), (horizon, s)):
        by_time = np.broadcast_to(found, (horizon, s))
    elif not np.issubdtype(found.dtype, np.integer) and found.shape in ((s, a), (horizon, s, a)):
        by_time = np.broadcast_to(found, (horizon, s, a))
    else:
        wanted = f"a function, integers [{s}] or [{horizon}, {s}], or probabilities [{s}, {a}] or [{horizon}, {s}, {a}]"
        raise ValueError(f"policy: {found.dtype} {list(found.shape)}; expected {wanted}")
    return lambda t, state, stock: by_time[t, state]


def _shares(choice: Any, actions: int) -> list[tuple[Any, int]]:
    """(probability, action) of what a rule returned."""
    if isinstance(choice, Integral):
        if not 0 <= int(choice) < actions:
            raise ValueError(f"the policy chose action {choice}; expected 0..{actions - 1}")
        return [(1, int(choice))]
    shares = list(choice)
    if len(shares) != actions or min(shares) < 0 or abs(sum(shares) - 1) > 1e-8:
        raise ValueError(f"the policy gave {shares}; expected an action or {actions} probabilities that sum to one")
    return [(p, a) for a, p in enumerate(shares) if p > 0]
