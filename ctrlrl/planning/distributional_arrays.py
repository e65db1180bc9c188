"""Rows of arrays moved and mixed quickly, for the engines of distributional dynamic programming on grids."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import DTypeLike, NDArray
from scipy.sparse import csr_matrix

Array: TypeAlias = NDArray[Any]

TIE = 1e-11
"""Relative difference below which two values are equal."""
MAX_BYTES = 8 * 2**30
"""Largest problem that is begun without being told otherwise."""


class Padded:
    """Rows [N, pad + width + pad] in one block, so that all rows moved by k <= pad are a view."""

    def __init__(self, rows: int, width: int, pad: int, dtype: DTypeLike) -> None:
        self.rows, self.width, self.pad, self.stride = rows, width, pad, width + 2 * pad
        self.block = np.zeros(rows * self.stride + 2 * pad, dtype)
        self.full = self.block[pad : pad + rows * self.stride].reshape(rows, self.stride)
        self.core = self.full[:, pad : pad + width]

    def shifted(self, k: int) -> Array:
        """[N, stride] whose column i is column i + k; what is beyond the pads belongs to the neighbouring row."""
        low = self.pad + k
        return self.block[low : low + self.rows * self.stride].reshape(self.rows, self.stride)


def select(index: Array, weight: Array, shift: Array, shifts: list[int], columns: int) -> list[tuple[int, csr_matrix]]:
    """For each shift listed that occurs, the sparse matrix [n, columns] of the entries [n, B] with that shift."""
    found = []
    for k in shifts:
        mine = shift == k
        # column by column: a sum over so short an axis is slow
        count = mine[:, 0].astype(np.int32)
        for column in mine.T[1:]:
            count += column
        ends = np.zeros(len(count) + 1, dtype=np.int32)
        np.cumsum(count, out=ends[1:])
        if ends[-1]:
            at = np.flatnonzero(mine)
            parts = (weight.ravel().take(at), index.ravel().take(at), ends)
            found.append((k, csr_matrix(parts, shape=(len(index), columns))))
    return found


def total_of(parts: Iterable[Array]) -> Array:
    """Sum of fresh arrays, of which there is at least one."""
    each = iter(parts)
    total = next(each)
    for part in each:
        total += part
    return total


def greedy(q: Array, mean: Array, slack: float) -> tuple[Array, Array, Array]:
    """Best of q [S, A, C], of equal ones that of the larger mean, then the first: (action, its q, its mean), [S, C]."""
    best, best_mean = q[:, 0].copy(), mean[:, 0].copy()
    chosen = np.zeros(best.shape, dtype=np.int64)
    # a loop over the few actions is several times faster than argmax over a middle axis
    for a in range(1, q.shape[1]):
        more = q[:, a] - best
        take = (more > slack) | ((more >= -slack) & (mean[:, a] > best_mean + slack))
        for target, source in ((best, q[:, a]), (best_mean, mean[:, a]), (chosen, a)):
            np.copyto(target, source, where=take)
    return chosen, best, best_mean


def slack_of(values: Array) -> float:
    """Difference below which two values of that size are equal."""
    return TIE * max(1.0, float(np.abs(values).max()))
