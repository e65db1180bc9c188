"""What is wanted of the return of an environment, solved by the engine that fits, and its laws."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cached_property
from typing import Any

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray

from ctrlrl.core.distribution import Law
from ctrlrl.core.functional import UTILITIES, ExpectedUtility
from ctrlrl.planning import distributional_scan as scans
from ctrlrl.planning.distributional_dp import possible_returns, solve
from ctrlrl.planning.distributional_exact import Arithmetic, reachable
from ctrlrl.planning.distributional_grid import GridPlan
from ctrlrl.planning.distributional_lattice import LatticePlan
from ctrlrl.planning.distributional_policy import evaluate, risk_neutral
from ctrlrl.planning.distributional_scan import Plan, Scan
from ctrlrl.planning.distributional_table import OutcomeTable

SCANNED = {"cvar": "shortfall", "upper_cvar": "surplus", "mean_cvar": ""}
"""Objectives that search for their initial stock, and the utilities they need."""
AIMED = {"target": "distance", "exceedance": "reached"}
"""Objectives that need a goal, and their utilities."""
OBJECTIVES = ("mean", *SCANNED, *AIMED, *(name for name in UTILITIES if name != "mean"))
"""All by name."""
SMALL = 5_000
"""(time, state, stock) that are solved one by one, in fractions where the table has them."""
DIGITS = 9
"""Decimals of float returns that count for an objective."""
MAX_STEP = 1_000_000
"""Largest denominator that a float reward on a lattice is taken for."""
_CHANGING = (gym.ActionWrapper, gym.ObservationWrapper, gym.RewardWrapper)


def as_written(value: Any) -> Fraction:
    """The number that a setting stands for: 0.1 is 1/10. Raises ValueError for one that is not finite."""
    if not isinstance(value, Fraction) and not math.isfinite(value):
        raise ValueError(f"found {value}; expected a finite number")
    return value if isinstance(value, Fraction) else Fraction(str(value))


@dataclass(frozen=True)
class Objective:
    """What is wanted of a return G, larger is better.

    ==========  ====================================================================
    mean        E G
    cvar        mean of the worst share ``tau`` of outcomes
    upper_cvar  mean of the best share ``tau``; what is reported may be out of reach
    mean_cvar   ``share`` E G + (1 - ``share``) CVaR at ``tau``
    target      -E |G - goal|
    exceedance  P(G >= goal)
    a utility   E f(G - goal), f by ``ExpectedUtility.named``; the goal is 0 if none
    ==========  ====================================================================

    Raises ValueError for an unknown name, tau outside (0, 1], a share outside [0, 1] and a goal that is missing or has
    no meaning.
    """

    name: str
    tau: Any = Fraction(1, 4)
    share: Any = Fraction(1, 2)
    goal: Any = None

    def __post_init__(self) -> None:
        if self.name not in OBJECTIVES:
            raise ValueError(f"objective={self.name!r} is unknown; expected one of {', '.join(OBJECTIVES)}")
        if not 0 < self.tau <= 1:
            raise ValueError(f"tau={float(self.tau):g} must lie in (0, 1]: the share of the outcomes that counts")
        if not 0 <= self.share <= 1:
            raise ValueError(f"mean_share={float(self.share):g} must lie in [0, 1]")
        if self.name in AIMED and self.goal is None:
            raise ValueError(f"objective={self.name!r} needs a goal: the return that is wanted")
        if self.goal is not None and (self.name in SCANNED or self.name == "mean"):
            raise ValueError(f"goal={float(self.goal):g} has no part in objective={self.name!r}; leave it out")

    def as_float(self) -> Objective:
        """The same with float numbers."""
        goal = None if self.goal is None else float(self.goal)
        return replace(self, tau=float(self.tau), share=float(self.share), goal=goal)

    @property
    def utility(self) -> ExpectedUtility:
        """Of stock + return."""
        if self.name == "mean_cvar":
            return scans.mean_cvar_utility(self.tau, self.share)
        return ExpectedUtility.named((SCANNED | AIMED).get(self.name, self.name))

    @property
    def stock(self) -> Any:
        """The initial stock; None where it is to be found."""
        return None if self.name in SCANNED else -(self.goal or 0)

    @property
    def label(self) -> str:
        """In few words."""
        if self.name in SCANNED:
            tail = f"{'upper ' * (self.name == 'upper_cvar')}CVaR at {float(self.tau):g}"
            return f"{float(self.share):g} mean + {float(1 - self.share):g} {tail}" * (self.name == "mean_cvar") or tail
        if self.name == "mean":
            return "mean"
        goal = float(self.goal or 0)
        wanted = {"target": f"-E |G - {goal:g}|", "exceedance": f"P(G >= {goal:g})"}
        return wanted.get(self.name, f"mean {self.name}" + f" of G - {goal:g}" * (self.goal is not None))

    def of(self, law: Law) -> Any:
        """What a law of the return attains."""
        if self.name == "cvar":
            return law.cvar(self.tau)
        if self.name == "upper_cvar":
            return law.upper_cvar(self.tau)
        if self.name == "mean_cvar":
            return self.share * law.mean() + (1 - self.share) * law.cvar(self.tau)
        beyond = law.affine(1, self.stock)
        # what rounding adds must not decide whether a goal was reached
        return self.utility(beyond if law.exact else Law.of(np.round(beyond.atoms, DIGITS), beyond.probabilities))

    def scan(self, plan: Plan) -> Scan:
        """The initial stock and the value of a plan for ``utility``."""
        if self.name == "mean_cvar":
            return scans.mean_cvar(plan, self.tau, self.share)
        if self.name in SCANNED:
            return {"cvar": scans.cvar, "upper_cvar": scans.upper_cvar}[self.name](plan, self.tau)
        return Scan(self.label, plan.value(self.stock), self.stock, plan.value_error(self.stock))


@dataclass(frozen=True)
class Answer:
    """The best policy on (time, state, stock) for an objective, and what it does."""

    table: OutcomeTable
    """As it was solved: in fractions or in floats."""
    objective: Objective
    horizon: int | None
    gamma: Any
    engine: str
    """exact, lattice or grid."""
    plan: Any
    """What ``ctrlrl.planning.distributional_dp.solve`` returned."""
    scan: Scan
    """Value, initial stock and error bound."""

    @property
    def words(self) -> str:
        """Engine and size of the problem."""
        kind = " in fractions" if self.engine == "exact" and self.plan.arithmetic.exact else ""
        steps = "no horizon" if self.horizon is None else f"{self.horizon} step{'s' * (self.horizon > 1)}"
        states = f"{self.table.states:,} state{'s' * (self.table.states > 1)}"
        return f"{self.engine} engine{kind}: {states}, {steps}, gamma {float(self.gamma):g}"

    @cached_property
    def law(self) -> Law:
        """Of the return under the policy."""
        if isinstance(self.plan, LatticePlan):
            # one stock needs no array of all laws, and what clipping the stock does is in it
            return evaluate(self.table, self.plan, self.plan.horizon, 1, self.scan.stock)
        return self.plan.law(self.scan.stock)

    @cached_property
    def neutral(self) -> Law:
        """Law of the return under the policy of the largest mean."""
        if self.horizon is None:
            return solve(self.table, "mean", None, self.gamma, engine="grid").law(0)
        return evaluate(self.table, risk_neutral(self.table, self.horizon, self.gamma), self.horizon, self.gamma)

    @property
    def law_error(self) -> float:
        """No further is ``law`` from that of the policy in Wasserstein-1; 0 but for grids."""
        return float(getattr(self.plan, "law_error", 0.0)) if isinstance(self.plan, GridPlan) else 0.0

    @cached_property
    def _nodes(self) -> list[dict[int, tuple[NDArray[np.float64], NDArray[np.int64]]]]:
        """By time and state, ascending stocks that were solved and their actions."""
        plan = self.plan
        begin = [(s, plan.arithmetic.stock(c)) for _, s in plan.table.start for c in plan.stocks]
        found = []
        for t, level in enumerate(reachable(plan.table, plan.arithmetic, begin, plan.horizon, 1 << 62)):
            by_state: dict[int, list[tuple[float, int]]] = {}
            for s, c in level:
                by_state.setdefault(s, []).append((float(c), plan.action(t, s, c)))
            found.append({
                s: (np.array([c for c, _ in sorted(pairs)]), np.array([a for _, a in sorted(pairs)]))
                for s, pairs in by_state.items()
            })  # fmt: skip
        return found

    @cached_property
    def _stocks(self) -> NDArray[np.float64]:
        return np.array(self.plan.stocks, dtype=np.float64)

    def actions(self, t: int, state: int) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        """Ascending stocks [n] and the action for each.

        Raises:
            ValueError: No policy is in that state at that time, or the plan ends before it.
        """
        if self.horizon is not None and not 0 <= t < self.horizon:
            raise ValueError(f"timestep {t}; the plan has the steps 0 to {self.horizon - 1}")
        if self.engine == "grid":
            return self._stocks, self.plan.chosen[state]
        if self.engine == "lattice":
            return self._stocks, self.plan.chosen[t, state].astype(np.int64)
        if state not in self._nodes[t]:
            raise ValueError(f"state {state} cannot be reached in {t} steps: there is no action for it")
        return self._nodes[t][state]

    def action(self, t: int, state: int, told: float) -> int:
        """The action at time t where ``told`` is gamma^t times the stock; the nearest stock that was solved counts."""
        stocks, actions = self.actions(t, state)
        # gamma^t may vanish where there is no horizon
        stock = told / max(float(self.gamma) ** t, 1e-300)
        return int(actions[np.abs(stocks - stock).argmin()])


def table_of(env: gym.Env, name: str) -> OutcomeTable:
    """The table of an environment whose observation is the state, in fractions where ``unwrapped.exact()`` has them.

    Raises:
        TypeError: There is none, the spaces are not those of the table, or a wrapper changes what it says.
    """
    bare: Any = env.unwrapped
    if not hasattr(bare, "P"):
        raise TypeError(
            "distributional dynamic programming needs the transition table env.unwrapped.P, "
            f"{{state: {{action: [(probability, next state, reward, terminated)]}}}}; {name} has none. FrozenLake-v1, "
            "CliffWalking-v1 and ctrlrl/Ladder-v0 have one"
        )
    layer: Any = env
    while layer is not bare:
        if isinstance(layer, _CHANGING):
            raise TypeError(
                f"{type(layer).__name__} changes actions, observations or rewards, which the table of {name} does not "
                "know; leave it out"
            )
        layer = layer.env
    wanted = (gym.spaces.Discrete(len(bare.P)), gym.spaces.Discrete(len(bare.P[0])))
    if (found := (bare.observation_space, bare.action_space)) != wanted:
        raise TypeError(f"{name} has the spaces {found}, its table needs {wanted}: the observation must be the state")
    start = getattr(bare, "initial_state_distrib", None)
    if not hasattr(bare, "exact"):
        return OutcomeTable.of(bare.P, 0 if start is None else start)
    if start is not None:
        shares = [Fraction(float(p)).limit_denominator(MAX_STEP) for p in start]
        start = shares if sum(shares) == 1 and np.allclose(np.array(shares, float), start, atol=1e-12) else start
    return OutcomeTable.of(bare.exact(), 0 if start is None else start)


def solve_for(
    table: OutcomeTable, objective: Objective, horizon: int | None, gamma: Any = 1, engine: str = "auto"
) -> Answer:
    """The best policy for an objective.

    Args:
        table: Of numbers as rewards.
        objective: What is wanted.
        horizon: Steps of an episode at most; None with gamma < 1.
        gamma: In (0, 1].
        engine: As in ``solve``; ``auto`` takes fractions where the problem is small, else a lattice where gamma is 1
            and all rewards are multiples of a unit, else floats; a grid where there is no horizon.

    Raises:
        ValueError: What does not fit together or into memory.
    """
    if table.dimension is not None:
        raise ValueError(f"rewards are vectors [{table.dimension}]; expected numbers")
    if engine == "auto":
        engine = "grid" if horizon is None else ""
    if engine == "grid":
        return _answer(table.as_float(), objective.as_float(), None, float(gamma), "grid")
    if horizon is None:
        raise ValueError(f"engine={engine or 'auto'!r} needs a horizon: the environment has no limit of steps")
    stocks = None if objective.stock is None else [objective.stock]
    if engine != "lattice" and _small(table, horizon, gamma, stocks, SMALL):
        return _answer(table, objective, horizon, gamma, "exact", stocks=stocks)
    table, objective = table.as_float(), objective.as_float()
    stocks = None if stocks is None else [objective.stock]
    if engine == "lattice" or (not engine and gamma == 1):
        window, unit = _window(table, objective, horizon), float(_unit(table, objective))
        try:
            return _answer(table, objective, horizon, gamma, "lattice", stocks=window, unit=unit, keep_laws=False)
        except ValueError:  # off a lattice, or too large a one
            if engine:
                raise
    try:
        return _answer(table, objective, horizon, gamma if gamma == 1 else float(gamma), "exact", stocks=stocks)
    except ValueError as error:
        error.add_note("A shorter horizon needs less, or no horizon with gamma < 1 (engine='grid').")
        raise


def _answer(
    table: OutcomeTable, objective: Objective, horizon: int | None, gamma: Any, engine: str, **how: Any
) -> Answer:
    plan = solve(table, objective.utility, horizon, gamma, engine=engine, **how)
    return Answer(table, objective, horizon, gamma, engine, plan, objective.scan(plan))


def _small(table: OutcomeTable, horizon: int, gamma: Any, stocks: Sequence[Any] | None, limit: int) -> bool:
    """Whether no more than ``limit`` (time, state, stock) can be reached."""
    if horizon > limit:
        return False
    exact = table.exact and isinstance(gamma, int | Fraction)
    table = table if exact else table.as_float()
    try:
        if stocks is None:
            # each of them begins a stock, which goes on to the horizon
            stocks = [-g for g in possible_returns(table, horizon, gamma, limit=4 * limit // horizon)]
        rules = Arithmetic(gamma, None, exact)
        begin = [(s, rules.stock(c)) for _, s in table.start for c in stocks]
        return sum(map(len, reachable(table, rules, begin, horizon, limit))) <= limit
    except ValueError:  # all that they have to complain of is the limit
        return False


def _unit(table: OutcomeTable, objective: Objective) -> Fraction:
    """The largest number of which all rewards and the goal are multiples."""
    numbers = [r for moves in table.moves for _, r in moves] + [objective.goal or 0]
    parts = [Fraction(float(v)).limit_denominator(MAX_STEP) for v in numbers]
    shared = math.lcm(*(p.denominator for p in parts))
    return Fraction(math.gcd(*(int(p * shared) for p in parts)) or 1, shared)


def _window(table: OutcomeTable, objective: Objective, horizon: int) -> list[float] | None:
    """Least and largest stock that matter from a known first one; None leaves it to the lattice."""
    if objective.stock is None:
        return None
    if objective.name == "mean":
        return [0.0]
    rewards = [float(r) for moves in table.moves for _, r in moves]
    return [objective.stock + horizon * min(0.0, *rewards), objective.stock + horizon * max(0.0, *rewards)]
