"""One checkpoint is one file: tensors and a JSON document in a single ``.safetensors``.

The document sits in the header under the key ``"ctrlrl"``::

    {"format": 1, "sha256": "...", "state": {...}}

so that one ``os.replace`` swaps weights, optimiser, controllers and counters together: a reader sees the old
checkpoint or the new one, never a mixture. The digest covers the state and every tensor (name, type, shape, bytes).
Nothing here can execute code on loading.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import re
import shutil
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ctrlrl.engine.errors import CheckpointError

FORMAT = 1
"""Version of the layout described above; raised when an older reader could misread a newer file."""

_KEY = "ctrlrl"
_FLOAT_TAG = "$float"
_TEMPORARY = re.compile(r".+\.tmp-(\d+)(\.\w+)?")
_STALE_S = 3600.0


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike[str], suffix: str = "") -> Iterator[Path]:
    """Yield a temporary path beside ``path``; when the block ends well, that file becomes ``path``.

    The file is fsynced before it is renamed and its folder after it, so that a crash or a power cut leaves the old
    file or the new one. When the block raises, the temporary file is removed and ``path`` stays as it was.

    Args:
        path: Where the file shall be. Its folder must exist.
        suffix: Ending of the temporary name, for writers that look at it (``".mp4"``).

    Raises:
        FileNotFoundError: The block wrote no file, or the folder does not exist.
    """
    target = Path(path)
    if not target.parent.is_dir():
        raise FileNotFoundError(f"cannot write {target}: the folder {target.parent} does not exist; create it first")
    temporary = target.with_name(f"{target.name}.tmp-{os.getpid()}{suffix}")
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync_folder(target.parent)


def write(path: str | os.PathLike[str], tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
    """Write a checkpoint, all of it or nothing.

    Args:
        path: ``.../<name>.safetensors``; replaced if it exists.
        tensors: Flat names (``"policy/actor.0.weight"``) to dense tensors of any shape, on any device.
        state: JSON values (NumPy scalars are converted, tuples come back as lists). Floats come back bit for bit,
            including NaN and infinities.

    Raises:
        CheckpointError: A name or value that cannot be stored, with its place.
        OSError: The disk is full or not writable; an existing checkpoint is untouched.
    """
    if not str(path).endswith(".safetensors"):
        raise CheckpointError(f"checkpoint path {str(path)!r} does not end in .safetensors; add the ending")
    stored = _storable(tensors)
    text = _dump(_encode(dict(state), "state"))
    document = f'{{"format": {FORMAT}, "sha256": "{_digest(stored, text)}", "state": {text}}}'
    with atomic_path(path) as temporary:
        # safetensors has hidden temporary files of its own: in a folder of ours a kill leaves nothing unknown.
        scratch = temporary.with_name(f"{temporary.name}.d")
        try:
            scratch.mkdir(exist_ok=True)
            save_file(stored, scratch / "new", metadata={_KEY: document})
            os.replace(scratch / "new", temporary)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)


def read(
    path: str | os.PathLike[str], *, expect: Mapping[str, Any] | None = None
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a checkpoint and check that it is whole.

    Args:
        path: A file written by :func:`write`.
        expect: Entries that ``state`` must have (``{"method": "ppo", "spaces": {...}}``); nested mappings are
            compared key by key, and keys not named here are free.

    Returns:
        tensors: On the CPU, owning their memory, shapes and types as written.
        state: The document as written.

    Raises:
        CheckpointError: Missing, truncated or damaged file, another format, or a mismatch with ``expect``; the
            message says what was found, what was expected and what to do.
    """
    file = Path(path)
    _refuse_obvious(file)
    try:
        with safe_open(file, framework="pt") as opened:
            metadata = opened.metadata() or {}
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{file} cannot be read as a checkpoint ({error}; {file.stat().st_size} bytes): {_kind(file)}"
        ) from error
    if _KEY not in metadata:
        raise CheckpointError(
            f"{file} is a safetensors file but not a ctrlrl checkpoint: its header has "
            f"{sorted(metadata) or 'no entries'}, "
            f"expected an entry {_KEY!r}"
        )
    state = _checked_state(file, metadata[_KEY], tensors)
    for key, wanted in (expect or {}).items():
        _compare(file, key, state.get(key, _ABSENT), _encode_expected(wanted, key))
    # The tensors read are windows into the mapped file; the caller gets memory of its own.
    return {name: tensor.clone() for name, tensor in tensors.items()}, state


