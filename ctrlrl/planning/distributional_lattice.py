"""Distributional dynamic programming with rewards on a lattice and gamma = 1: laws as one array [S, C, X]."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, DTypeLike
from scipy.sparse import csr_matrix

from ctrlrl.core.distribution import Law
from ctrlrl.core.functional import ExpectedUtility, NotOptimisableError
from ctrlrl.planning.distributional_arrays import MAX_BYTES, Array, Padded, greedy, select, slack_of, total_of
from ctrlrl.planning.distributional_table import OutcomeTable

VALUES = 16384
"""Values by state, action and stock that are reckoned at once: few enough to stay in the cache."""
LAWS = 4096
"""Laws moved at once, for the same reason."""


@dataclass(frozen=True)
class Lattice:
    """The stocks and the returns that are kept, in steps of ``unit``."""

    unit: float
    low: int
    """Least stock, in units."""
    stocks: int
    """How many stocks: C."""
    first: int
    """Least return, in units."""
    atoms: int
    """How many returns: X."""

    def stock_index(self, stock: Any) -> int:
        """Of the nearest stock that is kept; raises ValueError for one off the lattice."""
        k = float(stock) / self.unit
        if abs(k - round(k)) > 1e-6:
            raise ValueError(f"stock {stock!r} is no multiple of the unit {self.unit}")
        return min(max(round(k) - self.low, 0), self.stocks - 1)


@dataclass(frozen=True)
class LatticePlan:
    """Best policy on (time, state, stock), all stocks of a window at once.

    Its policy remembers stocks clipped to the window. ``law`` is the law of just that policy.
    """

    table: OutcomeTable
    functional: ExpectedUtility
    horizon: int
    lattice: Lattice
    values: Array
    """[S, C] float64: F = E f(stock + return) at time 0."""
    value_errors: Array
    """[S, C] bound on the error of ``values`` from clipping the stock; 0 where no stock was clipped to any effect."""
    chosen: Array
    """[horizon, S, C] unsigned integers: actions."""
    laws: Array | None
    """[S, C, X] laws of the return at time 0; None if they were not asked for."""
    law_errors: Array
    """[S, C] Wasserstein-1 bound on what clipping returns to the atoms did to ``laws``."""
    bytes_used: int
    """Memory reckoned beforehand."""

    gamma: int = 1

    @property
    def stocks(self) -> tuple[float, ...]:
        """The stocks of the window."""
        return tuple((self.lattice.unit * (self.lattice.low + np.arange(self.lattice.stocks))).tolist())

    @property
    def error_bound(self) -> float:
        """Largest ``value_error`` over the stocks of the window."""
        return max(self.value_error(c) for c in self.stocks)

    def value(self, stock: Any, state: int | None = None) -> float:
        """F from a state, or from the start of episodes."""
        return self._at(self.values, stock, state)

    def value_error(self, stock: Any) -> float:
        """Bound on the error of ``value`` at one initial stock."""
        return self._at(self.value_errors, stock, None)

    def law_error(self, stock: Any) -> float:
        """Wasserstein-1 bound on the error of ``law`` at one initial stock, beside rounding."""
        return self._at(self.law_errors, stock, None)

    def law(self, stock: Any, state: int | None = None) -> Law:
        """Law of the return from a state, or from the start; raises ValueError if no laws were kept."""
        if self.laws is None:
            raise ValueError("laws were not kept; solve with keep_laws=True, or push the policy forward with evaluate")
        j, starts = self._index(stock), self.table.start if state is None else ((1.0, state),)
        weights = sum(float(p) * self.laws[s, j].astype(np.float64) for p, s in starts)
        atoms = self.lattice.unit * (self.lattice.first + np.arange(self.lattice.atoms))
        return Law.of(atoms, weights / np.sum(weights))

    def action(self, t: int, state: int, stock: Any) -> int:
        """The action at time t (0 first); stocks outside the window count as its border."""
        return int(self.chosen[t, state, self.lattice.stock_index(stock)])

    def _index(self, stock: Any) -> int:
        j = self.lattice.stock_index(stock)
        if abs(self.lattice.unit * (self.lattice.low + j) - float(stock)) > 1e-6 * self.lattice.unit:
            raise ValueError(f"stock {stock!r} is outside the window {self.stocks[0]} to {self.stocks[-1]}")
        return j

    def _at(self, array: Array, stock: Any, state: int | None) -> float:
        j, starts = self._index(stock), self.table.start if state is None else ((1.0, state),)
        return float(sum(float(p) * array[s, j] for p, s in starts))


def solve_lattice(
    table: OutcomeTable,
    functional: Any,
    horizon: int,
    stocks: tuple[float, float] | None = None,
    atoms: tuple[float, float] | None = None,
    unit: float = 1.0,
    dtype: DTypeLike = np.float32,
    policy: ArrayLike | None = None,
    keep_laws: bool = True,
    max_bytes: int = MAX_BYTES,
) -> LatticePlan:
    """Distributional value iteration where every reward is a multiple of ``unit``; gamma = 1.

    ``stocks``, ``atoms``: least and largest stock and return that are kept; by default all that any policy needs which
    begins with a stock between -(largest return) and -(least return).
    ``dtype`` of the laws: float32 or float64. ``policy`` [S], [horizon, S] or [horizon, S, C]: evaluated instead of
    optimised. An action is chosen by its F alone, since K of a mixture of laws is the mean of their K; only laws of
    chosen actions are moved. Raises NotOptimisableError unless K is an expected utility, ValueError off the lattice and
    where more than ``max_bytes`` of memory would be needed.
    """
    if not isinstance(functional, ExpectedUtility):
        raise NotOptimisableError(f"{functional.name}: the lattice takes expected utilities; use engine='exact'")
    steps = _Steps(table, unit)
    ranges = _ranges(steps, horizon)
    grid = _lattice(functional, ranges, stocks, atoms, unit)
    size, pad = (table.states + 1) * grid.stocks, steps.pad
    small = np.dtype(np.uint8 if table.actions <= 256 else np.uint16)
    parts = {
        "laws": 2 * size * (grid.atoms + 2 * pad) * np.dtype(dtype).itemsize if keep_laws else 0,
        "policy": horizon * size * small.itemsize,
        "values": 8 * 8 * (table.states + 1) * (grid.stocks + 2 * pad),
    }
    total = sum(parts.values())
    if total > max_bytes:
        needs = ", ".join(f"{name} {count / 2**20:,.0f} MiB" for name, count in parts.items())
        shape = f"{table.states} states x {grid.stocks} stocks x {grid.atoms} atoms, horizon {horizon}"
        text = f"{shape} takes {total / 2**20:,.0f} MiB ({needs}), allowed are {max_bytes / 2**20:,.0f}"
        raise ValueError(f"{text}: narrow stocks or atoms, use keep_laws=False, or raise max_bytes")
    fixed = _fixed(policy, horizon, table.states, grid.stocks)
    values = _Values(functional, grid, steps, ranges)
    laws = _Laws(grid, steps, table.states, dtype) if keep_laws else None
    chosen = np.zeros((horizon, table.states + 1, grid.stocks), dtype=small)
    for t in reversed(range(horizon)):
        chosen[t] = values.sweep(t, None if fixed is None else fixed[t])
        if laws is not None:
            laws.sweep(chosen[t])
    s = table.states
    law_errors = laws.errors[:s] if laws is not None else np.zeros((s, grid.stocks))
    kept = laws.array[:s] if laws is not None else None
    return LatticePlan(
        table, functional, horizon, grid, values.utility[:s], values.errors[:s], chosen[:, :s], kept, law_errors, total
    )


class _Steps:
    """The table in units: arrays [S + 1, A, B], rewards as shifts."""

    def __init__(self, table: OutcomeTable, unit: float) -> None:
        self.to, self.probability, reward = table.arrays()
        shift = np.rint(reward / unit).astype(np.int64)
        off = np.abs(reward - unit * shift) > 1e-9 * unit
        if off.any():
            raise ValueError(f"the reward {reward[off][0]} is no multiple of the unit {unit}")
        real = self.probability > 0
        self.pad = int(np.abs(shift[real]).max())
        self.shifts = [int(k) for k in np.unique(shift[real])]
        # what fills rows up has a shift that occurs nowhere, so that ``select`` leaves it out
        self.shift = np.where(real, shift, self.pad + 1)
        self.actions, width = self.to.shape[1:]
        flat = (-1, width)
        # by (state, action) [(S + 1) A, B], as both sweeps read them
        self.to, self.shift = self.to.reshape(flat).astype(np.int32), self.shift.reshape(flat).astype(np.int32)
        self.probability = self.probability.reshape(flat)
        self.states = len(self.to) // self.actions

    def matrices(self, states: slice) -> list[tuple[int, csr_matrix]]:
        """By reward, the probabilities [s A, S + 1] of the successors of some states."""
        rows = slice(states.start * self.actions, states.stop * self.actions)
        return select(self.to[rows], self.probability[rows], self.shift[rows], self.shifts, self.states)

    def expect(self, padded: Padded, matrices: list[tuple[int, csr_matrix]]) -> Array:
        """E padded[next state, stock + reward] over outcomes: [s, A, C]."""
        total = total_of(m @ padded.shifted(k) for k, m in matrices)
        return total.reshape(-1, self.actions, padded.stride)[:, :, self.pad : self.pad + padded.width]


class _Values:
    """F, the mean return that breaks its ties, and the bound on the error of F, backward in time."""

    def __init__(
        self, functional: ExpectedUtility, grid: Lattice, steps: _Steps, ranges: list[tuple[int, int]]
    ) -> None:
        self.steps, self.grid, self.functional, self._ranges = steps, grid, functional, ranges
        self._now, self._next = (
            [Padded(steps.states, grid.stocks, steps.pad, np.float64) for _ in ("utility", "mean", "error")]
            for _ in range(2)
        )
        self.utility[:] = self._apply(grid.low + np.arange(grid.stocks))
        gain = np.where(steps.probability > 0, steps.probability * steps.shift, 0.0).sum(-1)
        self._gain = gain.reshape(-1, steps.actions, 1)
        many = max(1, VALUES // (grid.stocks * steps.actions))
        self._chunks = [slice(low, min(low + many, steps.states)) for low in range(0, steps.states, many)]
        self._matrices = [steps.matrices(chunk) for chunk in self._chunks]

    @property
    def utility(self) -> Array:
        return self._now[0].core

    @property
    def errors(self) -> Array:
        return self._now[2].core

    def sweep(self, t: int, fixed: Array | None) -> Array:
        """One step backward; the actions chosen [S + 1, C]."""
        self._fill_borders(*self._ranges[t + 1])
        utility, mean, error = self._now
        chosen = np.zeros((self.steps.states, self.grid.stocks), dtype=np.int64)
        clipped, slack = error.full.any(), slack_of(utility.core)
        for chunk, matrices in zip(self._chunks, self._matrices, strict=True):
            q = self.steps.expect(utility, matrices)
            q_mean = self.steps.expect(mean, matrices) + self._gain[chunk]
            if fixed is None:
                here, best, best_mean = greedy(q, q_mean, slack)
            else:
                here = fixed[chunk]
                best, best_mean = (np.take_along_axis(x, here[:, None], 1)[:, 0] for x in (q, q_mean))
            chosen[chunk], self._next[0].core[chunk], self._next[1].core[chunk] = here, best, best_mean
            # the error of a maximum is at most the largest error, whichever action it comes from
            self._next[2].core[chunk] = self.steps.expect(error, matrices).max(1) if clipped else 0.0
        self._now, self._next = self._next, self._now
        return chosen

    def _apply(self, units: Array) -> Array:
        return np.asarray(self.functional.function(self.grid.unit * units.astype(np.float64)), dtype=np.float64)

    def _fill_borders(self, least: int, largest: int) -> None:
        """Beyond the window F goes on as f does; the error is how far f(c + G) - f(c) differs from the border's."""
        pad, grid = self.steps.pad, self.grid
        if not pad:
            return
        returns = np.arange(least, largest + 1)
        last = grid.low + grid.stocks - 1
        for border, beyond, columns, edge in (
            (grid.low, grid.low - np.arange(pad, 0, -1), slice(0, pad), 0),
            (last, last + np.arange(1, pad + 1), slice(pad + grid.stocks, None), -1),
        ):
            extra = self._apply(beyond) - self._apply(np.array([border]))
            for padded in self._now:
                padded.full[:, columns] = padded.core[:, [edge]]
            self._now[0].full[:, columns] += extra
            moved = self._apply((beyond[:, None] + returns).ravel()).reshape(pad, -1) - self._apply(border + returns)
            wrong = np.abs(moved - extra[:, None]).max(1)
            # rounding of f itself is no error of clipping
            self._now[2].full[:, columns] += np.where(wrong > 1e-9 * np.maximum(1.0, np.abs(extra)), wrong, 0.0)


