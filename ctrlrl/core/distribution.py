"""Laws with finitely many atoms, exact in rationals or fast in float64; distances between them and projections."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import isinf
from numbers import Integral, Rational
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

Numbers: TypeAlias = NDArray[Any]
"""float64, or dtype object holding ``fractions.Fraction``."""

SUM_TOLERANCE = 1e-9
"""How far float probabilities may be from summing to one."""
LEVEL_TOLERANCE = 1e-12
"""Slack in cumulated float probabilities, so that .7 + .1 reaches the level .8."""


@dataclass(frozen=True, eq=False)
class Law:
    """Law of a random number or vector. Build it with ``Law.of``, ``Law.at`` or ``Law.mixture``."""

    atoms: Numbers
    """[n] ascending, or vectors [n, m] in lexicographic order; all different."""

    probabilities: Numbers
    """[n] positive, of the same dtype as the atoms."""

    @classmethod
    def of(cls, atoms: Any, probabilities: Any = None) -> Law:
        """The law of atoms [n] or [n, m], equal ones merged; without probabilities all [n] weigh the same.

        Where a Fraction occurs and all else is rational the law is exact; everything else becomes float64. Raises
        ValueError on shapes, on numbers that are not finite, and on what is no distribution.
        """
        if probabilities is None:
            count = max(len(np.asarray(atoms, dtype=object)), 1)
            probabilities = [Fraction(1, count) if _has_fraction(atoms) else 1.0 / count] * count
        x, p = _numbers(atoms, probabilities)
        if x.ndim not in (1, 2) or x.size == 0 or p.shape != x.shape[:1]:
            found = f"atoms {list(x.shape)}, probabilities {list(p.shape)}"
            raise ValueError(f"{found}; expected atoms [n] or [n, m] with probabilities [n], n >= 1")
        exact = p.dtype == object
        if not exact and not (np.isfinite(x).all() and np.isfinite(p).all()):
            raise ValueError("atoms or probabilities contain NaN or infinity")
        total, least = p.sum(), p.min()
        if least < 0 or (total != 1 if exact else abs(total - 1) > SUM_TOLERANCE):
            raise ValueError(f"probabilities sum to {total}, least {least}; expected >= 0 that sum to one")
        return cls(*_merge(x[p > 0], p[p > 0]))

    @classmethod
    def at(cls, atom: Any) -> Law:
        """All mass on one number or vector [m]; exact if it is a Fraction or holds one."""
        return cls.of([atom], [Fraction(1) if _has_fraction([atom]) else 1.0])

    @classmethod
    def mixture(cls, laws: Sequence[Law], weights: Any) -> Law:
        """The law drawn first, then the outcome from it; weights [k] are probabilities."""
        w = np.asarray(weights, dtype=object)
        if len(laws) == 0 or w.shape != (len(laws),):
            raise ValueError(f"{len(laws)} laws, weights {list(w.shape)}; expected at least one law, a weight each")
        mass = np.concatenate([weight * law.probabilities for weight, law in zip(w, laws, strict=True)])
        return cls.of(np.concatenate([law.atoms for law in laws]), mass)

    def __eq__(self, other: object) -> bool:
        """The same atoms with exactly the same probabilities."""
        if not isinstance(other, Law):
            return NotImplemented
        same = np.array_equal(self.atoms, other.atoms)
        return bool(same and np.array_equal(self.probabilities, other.probabilities))

    @property
    def exact(self) -> bool:
        """Atoms and probabilities are rationals."""
        return self.probabilities.dtype == object

    def affine(self, scale: Any = 1, shift: Any = 0) -> Law:
        """Law of scale X + shift; on vectors ``shift`` may be [m]."""
        atoms = self.atoms * scale + np.asarray(shift, dtype=object if self.exact else None)
        return Law.of(atoms, self.probabilities)

    def expect(self, function: Callable[[Numbers], Any]) -> Any:
        """E function(X); the function maps all atoms at once, [n] or [n, m] to [n]."""
        values = np.asarray(function(self.atoms))
        if values.shape != self.probabilities.shape:
            found = f"the function maps atoms {list(self.atoms.shape)} to {list(values.shape)}"
            raise ValueError(f"{found}; expected one number per atom")
        return (self.probabilities * values).sum()

    def mean(self) -> Any:
        """E X; of vectors [m]."""
        return self.probabilities @ self.atoms

    def variance(self) -> Any:
        """E (X - E X)^2; of vectors each component's, [m]."""
        return self.probabilities @ (self.atoms - self.mean()) ** 2

    def cdf(self, x: Any) -> Any:
        """P(X <= x)."""
        return self.probabilities[self._scalars() <= x].sum()

    def quantile(self, level: Any) -> Any:
        """The least atom x with P(X <= x) >= level, 0 <= level <= 1; at 0 the least atom."""
        if not 0 <= level <= 1:
            raise ValueError(f"level={level!r}; expected 0 <= level <= 1")
        return self.quantiles([level])[0]

    def quantiles(self, levels: Any) -> Numbers:
        """``quantile`` at levels [k] in [0, 1], not checked."""
        below = self.probabilities.cumsum()
        wanted = np.asarray(levels, dtype=object) if self.exact else np.asarray(levels, float) - LEVEL_TOLERANCE
        return self._scalars()[np.searchsorted(below, wanted).clip(max=len(below) - 1)]

    def cvar(self, level: Any) -> Any:
        """Mean of the worst share ``level`` of outcomes: (1/level) int_0^level q(u) du."""
        below = self.probabilities.cumsum() - self.probabilities
        return self._tail_mean(level, below)

    def upper_cvar(self, level: Any) -> Any:
        """Mean of the best share ``level`` of outcomes."""
        above = self.probabilities[::-1].cumsum()[::-1] - self.probabilities
        return self._tail_mean(level, above)

    def entropic(self, beta: float) -> float:
        """(1/beta) log E exp(beta X); beta < 0 shuns risk, beta > 0 seeks it, at 0 the mean."""
        atoms, p = self._scalars().astype(float), self.probabilities.astype(float)
        if beta == 0:
            return float(p @ atoms)
        top = (beta * atoms).max()
        return float((top + np.log(p @ np.exp(beta * atoms - top))) / beta)

    def pruned(self, tolerance: Any) -> tuple[Law, Any]:
        """Atoms rarer than ``tolerance`` joined to the nearest that stays, and how far that is in Wasserstein-1."""
        atoms, keep = self._scalars(), self.probabilities >= tolerance
        if not keep.any():
            keep = self.probabilities == self.probabilities.max()
        kept = atoms[keep]
        right = np.searchsorted(kept, atoms).clip(max=len(kept) - 1)
        left = (right - 1).clip(min=0)
        nearest = np.where(atoms - kept[left] <= np.abs(kept[right] - atoms), left, right)
        moved = Law.of(kept[nearest], self.probabilities)
        return moved, (self.probabilities * np.abs(atoms - kept[nearest])).sum()

    def _scalars(self) -> Numbers:
        if self.atoms.ndim != 1:
            raise ValueError(f"the atoms are vectors {list(self.atoms.shape)}; expected numbers [n]")
        return self.atoms

    def _tail_mean(self, level: Any, outside: Numbers) -> Any:
        if not 0 < level <= 1:
            raise ValueError(f"level={level!r}; expected 0 < level <= 1")
        share = np.minimum(self.probabilities, np.maximum(level - outside, 0))
        return (share * self._scalars()).sum() / level


