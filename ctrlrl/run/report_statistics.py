"""The statistics of a report: rliable's estimators, and curves over seeds."""

from __future__ import annotations

import importlib.machinery
import sys
import types
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

CONFIDENCE = 0.95
REPS = 2000
_SEED = 0


@dataclass(frozen=True)
class Estimate:
    """A number with its interval; ``low`` and ``high`` are None where one run gives no interval."""

    value: float
    low: float | None
    high: float | None
    n: int
    """Runs behind it."""


def iqm(scores: np.ndarray, reps: int = REPS) -> Estimate:
    """Interquartile mean over runs and tasks with a 95 % stratified-bootstrap percentile interval.

    Args:
        scores: [runs, tasks].
        reps: Bootstrap replications.
    """
    library, metrics = _rliable()
    value = float(metrics.aggregate_iqm(scores))
    if len(scores) < 2:
        return Estimate(value, None, None, len(scores))
    low, high = _interval(library, scores, lambda s: np.array([metrics.aggregate_iqm(s)]), reps)
    return Estimate(value, low, high, len(scores))


def probability_of_improvement(x: np.ndarray, y: np.ndarray, reps: int = REPS) -> Estimate:
    """P(a run of X scores above a run of Y), averaged over tasks, ties counting half, with its 95 % interval.

    Args:
        x: [runs of X, tasks].
        y: [runs of Y, tasks].
        reps: Bootstrap replications.
    """
    library, metrics = _rliable()
    value = float(metrics.probability_of_improvement(x, y))
    n = min(len(x), len(y))
    if n < 2:
        return Estimate(value, None, None, n)
    low, high = _interval(library, [x, y], lambda a, b: np.array([metrics.probability_of_improvement(a, b)]), reps)
    return Estimate(value, low, high, n)


@dataclass(frozen=True)
class Curve:
    """Learning curves of one group over ``x`` (steps or seconds)."""

    runs: list[tuple[np.ndarray, np.ndarray]]
    """Each run's own points (x, y)."""
    x: np.ndarray
    """[P] grid on which every run has data: the runs' points between the latest start and the earliest end."""
    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray
    """[P] mean, minimum and maximum over runs, linear between a run's points."""
    cut: bool
    """Whether some run goes on beyond the grid."""


def curve(runs: Sequence[tuple[np.ndarray, np.ndarray]]) -> Curve | None:
    """Mean and range over runs on their common range; None without a point."""
    kept = [(x[ok], y[ok]) for x, y in runs if (ok := np.isfinite(y) & np.isfinite(x)).any()]
    if not kept:
        return None
    start, end = max(x[0] for x, _ in kept), min(x[-1] for x, _ in kept)
    points = np.unique(np.concatenate([x for x, _ in kept]))
    grid = points[(points >= start) & (points <= end)]
    if len(grid) > 1000:
        grid = np.linspace(start, end, 1000)
    values = np.array([np.interp(grid, x, y) for x, y in kept]).reshape(len(kept), len(grid))
    cut = any(x[-1] > end * (1 + 1e-9) for x, _ in kept)
    if not len(grid):  # no common range at all: single runs only
        return Curve(kept, grid, grid, grid, grid, True)
    return Curve(kept, grid, values.mean(0), values.min(0), values.max(0), cut)


def _interval(library: Any, scores: Any, function: Any, reps: int) -> tuple[float, float]:
    # rliable draws from NumPy's global generator whatever random_state it is given (1.2.0).
    before = np.random.get_state()
    np.random.seed(_SEED)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            _, intervals = library.get_interval_estimates(
                {"_": scores}, function, reps=reps, confidence_interval_size=CONFIDENCE
            )
    finally:
        np.random.set_state(before)
    low, high = intervals["_"][:, 0]
    return float(low), float(high)


def _rliable() -> tuple[Any, Any]:
    """rliable's library and metrics."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            try:
                from rliable import library, metrics
            except TypeError:
                # arch 7.2's econometric models do not import with pandas 3; rliable needs arch.bootstrap only.
                _bare_package("arch")
                from rliable import library, metrics
        except ImportError as error:
            raise ImportError("the report needs rliable: pip install rliable") from error
    return library, metrics


def _bare_package(name: str) -> None:
    """Put package ``name`` into sys.modules without running its ``__init__``; its submodules import as usual."""
    spec = importlib.machinery.PathFinder.find_spec(name)
    if spec is None or spec.submodule_search_locations is None:
        raise ImportError(f"{name} is not installed")
    for loaded in [m for m in sys.modules if m == name or m.startswith((f"{name}.", "rliable"))]:
        del sys.modules[loaded]
    module = types.ModuleType(name)
    module.__path__ = list(spec.submodule_search_locations)
    sys.modules[name] = module
