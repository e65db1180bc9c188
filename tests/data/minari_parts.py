"""A small dataset, and what several tests of Minari share."""

from __future__ import annotations

import dataclasses
import json

import gymnasium as gym
import numpy as np

from ctrlrl.data.dataset import Dataset, DatasetInfo
from ctrlrl.types import EnvSpec

BOX = gym.spaces.Box(-np.inf, np.inf, (2,), np.float64)
ACTIONS = gym.spaces.Box(np.float32([-1.0, -2.0]), np.float32([1.0, 3.0]))
ID = "ctrlrl/toy/made-v0"


def toy(**changes):
    """Six steps: an episode of 3 that ends, one of 1 that ends and is cut at once, one of 2 that is cut."""
    seen = np.arange(14, dtype=np.float32).reshape(7, 2)
    after = seen[1:] + np.float32(0.5)
    now = np.concatenate([[seen[0]], after[:2], [seen[3]], [seen[4]], [after[4]]])
    info = DatasetInfo(
        "toy", EnvSpec("Hopper-v5", {"ctrl_cost_weight": 0.1}), -1.5, 7.25, about={"kind": "made", "n": 3}
    )
    parts = {
        "observations": now, "next_observations": after, "actions": np.float32(np.linspace(-1, 1, 12).reshape(6, 2)),
        "rewards": np.float32([1, 2, 3, 4, 5, 6]), "terminals": np.array([0, 0, 1, 1, 0, 0], bool),
        "timeouts": np.array([0, 0, 0, 1, 0, 1], bool), "next_known": np.ones(6, bool), "observation_space": BOX,
        "action_space": ACTIONS, "info": info,
        "infos": {"action_log_probs": -np.arange(6, dtype=np.float32), "qpos": np.arange(18.0).reshape(6, 3)},
    }  # fmt: skip
    return Dataset(**parts | changes)


def assert_same(found, expected, but=("id", "path", "sha256")):
    mine, theirs = found.columns(), expected.columns()
    assert mine.keys() == theirs.keys()
    for name in mine:
        assert mine[name].dtype == theirs[name].dtype, name
        np.testing.assert_array_equal(mine[name], theirs[name], err_msg=name)
    assert found.observation_space == expected.observation_space and found.action_space == expected.action_space
    for field in dataclasses.fields(DatasetInfo):
        if field.name not in but:
            assert getattr(found.info, field.name) == getattr(expected.info, field.name), field.name


def edit(folder, change):
    """Change main_data.hdf5 of a set."""
    import h5py

    with h5py.File(folder / "data" / "main_data.hdf5", "r+") as file:
        change(file)


def edit_metadata(folder, **entries):
    path = folder / "data" / "metadata.json"
    document = json.loads(path.read_text()) | entries
    path.write_text(json.dumps({k: v for k, v in document.items() if v is not None}))
