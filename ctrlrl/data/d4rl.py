"""D4RL's HDF5 layout: one array per column, whole episodes one after the other (Fu et al. 2020)."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import gymnasium as gym
import numpy as np

from ctrlrl.data import checks, d4rl_metadata, stated
from ctrlrl.data.d4rl_catalogue import entry
from ctrlrl.data.d4rl_metadata import NEXT_KNOWN, OURS
from ctrlrl.data.dataset import Dataset, DatasetError, DatasetInfo
from ctrlrl.types import EnvSpec


def read(
    path: str | os.PathLike[str],
    *,
    like: str | None = None,
    env: str | EnvSpec | None = None,
    unfinished: Literal["error", "cut"] = "error",
    memory_map: str | os.PathLike[str] | None = None,
) -> Dataset:
    """The D4RL HDF5 file at ``path``.

    Terminals and timeouts stay apart; where a row has both, the terminal counts. ``next_observations`` are used where
    the file has them: D4RL recorded what the step returned, before any reset, so that they are known at timeouts too.
    Without them the next observation is the following row's, and is not known in the last row of an episode (what
    stands there is the next episode's first observation; see ``Dataset.next_known``). A file whose next observations
    are the following row's at its timeouts too was filled in that way: there they are not known either. Floats become
    float32. Actions are in a Box of -1 to 1 unless the file states its bounds in ``metadata/action_low`` and
    ``metadata/action_high``; those outside by rounding only are brought back. An environment that the file names and
    whose id imports a module of others is not taken from it: ``about["env_left_out"]`` has its id.

    Differs from ``d4rl.qlearning_dataset``: that drops every row with a timeout, also where its next observation is
    recorded or a terminal is set too, and always the file's last row. In files without ``timeouts`` it begins to count
    at one after a terminal, so that it cuts one row early.

    Args:
        path: The file.
        like: D4RL id whose reference scores, environment and, for files without ``timeouts``, time limit are used.
        env: Environment to evaluate in, recorded in ``info.env``; goes before the one of the file and of ``like``.
        unfinished: What to do with a last episode that has no end: ``cut`` sets its last row's timeout.
        memory_map: Folder (made if needed) to keep the rows in, for sets larger than memory: they are copied there
            in slices and read from disk as they are used. Files of an earlier call are replaced.

    Raises:
        DatasetError: With the file, key and row, for the first fault; ``ctrlrl data verify`` names them all.
        ImportError: h5py is missing.
    """
    like_entry, report = entry(like) if like else None, checks.Report(str(path))
    place = _Place(Path(memory_map) if memory_map is not None else None)
    with checks.opened(path) as file:
        columns = checks.structure(file, report, like_entry)
        d4rl_metadata.check(file, columns, report)
        report.stop()
        bounds = d4rl_metadata.bounds(file, "action", columns["actions"])
        spare = "next_observations" not in columns  # one array, seen twice: as observations and from its second row on
        rows = {k: _load(v, k, place, str(path), int(spare and k == "observations")) for k, v in columns.items()}
        known = file[NEXT_KNOWN][()].astype(bool) if NEXT_KNOWN in file else None
        document, about = d4rl_metadata.document(file), d4rl_metadata.words(file)
        spaces = tuple(d4rl_metadata.space(file, what, rows[f"{what}s"]) for what in ("observation", "action"))
    if spare:
        rows["observations"], following = rows["observations"][:-1], rows["observations"][1:]
    else:
        following = rows["next_observations"]
    if "timeouts" not in rows and like_entry:
        rows["timeouts"] = _time_limit(rows["terminals"] != 0, like_entry.max_episode_steps)
    checks.contents(rows, report, bounds, unfinished=unfinished, stated=True)  # what is shifted comes below
    report.stop()

    terminals, timeouts = rows["terminals"].astype(bool), rows["timeouts"].astype(bool)
    count = len(terminals)
    if not (terminals[-1] or timeouts[-1]):
        timeouts[-1] = True
    if spare:
        known = ~(terminals | timeouts)
    elif known is None:
        cuts = timeouts & ~terminals
        known = np.ones(count, bool) if checks.shifted(rows["observations"], following, cuts) is None else ~cuts
    if isinstance(spaces[1], gym.spaces.Box):
        for _, block in checks.blocks(rows["actions"]):
            np.clip(block, spaces[1].low, spaces[1].high, out=block)
    about, where = document.get("about", about) | ({"like": like} if like else {}), f"{path}: {OURS}"
    spec = EnvSpec(env) if isinstance(env, str) else env or stated.environment(document.get("env"), about, where)
    scores = (like_entry.ref_min_score, like_entry.ref_max_score) if like_entry else stated.references(document, where)
    info = DatasetInfo(
        id=str(document.get("id") or path),
        env=spec or (like_entry.env if like_entry else None),
        ref_min_score=scores[0],
        ref_max_score=scores[1],
        path=str(path),
        about=about,
    )
    return Dataset(
        observations=rows["observations"], actions=rows["actions"], rewards=rows["rewards"], terminals=terminals,
        timeouts=timeouts, next_observations=following, next_known=known, observation_space=spaces[0],
        action_space=spaces[1], info=info,
        infos={k.removeprefix("infos/"): v for k, v in rows.items() if k.startswith("infos/")},
    )  # fmt: skip


def write(dataset: Dataset, path: str | os.PathLike[str]) -> None:
    """Write ``dataset`` as D4RL HDF5, all of it or nothing; an existing file is replaced.

    ``next_observations`` are left out where :func:`read` gives the same without them. What D4RL has no place for (id,
    environment, reference scores, further words, bounds, ``next_known``) lies under ``metadata``, so that
    :func:`read` gives the same dataset again; other readers of D4RL files pass over it.

    Raises:
        DatasetError: Dict observations, or spaces other than Box and Discrete actions: write a Minari set.
        OSError: The disk is full or not writable.
    """
    check_spaces(dataset.observation_space, dataset.action_space, dataset.info.id)
    observations, following = dataset.observations, dataset.next_observations
    if isinstance(observations, Mapping) or isinstance(following, Mapping):
        raise DatasetError(f"{dataset.info.id}: D4RL HDF5 holds no Dict observations; write it as a Minari set")
    columns = {
        "observations": observations, "actions": dataset.actions, "rewards": dataset.rewards,
        "terminals": dataset.terminals, "timeouts": dataset.timeouts,
        **{f"infos/{k}": v for k, v in dataset.infos.items()},
    }  # fmt: skip
    if not _is_derived(dataset, observations, following):
        columns |= {"next_observations": following, NEXT_KNOWN: np.asarray(dataset.next_known)}
    info = dataset.info
    for key, column in columns.items():
        if column.dtype.kind not in "fiub":
            raise DatasetError(f"{info.id}: {key} holds {column.dtype}; D4RL HDF5 holds numbers. Leave it out")
    document = {
        "id": info.id, "env": None if info.env is None else dataclasses.asdict(info.env), "about": dict(info.about),
        "ref_min_score": info.ref_min_score, "ref_max_score": info.ref_max_score,
    }  # fmt: skip
    metadata = _bounds("observation", dataset.observation_space, info.id)
    metadata |= _bounds("action", dataset.action_space, info.id)
    for key in ("algorithm", "iteration"):  # where D4RL's files say it
        if isinstance(info.about.get(key), str | int):
            metadata[key] = info.about[key]
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    beside = target.with_name(f".{target.name}.{os.getpid()}.new")
    try:
        with checks.import_h5py().File(beside, "w") as file:
            for key, column in columns.items():
                file.create_dataset(key, data=column, compression="gzip")
            for key, value in metadata.items():
                file[f"metadata/{key}"] = np.bytes_(value.encode()) if isinstance(value, str) else value
            file[OURS] = json.dumps(document)
        os.replace(beside, target)
    finally:
        beside.unlink(missing_ok=True)


def check_spaces(observation: gym.Space, action: gym.Space, id: str) -> None:
    """Refuse a set called ``id`` that :func:`write` cannot hold.

    Raises:
        DatasetError: Observations other than of a Box, or actions other than of a Box or Discrete.
    """
    if isinstance(observation, gym.spaces.Dict):
        raise DatasetError(f"{id}: D4RL HDF5 holds no Dict observations; write it as a Minari set")
    _bounds("observation", observation, id)
    _bounds("action", action, id)


@dataclasses.dataclass(frozen=True)
class _Place:
    """Where rows are kept: memory, or files of a folder."""

    folder: Path | None

    def empty(self, key: str, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        if self.folder is None:
            return np.empty(shape, dtype)
        self.folder.mkdir(parents=True, exist_ok=True)
        file = self.folder / f"{key.replace('/', '.')}.npy"
        file.unlink(missing_ok=True)  # another process may still read the old one
        return np.lib.format.open_memmap(file, "w+", dtype, shape)


def _load(column: Any, key: str, place: _Place, path: str, spare: int) -> np.ndarray:
    """All rows of ``column``, and ``spare`` more at the end, which repeat the last."""
    single = key in ("rewards", *checks.FLAGS)
    shape = column.shape[:1] if single else column.shape
    dtype = np.dtype(np.float32) if column.dtype.kind == "f" or key == "rewards" else column.dtype
    try:
        rows = place.empty(key, (shape[0] + spare, *shape[1:]), dtype)
        for start, block in checks.blocks(column):
            rows[start : start + len(block)] = block.reshape(len(block), *shape[1:])
    except OSError as error:
        raise DatasetError(f"{path}: {key}: cannot be read ({error}); fetch the file again") from error
    except MemoryError as error:
        size = f"{int(np.prod(shape)) * dtype.itemsize / 2**30:.1f} GiB"
        raise DatasetError(f"{path}: {key}: {size} do not fit into memory; give memory_map= a folder") from error
    rows[shape[0] :] = rows[shape[0] - 1]
    return rows


def _time_limit(terminals: np.ndarray, steps: int) -> np.ndarray:
    """[N] bool: rows in which an episode reached ``steps`` rows without a terminal."""
    timeouts = np.zeros(len(terminals), bool)
    stops = np.r_[np.flatnonzero(terminals) + 1, len(terminals)]
    for start, stop in zip(np.r_[0, stops[:-1]], stops, strict=True):
        timeouts[start + steps - 1 : stop : steps] = True
    return timeouts & ~terminals


def _is_derived(dataset: Dataset, observations: np.ndarray, following: np.ndarray) -> bool:
    """Whether the next observations are those of the following rows, known everywhere but at the ends."""
    if not np.array_equal(dataset.next_known, ~dataset.ends):
        return False
    for start in range(0, len(dataset) - 1, checks.BLOCK):
        stop = min(start + checks.BLOCK, len(dataset) - 1)
        inside = np.asarray(dataset.next_known[start:stop])
        if not np.array_equal(following[start:stop][inside], observations[start + 1 : stop + 1][inside]):
            return False
    return True


def _bounds(what: str, space: gym.Space, id: str) -> dict[str, Any]:
    """The metadata entries that describe ``space``; observations without bounds need none."""
    if isinstance(space, gym.spaces.Discrete) and what == "action":
        return {"action_n": int(space.n), "action_start": int(space.start)}
    if not isinstance(space, gym.spaces.Box):
        raise DatasetError(f"{id}: D4RL HDF5 holds no {what}s of {space}; write it as a Minari set")
    if what == "observation" and not (np.isfinite(space.low).any() or np.isfinite(space.high).any()):
        return {}
    return {f"{what}_low": space.low, f"{what}_high": space.high}
