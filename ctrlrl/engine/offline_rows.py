"""From a dataset to rows that methods learn from: on the device, actions in [-1, 1], rewards as the settings say."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch
from torch import Tensor

from ctrlrl.data.dataset import Dataset, DatasetError
from ctrlrl.data.transitions import ReplaySizeError, TransitionReplay
from ctrlrl.nets.actors import BoxActor
from ctrlrl.types import Obs

SLICE = 65_536
"""Rows that are copied at once."""


def rows_of(
    data: Dataset,
    policy: BoxActor,
    device: torch.device,
    reward_map: Mapping[str, float],
    columns: Mapping[str, np.ndarray],
    folder: Path | None,
    usable: np.ndarray | None = None,
) -> TransitionReplay:
    """The usable steps of ``data`` as a full TransitionReplay.

    Args:
        data: Where they come from.
        policy: Whose observation and action spaces they are stored for.
        device: Where to hold them.
        reward_map: "reward_scale" and "reward_shift".
        columns: Further columns, each with a row for every step of ``data``.
        folder: Hold them in a memory-mapped file there.
        usable: [N] bool, which steps; ``data.usable`` by default.

    Raises:
        DatasetError: There is no usable step.
        ReplaySizeError: They do not fit.
    """
    rows = np.flatnonzero(data.usable if usable is None else usable)
    if len(rows) == 0:
        raise DatasetError(f"{data.info.id} has no step whose next observation is known")
    extras = {k: (v.shape[1:], torch.from_numpy(v[:1]).dtype) for k, v in columns.items()}
    try:
        replay = TransitionReplay(
            policy.observation_space, policy.action_shape, torch.float32, len(rows), device,
            extras=extras, folder=folder,
        )  # fmt: skip
    except ReplaySizeError as error:
        error.add_note("The setting is memory_map (--memory-map).")
        raise
    for start in range(0, len(rows), SLICE):
        index = rows[start : start + SLICE]
        replay.add(
            obs=_tensors(data.observations, index),
            action=torch.from_numpy(to_unit(data.actions[index], policy.action_space)),
            reward=_floats(data.rewards[index]) * reward_map["reward_scale"] + reward_map["reward_shift"],
            terminated=_floats(data.terminals[index]),
            truncated=_floats(data.timeouts[index]),
            next_obs=_tensors(data.next_observations, index),
            extras={k: torch.from_numpy(np.asarray(v[index])) for k, v in columns.items()},
        )
    return replay


def to_unit(actions: np.ndarray, space: gym.Space) -> np.ndarray:
    """``actions`` [N, ...] of the bounded Box ``space`` scaled to [-1, 1], flat: [N, A] float32 of their own memory."""
    assert isinstance(space, gym.spaces.Box)
    low, high = (np.asarray(b, np.float64).flatten() for b in (space.low, space.high))
    middle, scale = (((high + low) / 2).astype(np.float32), ((high - low) / 2).astype(np.float32))
    unit = (np.asarray(actions, np.float32).reshape(len(actions), -1) - middle) / scale
    return np.clip(unit, -1.0, 1.0, out=unit)  # rounding may not leave the range


def check_actions(data: Dataset, space: gym.Space) -> None:
    """Refuse actions that the space does not hold; float32 rounding is allowed.

    Raises:
        DatasetError: With the first such row.
    """
    if not isinstance(space, gym.spaces.Box):
        return
    margin = 1e-5 * (space.high - space.low)
    outside = (data.actions < space.low - margin) | (data.actions > space.high + margin)
    if outside.any():
        row = int(np.argwhere(outside)[0][0])
        raise DatasetError(
            f"{data.info.id}: actions row {row} is {data.actions[row]}, outside {space}; this is data of another "
            "environment, or its actions were not cut to the bounds"
        )


def _floats(x: np.ndarray) -> Tensor:
    return torch.from_numpy(np.asarray(x, np.float32))


def _tensors(value: np.ndarray | Mapping[str, np.ndarray], index: np.ndarray) -> Obs:
    def one(x: np.ndarray) -> Tensor:
        rows = np.asarray(x[index])
        return torch.from_numpy(rows.astype(np.float32) if rows.dtype == np.float64 else rows)

    return {k: one(v) for k, v in value.items()} if isinstance(value, Mapping) else one(value)