class _Laws:
    """Laws of the return [S + 1, C, X], moved by the chosen actions."""

    def __init__(self, grid: Lattice, steps: _Steps, states: int, dtype: DTypeLike) -> None:
        self.grid, self.steps, self.states = grid, steps, states + 1
        rows = self.states * grid.stocks
        # a row of indices must fit int32
        if rows >= 2**31:
            raise ValueError(f"{rows} laws; expected fewer than 2^31")
        self._now, self._next = (Padded(rows, grid.atoms, steps.pad, dtype) for _ in range(2))
        self._weight, self._first = steps.probability.astype(dtype), steps.to * np.int32(grid.stocks)
        zero = min(max(-grid.first, 0), grid.atoms - 1)
        self._now.core[:, zero] = 1.0
        self.errors = np.full((self.states, grid.stocks), grid.unit * abs(-grid.first - zero))

    @property
    def array(self) -> Array:
        return self._now.core.reshape(self.states, self.grid.stocks, -1)

    def sweep(self, chosen: Array) -> None:
        grid, steps, count = self.grid, self.steps, self.grid.stocks
        stock, errors, wrong = np.arange(count, dtype=np.int32), np.zeros_like(self.errors), self.errors.any()
        many = max(1, LAWS // count)
        for low in range(0, self.states, many):
            s = slice(low, min(low + many, self.states))
            pair = (np.arange(s.start, s.stop)[:, None] * steps.actions + chosen[s]).ravel()
            shift, weight = steps.shift.take(pair, 0), self._weight.take(pair, 0)
            at = np.tile(stock, s.stop - s.start)[:, None] + shift
            index = self._first.take(pair, 0) + at.clip(0, count - 1)
            here = slice(s.start * count, s.stop * count)
            made = select(index, weight, shift, steps.shifts, self._now.rows)
            total = total_of(m @ self._now.shifted(-k) for k, m in made)
            self._next.core[here] = total[:, steps.pad : steps.pad + grid.atoms]
            lost = self._fold(total, self._next.core[here])
            if wrong:
                lost += (weight * self.errors.ravel()[index]).sum(1)
            errors[s] = lost.reshape(-1, count)
        self._now, self._next, self.errors = self._next, self._now, errors

    def _fold(self, total: Array, core: Array) -> Array:
        """Mass beyond the atoms goes to the border; how far it went, on average."""
        pad = self.steps.pad
        lost = np.zeros(len(core))
        for beyond, edge, far in (
            (total[:, :pad], 0, np.arange(pad, 0, -1)),
            (total[:, pad + self.grid.atoms :], -1, np.arange(1, pad + 1)),
        ):
            if beyond.any():
                core[:, edge] += beyond.sum(1)
                lost += self.grid.unit * (beyond @ far)
        return lost


def _ranges(steps: _Steps, horizon: int) -> list[tuple[int, int]]:
    """By time, least and largest return in units that any state may still meet; the last entry is the horizon."""
    low = high = np.zeros(steps.states, dtype=np.int64)
    found = [(0, 0)]
    real = steps.probability > 0
    for _ in range(horizon):
        low = np.where(real, steps.shift + low[steps.to], np.iinfo(np.int64).max)
        low = low.reshape(steps.states, -1).min(1)
        high = np.where(real, steps.shift + high[steps.to], np.iinfo(np.int64).min)
        high = high.reshape(steps.states, -1).max(1)
        found.append((int(low.min()), int(high.max())))
    return found[::-1]


def _lattice(
    functional: ExpectedUtility,
    ranges: list[tuple[int, int]],
    stocks: tuple[float, float] | None,
    atoms: tuple[float, float] | None,
    unit: float,
) -> Lattice:
    if not unit > 0:
        raise ValueError(f"unit={unit!r}; expected > 0")
    least, largest = unit * min(low for low, _ in ranges), unit * max(high for _, high in ranges)
    if stocks is None:
        # where f is linear on either side of 0, stocks beyond these decide nothing; otherwise all c0 + rewards are kept
        margin = 0.0 if functional.degree in (0, 1) else largest - least
        stocks = (-largest - margin, -least + margin)
    low, high = (_units(v, unit, "stocks") for v in stocks)
    first, last = (_units(v, unit, "atoms") for v in (atoms if atoms is not None else (least, largest)))
    if high < low or last < first:
        raise ValueError(f"stocks={stocks!r}, atoms={atoms!r}; expected the least first")
    return Lattice(float(unit), low, high - low + 1, first, last - first + 1)


def _units(value: Any, unit: float, name: str) -> int:
    k = float(value) / unit
    if abs(k - round(k)) > 1e-6:
        raise ValueError(f"{name}: {value!r} is no multiple of the unit {unit}")
    return round(k)


def _fixed(policy: ArrayLike | None, horizon: int, states: int, stocks: int) -> Array | None:
    """The given actions as [horizon, S + 1, C]."""
    if policy is None:
        return None
    found = np.asarray(policy)
    views: dict[tuple[int, ...], Callable[[Array], Array]] = {
        (horizon, states, stocks): lambda x: x,
        (horizon, states): lambda x: x[:, :, None],
        (states,): lambda x: x[None, :, None],
    }
    if found.shape not in views or not np.issubdtype(found.dtype, np.integer):
        wanted = f"integers [{states}], [{horizon}, {states}] or [{horizon}, {states}, {stocks}]"
        raise ValueError(f"policy: {found.dtype} {list(found.shape)}; expected {wanted}")
    full = np.broadcast_to(views[found.shape](found), (horizon, states, stocks))
    return np.concatenate([full, np.zeros((horizon, 1, stocks), dtype=found.dtype)], axis=1)
