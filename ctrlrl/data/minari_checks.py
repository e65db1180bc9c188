"""What is wrong with a Minari set: all of it at once, see :mod:`ctrlrl.data.checks`."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np

from ctrlrl.data import minari
from ctrlrl.data.checks import Problem
from ctrlrl.data.dataset import DatasetError


def problems(id_or_folder: str | os.PathLike[str], *, unfinished: Literal["error", "cut"] = "error") -> list[Problem]:
    """Everything that keeps the set from being read (the first fault of each episode), and every NaN.

    Args:
        id_or_folder: Id, or a set's folder.
        unfinished: ``cut``: an episode without an end is none.
    """
    found: list[Problem] = []
    name = str(id_or_folder)
    try:
        for place, episode in minari.episodes(name, unfinished):
            if isinstance(episode, DatasetError):
                found.append(Problem("error", place, "", None, str(episode).removeprefix(place).lstrip(": ")))
            else:
                found += _not_finite(place, *episode)
    except DatasetError as error:
        found.append(Problem("error", name, "", None, str(error)))
    return found


def _not_finite(place: str, columns: Mapping[str, Any], infos: Mapping[str, Any]) -> list[Problem]:
    flat: dict[str, np.ndarray] = {}
    for key, value in {**columns, **{f"infos/{k}": v for k, v in infos.items()}}.items():
        flat |= {f"{key}/{k}": v for k, v in value.items()} if isinstance(value, Mapping) else {key: value}
    found = []
    for key, value in flat.items():
        if value is None or value.dtype.kind != "f":
            continue
        bad = np.flatnonzero(~np.isfinite(value.reshape(len(value), -1)).all(1))
        if len(bad):
            text = f"{value[bad[0]].tolist()} is not finite ({len(bad)} of {len(value)} steps)"
            found.append(Problem("error", place, key, int(bad[0]), text))
    return found
