"""Discounted distributional dynamic programming without a horizon, on grids of stocks and returns."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, log
from typing import Any

import numpy as np
from scipy.sparse import csr_matrix

from ctrlrl.core.distribution import Law
from ctrlrl.core.functional import ExpectedUtility, NotOptimisableError
from ctrlrl.planning.distributional_arrays import MAX_BYTES, Array, greedy, select, slack_of, total_of
from ctrlrl.planning.distributional_table import OutcomeTable


def truncation_bound(lipschitz: float, gamma: float, sweeps: int, reward_size: float) -> float:
    """L gamma^n r / (1 - gamma): how far F is from the optimum after n sweeps begun at returns of 0.

    Ávila Pires et al., section 4, with sup W1(delta_0, law of the return) <= r / (1 - gamma), r the largest 1-norm of a
    reward. Needs f of degree one.
    """
    return lipschitz * gamma**sweeps * reward_size / (1.0 - gamma)


def sweeps_for(tolerance: float, lipschitz: float, gamma: float, reward_size: float) -> int:
    """Sweeps after which ``truncation_bound`` is at most ``tolerance``; raises ValueError unless 0 < gamma < 1."""
    if not 0.0 < gamma < 1.0 or not tolerance > 0:
        raise ValueError(f"gamma={gamma!r}, tolerance={tolerance!r}; expected 0 < gamma < 1 and tolerance > 0")
    start = truncation_bound(lipschitz, gamma, 0, reward_size)
    return max(1, ceil(log(tolerance / start) / log(gamma))) if start > tolerance else 1


@dataclass(frozen=True)
class GridPlan:
    """Best stationary policy on (state, stock); stocks are rounded to the grid, which covers all that decide anything.

    The policy's memory is the rounded stock: ``law`` is the law of the return of just that policy.
    """

    table: OutcomeTable
    functional: ExpectedUtility
    gamma: float
    grid: Array
    """[C] stocks, ascending."""
    atoms: Array
    """[X] returns, ascending."""
    values: Array
    """[S, C] F = E f(stock + return)."""
    chosen: Array
    """[S, C] actions."""
    laws: Array
    """[S, C, X] laws of the return under ``chosen``."""
    error_bound: float
    """No entry of ``values`` is further from the optimum."""
    law_error: float
    """No law is further in Wasserstein-1 from that of its policy: projection and truncation."""
    sweeps: int
    differences: tuple[float, ...]
    """Largest change of F by sweep; each at most gamma times the one before."""

    horizon: None = None

    @property
    def stocks(self) -> tuple[float, ...]:
        return tuple(self.grid.tolist())

    def value(self, stock: Any, state: int | None = None) -> float:
        """F, linear between stocks of the grid, from a state or from the start of episodes."""
        c, starts = float(stock), self.table.start if state is None else ((1.0, state),)
        inside = min(max(c, self.grid[0]), self.grid[-1])
        beyond = np.asarray(self.functional.function(np.array([c, inside])), dtype=float)
        at = sum(float(p) * np.interp(inside, self.grid, self.values[s]) for p, s in starts)
        return float(at + beyond[0] - beyond[1])

    def achieved(self, stock: Any, state: int | None = None) -> float:
        """K of stock + return for the law of the policy; within L ``law_error`` of what it is worth."""
        return float(self.functional(self.law(stock, state).affine(1, float(stock))))

    def value_error(self, stock: Any) -> float:
        """Bound on the error of ``value``; between stocks of the grid what interpolation adds is counted."""
        between = 0.0 if float(stock) in self.grid else float(self.functional.lipschitz or 0.0) * self.spacing / 2
        return self.error_bound + between

    def law(self, stock: Any, state: int | None = None) -> Law:
        """Law of the return from a state, or from the start of episodes."""
        j, starts = self._nearest(stock), self.table.start if state is None else ((1.0, state),)
        mass = sum(float(p) * self.laws[s, j] for p, s in starts)
        return Law.of(self.atoms, mass / np.sum(mass))

    def action(self, t: int, state: int, stock: Any) -> int:
        """The action in a state with a stock, the same at all times."""
        return int(self.chosen[state, self._nearest(stock)])

    @property
    def spacing(self) -> float:
        """Between neighbouring stocks."""
        return float(np.diff(self.grid).max())

    def _nearest(self, stock: Any) -> int:
        return int(np.abs(self.grid - float(stock)).argmin())


def solve_grid(
    table: OutcomeTable,
    functional: Any,
    gamma: float,
    tolerance: float = 1e-3,
    n_stocks: int = 201,
    n_atoms: int = 201,
    max_bytes: int = MAX_BYTES,
) -> GridPlan:
    """Distributional value iteration, then the laws of its policy by categorical projection.

    F is linear between stocks, which costs at most L h / 2 at each look-up, h apart: in all
    L h gamma (1 - gamma^n) / (2 (1 - gamma)), and truncation comes on top; ``tolerance`` is of the latter alone. Beyond
    the grid an f of degree one is linear wherever the return may end, so that nothing is lost there. Raises
    NotOptimisableError unless K is an expected utility of degree one, ValueError on gamma, vectors and sizes.
    """
    if not isinstance(functional, ExpectedUtility) or functional.degree != 1 or functional.lipschitz is None:
        raise NotOptimisableError(f"{functional.name}: without a horizon f must be Lipschitz and of degree one")
    gamma = float(gamma)
    to, probability, reward = table.arrays()
    sweeps = sweeps_for(tolerance, functional.lipschitz, gamma, table.reward_size)
    if n_stocks < 2 or n_atoms < 2:
        raise ValueError(f"n_stocks={n_stocks}, n_atoms={n_atoms}; expected at least 2 of each")
    size = 8 * len(to) * n_stocks * (3 * n_atoms + 4 * table.actions)
    if size > max_bytes:
        shape = f"{table.states} states x {n_stocks} stocks x {n_atoms} atoms"
        raise ValueError(f"{shape} takes {size / 2**20:,.0f} MiB, allowed are {max_bytes / 2**20:,.0f}")
    least, largest = (min(0.0, reward.min()) / (1 - gamma), max(0.0, reward.max()) / (1 - gamma))
    if least == largest:
        raise ValueError("all rewards are 0: there is nothing to choose")
    grid, atoms = np.linspace(-largest, -least, n_stocks), np.linspace(least, largest, n_atoms)
    rewards = np.unique(reward[probability > 0])
    # what fills rows up has a code of its own, which no reward has
    code = np.where(probability > 0, np.searchsorted(rewards, reward), len(rewards))
    shape = (len(to) * table.actions, -1)
    steps = select(
        to.reshape(shape), probability.reshape(shape), code.reshape(shape), list(range(len(rewards))), len(to)
    )

    looks = [_Look(grid, (grid + r) / gamma, functional) for r in rewards]

    def q_of(array: Array, gain: Array, beyond: bool) -> Array:
        q = total_of(m @ (gain[k] + gamma * looks[k].of(array, beyond)) for k, m in steps)
        return q.reshape(len(to), table.actions, n_stocks)

    values = np.tile(np.asarray(functional.function(grid), dtype=float), (len(to), 1))
    mean = np.zeros(values.shape)
    chosen, differences = np.zeros(values.shape, dtype=np.int64), []
    for _ in range(sweeps):
        q, q_mean = q_of(values, np.zeros(len(rewards)), True), q_of(mean, rewards, False)
        chosen, best, mean = greedy(q, q_mean, slack_of(values))
        differences.append(float(np.abs(best - values).max()))
        values = best
    laws, projection = _laws(_under(chosen, to, probability, code, grid, rewards, gamma), atoms, rewards, gamma, sweeps)
    between = functional.lipschitz * float(np.diff(grid).max()) / 2 * gamma / (1 - gamma)
    error = between + truncation_bound(functional.lipschitz, gamma, sweeps, table.reward_size)
    cut_off = gamma**sweeps
    law_error = projection * ((1 - cut_off) / (1 - gamma) + cut_off) + cut_off * max(largest, -least)
    laws = laws.reshape(*values.shape, -1)[:-1]
    return GridPlan(
        table, functional, gamma, grid, atoms, values[:-1], chosen[:-1], laws, error, law_error, sweeps,
        tuple(differences),
    )  # fmt: skip


class _Look:
    """Values at stocks off the grid: linear between its points, and as f beyond its ends."""

    def __init__(self, grid: Array, at: Array, functional: ExpectedUtility) -> None:
        inside = at.clip(grid[0], grid[-1])
        self._left = (np.searchsorted(grid, inside, side="right") - 1).clip(0, len(grid) - 2)
        self._share = (inside - grid[self._left]) / (grid[self._left + 1] - grid[self._left])
        self._beyond = np.asarray(functional.function(at) - functional.function(inside), dtype=float)

    def of(self, values: Array, beyond: bool) -> Array:
        """[S, C] values on the grid to values at the stocks, [S, C]; without ``beyond`` constant past the ends."""
        left, right = values[:, self._left], values[:, self._left + 1]
        between = left + self._share * (right - left)
        return between + self._beyond if beyond else between


def _under(
    chosen: Array, to: Array, probability: Array, code: Array, grid: Array, rewards: Array, gamma: float
) -> list[tuple[int, csr_matrix]]:
    """For each reward the sparse matrix [S C, S C] of the steps of a policy [S, C], stocks rounded to the grid."""
    state, count = np.arange(len(to))[:, None], len(grid)
    reached = np.stack([np.abs(grid[:, None] - (grid + r) / gamma).argmin(0) for r in rewards])
    kind, weight = code[state, chosen], probability[state, chosen]
    stock = reached[kind.clip(max=len(rewards) - 1), np.arange(count)[:, None]]
    shape = (len(to) * count, -1)
    index = (to[state, chosen] * count + stock).reshape(shape)
    return select(index, weight.reshape(shape), kind.reshape(shape), list(range(len(rewards))), len(index))


def _laws(
    steps: list[tuple[int, csr_matrix]], atoms: Array, rewards: Array, gamma: float, sweeps: int
) -> tuple[Array, float]:
    """Laws [S C, X] after so many sweeps from returns of 0, and the largest Wasserstein-1 error of one projection."""

    def shared(at: Array) -> tuple[Array, float]:
        """[n, X] each point shared between its neighbours, and how far that is at most."""
        left = (np.searchsorted(atoms, at, side="right") - 1).clip(0, len(atoms) - 2)
        gap = atoms[left + 1] - atoms[left]
        right_share = ((at - atoms[left]) / gap).clip(0.0, 1.0)
        row, matrix = np.arange(len(at)), np.zeros((len(at), len(atoms)))
        matrix[row, left], matrix[row, left + 1] = 1.0 - right_share, right_share
        return matrix, float((2 * right_share * (1 - right_share) * gap).max())

    zero, error = shared(np.zeros(1))
    moved = [shared(r + gamma * atoms) for r in rewards]
    rows: int = steps[0][1].get_shape()[0]
    laws = np.repeat(zero, rows, axis=0)
    for _ in range(sweeps):
        laws = total_of(m @ (laws @ moved[k][0]) for k, m in steps)
    return laws, max(error, *(e for _, e in moved))