def clean_temporaries(folder: str | os.PathLike[str]) -> list[Path]:
    """Remove what killed writes left in ``folder`` (not below it); return what was removed.

    Files of another process that is alive are kept for an hour: it may be writing them now.
    """
    removed = []
    for file in sorted(Path(folder).iterdir()) if Path(folder).is_dir() else []:
        match = _TEMPORARY.fullmatch(file.name)
        if match is None:
            continue
        pid = int(match.group(1))
        with contextlib.suppress(FileNotFoundError):
            if pid != os.getpid() and _alive(pid) and time.time() - file.stat().st_mtime < _STALE_S:
                continue
            shutil.rmtree(file) if file.is_dir() else file.unlink()
            removed.append(file)
    return removed


_ABSENT = object()


def _refuse_obvious(file: Path) -> None:
    """Tell the usual mistakes apart before the parser speaks of headers."""
    if file.is_dir():
        raise CheckpointError(
            f"{file} is a folder, expected a .safetensors file in it; for a whole run use ctrlrl.load"
        )
    if not file.is_file():
        there = sorted(p.name for p in file.parent.glob("*.safetensors")) if file.parent.is_dir() else []
        hint = (
            f"there are {', '.join(there)}" if there else "its folder holds no checkpoint; has the run saved one yet?"
        )
        raise CheckpointError(f"no checkpoint at {file}: {hint}")
    with open(file, "rb") as opened:
        head = opened.read(9)
    if len(head) < 9:
        raise CheckpointError(
            f"{file} is truncated: {len(head)} bytes. Use another checkpoint of the run or train again"
        )


def _kind(file: Path) -> str:
    """What an unreadable file seems to be, as a half sentence with advice."""
    with open(file, "rb") as opened:
        head = opened.read(4)
    # Asked only now: a safetensors file may begin with these bytes too, they are the length of its header.
    if head == b"PK\x03\x04" or (head[:1] == b"\x80" and head[1] in range(2, 6)):
        return "it is a zip or pickle file, or damaged. ctrlrl never unpickles checkpoints"
    return "it is truncated or damaged. Use another checkpoint of the run (last or best) or train again"


