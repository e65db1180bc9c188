"""What is wrong with a D4RL HDF5 file: all of it at once, each with its key and first row."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ctrlrl.data import d4rl_metadata
from ctrlrl.data.d4rl_catalogue import Entry, entry
from ctrlrl.data.dataset import DatasetError

BLOCK = 65_536
"""Rows read at a time."""

REQUIRED = ("observations", "actions", "rewards", "terminals")
FLAGS = ("terminals", "timeouts")
Columns = dict[str, Any]
"""Row columns by key; arrays, or datasets of HDF5 that are read when sliced."""


@dataclass(frozen=True)
class Problem:
    """One fault of a file."""

    severity: Literal["error", "note"]
    """An error keeps the file from being read; a note says what to know of it."""
    file: str
    key: str
    """Of the HDF5 file; empty for the file itself."""
    index: int | None
    """First row concerned."""
    text: str

    def __str__(self) -> str:
        row = "" if self.index is None else f"[{self.index}]"
        return f"{self.file}: {self.key}{row}{': ' if self.key else ''}{self.text}"


class Report(list[Problem]):
    """Problems of one file, as they are found."""

    def __init__(self, file: str) -> None:
        super().__init__()
        self.file = file

    def error(self, key: str, text: str, index: int | None = None) -> None:
        """Enter an error."""
        self.append(Problem("error", self.file, key, index, text))

    def note(self, key: str, text: str, index: int | None = None) -> None:
        """Enter a note."""
        self.append(Problem("note", self.file, key, index, text))

    def stop(self) -> None:
        """Raise for the first error, if there is one.

        Raises:
            DatasetError: With the file, key and row.
        """
        errors = [p for p in self if p.severity == "error"]
        if errors:
            more = f" ({len(errors) - 1} more; `ctrlrl data verify {self.file}` names them all)" if errors[1:] else ""
            raise DatasetError(f"{errors[0]}{more}")


def problems(
    path: str | os.PathLike[str], *, like: str | None = None, unfinished: Literal["error", "cut"] = "error"
) -> list[Problem]:
    """Everything that is wrong with, or peculiar to, the D4RL HDF5 file at ``path``, errors first.

    Args:
        path: The file.
        like: D4RL id whose sizes it must have, and whose time limit cuts it where it has no ``timeouts``.
        unfinished: ``cut``: a last episode without an end is only noted.

    Raises:
        DatasetError: ``like`` is unknown.
        ImportError: h5py is missing.
    """
    like_entry, report = entry(like) if like else None, Report(str(path))
    try:
        with opened(path) as file:
            columns = structure(file, report, like_entry)
            before = len(report)
            d4rl_metadata.check(file, columns, report)
            sound = len(report) == before and "actions" in columns
            bounds = d4rl_metadata.bounds(file, "action", columns["actions"]) if sound else None
            d4rl_metadata.check_stated(file, report)
            contents(columns, report, bounds, unfinished=unfinished, stated=d4rl_metadata.NEXT_KNOWN in file)
    except DatasetError as error:
        report.error("", str(error).removeprefix(f"{path}: "))
    return sorted(report, key=lambda p: p.severity != "error")


@contextmanager
def opened(path: str | os.PathLike[str]) -> Iterator[Any]:
    """The HDF5 file at ``path``, open for reading.

    Raises:
        DatasetError: Missing, truncated, not HDF5, or with links or storage outside of the file.
        ImportError: h5py is missing.
    """
    h5py = import_h5py()
    if not Path(path).is_file():
        raise DatasetError(f"{path}: there is no such file")
    try:
        file = h5py.File(path, "r")
    except OSError as error:
        raise DatasetError(
            f"{path}: it is truncated or no HDF5 file ({error}); fetch it again, or give a D4RL HDF5 file"
        ) from error
    with file:
        _refuse_links(file, str(path))
        yield file


def import_h5py() -> Any:
    """The module h5py.

    Raises:
        ImportError: Naming the extra that brings it.
    """
    try:
        import h5py
    except ImportError as error:
        raise ImportError("HDF5 files need h5py: pip install 'ctrlrl[offline]'") from error
    return h5py


def _refuse_links(file: Any, path: str) -> None:
    """A file from elsewhere must not make us read other files: hard links and storage of its own only."""
    h5py = import_h5py()
    groups, seen = [file], set()
    while groups:
        group = groups.pop()
        address = h5py.h5o.get_info(group.id).addr
        if address in seen:  # hard links may lead back
            continue
        seen.add(address)
        for name in group:
            key = f"{group.name.rstrip('/')}/{name}"[1:]
            if not isinstance(group.get(name, getlink=True), h5py.HardLink):
                raise DatasetError(f"{path}: {key} is a link; expected the rows themselves. Copy them into the file")
            item = group[name]
            if isinstance(item, h5py.Group):
                groups.append(item)
            elif isinstance(item, h5py.Dataset) and (item.is_virtual or item.external):
                raise DatasetError(f"{path}: {key} lies outside of the file; expected the rows in it. Copy them there")


def structure(file: Any, report: Report, like: Entry | None) -> Columns:
    """The sound row columns of the open ``file`` by key; what is missing or misshapen goes to ``report``."""
    h5py = import_h5py()
    if "observations" not in file and any(name.startswith("episode_") for name in file):
        report.error("", "it looks like the main_data.hdf5 of a Minari set; load the set by its id or folder")
        return {}
    missing = [key for key in REQUIRED if key not in file]
    for key in missing:
        report.error(key, f"is missing; found the keys {', '.join(sorted(file)) or 'none'}")
    if "timeouts" not in file and not missing and like is None:
        report.error(
            "timeouts",
            "is missing, so it is not known where episodes were cut; name the set with like= (--like) and its time "
            "limit is used, or add the key",
        )
    columns: Columns = {}
    for key in (*REQUIRED, "timeouts", "next_observations"):
        if key not in file:
            continue
        if not isinstance(file[key], h5py.Dataset):
            report.error(key, "is a group; expected an array. Dict observations are held by Minari sets only")
        elif _shape(file[key], key, report, like):
            columns[key] = file[key]
    if isinstance(file.get("infos"), h5py.Group):
        columns |= _info_columns(file["infos"], report)
    _lengths(columns, report)
    return columns


def _info_columns(infos: Any, report: Report) -> Columns:
    h5py, found = import_h5py(), {}

    def visit(name: str, item: Any) -> None:
        if isinstance(item, h5py.Dataset):
            if item.dtype.kind in "fiub" and item.ndim > 0:
                found[f"infos/{name}"] = item
            else:
                report.note(f"infos/{name}", f"holds {item.dtype} of shape {item.shape}, no rows of numbers: not read")

    infos.visititems(visit)
    return found


def _shape(column: Any, key: str, report: Report, like: Entry | None) -> bool:
    shape, kind = column.shape, column.dtype.kind
    size = {"observations": like.observation_size, "actions": like.action_size} if like else {}
    wide = key.endswith("observations")
    if kind not in "fiub" or (key == "rewards" and kind == "b"):
        report.error(key, f"holds {column.dtype}; expected numbers")
    elif not shape or shape[0] == 0:
        report.error(key, f"has shape {shape}; expected at least one row")
    elif (wide and len(shape) < 2) or (key == "actions" and len(shape) < 2 and kind not in "iu"):
        report.error(key, f"has shape {shape}; expected (rows, size)")
    elif key in ("rewards", *FLAGS) and shape[1:] not in ((), (1,)):
        report.error(key, f"has shape {shape}; expected ({shape[0]},)")
    elif like and shape[1:] != ((width := size.get(key.removeprefix("next_"), 0)),) and width:
        report.error(key, f"has shape {shape}; {like.id} has rows of {width} numbers")
    else:
        return True
    return False


def _lengths(columns: Columns, report: Report) -> None:
    """Every column must have as many rows as the observations, or else as the first there is."""
    if not columns:
        return
    first = next(iter(columns))
    for key in [k for k, column in columns.items() if len(column) != len(columns[first])]:
        report.error(key, f"has {len(columns[key])} rows; {first} has {len(columns[first])}")
        del columns[key]
    obs, following = columns.get("observations"), columns.get("next_observations")
    if obs is not None and following is not None and following.shape != obs.shape:
        report.error("next_observations", f"has shape {following.shape}; observations has {obs.shape}")
        del columns["next_observations"]


def contents(
    columns: Mapping[str, Any],
    report: Report,
    bounds: tuple[np.ndarray, np.ndarray] | None,
    *,
    unfinished: Literal["error", "cut"] = "error",
    stated: bool = False,
) -> None:
    """Look through the rows of ``columns`` and enter what is wrong into ``report``.

    Args:
        columns: Arrays, or datasets of HDF5.
        report: Where to enter it.
        bounds: Smallest and largest action; None where they are not known.
        unfinished: ``cut``: a last episode without an end is only noted.
        stated: The file says which next observations are known.
    """
    sound: Columns = {}
    for key, column in columns.items():
        try:
            if key in FLAGS:
                sound[key] = _flags(key, column, report)
            else:
                _non_finite(key, column, report)
                sound[key] = column
        except OSError as error:  # a damaged chunk is met only when it is decompressed
            report.error(key, f"cannot be read ({error}); fetch the file again")
    actions = sound.get("actions")
    if actions is not None and bounds is not None:
        _outside(actions, *bounds, report)
    if "terminals" in sound and "timeouts" in sound:
        _episodes(sound["terminals"], sound["timeouts"], report, unfinished)
        if "observations" in sound and "next_observations" in sound:
            ends = sound["terminals"] | sound["timeouts"]
            _jumps(sound["observations"], sound["next_observations"], ends, report)
            cuts = sound["timeouts"] & ~sound["terminals"]
            first = None if stated else shifted(sound["observations"], sound["next_observations"], cuts)
            if first is not None:
                text = "is the observation of the next row, though a timeout ends the episode; not read as known there"
                report.note("next_observations", text, first)


def blocks(column: Any) -> Iterator[tuple[int, np.ndarray]]:
    """``column`` in blocks of rows, each with the number of its first row."""
    for start in range(0, len(column), BLOCK):
        yield start, np.asarray(column[start : start + BLOCK])


def _bad_rows(bad: np.ndarray) -> np.ndarray:
    return np.asarray(bad.reshape(len(bad), -1).any(axis=1))


def _non_finite(key: str, column: Any, report: Report) -> None:
    count, first, what = 0, None, ""
    for start, block in blocks(column):
        if block.dtype.kind != "f" or np.isfinite(block).all():
            continue
        bad = ~np.isfinite(block)
        count += int(bad.sum())
        if first is None:
            first = start + int(np.argmax(_bad_rows(bad)))
            what = str(block[bad][0])
    if first is not None:
        enter = report.note if key.startswith("infos/") else report.error  # an info may be minus infinity
        enter(key, f"is {what}; {count} entries are NaN or infinite", first)


def _flags(key: str, column: Any, report: Report) -> np.ndarray:
    values = np.concatenate([block.reshape(len(block)) for _, block in blocks(column)])
    bad = (values != 0) & (values != 1)
    if bad.any():
        first = int(np.argmax(bad))
        report.error(key, f"is {values[first]}; expected true or false ({int(bad.sum())} rows are neither)", first)
    return values.astype(bool)


def slack(low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """How far outside of its bounds an action may be by rounding alone; read brings it back."""
    return np.asarray(1e-5 * np.maximum(1.0, np.maximum(np.abs(low), np.abs(high))))


def _outside(actions: Any, low: np.ndarray, high: np.ndarray, report: Report) -> None:
    margin = np.where(np.isfinite(low) & np.isfinite(high), slack(low, high), 0.0)
    count, first, text = 0, None, ""
    for start, block in blocks(actions):
        bad = (block < low - margin) | (block > high + margin)
        if not bad.any():
            continue
        count += int(bad.sum())
        if first is None:
            first = start + int(np.argmax(_bad_rows(bad)))
            place = np.argwhere(bad)[0]
            number = ", ".join(str(int(k)) for k in place[1:])
            lowest, highest = (np.broadcast_to(b, block.shape)[tuple(place)] for b in (low, high))
            text = f"entry {number} is {block[tuple(place)]:.6g}, outside of [{lowest:g}, {highest:g}]"
    if first is not None:
        hint = "state other bounds in metadata/action_low and metadata/action_high, or clip them"
        report.error("actions", f"{text}; {count} entries are outside. D4RL's actions lie in [-1, 1]: {hint}", first)


def _episodes(terminals: np.ndarray, timeouts: np.ndarray, report: Report, unfinished: str) -> None:
    both, ends = terminals & timeouts, terminals | timeouts
    if both.any():
        text = f"is set in {int(both.sum())} rows that are terminals too; there the terminal counts"
        report.note("timeouts", text, int(np.argmax(both)))
    if not ends[-1]:
        first = int(np.flatnonzero(ends)[-1]) + 1 if ends.any() else 0
        text = f"the episode of rows {first} to {len(ends) - 1} has no end: neither terminals nor timeouts is set in it"
        if unfinished == "cut":
            report.note("timeouts", f"{text}; it is taken to be cut there", first)
        else:
            advice = "load it with unfinished='cut' (--unfinished cut) to treat it as cut there"
            report.error("timeouts", f"{text}; {advice}", first)


def shifted(obs: Any, following: Any, cuts: np.ndarray) -> int | None:
    """First row of ``cuts`` (cut, not ended) where the next observations were filled in from the next row.

    None unless nine in ten of those rows, and at least two, have exactly the observation of the next row: what a step
    returned before a reset is the next episode's first observation only by accident.
    """
    count, equal, first = 0, 0, None
    for start in range(0, len(cuts) - 1, BLOCK):
        stop = min(start + BLOCK, len(cuts) - 1)
        rows = np.flatnonzero(cuts[start:stop])
        if not len(rows):
            continue
        here, there = np.asarray(following[start:stop])[rows], np.asarray(obs[start + 1 : stop + 1])[rows]
        same = ~_bad_rows(here != there)
        count, equal = count + len(rows), equal + int(same.sum())
        if first is None and same.any():
            first = start + int(rows[np.argmax(same)])
    return first if count >= 2 and equal >= 0.9 * count else None


def _jumps(obs: Any, following: Any, ends: np.ndarray, report: Report) -> None:
    """Rows whose recorded next observation is not the next row's, though no episode ends there."""
    count, first = 0, None
    for start in range(0, len(ends) - 1, BLOCK):
        stop = min(start + BLOCK, len(ends) - 1)
        here, there = np.asarray(following[start:stop]), np.asarray(obs[start + 1 : stop + 1])
        bad = _bad_rows(~np.isclose(here, there, rtol=1e-4, atol=1e-5, equal_nan=True)) & ~ends[start:stop]
        count += int(bad.sum())
        if first is None and bad.any():
            first = start + int(np.argmax(bad))
    if first is not None:
        report.note(
            "next_observations",
            f"is not the observation of the next row, in {count} rows within an episode (D4RL's replay sets do not "
            "mark every cut). Transitions are right; whole trajectories run across these places",
            first,
        )
