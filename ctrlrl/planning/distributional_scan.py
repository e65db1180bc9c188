"""Objectives that one solve answers for every parameter, by searching over the initial stock."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from ctrlrl.core.distribution import Law
from ctrlrl.core.functional import UTILITIES, ExpectedUtility, Functional

UPPER_TAIL = (
    "only a bound for deterministic policies: it is a minimax value that may need an action drawn by lot where the "
    "policy is indifferent"
)


class Plan(Protocol):
    """What every engine returns."""

    @property
    def functional(self) -> Functional: ...
    @property
    def stocks(self) -> tuple[Any, ...]: ...
    def value(self, stock: Any, state: int | None = None) -> Any: ...
    def value_error(self, stock: Any) -> float: ...
    def law(self, stock: Any, state: int | None = None) -> Law: ...
    def action(self, t: int, state: int, stock: Any) -> int: ...


@dataclass(frozen=True)
class Scan:
    """One answer: begin with ``stock`` and follow the plan."""

    objective: str
    """In words."""
    value: Any
    """Of the objective."""
    stock: Any
    """The initial stock."""
    error_bound: float
    """``value`` is no further than this from the truth, of the stocks within the range of those solved."""
    note: str = ""
    """What to know about the value; empty: it is what the law of the plan attains."""

    @property
    def is_bound(self) -> bool:
        """The value bounds what policies attain and need not be attained by this one."""
        return bool(self.note)


def cvar(plan: Plan, level: Any, state: int | None = None) -> Scan:
    """Largest lower-tail CVaR, max over c0 of -c0 + F(c0) / level (Bäuerle and Ott 2011); utility shortfall.

    Exact where a negative return of the best policy is among the stocks solved, as it is by default on tables of
    finitely many returns. Raises ValueError on another utility or a level outside (0, 1].
    """
    _needs(plan, "shortfall")
    _level(level)
    return _best(plan, f"CVaR at {level}", lambda c: -c + plan.value(c, state) / level, 1 / float(level))


def upper_cvar(plan: Plan, level: Any, state: int | None = None) -> Scan:
    """min over c0 of -c0 + F(c0) / level: no policy has a larger mean of its best share ``level``; utility surplus.

    Deterministic policies may fall short of it, and ``note`` says so.
    """
    _needs(plan, "surplus")
    _level(level)
    found = _best(plan, f"upper CVaR at {level}", lambda c: c - plan.value(c, state) / level, 1 / float(level))
    return Scan(found.objective, -found.value, found.stock, found.error_bound, UPPER_TAIL)


def mean_cvar(plan: Plan, level: Any, share: Any, state: int | None = None) -> Scan:
    """Largest share mean + (1 - share) CVaR at level; utility ``mean_cvar_utility(level, share)``."""
    wanted = mean_cvar_utility(level, share)
    if getattr(plan.functional, "label", None) != wanted.label:
        raise ValueError(f"the plan maximises {plan.functional.name}; expected {wanted.name}")
    return _best(plan, f"{share} mean + {1 - share} CVaR at {level}", lambda c: -c + plan.value(c, state), 1.0)


def mean_cvar_utility(level: Any, share: Any) -> ExpectedUtility:
    """share max(x, 0) + ((1 - share) / level + share) min(x, 0), the utility of ``mean_cvar``."""
    _level(level)
    if not 0 <= share <= 1:
        raise ValueError(f"share={share!r}; expected 0 <= share <= 1")
    return ExpectedUtility.two_slopes((1 - share) / level + share, share)


def target(plan: Plan, goal: Any, state: int | None = None) -> Scan:
    """Least E |G - goal|, or E (G - goal)^2, as a negative number; utility distance or squared, stock -goal."""
    _needs(plan, "distance", "squared")
    return Scan(f"return {goal}", plan.value(-goal, state), -goal, plan.value_error(-goal))


def exceedance(plan: Plan, goal: Any, state: int | None = None) -> Scan:
    """Largest P(G >= goal); utility reached, stock -goal."""
    _needs(plan, "reached")
    return Scan(f"P(return >= {goal})", plan.value(-goal, state), -goal, plan.value_error(-goal))


def homeostasis(plan: Plan, drives: Any, state: int | None = None) -> Scan:
    """Largest E -||drives + return||^p of vector returns; utility ``ExpectedUtility.norm``, stock the drives now."""
    if not getattr(plan.functional, "label", "").startswith("-||x||"):
        raise ValueError(
            f"the plan maximises {plan.functional.name}; expected a norm: ExpectedUtility.norm(order, power)"
        )
    return Scan("homeostasis", plan.value(drives, state), drives, plan.value_error(drives))


def constrained(plan: Plan, budgets: Sequence[Any], state: int | None = None) -> Scan:
    """Largest E of the first component less weighted overdrafts of the others; utility ``ExpectedUtility.penalised``.

    Rewards are (gain, -cost_1, ..., -cost_k); ``budgets`` [k] are what may be spent: the stock is (0, *budgets).
    """
    if not getattr(plan.functional, "label", "").startswith("x_0 + "):
        raise ValueError(f"the plan maximises {plan.functional.name}; expected ExpectedUtility.penalised(weights)")
    stock = (0, *budgets)
    return Scan(f"gain with budgets {list(budgets)}", plan.value(stock, state), stock, plan.value_error(stock))


def _best(plan: Plan, objective: str, score: Callable[[Any], Any], scale: float) -> Scan:
    """The stock of the highest score; of equal ones the largest, which asks for least risk."""
    scores = [score(c) for c in plan.stocks]
    top = max(scores)
    slack = 0 if not isinstance(top, float) else 1e-11 * max(1.0, abs(top))
    stock = max(c for c, v in zip(plan.stocks, scores, strict=True) if v >= top - slack)
    error = scale * max(plan.value_error(c) for c in plan.stocks)
    # between the stocks of a grid the score rises by at most this
    error += getattr(plan, "spacing", 0.0) / 2 * max(1.0, scale * float(plan.functional.lipschitz or 0.0))
    return Scan(objective, top, stock, float(error))


def _needs(plan: Plan, *names: str) -> None:
    if not any(plan.functional is UTILITIES[name] for name in names):
        wanted = " or ".join(repr(name) for name in names)
        raise ValueError(f"the plan maximises {plan.functional.name}; expected the utility {wanted}")


def _level(level: Any) -> None:
    if not 0 < level <= 1:
        raise ValueError(f"level={level!r}; expected 0 < level <= 1")
