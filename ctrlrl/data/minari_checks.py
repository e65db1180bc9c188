"""What is wrong with a Minari set: all of it at once, see :mod:`ctrlrl.data.checks`."""

from __future__ import annotations

import os
from typing import Literal

from ctrlrl.data import minari, minari_rows
from ctrlrl.data.checks import Problem
from ctrlrl.data.dataset import DatasetError
from ctrlrl.data.minari_root import locate


def problems(id_or_folder: str | os.PathLike[str], *, unfinished: Literal["error", "cut"] = "error") -> list[Problem]:
    """Everything that keeps the set from being read: of each episode the first fault in its shape, or else every column
    with a NaN or infinite number, and actions outside of their space.

    Args:
        id_or_folder: Id, or a set's folder.
        unfinished: ``cut``: an episode without an end is none.
    """
    found: list[Problem] = []
    try:
        folder = str(locate(str(id_or_folder)))
        for look in (lambda: minari.check_stated(folder), lambda: _look_through(folder, unfinished, found)):
            try:
                look()
            except DatasetError as error:
                if str(error) not in [problem.text for problem in found]:  # damaged metadata are met twice
                    found.append(Problem("error", str(id_or_folder), "", None, str(error)))
    except DatasetError as error:
        found.append(Problem("error", str(id_or_folder), "", None, str(error)))
    return found


def _look_through(folder: str, unfinished: str, found: list[Problem]) -> None:
    """Enter the faults of each episode into ``found``."""
    action_space = minari.spaces(folder)["action"]
    for place, episode in minari.episodes(folder, unfinished):
        if isinstance(episode, DatasetError):
            found.append(Problem("error", place, "", None, str(episode).removeprefix(place).lstrip(": ")))
        else:
            found += minari_rows.faults(place, episode[0], episode[1], action_space)
