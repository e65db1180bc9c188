"""The search for a policy's worst case: parameters of the environment under which its return is lowest."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from torch import nn

from ctrlrl.engine import environments, runfolder
from ctrlrl.engine.robust import run_cells
from ctrlrl.engine.sync import LeanSyncVectorEnv
from ctrlrl.engine.uncertainty import Params
from ctrlrl.types import EnvSpec

Act: TypeAlias = Callable[[Any, np.ndarray], np.ndarray]
"""How to act in episodes side by side, see ``Agent.session``."""

CHUNK = 100
"""Most points that a grid search asks for at once."""


class Search(ABC):
    """Asks for points of the unit cube, is told their values and keeps the lowest, the first among equals.

    A search is a function of its arguments and of the values it was told: one that is told the same again asks for
    the same points, which is how a search goes on after it was killed.

    Args:
        known: [k, d] points asked for before all others, such as earlier worst cases.
    """

    def __init__(self, known: np.ndarray | None = None) -> None:
        self.point: np.ndarray | None = None
        """[d] the best so far."""
        self.value = np.inf
        """Its value."""
        self.known_value = np.inf
        """Lowest value of the known points."""
        self.evaluations = 0
        self._known = None if known is None or not len(known) else np.asarray(known, dtype=np.float64)
        self._asked: np.ndarray | None = None
        self._looking_back = False

    def ask(self) -> np.ndarray | None:
        """The next points [n, d], to be followed by :meth:`tell`; None at the end."""
        self._looking_back = self._known is not None
        self._asked = self._known if self._looking_back else self._propose()
        self._known = None
        return self._asked

    def tell(self, values: Sequence[float]) -> None:
        """The values [n] of the points that were asked for.

        Raises:
            ValueError: Nothing was asked for, another number of values, or one that is not finite.
        """
        found = np.asarray(values, dtype=np.float64)
        if self._asked is None or found.shape != (len(self._asked),) or not np.isfinite(found).all():
            expected = "none, ask first" if self._asked is None else f"{len(self._asked)} finite ones"
            raise ValueError(f"told the values {found}, expected {expected}")
        best = int(found.argmin())
        if found[best] < self.value:
            self.point, self.value = self._asked[best].copy(), float(found[best])
        self.evaluations += len(found)
        self._asked = None
        if self._looking_back:
            self.known_value = self.value
        else:
            self._learn(found)

    @abstractmethod
    def _propose(self) -> np.ndarray | None:
        """[n, d] points of the search itself."""

    def _learn(self, values: np.ndarray) -> None:  # noqa: B027 - optional
        """Take in the values of what was proposed."""


class CMASearch(Search):
    """CMA-ES (Hansen and Ostermeier 2001), by the package ``cma``, from the middle with deviation one half.

    Points outside the cube are evaluated at the nearest point inside: worst cases like the corners, which this tries
    at once. On random smooth functions of two variables it came closer than resampling (as the package ``cmaes``) or
    the package's own transformation of the bounds.

    Args:
        dim: Number of parameters.
        generations: How often to ask.
        population: Points each time.
        seed: Of all that is drawn.
        known: See :class:`Search`.

    Raises:
        ImportError: ``cma`` is not installed, with the command that installs it.
    """

    def __init__(self, dim: int, generations: int, population: int, seed: int, known: np.ndarray | None = None) -> None:
        super().__init__(known)
        draw = np.random.default_rng(seed).standard_normal  # by default the package seeds numpy's global generator
        options = {"popsize": population, "seed": np.nan, "randn": lambda *size: draw(size)}
        quiet = {"verbose": -9, "verb_disp": 0, "verb_log": 0}
        self._strategy = need_cma().CMAEvolutionStrategy([0.5] * dim, 0.5, options | quiet)
        self._left = generations
        self._drawn: list[np.ndarray] = []

    def _propose(self) -> np.ndarray | None:
        if self._left == 0:
            return None
        self._left -= 1
        self._drawn = self._strategy.ask()
        return np.clip(np.array(self._drawn), 0.0, 1.0)

    def _learn(self, values: np.ndarray) -> None:
        self._strategy.tell(self._drawn, values.tolist())


class GridSearch(Search):
    """All points of a regular grid, both ends included; the first coordinate changes slowest.

    Args:
        dim: Number of parameters.
        points: In each dimension.
        known: See :class:`Search`.
    """

    def __init__(self, dim: int, points: int, known: np.ndarray | None = None) -> None:
        super().__init__(known)
        self._left = itertools.product(np.linspace(0.0, 1.0, points).tolist(), repeat=dim)

    def _propose(self) -> np.ndarray | None:
        chunk = list(itertools.islice(self._left, CHUNK))
        return np.array(chunk) if chunk else None


def need_cma() -> Any:
    """The package ``cma``.

    Raises:
        ImportError: It is not installed, with the command that installs it.
    """
    try:
        import cma
    except ImportError as error:
        raise ImportError(
            "search='cma' needs the package cma: pip install 'ctrlrl[robust]', or take search='grid'"
        ) from error
    return cma


class Record:
    """The finished generations of searches in a JSON file, written whole after each, so that a kill loses at most one.

    Args:
        path: The file, in a folder that exists; None keeps no record.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self._entries: dict[str, list[dict[str, Any]]] = {}
        if path is not None and path.is_file():
            self._entries = json.loads(path.read_text(encoding="utf-8"))

    def read(self, key: str) -> list[tuple[list[float], int]]:
        """Values and environment steps of each generation of the search ``key``."""
        return [(entry["values"], entry["steps"]) for entry in self._entries.get(key, [])]

    def add(self, key: str, values: Sequence[float], steps: int) -> None:
        """Append a generation."""
        self._entries.setdefault(key, []).append({"values": list(values), "steps": steps})
        if self.path is not None:
            runfolder.write_json(self.path, self._entries)


