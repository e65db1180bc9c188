"""Where Minari keeps its datasets: ids, folders, and fetching what is not there.

A set lives in ``<root>/<id>/data``; the root is ``MINARI_DATASETS_PATH`` or ``~/.minari/datasets``, and ids are
``[namespace/][env/]name-vN``.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import shutil
import socket
import urllib.request
from pathlib import Path
from typing import Any

from ctrlrl import names
from ctrlrl.data.dataset import DatasetError

METADATA, HDF5 = "metadata.json", "main_data.hdf5"
WORDS = ("algorithm_name", "author", "author_email", "code_permalink", "description", "requirements")
"""Entries of the metadata that ``DatasetInfo.about`` holds under the same names."""
OWN = "ctrlrl"
"""Entry of the metadata with what Minari has no place for: our EnvSpec and the rest of ``about``."""
NEXT_KNOWN = "next_known"
"""Info column that is written where an episode ended without its last observation having been recorded."""

_ID = re.compile(r"(\w+://[^/]+/)?(([-\w]+/)*[-\w]+-v\d+)")


def local_root() -> Path:
    """Where Minari keeps its sets."""
    return Path(os.environ.get("MINARI_DATASETS_PATH") or Path.home() / ".minari" / "datasets")


def is_id(text: str) -> bool:
    """Whether ``text`` has the form of a Minari id, ``[namespace/]name-vN``, or of a remote one (``hf://...``)."""
    return _ID.fullmatch(text) is not None


def is_folder(path: str | os.PathLike[str]) -> bool:
    """Whether ``path`` is the folder of a Minari set, or its ``data`` folder."""
    return (Path(path) / METADATA).is_file() or (Path(path) / "data" / METADATA).is_file()


def local_ids(folder: str | os.PathLike[str] | None = None) -> list[str]:
    """Ids of the sets below ``folder``, the local root by default."""
    top = local_root() if folder is None else Path(folder)
    found = []
    for here, below, _ in os.walk(top):
        if (Path(here) / "data" / METADATA).is_file():
            found.append(Path(here).relative_to(top).as_posix())
            below.clear()
        below[:] = [name for name in below if not name.startswith(".")]
    return sorted(found)


def locate(name: str) -> Path:
    """The folder of ``name`` (an id or a folder) that holds the metadata; an id that is not there is downloaded.

    Raises:
        DatasetError: No such set, here or at minari's remotes; lists the local ids.
    """
    path = Path(name)
    if is_folder(path):
        return path if (path / METADATA).is_file() else path / "data"
    match = _ID.fullmatch(name)
    if match is None:
        what = "has no data/metadata.json of Minari" if path.exists() else "does not exist, and is no id (name-v0)"
        raise DatasetError(f"{name} {what}.{_local(name)}")
    folder = local_root() / match[2]
    if not folder.exists():
        _download(name, folder)
    if not is_folder(folder):
        raise DatasetError(f"{folder} has no data/{METADATA}: a download was stopped there. Remove the folder")
    return folder / "data"


def _download(name: str, folder: Path) -> None:
    if _offline():
        raise DatasetError(f"{name} is not in {local_root()}, and there is no network to fetch it.{_local(name)}")
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # what it prints; its progress goes to stderr
            library().download_dataset(name)
    except BaseException as error:
        shutil.rmtree(folder, ignore_errors=True)  # or minari would take the torn copy for the set
        if not isinstance(error, Exception):
            raise
        raise DatasetError(
            f"{name} is not in {local_root()}, and minari could not fetch it: {error}{_local(name)}"
        ) from error


def _local(name: str) -> str:
    known = local_ids()
    return f"{names.hint(name, known)} Local ids in {local_root()}: {', '.join(known) or 'none'}"


def _offline() -> bool:
    """Whether names cannot be resolved; minari's clients would try for half a minute. Behind a proxy, nobody knows."""
    if urllib.request.getproxies():
        return False
    try:
        socket.getaddrinfo("huggingface.co", 443)
    except OSError:
        return True
    return False


def library() -> Any:
    """The package minari, with what it needs.

    Raises:
        ImportError: Not installed.
    """
    try:
        import h5py  # noqa: F401 - minari asks for it late
        import minari
    except ImportError as error:
        raise ImportError("Minari sets need minari and h5py: pip install 'ctrlrl[offline]'") from error
    return minari
