"""Value iteration against one model and against the worst one, and the exact value of a policy."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ctrlrl.planning.model import Array, IntArray, Model, check_policy
from ctrlrl.planning.robust_mdp import ListedMDP, ProductMDP, RobustMDP, key_of

TIE = 1e-12
"""Relative difference below which two values are the same, so that rounding does not choose between equal models."""


@dataclass(frozen=True)
class Solution:
    """Optimal values of one model."""

    values: Array
    """[S]"""

    q: Array
    """[S, A]"""

    policy: IntArray
    """[S] the greedy action, the lowest index among equals."""

    error: float
    """No entry of ``values`` and ``q`` is further than this from the truth."""


@dataclass(frozen=True)
class RobustSolution(Solution):
    """Optimal values against an adversary who chooses the row of every pair, at every step."""

    rows: IntArray
    """[S, A] the row that the adversary takes: of the pair's choices, or the index of the model it comes from."""

    is_hull: bool
    """The set is not rectangular: its rectangular hull was solved instead, whose values are a lower bound."""


@dataclass(frozen=True)
class WorstCase:
    """The member of a set against which a policy gains least from the start."""

    value: float
    """Expected discounted return from the start."""

    values: Array
    """[S] values of the policy in that model."""

    model: Hashable
    """Its key, for ``RobustMDP.model``; of equal models the first."""


def value_iteration(model: Model, gamma: float, tolerance: float = 1e-10) -> Solution:
    """Optimal values of one model, to within ``tolerance``; on large values to within what float64 resolves.

    Raises ValueError unless tolerance > 0 and 0 <= gamma < 1.
    """
    values, error = _iterate(lambda v: model.backup(v, gamma), model.states, gamma, tolerance)
    q = model.backup(values, gamma)
    return Solution(q.max(-1), q, greedy(q), error)


def robust_value_iteration(mdp: RobustMDP, tolerance: float = 1e-10) -> RobustSolution:
    """Values of max over actions, min over the rows of each pair (Iyengar 2005, Nilim and El Ghaoui 2005).

    On an (s,a)-rectangular set they are the best worst case. On any other set they are those of its rectangular hull,
    and ``is_hull`` says so: the best worst case in the set itself is at least as high.
    """
    values, error = _iterate(lambda v: mdp.worst_rows(v)[0], mdp.states, mdp.gamma, tolerance)
    q, rows = mdp.worst_rows(values)
    return RobustSolution(q.max(-1), q, greedy(q), error, rows, not mdp.is_rectangular)


def evaluate(model: Model, policy: ArrayLike, gamma: float) -> Array:
    """Values [S] of a policy, actions [S] or probabilities [S, A], by a linear solve."""
    matrix, reward = model.chain(check_policy(policy, model.states, model.actions))
    return _solve(matrix, reward, gamma)


def greedy(q: Array) -> IntArray:
    """The action of the largest entry in each row of q [S, A], the lowest index among equals; [S]."""
    best = q.max(-1, keepdims=True)
    return (q >= best - TIE * np.maximum(1.0, np.abs(best))).argmax(-1)


def worst_case(mdp: RobustMDP, policy: ArrayLike) -> WorstCase:
    """min over the members T of the policy's value from the start, exact up to rounding.

    Lists are enumerated. On a product the adversary's own decision process is solved by policy iteration; where the
    policy never acts it takes the row that would hurt most.
    """
    checked = check_policy(policy, mdp.states, mdp.actions)
    if isinstance(mdp, ProductMDP):
        return _against_product(mdp, checked)
    if isinstance(mdp, ListedMDP):
        return _against_list(mdp, checked)
    raise TypeError(f"{type(mdp).__name__}; expected a set made by RobustMDP.models, .rectangular or .tables")


def _iterate(backup: Callable[[Array], Array], states: int, gamma: float, tolerance: float) -> tuple[Array, float]:
    """Fixed point of v -> max_a backup(v), and the bound on its error.

    MacQueen's bounds, which hold for every monotone backup that carries a constant c over as gamma c:
    v + gamma/(1-gamma) min(v - old) <= v* <= v + gamma/(1-gamma) max(v - old). The middle is returned.
    """
    if not tolerance > 0:
        raise ValueError(f"tolerance={tolerance!r}; expected > 0")
    if not 0.0 <= gamma < 1.0:
        raise ValueError(f"gamma={gamma!r}; expected 0 <= gamma < 1")
    values, horizon = np.zeros(states), 1.0 / (1.0 - gamma)
    while True:
        after = backup(values).max(-1)
        low, high = (after - values).min(), (after - values).max()
        rounding = 8 * np.finfo(np.float64).eps * max(np.abs(after).max(), abs(low), abs(high))
        values = after
        if gamma * horizon * (high - low) / 2 <= max(tolerance, horizon * rounding):
            middle = values + gamma * horizon * (high + low) / 2
            return middle, float(horizon * (gamma * (high - low) / 2 + rounding))


def _solve(chain: Array, reward: Array, gamma: float) -> Array:
    """v = reward + gamma chain v, for any number of chains [..., S, S] at once."""
    system = np.eye(chain.shape[-1]) - gamma * chain
    return np.linalg.solve(system, reward[..., None])[..., 0].astype(np.float64, copy=False)


def _against_list(mdp: ListedMDP, policy: NDArray) -> WorstCase:
    chains = (block.chain(policy) for _, block in mdp.blocks(mdp.states**2))
    values = np.concatenate([_solve(chain, reward, mdp.gamma) for chain, reward in chains])
    gains = values @ mdp.start
    worst = int(np.flatnonzero(gains <= gains.min() + TIE * max(1.0, abs(gains.min())))[0])
    return WorstCase(float(gains[worst]), values[worst], worst)


def _against_product(mdp: ProductMDP, policy: NDArray) -> WorstCase:
    _, rows = mdp.worst_rows(np.zeros(mdp.states))
    while True:
        model = mdp.model(key_of(rows))
        values = evaluate(model, policy, mdp.gamma)
        least, better = mdp.worst_rows(values)
        now = model.backup(values, mdp.gamma)
        falls = least < now - TIE * np.maximum(1.0, np.abs(now))
        if not falls.any():
            return WorstCase(float(mdp.start @ values), values, key_of(rows))
        rows = np.where(falls, better, rows)
