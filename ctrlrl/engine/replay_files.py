"""Replay buffers on disk: each checkpoint adds one segment, the rows that are new since the last.

A segment is ``replay-<first>-<last>.safetensors``: the rows numbered ``first`` to ``last - 1``, counted from the
first ever added. The list of segments that make up a buffer, its manifest, belongs into the checkpoint. The order

    manifest = save(replay, folder, manifest); write the checkpoint with manifest; clean(folder, manifest)

leaves, wherever it is killed, the segments of the last checkpoint that was written: no file is ever replaced, and what
that checkpoint names is deleted only after the next one is there. Segments that a kill left over go with the next
:func:`clean`, which may also follow :func:`restore` at once.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ctrlrl.data.transitions import TransitionReplay
from ctrlrl.engine import checkpoint
from ctrlrl.engine.errors import CheckpointError

SEGMENT_BYTES = 2**28
"""Bytes of a segment: more rows than that are several files, for they pass through memory whole."""

_NAME = re.compile(r"replay-\d+-\d+(\.\d+)?\.safetensors")


def save(
    replay: TransitionReplay, folder: str | os.PathLike[str], done: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """Write the rows that ``done`` does not hold, and return the manifest of all that are still in the buffer.

    Args:
        replay: The buffer.
        folder: Where the segments are; it must exist.
        done: The manifest of the last save, or of the checkpoint the buffer was restored from; empty at first. Where
            a file of it is not in ``folder`` (saving elsewhere) all rows are written.

    Returns:
        Entries ``{"file", "first", "last"}`` in order of rows, for :func:`restore` and the next save.

    Raises:
        CheckpointError: ``done`` is from another buffer: it holds rows that this one has not seen.
        OSError: The disk is full or not writable; earlier segments are untouched.
    """
    target = Path(folder)
    manifest = [dict(entry) for entry in done if entry["last"] > replay.oldest]
    if manifest and manifest[-1]["last"] > replay.added:
        raise CheckpointError(
            f"the manifest reaches row {manifest[-1]['last']}, but {replay.added} rows were added to this replay "
            "buffer; give the manifest of its own last save, or an empty one"
        )
    if not all((target / entry["file"]).is_file() for entry in manifest):
        manifest = []
    first = manifest[-1]["last"] if manifest else replay.oldest
    step = max(1, SEGMENT_BYTES // replay.row_bytes)
    for start in range(first, replay.added, step):
        entry = {"first": start, "last": min(start + step, replay.added)}
        file = _free_name(target, **entry)
        # windows of one row count as contiguous whatever their strides, and cannot be hashed as bytes
        rows = {k: v.cpu().clone(memory_format=torch.contiguous_format) for k, v in replay.rows(**entry).items()}
        checkpoint.write(file, rows, entry)
        manifest.append({"file": file.name, **entry})
    return manifest


def restore(replay: TransitionReplay, folder: str | os.PathLike[str], manifest: Sequence[Mapping[str, Any]]) -> None:
    """Fill ``replay`` with exactly what was saved; it then samples bit for bit as the saved one would have.

    Its capacity may differ, as long as the manifest has all the rows it would hold.

    Raises:
        CheckpointError: A segment is missing, damaged, or does not fit the buffer, with its name, or rows are missing
            between segments. The buffer is then empty.
    """
    source = Path(folder)
    replay.added = 0
    added = manifest[-1]["last"] if manifest else 0
    reached = oldest = max(0, added - replay.capacity)
    for entry in manifest:
        if entry["first"] > reached:
            break
        reached = max(reached, entry["last"])
    if reached != added:
        raise CheckpointError(
            f"a replay buffer of {replay.capacity} rows after {added} were added needs the rows from {oldest} on, "
            f"but those from {reached} on are not in the checkpoint; use the replay_size it was trained with"
        )
    try:
        for entry in manifest:
            if entry["last"] > oldest:
                _restore_segment(replay, source / entry["file"], entry, oldest)
    except BaseException:
        replay.added = 0
        raise


def clean(folder: str | os.PathLike[str], *manifests: Iterable[Mapping[str, Any]]) -> list[Path]:
    """Delete the segments in ``folder`` that none of the manifests names; return what was deleted.

    Give the manifest of every checkpoint in the folder that shall stay restorable, and call it only when they are
    all written.
    """
    named = {entry["file"] for manifest in manifests for entry in manifest}
    unused = [p for p in sorted(Path(folder).iterdir()) if _NAME.fullmatch(p.name) and p.name not in named]
    for file in unused:
        file.unlink(missing_ok=True)
    return unused


def _restore_segment(replay: TransitionReplay, file: Path, entry: Mapping[str, Any], oldest: int) -> None:
    if not _NAME.fullmatch(file.name):
        raise CheckpointError(f"{file.name!r} is not the name of a segment of a replay buffer; the manifest is damaged")
    if not file.is_file():
        raise CheckpointError(
            f"{file} is missing, and with it rows {entry['first']} to {entry['last']} of the replay buffer. "
            "Use another checkpoint of the run, or copy the whole folder if this is a copy"
        )
    rows, _ = checkpoint.read(file, expect={"first": entry["first"], "last": entry["last"]})
    first = max(entry["first"], oldest)
    found, expected = _described(rows), _described(replay.columns)
    if found != expected:
        raise CheckpointError(
            f"{file} does not fit: its columns are {found}, expected {expected}. Load it with the settings it was "
            "trained with"
        )
    replay.put(first, {name: value[first - entry["first"] :] for name, value in rows.items()})


def _described(columns: Mapping[str, Tensor]) -> dict[str, str]:
    return {name: f"{column.dtype} {list(column.shape[1:])}" for name, column in sorted(columns.items())}


def _free_name(folder: Path, first: int, last: int) -> Path:
    """A file that is not there: one of that name may belong to a checkpoint that a resumed run has left behind."""
    file, n = folder / f"replay-{first}-{last}.safetensors", 1
    while file.exists():
        n += 1
        file = folder / f"replay-{first}-{last}.{n}.safetensors"
    return file
