"""What is wrong with the numbers of one episode of a Minari set."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import gymnasium as gym
import numpy as np

from ctrlrl.data.checks import Problem, slack


def faults(place: str, columns: Mapping[str, Any], infos: Mapping[str, Any], action_space: gym.Space) -> list[Problem]:
    """NaNs and infinite numbers, notes where they are among the ``infos``; and actions outside of their space by more
    than rounding.

    Args:
        place: File and group of the episode.
        columns: Its columns, as :func:`ctrlrl.data.minari.episodes` gives them.
        infos: Its info columns; None for what is no array of numbers.
        action_space: Box or Discrete.
    """
    found = []
    for key, value in _columns(columns, infos):
        if value is None or value.dtype.kind != "f":
            continue
        bad = np.flatnonzero(~np.isfinite(value.reshape(len(value), -1)).all(1))
        if len(bad):
            text = f"{_short(value[bad[0]])} is not finite ({len(bad)} of {len(value)} steps)"
            severity = "note" if key.startswith("infos/") else "error"  # an info may be minus infinity
            found.append(Problem(severity, place, key, int(bad[0]), text))
    return found + _outside(place, columns["actions"], action_space)


def _columns(columns: Mapping[str, Any], infos: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """The columns by their names in the file, the observations with the last one."""
    now, following = columns["observations"], columns["next_observations"]
    if isinstance(now, Mapping):
        for key in now:
            yield f"observations/{key}", np.concatenate([now[key], following[key][-1:]])
    else:
        yield "observations", np.concatenate([now, following[-1:]])
    yield from ((key, columns[key]) for key in ("actions", "rewards"))
    yield from ((f"infos/{key}", value) for key, value in infos.items())


def _outside(place: str, actions: np.ndarray, space: gym.Space) -> list[Problem]:
    low, high = limits(space)
    margin = np.where(np.isfinite(low) & np.isfinite(high), slack(low, high), 0.0)
    bad = (actions < low - margin) | (actions > high + margin)
    bad &= np.isfinite(actions)  # those have been named
    rows = np.flatnonzero(bad.reshape(len(bad), -1).any(1))
    if not len(rows):
        return []
    text = f"{_short(actions[rows[0]])} is outside of the action space {space} ({len(rows)} of {len(actions)} steps)"
    return [Problem("error", place, "actions", int(rows[0]), text)]


def limits(space: gym.Space) -> tuple[np.ndarray, np.ndarray]:
    """Smallest and largest action of a Box or Discrete space."""
    if isinstance(space, gym.spaces.Discrete):
        return np.asarray(space.start), np.asarray(space.start + space.n - 1)
    assert isinstance(space, gym.spaces.Box)
    return np.asarray(space.low), np.asarray(space.high)


def clipped(actions: np.ndarray, space: gym.Space) -> np.ndarray:
    """``actions`` with those outside of the space by rounding brought back."""
    low, high = (bound.astype(actions.dtype) for bound in limits(space))
    return np.clip(actions, low, high)


def _short(value: np.ndarray) -> str:
    text = str(value.tolist())
    return text if len(text) <= 80 else f"{text[:76]} ..."