def wasserstein(a: Law, b: Law, p: float = 1) -> Any:
    """Wasserstein-p distance of laws of numbers: how far quantiles are apart.

    (int_0^1 |q_a(u) - q_b(u)|^p du)^(1/p);  p = inf: the largest difference

    ======  ==============================================
    a       law of numbers
    b       law of numbers
    p       order, 1 <= p <= inf
    return  at p = 1 exact if both laws are
    ======  ==============================================
    """
    if not p >= 1:
        raise ValueError(f"p={p!r}; expected 1 <= p <= inf")
    cuts = np.unique(np.concatenate([a.probabilities.cumsum(), b.probabilities.cumsum()]))
    width = np.diff(cuts, prepend=0)
    apart = np.abs(a.quantiles(cuts) - b.quantiles(cuts))
    if isinf(p):
        return apart[width > LEVEL_TOLERANCE].max()
    return (width * apart).sum() if p == 1 else float((width * apart**p).sum()) ** (1 / p)


def cramer(a: Law, b: Law) -> float:
    """Cramér distance of laws of numbers.

    (int (F_a(x) - F_b(x))^2 dx)^(1/2)

    ======  ==============
    a       law of numbers
    b       law of numbers
    return  >= 0
    ======  ==============
    """
    x = np.unique(np.concatenate([a.atoms, b.atoms]))
    gap = np.array([a.cdf(at) - b.cdf(at) for at in x[:-1]])
    return float((gap**2 * np.diff(x)).sum()) ** 0.5 if len(x) > 1 else 0.0