def _checked_state(file: Path, document: str, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """The state of a document whose format and digest are right."""
    damaged = f"{file} is damaged: {{}}. Use another checkpoint of the run (last or best) or train again"
    try:
        found = json.loads(document)
        version, digest, state = found["format"], found["sha256"], found["state"]
        text = _dump(state)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(damaged.format(f"its header entry {_KEY!r} is not what was written ({error})")) from error
    if version != FORMAT:
        raise CheckpointError(
            f"{file} has checkpoint format {version!r}, this ctrlrl reads format {FORMAT}. "
            f"{'Update ctrlrl' if isinstance(version, int) and version > FORMAT else 'Use the ctrlrl that wrote it'}"
            " (versions.json of the run names it)"
        )
    actual = _digest(tensors, text)
    if digest != actual:
        raise CheckpointError(
            damaged.format(f"its contents have checksum {actual[:12]}, written was {str(digest)[:12]}")
        )
    return cast(dict[str, Any], _decode(state))


def _storable(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Dense contiguous CPU tensors, none sharing memory with another."""
    stored: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        if not isinstance(name, str) or not name or name == "__metadata__":
            raise CheckpointError(f"tensor name {name!r} cannot be stored; use a non-empty string like 'policy/weight'")
        if not isinstance(tensor, Tensor):
            raise CheckpointError(
                f"{name!r} is a {type(tensor).__name__}, expected a torch.Tensor; plain values go into state"
            )
        if tensor.layout is not torch.strided or tensor.is_quantized:
            raise CheckpointError(f"tensor {name!r} is sparse or quantised; store it dense (tensor.to_dense())")
        dense = tensor.detach().to("cpu").resolve_conj().resolve_neg()
        dense = dense.clone(memory_format=torch.contiguous_format) if not _packed(dense) else dense
        storage = dense.untyped_storage().data_ptr()
        # safetensors refuses tensors that share memory (tied weights, views): each is stored in full.
        if dense.numel() and (storage in seen or dense.untyped_storage().nbytes() != dense.nbytes):
            dense = dense.clone()
        seen.add(storage)
        stored[name] = dense
    return stored


def _packed(tensor: Tensor) -> bool:
    """Whether elements lie in order; a window of one row counts as contiguous whatever its strides."""
    strides, size = [], 1
    for n in reversed(tensor.shape):
        strides.insert(0, size)
        size *= n
    return list(tensor.stride()) == strides


def _digest(tensors: Mapping[str, Tensor], state: str) -> str:
    """SHA-256 over the state and each tensor's name, type, shape and bytes."""
    digest = hashlib.sha256(state.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"\0{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        if tensor.numel():
            digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _dump(value: Any) -> str:
    return json.dumps(value, allow_nan=False, ensure_ascii=True)


def _encode(value: Any, place: str) -> Any:
    """JSON values with non-finite floats tagged; raises with the place of what cannot be stored."""
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, bool | str):
        return str(value) if isinstance(value, str) else value
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else {_FLOAT_TAG: repr(float(value))}
    if isinstance(value, list | tuple):
        return [_encode(item, f"{place}[{i}]") for i, item in enumerate(value)]
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str) or key == _FLOAT_TAG:
                raise CheckpointError(
                    f"{place} has the key {key!r}; keys of a checkpoint's state must be other strings"
                )
        return {key: _encode(item, f"{place}.{key}") for key, item in value.items()}
    advice = (
        "store it among the tensors"
        if isinstance(value, Tensor | np.ndarray)
        else "convert it to numbers, strings or lists"
    )
    raise CheckpointError(f"{place} is a {type(value).__name__}, which is not a JSON value; {advice}")


def _decode(value: Any) -> Any:
    if isinstance(value, list):
        return [_decode(item) for item in value]
    if isinstance(value, dict):
        if set(value) == {_FLOAT_TAG}:
            return float(value[_FLOAT_TAG])
        return {key: _decode(item) for key, item in value.items()}
    return value


def _encode_expected(value: Any, place: str) -> Any:
    """``value`` as it would come back from a file (tuples as lists, NumPy scalars as Python's)."""
    return _decode(_encode(value, f"expect.{place}"))


def _compare(file: Path, place: str, found: Any, wanted: Any) -> None:
    if isinstance(wanted, dict) and isinstance(found, dict):
        for key, item in wanted.items():
            _compare(file, f"{place}.{key}", found.get(key, _ABSENT), item)
        return
    if found is _ABSENT or _dump(_encode(found, place)) != _dump(_encode(wanted, place)):
        shown = "nothing" if found is _ABSENT else repr(found)
        raise CheckpointError(
            f"{file} does not fit: {place} is {shown} in the checkpoint, expected {wanted!r}. "
            "Load it with the settings it was trained with (config.json of its run), or choose another checkpoint"
        )


def _alive(pid: int) -> bool:
    if os.name == "nt":  # os.kill(pid, 0) would end the process there: age alone decides
        return True
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


def _sync_folder(folder: Path) -> None:
    """Make the rename itself durable; not every file system can, which is no reason to fail."""
    flag: int | Literal[0] = getattr(os, "O_DIRECTORY", 0)
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY | flag)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
