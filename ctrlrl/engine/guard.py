"""The search for the first non-finite value of a rollout, and the file that lets one see it again."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ctrlrl.data.rollout import RolloutStorage
from ctrlrl.engine.checkpoint import atomic_path
from ctrlrl.engine.errors import NonFiniteError
from ctrlrl.types import EnvSpec

FORMAT = 1
"""Version of the dump's layout."""


class Found(NamedTuple):
    """Where the first non-finite value is. ``step`` counts within the rollout; an observation belongs to the step
    that returned it (-1 for the one from the reset)."""

    step: int
    env_index: int
    what: str


def first(
    storage: RolloutStorage, sent: np.ndarray, finals: list[tuple[int, int, Any]], steps: int, rows: int
) -> Found | None:
    """The earliest non-finite action, reward or observation among the first ``steps`` steps, or None.

    Args:
        storage: The rollout.
        sent: [T, N, ...] actions as the environments received them.
        finals: (step, environment, observation) of truncated episodes.
        steps: Steps begun; the last may have failed.
        rows: Rows of observations that were written; the others hold whatever the memory held.
    """
    found = []
    valid = storage.valid
    if sent.dtype.kind == "f" and not np.isfinite(sent[:steps]).all():
        bad = ~np.isfinite(sent[:steps].reshape(steps, storage.n_envs, -1)).all(-1) & valid[:steps]
        found += [(t, 0, n, "action") for t, n in zip(*np.nonzero(bad), strict=True)][:1]
    if not np.isfinite(storage.reward[:steps]).all():
        bad = ~np.isfinite(storage.reward[:steps]) & valid[:steps]
        found += [(t, 1, n, "reward") for t, n in zip(*np.nonzero(bad), strict=True)][:1]
    for t, n, obs in finals:
        parts = obs.values() if isinstance(obs, dict) else (obs,)
        if not all(np.isfinite(p).all() for p in parts if np.asarray(p).dtype.kind == "f"):
            found.append((t, 2, n, "final observation"))
            break
    for array in storage.host_obs().values():
        if array.dtype.kind == "f" and not np.isfinite(array[:rows]).all():
            bad = ~np.isfinite(array[:rows].reshape(rows, storage.n_envs, -1)).all(-1)
            found += [(t - 1, 3, n, "observation") for t, n in zip(*np.nonzero(bad), strict=True)][:1]
    if not found:
        return None
    step, _, env_index, what = min(found)
    return Found(int(step), int(env_index), what)


class History:
    """Everything done to the environments since they were created: enough to do it again.

    Args:
        spec: What they were built from; None for live ones, which cannot be replayed.
        seeds: Their seeds.
        folder: Where dumps go; None keeps no history at all.
    """

    def __init__(self, spec: EnvSpec | None, seeds: list[int], folder: Path | None) -> None:
        self.spec, self.seeds, self.folder = spec, seeds, folder
        self.steps = 0
        self._chunks: list[np.ndarray] = []
        self._params: list[tuple[int, Any]] = []

    def add(self, sent: np.ndarray) -> None:
        """Note the actions [t, N, ...] of a rollout."""
        self.steps += len(sent)
        if self.folder is not None:
            self._chunks.append(sent)

    def params(self, params: Any) -> None:
        """Note that parameters were set before the next step."""
        if self.folder is not None:
            self._params.append((self.steps, params))

    def error(self, found: Found, storage: RolloutStorage, steps: int, rows: int) -> NonFiniteError:
        """Write the dump, if there is a folder, and return the error to raise (arguments as of :func:`first`)."""
        step = self.steps - steps + found.step
        n = found.env_index
        arrays = {f"obs/{k}": v[:rows, n] for k, v in storage.host_obs().items()}
        arrays["reward"] = storage.reward[:steps, n]
        path = None
        if self.folder is not None:
            actions = np.concatenate(self._chunks)[: step + 1]
            path = self.write(found.what, n, step, actions, arrays)
        return NonFiniteError(found.what, n, step, path)

    def write(self, what: str, env_index: int, step: int, actions: np.ndarray, arrays: dict[str, np.ndarray]) -> Path:
        """Write ``nonfinite-<step>-<env>.npz``, all of it or nothing.

        Args:
            what: Kind of the value.
            env_index: Its environment.
            step: Its step since the environments were created (-1: their reset).
            actions: [step + 1, N, ...] every action since then.
            arrays: Observations and rewards of that environment in the current rollout.
        """
        assert self.folder is not None
        self.folder.mkdir(parents=True, exist_ok=True)
        about = {
            "format": FORMAT,
            "what": what,
            "env_index": env_index,
            "step": step,
            "seeds": self.seeds,
            "spec": None if self.spec is None else dataclasses.asdict(self.spec),
            "params": self._params,
        }
        path = self.folder / f"nonfinite-{max(step, 0)}-{env_index}.npz"
        with atomic_path(path, ".npz") as temporary:
            np.savez_compressed(temporary, about=np.array(json.dumps(about)), actions=actions, **arrays)  # type: ignore[arg-type]
        return path
