"""The group ``metadata`` of a D4RL HDF5 file: bounds, and what :func:`ctrlrl.data.d4rl.write` adds."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import gymnasium as gym
import numpy as np

from ctrlrl.data import stated
from ctrlrl.data.dataset import DatasetError

if TYPE_CHECKING:
    from ctrlrl.data.checks import Report

OURS = "metadata/ctrlrl"
NEXT_KNOWN = "metadata/next_known"
_DISCRETE = ("metadata/action_n", "metadata/action_start")
_NUMBERS = 1_000_000
"""No bound has more entries."""


def check(file: Any, columns: Mapping[str, Any], report: Report) -> None:
    """Enter what is wrong with the metadata that the rows ``columns`` of the open ``file`` need into ``report``."""
    discrete = [key for key in _DISCRETE if key in file]
    if "observations" in columns:
        _check_bounds(file, "observation", columns["observations"], report)
    if "actions" in columns and discrete:
        _check_discrete(file, columns["actions"], report)
    elif "actions" in columns:
        _check_bounds(file, "action", columns["actions"], report)
    if (found := file.get(NEXT_KNOWN)) is not None:
        rows = len(columns["observations"]) if "observations" in columns else None
        shape = getattr(found, "shape", None)
        if not _is_array(found) or found.dtype.kind not in "biu" or rows not in (None, *(shape or ())[:1]):
            report.error(NEXT_KNOWN, f"has shape {shape}; expected true or false in ({rows},)")
        elif len(found.shape) != 1:
            report.error(NEXT_KNOWN, f"has shape {shape}; expected ({rows},)")
    try:
        document(file)
    except DatasetError as error:
        report.error(OURS, str(error))


def check_stated(file: Any, report: Report) -> None:
    """Enter what keeps the environment and the reference scores of a sound document from being used."""
    try:
        found = document(file)
    except DatasetError:
        return  # entered by check
    for read in (lambda: stated.environment(found.get("env"), {}, ""), lambda: stated.references(found, "")):
        try:
            read()
        except DatasetError as error:
            report.error(OURS, str(error).removeprefix(":").strip())


def _is_array(item: Any) -> bool:
    return getattr(item, "shape", None) is not None


def _check_bounds(file: Any, what: str, rows: Any, report: Report) -> None:
    low, high = f"metadata/{what}_low", f"metadata/{what}_high"
    sound = True
    for key in (low, high):
        item = file.get(key)
        if item is None:
            continue
        shape, before = getattr(item, "shape", None), len(report)
        if not _is_array(item) or item.dtype.kind not in "fiub" or item.size > _NUMBERS:
            kind = item.dtype if _is_array(item) else "no array"
            report.error(key, f"holds {kind} of shape {shape}; expected one number, or one per dimension")
        elif shape not in ((), rows.shape[1:]):
            report.error(key, f"has shape {shape}; expected {rows.shape[1:]}, as the {what}s have")
        elif np.isnan(item[()]).any():
            report.error(key, "is NaN; expected one number, or one per dimension")
        sound &= len(report) == before
    if sound:
        lowest, highest = bounds(file, what, rows)
        if (lowest > highest).any():
            report.error(low, f"is above {high}")


def _check_discrete(file: Any, actions: Any, report: Report) -> None:
    for key in _DISCRETE:
        item = file.get(key)
        if item is None:
            report.error(key, f"is missing; discrete actions need {' and '.join(_DISCRETE)}")
        elif not _is_array(item) or item.dtype.kind not in "iu" or item.shape != ():
            report.error(key, "is no whole number")
        elif key == _DISCRETE[0] and int(item[()]) < 1:
            report.error(key, f"is {item[()]}; expected at least 1")
    if actions.dtype.kind not in "iu" or len(actions.shape) != 1:
        report.error("actions", f"holds {actions.dtype} of shape {actions.shape}; {_DISCRETE[0]} says it is discrete")


def bounds(file: Any, what: str, rows: Any) -> tuple[np.ndarray, np.ndarray]:
    """Smallest and largest observation or action: the sound ``metadata/<what>_low`` and ``_high``, else D4RL's -1 and 1
    for actions, and what the type holds."""
    if what == "action" and "metadata/action_n" in file:
        start = int(file["metadata/action_start"][()])
        return np.asarray(start), np.asarray(start + int(file["metadata/action_n"][()]) - 1)
    usual: tuple[Any, Any] = (-1.0, 1.0) if what == "action" else (-np.inf, np.inf)
    if rows.dtype.kind != "f":
        usual = (np.iinfo(rows.dtype).min, np.iinfo(rows.dtype).max) if rows.dtype.kind in "iu" else (0, 1)
    keys = f"metadata/{what}_low", f"metadata/{what}_high"
    low, high = (np.asarray(file[key][()] if key in file else value) for key, value in zip(keys, usual, strict=True))
    return low, high


def space(file: Any, what: str, rows: np.ndarray) -> gym.Space:
    """The space of the observations or actions, from sound metadata."""
    low, high = bounds(file, what, rows)
    if what == "action" and "metadata/action_n" in file:
        return gym.spaces.Discrete(int(high - low) + 1, start=int(low))
    if what == "action" and rows.ndim == 1:
        first = min(0, int(rows.min()))
        return gym.spaces.Discrete(int(rows.max()) + 1 - first, start=first)
    shape, dtype = rows.shape[1:], rows.dtype
    low, high = (np.broadcast_to(np.asarray(b, dtype), shape) for b in (low, high))
    return gym.spaces.Box(low, high, shape, dtype.type)


def document(file: Any) -> dict[str, Any]:
    """What :func:`ctrlrl.data.d4rl.write` recorded; empty for other files.

    Raises:
        DatasetError: It is damaged; says how, not where.
    """
    item = file.get(OURS)
    if item is None:
        return {}
    try:
        found = json.loads(_plain(item))
    except (IndexError, TypeError, ValueError, RecursionError) as error:
        raise DatasetError(f"is no JSON ({error}); remove it from the file") from error
    if not isinstance(found, dict) or not isinstance(found.get("about", {}), dict):
        raise DatasetError(f"is {str(found)[:80]!r}; expected an object. Remove it from the file")
    return found


def words(file: Any) -> dict[str, Any]:
    """The single values under ``metadata``: algorithm, iteration, ..."""
    group = file.get("metadata")
    if not hasattr(group, "items"):
        return {}
    found = {k: _plain(v) for k, v in group.items() if getattr(v, "shape", None) in ((), (1,))}
    ours = ("ctrlrl", "next_known", "action_", "observation_")
    return {k: v for k, v in found.items() if v is not None and not k.startswith(ours)}


def _plain(item: Any) -> Any:
    """A string, number or bool of HDF5 as Python's own; None for anything else."""
    value = np.asarray(item[()]).reshape(-1)[0]
    if isinstance(value, bytes):
        return value.decode(errors="replace")
    if isinstance(value, np.generic):
        return value.item() if value.dtype.kind in "fiub" else None
    return value if isinstance(value, str) else None
