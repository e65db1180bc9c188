"""Distributional dynamic programming with stock augmentation (Ávila Pires et al., arXiv 2501.13028).

The stock C' = (C + R) / gamma keeps what has been gained, so that C_0 + G_0 = gamma^t (C_t + G_t) at any time t. A
policy on (state, stock) can then maximise a functional K of the law of C_0 + G_0, and with the right C_0 what classic
dynamic programming cannot: CVaR, the chance to reach a goal, a wanted return, drives kept near zero.

    plan = solve(env, "shortfall", horizon=20)
    for level in (0.1, 0.5, 0.9):
        answer = cvar(plan, level)          # one solve for all levels
        law = plan.law(answer.stock)
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import Any

from ctrlrl.core.functional import ExpectedUtility, Functional, NotOptimisableError
from ctrlrl.planning.distributional_baselines import cvar_greedy, cvar_value_iteration
from ctrlrl.planning.distributional_exact import Arithmetic, ExactPlan, is_rational, solve_exact
from ctrlrl.planning.distributional_grid import GridPlan, solve_grid, sweeps_for, truncation_bound
from ctrlrl.planning.distributional_lattice import LatticePlan, solve_lattice
from ctrlrl.planning.distributional_policy import evaluate, risk_neutral
from ctrlrl.planning.distributional_scan import (
    Scan,
    constrained,
    cvar,
    exceedance,
    homeostasis,
    mean_cvar,
    mean_cvar_utility,
    target,
    upper_cvar,
)
from ctrlrl.planning.distributional_table import END, OutcomeTable

__all__ = [
    "ExactPlan", "GridPlan", "LatticePlan", "NotOptimisableError", "OutcomeTable", "Scan", "constrained", "cvar",
    "cvar_greedy", "cvar_value_iteration", "evaluate", "exceedance", "homeostasis", "mean_cvar", "mean_cvar_utility",
    "possible_returns", "risk_neutral", "solve", "sweeps_for", "target", "truncation_bound", "upper_cvar",
]  # fmt: skip


def solve(
    source: Any,
    functional: Functional | str,
    horizon: int | None = None,
    gamma: Any = 1,
    stocks: Sequence[Any] | None = None,
    start: Any = None,
    engine: str = "auto",
    method: str = "value_iteration",
    tolerance: float | None = None,
    allow: bool = False,
    **options: Any,
) -> ExactPlan | LatticePlan | GridPlan:
    """The best policy on (time, state, stock) for a functional of stock + return.

    Args:
        source: An environment with a table ``P``, such a table, or an OutcomeTable; rewards numbers or vectors.
        functional: What to maximise; a name of ``ExpectedUtility.named``, or a Functional.
        horizon: Steps of an episode at most. None needs gamma < 1.
        gamma: Discount in (0, 1].
        stocks: Initial stocks to solve for. By default the negatives of all returns that can occur, where CVaR and the
            other scans have their optima; vectors need them. On a lattice the least and the largest matter.
        start: State or probabilities [S] of the start; by default that of the environment, or state 0.
        engine: ``exact`` sparse laws on the reachable stocks, rational if all numbers are; ``lattice`` arrays, for
            gamma = 1 and rewards that are multiples of a unit; ``grid`` arrays, discounted without a horizon;
            ``auto``: grid without a horizon, otherwise exact.
        method: ``value_iteration`` or ``policy_iteration`` (exact engine only).
        tolerance: Of the error of stopping where there is no horizon; 1e-3 by default.
        allow: Run for a functional that the method does not maximise; a UserWarning says why it may be wrong.
        options: Of the engine, see ``solve_exact``, ``solve_lattice`` and ``solve_grid``.

    Raises:
        NotOptimisableError: The functional lacks a property that this problem needs.
        ValueError: Anything that does not fit together, or would need too much memory.
    """
    table = OutcomeTable.of(source, start)
    wanted = ExpectedUtility.named(functional) if isinstance(functional, str) else functional
    if not 0 < gamma <= 1 or (gamma == 1 and horizon is None) or (horizon is not None and horizon < 1):
        raise ValueError(
            f"gamma={gamma!r}, horizon={horizon!r}; expected 0 < gamma <= 1, and a horizon >= 1 if gamma = 1"
        )
    is_vector = isinstance(wanted, ExpectedUtility) and wanted.vector
    if is_vector != (table.dimension is not None):
        kind = "numbers" if table.dimension is None else f"vectors [{table.dimension}]"
        raise ValueError(f"rewards are {kind}, which {wanted.name} does not take")
    if engine == "auto":
        engine = "exact" if horizon is not None or is_vector else "grid"
    wanted.check(gamma, horizon is None, allow)
    if engine != "exact" and method != "value_iteration":
        raise ValueError(f"method={method!r} with engine={engine!r}; policy iteration needs engine='exact'")
    if tolerance is not None and horizon is not None:
        raise ValueError(
            f"tolerance={tolerance!r} with a horizon; expected one of them: with a horizon nothing is cut off"
        )
    if engine == "grid":
        if horizon is not None or stocks is not None:
            raise ValueError("the grid has no horizon and chooses its stocks; expected horizon=None, stocks=None")
        return solve_grid(table, wanted, gamma, tolerance or 1e-3, **options)
    if engine == "lattice":
        if gamma != 1 or horizon is None:
            raise ValueError(f"gamma={gamma!r}, horizon={horizon!r}; the lattice needs gamma = 1 and a horizon")
        window = (min(stocks), max(stocks)) if stocks is not None else None
        return solve_lattice(table, wanted, horizon, window, **options)
    if engine != "exact":
        raise ValueError(f"engine={engine!r}; expected 'auto', 'exact', 'lattice' or 'grid'")
    bound = 0.0
    if horizon is None:
        lipschitz = wanted.lipschitz
        if lipschitz is None:
            raise NotOptimisableError(f"{wanted.name} has no Lipschitz constant: give a horizon")
        horizon = sweeps_for(tolerance or 1e-3, lipschitz, float(gamma), table.reward_size)
        bound = truncation_bound(lipschitz, float(gamma), horizon, table.reward_size)
    if stocks is None:
        if table.dimension is not None:
            raise ValueError("rewards are vectors; expected the initial stocks to solve for, stocks=[(...), ...]")
        stocks = [-g for g in possible_returns(table, horizon, gamma)]
    return solve_exact(table, wanted, gamma, horizon, stocks, method, error_bound=bound, **options)


def possible_returns(source: Any, horizon: int, gamma: Any = 1, start: Any = None, limit: int = 100_000) -> list[Any]:
    """All returns from the start that any policy may meet, ascending; vectors as tuples.

    Raises ValueError when there are more than ``limit`` pairs of a state and a return so far.
    """
    table = OutcomeTable.of(source, start)
    exact = table.exact and is_rational(gamma)
    table = table if exact else table.as_float()
    rules = Arithmetic(gamma, table.dimension, exact)
    reached = {(s, rules.zero) for _, s in table.start}
    found, discount = set(), Fraction(1) if exact else 1.0
    for t in range(horizon):
        after = set()
        for s, gain in reached:
            for n, r in table.moves[s]:
                total = rules.gained(gain, r, discount)
                if n == END or t == horizon - 1:
                    found.add(total)
                else:
                    after.add((n, total))
        if len(after) > limit:
            text = f"{len(after)} pairs of state and return after {t + 1} of {horizon} steps, limit={limit}"
            raise ValueError(f"{text}; give stocks, or take engine='lattice' or 'grid'")
        reached, discount = after, discount * rules.gamma
    return sorted(found)
