"""IWOCS: a robust policy from a growing list of ordinary decision processes (arXiv 2410.06212, Algorithm 1)."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np

from ctrlrl.planning.model import Array, IntArray
from ctrlrl.planning.robust_mdp import RobustMDP
from ctrlrl.planning.robust_value_iteration import greedy, value_iteration, worst_case

Stopped: TypeAlias = Literal["certified", "gap_closed", "repeated", "max_iterations"]


class NoCertificateError(RuntimeError):
    """Bounds on the best worst case were asked for on a set where the method does not give them."""


@dataclass(frozen=True)
class Iteration:
    """One turn: a model joined the list, and its pessimistic policy met its worst case."""

    model: Hashable
    """Key of the model that joined."""

    q: Array
    """[S, A] Q_i = min over the listed models of Q*; never rises from one turn to the next."""

    policy: IntArray
    """[S] pi_i = argmax_a Q_i, the lowest index among equals."""

    upper: float
    """Q_i(s0, pi_i(s0)), averaged over the start."""

    lower: float
    """Worst case of pi_i over the whole set."""

    worst_model: Hashable
    """Key of the model of that worst case, which joins next."""


@dataclass(frozen=True)
class Certificate:
    """Proved bounds: lower <= best worst case of any policy <= upper."""

    lower: float
    """Worst case of the policy returned."""

    upper: float
    """Upper value of the last iteration, which is the least, plus the error of value iteration."""

    @property
    def gap(self) -> float:
        """What any policy could gain at most over the one returned."""
        return self.upper - self.lower


@dataclass(frozen=True)
class IwocsResult:
    """The best iterate, and how it was found."""

    policy: IntArray
    """[S] of the iterate with the best worst case."""

    worst_case: float
    """Its value from the start in the model that is worst for it."""

    worst_model: Hashable
    """Key of that model."""

    best: int
    """Index of that iterate; not always the last."""

    iterations: tuple[Iteration, ...]
    """All turns."""

    stopped: Stopped
    """certified: the gap closed on a rectangular set, so the policy is optimal. gap_closed: it closed on another set;
    from a single start state this shows that no deterministic policy does better, while a mixed one may.
    repeated: the worst model is in the list already, nothing would change any more. max_iterations: the limit."""

    dual_bound: float
    """Least V*_T(s0) of the listed models, plus the error of value iteration: no policy of any kind has a better worst
    case, on any set. Looser than the certificate, often far."""

    is_rectangular: bool
    """Of the set."""

    solver_error: float
    """Bound on the error of each Q*."""

    def certificate(self) -> Certificate:
        """Bounds on the best worst case; raises NoCertificateError on a set that is not rectangular."""
        if not self.is_rectangular:
            raise NoCertificateError(
                "this set of models is not (s,a)-rectangular, so Q_i(s0, pi_i(s0)) is no upper bound: the best worst"
                " case may lie below min_T V*_T (a duality gap), and, as in matching pennies, a policy that mixes its"
                " actions may beat every deterministic one. What holds here: the policy's worst case is"
                f" {self.worst_case:.6g}"
                f" and no policy has a better one than dual_bound = {self.dual_bound:.6g}"
            )
        return Certificate(self.worst_case, self.iterations[-1].upper + self.solver_error)


def iwocs(
    mdp: RobustMDP,
    first_model: Hashable | None = None,
    gap_tolerance: float = 1e-6,
    max_iterations: int = 100,
    solver_tolerance: float = 1e-10,
) -> IwocsResult:
    """Solve the listed models, act on the most pessimistic of them, add the model that hurts this most, repeat.

    ``first_model``: key of T_0, the first member by default. ``gap_tolerance``: the paper's epsilon, in units of the
    return. ``solver_tolerance``: of value iteration (paper: 1e-3). Raises ValueError on settings out of range.

    Differs from the paper: policies are evaluated exactly, not by rollouts; the gap is the one to the best iterate so
    far, which is returned, and counts the error of value iteration; a worst model that is in the list already ends the
    search, since nothing would change (the gap need not close, even on rectangular sets). Of equally bad models a list
    yields the first, a product the one that is also worst where the policy never acts; the paper leaves this open.
    """
    if max_iterations < 1:
        raise ValueError(f"max_iterations={max_iterations!r}; expected at least 1")
    if not gap_tolerance > solver_tolerance:
        found = f"gap_tolerance={gap_tolerance!r}, solver_tolerance={solver_tolerance!r}"
        raise ValueError(f"{found}; expected the gap's to be larger: no gap is known better than what it is made of")
    key = mdp.first() if first_model is None else first_model
    turns: list[Iteration] = []
    errors, dual_bounds = [], []
    stopped: Stopped = "max_iterations"
    while len(turns) < max_iterations:
        solved = value_iteration(mdp.model(key), mdp.gamma, solver_tolerance)
        q = _pessimistic(turns[-1].q, solved.q) if turns else solved.q
        policy = greedy(q)
        worst = worst_case(mdp, policy)
        turns.append(Iteration(key, q, policy, float(mdp.start @ q.max(-1)), worst.value, worst.model))
        errors.append(solved.error)
        dual_bounds.append(float(mdp.start @ solved.values) + solved.error)
        if turns[-1].upper + max(errors) - max(turn.lower for turn in turns) <= gap_tolerance:
            stopped = "certified" if mdp.is_rectangular else "gap_closed"
            break
        if worst.model in [turn.model for turn in turns]:
            stopped = "repeated"
            break
        key = worst.model
    best = int(np.argmax([turn.lower for turn in turns]))
    chosen = turns[best]
    return IwocsResult(
        policy=chosen.policy,
        worst_case=chosen.lower,
        worst_model=chosen.worst_model,
        best=best,
        iterations=tuple(turns),
        stopped=stopped,
        dual_bound=min(dual_bounds),
        is_rectangular=mdp.is_rectangular,
        solver_error=max(errors),
    )


def _pessimistic(so_far: Array, joined: Array) -> Array:
    """Q_i = min_{j <= i} Q*_{T_j}, from Q_{i-1} and the optimal values of the model that joined."""
    return np.minimum(so_far, joined)
