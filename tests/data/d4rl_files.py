"""Small files in D4RL's layout, made by plain h5py."""

import os
from pathlib import Path

import h5py
import numpy as np
import pytest

DATA = Path(os.environ.get("CTRLRL_DATA", Path(__file__).parents[3] / "shared" / "data"))


def door() -> Path:
    path = DATA / "door-human-demos.hdf5"
    if not path.exists():
        pytest.skip(f"{path} is absent; set CTRLRL_DATA to the folder of real data")
    return path


def rows(lengths=(3, 4, 2), ends="tct", size=2, actions=2, seed=0):
    """Episodes of ``lengths`` ending in a terminal (t), a cut (c), both (b) or neither (-); the first entry of an
    observation counts the rows."""
    rng = np.random.default_rng(seed)
    n = sum(lengths)
    obs = rng.normal(size=(n, size)).astype(np.float32)
    obs[:, 0] = np.arange(n)
    last = np.cumsum(lengths) - 1
    terminals, timeouts = np.zeros(n, bool), np.zeros(n, bool)
    terminals[last] = [e in "tb" for e in ends]
    timeouts[last] = [e in "cb" for e in ends]
    return {
        "observations": obs,
        "actions": rng.uniform(-1, 1, (n, actions)).astype(np.float32),
        "rewards": rng.normal(size=n).astype(np.float32),
        "terminals": terminals,
        "timeouts": timeouts,
    }


def with_next(columns):
    """The same with next observations recorded, as D4RL's v2 files have them: real ones also where an episode ends."""
    following = np.concatenate([columns["observations"][1:], columns["observations"][-1:]])
    ends = columns["terminals"] | columns["timeouts"]
    following[ends, 0] = 1000.0 + np.flatnonzero(ends)
    return columns | {"next_observations": following}


def save(path, columns, **metadata):
    with h5py.File(path, "w") as file:
        for key, value in columns.items():
            file[key] = value
        for key, value in metadata.items():
            file[f"metadata/{key}"] = value
    return path
