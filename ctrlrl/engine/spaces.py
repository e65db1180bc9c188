"""Spaces as JSON, and the check of an observation against its space."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import gymnasium as gym
import numpy as np

from ctrlrl.engine.errors import ObservationError


def space_to_json(space: gym.Space) -> dict[str, Any]:
    """A space as JSON values. Bounds that are the same everywhere become one number; infinities become strings.

    Raises:
        TypeError: Not a Box, Discrete, MultiDiscrete, MultiBinary or Dict of these.
    """
    if isinstance(space, gym.spaces.Dict):
        return {"type": "Dict", "spaces": {k: space_to_json(s) for k, s in space.spaces.items()}}
    if isinstance(space, gym.spaces.Box):
        bounds = {"low": _bounds(space.low), "high": _bounds(space.high)}
        return {"type": "Box", "shape": list(space.shape), "dtype": str(space.dtype), **bounds}
    if isinstance(space, gym.spaces.Discrete):
        return {"type": "Discrete", "n": int(space.n), "start": int(space.start), "dtype": str(space.dtype)}
    if isinstance(space, gym.spaces.MultiDiscrete):
        sizes = {"nvec": space.nvec.tolist(), "start": space.start.tolist()}
        return {"type": "MultiDiscrete", "dtype": str(space.dtype), **sizes}
    if isinstance(space, gym.spaces.MultiBinary):
        return {"type": "MultiBinary", "n": space.n if isinstance(space.n, int) else list(space.shape)}
    raise TypeError(
        f"a space of type {type(space).__name__} cannot be saved; expected Box, Discrete, MultiDiscrete, MultiBinary "
        "or a Dict of these. gymnasium.wrappers.FlattenObservation turns observations of other spaces into a Box."
    )


def space_from_json(data: Mapping[str, Any]) -> gym.Space:
    """The space that :func:`space_to_json` described.

    Raises:
        ValueError: An unknown type or a missing entry.
    """
    kind = data.get("type")
    try:
        if kind == "Dict":
            # pairs keep the order of the keys; a plain dict would be sorted
            return gym.spaces.Dict([(k, space_from_json(s)) for k, s in data["spaces"].items()])
        if kind == "Box":
            dtype, shape = np.dtype(data["dtype"]), tuple(data["shape"])
            return gym.spaces.Box(_array(data["low"], shape, dtype), _array(data["high"], shape, dtype), shape, dtype)
        if kind == "Discrete":
            space = gym.spaces.Discrete(data["n"], start=data["start"])
            space.dtype = np.dtype(data.get("dtype", "int64"))  # an argument of the constructor from gymnasium 1.2 on
            return space
        if kind == "MultiDiscrete":
            return gym.spaces.MultiDiscrete(data["nvec"], dtype=np.dtype(data["dtype"]), start=data["start"])
        if kind == "MultiBinary":
            return gym.spaces.MultiBinary(data["n"])
    except KeyError as error:
        raise ValueError(f"the saved {kind} space lacks the entry {error}; found {sorted(data)}") from None
    raise ValueError(
        f"a saved space has type {kind!r}; expected Box, Discrete, MultiDiscrete, MultiBinary or Dict. "
        "Was it written by a newer version?"
    )


def _bounds(array: np.ndarray) -> Any:
    flat = np.unique(array)
    if flat.size == 1:
        return _number(flat[0])
    return [_number(v) for v in array.ravel()]


def _number(value: Any) -> float | int | str:
    if isinstance(value, np.floating):
        return float(value) if np.isfinite(value) else str(float(value))
    return int(value)


def _array(data: Any, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    if not isinstance(data, list):
        return np.full(shape, float(data) if dtype.kind == "f" else data, dtype)
    return np.array([float(v) if dtype.kind == "f" else v for v in data], dtype).reshape(shape)


def check_observation(space: gym.Space, obs: Any, env_id: str) -> None:
    """Raise if an observation cannot be one of ``space``: keys, shape, or kind of number.

    A float64 observation of a float32 space passes (it is rounded, as Gymnasium's own vector environments do);
    floats of an integer space do not.

    Raises:
        ObservationError: Naming the environment, what it returned and what its space says.
    """
    if isinstance(space, gym.spaces.Dict):
        if not isinstance(obs, Mapping) or set(obs) != set(space.spaces):
            found = sorted(obs) if isinstance(obs, Mapping) else type(obs).__name__
            raise ObservationError(_complaint(env_id, f"keys {sorted(space.spaces)}", f"{found}"))
        for key, part in space.spaces.items():
            check_observation(part, obs[key], f"{env_id}, entry {key!r}")
        return
    if space.shape is None or space.dtype is None:
        return
    array = np.asarray(obs)
    expected, found = f"{space.dtype} of shape {space.shape}", f"{array.dtype} of shape {array.shape}"
    if array.shape != space.shape or array.dtype == object or not np.can_cast(array.dtype, space.dtype, "same_kind"):
        raise ObservationError(_complaint(env_id, expected, found))


def _complaint(env_id: str, expected: str, found: str) -> str:
    return (
        f"{env_id}: reset() returned an observation that contradicts the observation space: expected {expected}, "
        f"found {found}. Correct the environment's observation_space or what it returns."
    )