def digest(modules: Sequence[nn.Module]) -> str:
    """What tells these networks from others, for the key of a record."""
    found = hashlib.sha256()
    for module in modules:
        for value in module.state_dict().values():
            found.update(value.cpu().numpy().tobytes())
    return found.hexdigest()[:16]


class Found(NamedTuple):
    """What a search found."""

    point: np.ndarray
    """[d] in the unit cube."""
    value: float
    """Mean return there."""
    known_value: float
    """Lowest mean return at a known point; infinite without any."""
    evaluations: int
    """Points tried."""
    steps: int
    """Environment steps they took."""


def find(search: Search, evaluate: Callable[[np.ndarray], tuple[np.ndarray, int]], record: Record, key: str) -> Found:
    """Run ``search`` to its end, from where ``record`` left it.

    Args:
        search: A new one.
        evaluate: Points [n, d] to values [n] and the environment steps taken.
        record: Where finished generations are.
        key: Of this search in the record: other policies, seeds and settings need other ones.
    """
    steps = 0
    for values, taken in record.read(key):
        search.ask()
        search.tell(values)
        steps += taken
    while (points := search.ask()) is not None:
        values, taken = evaluate(points)
        search.tell(values.tolist())
        record.add(key, values.tolist(), taken)
        steps += taken
    assert search.point is not None
    return Found(search.point, search.value, search.known_value, search.evaluations, steps)


class Trials:
    """Whole episodes of a policy under many parameters side by side, from the same reset seeds under each.

    Args:
        spec: The environment, a ParametricEnv.
        seeds: Reset seeds of the episodes under each parameter (common random numbers).
        width: Most episodes side by side.
    """

    def __init__(self, spec: EnvSpec, seeds: Sequence[int], width: int) -> None:
        self.spec, self.seeds, self.width = spec, list(seeds), width
        self._envs: dict[int, LeanSyncVectorEnv] = {}

    def run(self, act: Act, params: Sequence[Params]) -> tuple[np.ndarray, int]:
        """Mean undiscounted return [n] under each of ``params``, and the environment steps taken.

        Raises:
            FloatingPointError: A return is not finite, with the parameters.
        """
        returns, lengths = run_cells(self._env(len(params) * len(self.seeds)), act, params, self.seeds)
        means = returns.mean(1)
        if not np.isfinite(means).all():
            bad = int(np.flatnonzero(~np.isfinite(means))[0])
            raise FloatingPointError(
                f"{self.spec.id}: the return under {params[bad]} is {means[bad]}; the simulation is not stable there, "
                "a narrower uncertainty set or a smaller time step may help"
            )
        return means, int(lengths.sum())

    def _env(self, episodes: int) -> LeanSyncVectorEnv:
        width = min(self.width, episodes)
        if width not in self._envs:
            spec = dataclasses.replace(self.spec, n_envs=width, backend="sync")
            env = environments.make_vector(spec, autoreset="disabled")
            assert isinstance(env, LeanSyncVectorEnv)
            self._envs[width] = env
        return self._envs[width]

    def close(self) -> None:
        """Close the environments."""
        for env in self._envs.values():
            env.close()
        self._envs = {}
