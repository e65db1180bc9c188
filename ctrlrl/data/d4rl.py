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

from ctrlrl.data import checks
from ctrlrl.data.d4rl_catalogue import entry
from ctrlrl.data.dataset import Dataset, DatasetError, DatasetInfo
from ctrlrl.types import EnvSpec

_OURS = "metadata/ctrlrl"
_NEXT_KNOWN = "metadata/next_known"
_WRAPPERS = ("gymnasium.", "ctrlrl.", "ctrlrl_envs.")


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
    stands there is the next episode's first observation; see ``Dataset.next_known``). Floats become float32. Actions
    are in a Box of -1 to 1 unless the file states its bounds in ``metadata/action_low`` and ``metadata/action_high``;
    those outside by rounding only are brought back.

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
        low, high = checks.action_bounds(file, report)
        report.stop()
        spare = "next_observations" not in columns  # one array, seen twice: as observations and from its second row on
        rows = {k: _load(v, k, place, str(path), int(spare and k == "observations")) for k, v in columns.items()}
        known = file[_NEXT_KNOWN][()].astype(bool) if _NEXT_KNOWN in file else None
        document, about = _document(file, str(path)), _about(file)
        spaces = _space(rows["observations"], file, "observation"), _space(rows["actions"], file, "action")
    if spare:
        rows["observations"], following = rows["observations"][:-1], rows["observations"][1:]
    else:
        following = rows["next_observations"]
    if "timeouts" not in rows and like_entry:
        rows["timeouts"] = _time_limit(rows["terminals"] != 0, like_entry.max_episode_steps)
    checks.contents(rows, report, low, high, unfinished=unfinished)
    report.stop()

    terminals, timeouts = rows["terminals"].astype(bool), rows["timeouts"].astype(bool)
    count = len(terminals)
    if not (terminals[-1] or timeouts[-1]):
        timeouts[-1] = True
    if spare:
        known = ~(terminals | timeouts)
    elif known is None:
        known = np.ones(count, bool)
    if known.shape != (count,):
        raise DatasetError(f"{path}: {_NEXT_KNOWN} has shape {known.shape}; expected ({count},)")
    if isinstance(spaces[1], gym.spaces.Box):
        for _, block in checks.blocks(rows["actions"]):
            np.clip(block, spaces[1].low, spaces[1].high, out=block)
    info = DatasetInfo(
        id=document.get("id") or str(path),
        env=_spec(env) or _env_from_json(document.get("env"), str(path)) or (like_entry.env if like_entry else None),
        ref_min_score=like_entry.ref_min_score if like_entry else document.get("ref_min_score"),
        ref_max_score=like_entry.ref_max_score if like_entry else document.get("ref_max_score"),
        path=str(path),
        about=document.get("about", about) | ({"like": like} if like else {}),
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
    observations, following = dataset.observations, dataset.next_observations
    if isinstance(observations, Mapping) or isinstance(following, Mapping):
        raise DatasetError(f"{dataset.info.id}: D4RL HDF5 holds no Dict observations; write it as a Minari set")
    columns = {
        "observations": observations, "actions": dataset.actions, "rewards": dataset.rewards,
        "terminals": dataset.terminals, "timeouts": dataset.timeouts,
        **{f"infos/{k}": v for k, v in dataset.infos.items()},
    }  # fmt: skip
    if not _is_derived(dataset, observations, following):
        columns |= {"next_observations": following, _NEXT_KNOWN: np.asarray(dataset.next_known)}
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
            file[_OURS] = json.dumps(document)
        os.replace(beside, target)
    finally:
        beside.unlink(missing_ok=True)


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


def _space(rows: np.ndarray, file: Any, what: str) -> gym.Space:
    """The space of the observations or actions."""
    if f"metadata/{what}_n" in file:
        return gym.spaces.Discrete(int(file[f"metadata/{what}_n"][()]), start=int(file[f"metadata/{what}_start"][()]))
    if what == "action" and rows.ndim == 1:
        first = min(0, int(rows.min()))
        return gym.spaces.Discrete(int(rows.max()) + 1 - first, start=first)
    usual = (-1.0, 1.0) if what == "action" else (-np.inf, np.inf)
    if rows.dtype.kind != "f":
        usual = (np.iinfo(rows.dtype).min, np.iinfo(rows.dtype).max) if rows.dtype.kind in "iu" else (0, 1)
    keys = f"metadata/{what}_low", f"metadata/{what}_high"
    low, high = (file[key][()] if key in file else value for key, value in zip(keys, usual, strict=True))
    shape, dtype = rows.shape[1:], rows.dtype
    low, high = (np.broadcast_to(np.asarray(b, dtype), shape) for b in (low, high))
    return gym.spaces.Box(low, high, shape, dtype.type)


def _spec(env: str | EnvSpec | None) -> EnvSpec | None:
    return EnvSpec(env) if isinstance(env, str) else env


def _document(file: Any, path: str) -> dict[str, Any]:
    """What :func:`write` recorded; empty for other files."""
    if _OURS not in file:
        return {}
    try:
        found = json.loads(_plain(file[_OURS]))
    except (TypeError, ValueError) as error:
        raise DatasetError(f"{path}: {_OURS} is no JSON ({error}); remove it from the file") from error
    if not isinstance(found, dict) or not isinstance(found.get("about", {}), dict):
        raise DatasetError(f"{path}: {_OURS} is {str(found)[:80]!r}; expected an object. Remove it from the file")
    return found


def _env_from_json(data: Any, path: str) -> EnvSpec | None:
    if data is None:
        return None
    try:
        wrappers = tuple((str(name), dict(kwargs)) for name, kwargs in data.pop("wrappers", ()))
        spec = EnvSpec(**data, wrappers=wrappers)
    except (AttributeError, TypeError, ValueError) as error:
        raise DatasetError(f"{path}: {_OURS} has an env that is none ({error}); give env= yourself") from error
    foreign = [name for name, _ in wrappers if not name.startswith(_WRAPPERS)]
    if foreign:  # a data file must not choose what code is imported
        raise DatasetError(f"{path}: its environment has the wrapper {foreign[0]}; give env= yourself if you trust it")
    return spec


def _about(file: Any) -> dict[str, Any]:
    """The single values under ``metadata``: algorithm, iteration, ..."""
    if "metadata" not in file:
        return {}
    found = {k: _plain(v) for k, v in file["metadata"].items() if getattr(v, "shape", None) in ((), (1,))}
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