def categorical_projection(law: Law, support: Any) -> tuple[Law, Any]:
    """Each atom shared between its two neighbours on a support so that the mean stays; what lies outside is clipped.

    Bellemare, Dabney and Munos 2017, equation 7. Between points h apart the Wasserstein-1 error is at most h/2.

    =======  ===  ==================================================
    law           of numbers
    support  [k]  ascending
    return        law on the support, Wasserstein-1 error
    =======  ===  ==================================================
    """
    grid, _ = _numbers(support, law.probabilities)
    if grid.ndim != 1 or len(grid) < 1 or not (grid[1:] > grid[:-1]).all():
        raise ValueError(f"support {list(grid.shape)}; expected numbers [k] that ascend, k >= 1")
    if len(grid) == 1:
        projected = Law.of(grid, law.probabilities.sum(keepdims=True))
        return projected, wasserstein(law, projected)
    inside = np.minimum(np.maximum(law.atoms, grid[0]), grid[-1])
    left = (np.searchsorted(grid, inside, side="right") - 1).clip(max=len(grid) - 2)
    right_share = (inside - grid[left]) / (grid[left + 1] - grid[left])
    atoms = np.concatenate([grid[left], grid[left + 1]])
    shares = np.concatenate([law.probabilities * (1 - right_share), law.probabilities * right_share])
    projected = Law.of(atoms, shares)
    return projected, wasserstein(law, projected)


def quantile_projection(law: Law, m: int) -> tuple[Law, Any]:
    """The m midpoint quantiles with equal weights: the nearest such law in Wasserstein-1.

    atoms q((2i - 1) / 2m), i = 1..m (Dabney et al. 2018, lemma 2);  error <= (largest - least atom) / 2m

    ======  =======================================
    law     of numbers
    m       atoms, >= 1
    return  projected law, Wasserstein-1 error
    ======  =======================================
    """
    if m < 1:
        raise ValueError(f"m={m!r}; expected at least one atom")
    levels = [Fraction(2 * i + 1, 2 * m) for i in range(m)]
    projected = Law.of(law.quantiles(levels), [Fraction(1, m) if law.exact else 1 / m] * m)
    return projected, wasserstein(law, projected)


def _has_fraction(values: Any) -> bool:
    if isinstance(values, np.ndarray) and values.dtype != object:
        return False
    return any(isinstance(v, Fraction) for v in np.asarray(values, dtype=object).ravel())


def _numbers(*arrays: Any) -> list[Numbers]:
    """All as Fractions if one of them holds a Fraction and all else is rational; otherwise all float64."""
    if not any(_has_fraction(a) for a in arrays):
        return [np.asarray(a, dtype=np.float64) for a in arrays]
    found = [np.asarray(a, dtype=object) for a in arrays]
    if not all(isinstance(v, Rational) for a in found for v in a.ravel()):
        return [a.astype(np.float64) for a in found]
    return [_fractions(a) for a in found]


def _fractions(array: Numbers) -> Numbers:
    whole = [Fraction(int(v)) if isinstance(v, Integral) else v for v in array.ravel()]
    return np.array(whole, dtype=object).reshape(array.shape)


def _merge(x: Numbers, p: Numbers) -> tuple[Numbers, Numbers]:
    """Atoms in order, equal ones once with the sum of their probabilities."""
    by_atom = sorted(range(len(x)), key=lambda i: tuple(x[i])) if x.ndim == 2 else np.argsort(x, kind="stable")
    order = np.asarray(by_atom)
    x, p = x[order], p[order]
    differs = x[1:] != x[:-1]
    first = np.flatnonzero(np.append(True, differs if x.ndim == 1 else differs.any(1)))
    return x[first], np.add.reduceat(p, first)
