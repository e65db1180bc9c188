"""One name for all datasets: a D4RL id, a Minari id, or a path."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Literal

from ctrlrl.data import d4rl, download
from ctrlrl.data.d4rl_catalogue import CATALOGUE
from ctrlrl.data.dataset import Dataset, DatasetError
from ctrlrl.names import hint
from ctrlrl.types import EnvSpec

ENDINGS = (".hdf5", ".h5")


def load(
    id_or_path: str | os.PathLike[str],
    *,
    like: str | None = None,
    env: str | EnvSpec | None = None,
    unfinished: Literal["error", "cut"] = "error",
    progress: bool = True,
    memory_map: str | os.PathLike[str] | None = None,
) -> Dataset:
    """The dataset called ``id_or_path``.

    Args:
        id_or_path: A D4RL HDF5 file (``.hdf5``, ``.h5``); a D4RL id (``hopper-medium-v2``), fetched into D4RL's own
            cache at first use (``~/.d4rl/datasets``, or ``$D4RL_DATASET_DIR``); otherwise a Minari id or folder.
        like: D4RL id whose reference scores and environment are used for a local D4RL file.
        env: Environment to evaluate in, recorded in ``info.env``.
        unfinished: ``cut`` takes a last episode without an end as cut there. D4RL's own files always are: they were
            cut to length in the middle of an episode.
        progress: Show a bar while fetching.
        memory_map: Folder to keep the rows of D4RL files in, for sets larger than memory; see ``d4rl.read``. Minari
            sets are read into memory all the same: the minari library gives whole episodes, one after the other.

    Raises:
        DatasetError: Unknown, with the nearest names; or the file cannot be used.
        ImportError: h5py or Minari is missing; names the extra.
    """
    name = os.fspath(id_or_path)
    path = Path(name)
    if path.is_file():
        if path.suffix not in ENDINGS:
            raise DatasetError(f"{name} ends in {path.suffix!r}; expected a D4RL file, {' or '.join(ENDINGS)}")
        found = d4rl.read(path, like=like, env=env, unfinished=unfinished, memory_map=memory_map)
        return _with(found, sha256=download.digest(path))
    if path.suffix in ENDINGS:
        raise DatasetError(f"{name}: there is no such file")
    if name in CATALOGUE:
        entry = CATALOGUE[name]
        file = download.cache_folder() / entry.url.rpartition("/")[2]
        download.fetch(entry.url, file, progress=progress)
        found = d4rl.read(file, like=name, env=env, unfinished="cut", memory_map=memory_map)
        return _with(found, id=name, sha256=download.verified(file))
    if like is not None:
        raise DatasetError(f"like={like!r} is for local D4RL files; {name} is none")
    from ctrlrl.data import minari  # heavy

    try:
        return minari.read(name, env=env, unfinished=unfinished)
    except DatasetError as error:
        raise DatasetError(f"{str(error).rstrip('.')}. D4RL has no such id.{hint(name, CATALOGUE)}") from error


def _with(dataset: Dataset, **changes: str) -> Dataset:
    return dataclasses.replace(dataset, info=dataclasses.replace(dataset.info, **changes))
