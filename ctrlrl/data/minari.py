"""Minari datasets, read and written through the ``minari`` library (0.5).

A set is ``metadata.json`` beside ``main_data.hdf5`` (or one Arrow folder per episode). An episode of ``T`` steps has
``T + 1`` observations, so the observation after every step is known, the final one too.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import gymnasium as gym
import numpy as np

from ctrlrl.data import minari_rows, stated
from ctrlrl.data.dataset import Dataset, DatasetError, DatasetInfo
from ctrlrl.data.minari_root import (
    HDF5,
    METADATA,
    NEXT_KNOWN,
    OWN,
    WORDS,
    is_folder,
    is_id,
    library,
    local_ids,
    local_root,
    locate,
)  # fmt: skip
from ctrlrl.data.minari_write import write
from ctrlrl.types import EnvSpec

__all__ = [
    "check_stated", "episodes", "is_folder", "is_id", "library", "local_ids", "local_root", "read", "spaces", "write",
]  # fmt: skip

_DAMAGE = (
    OSError, KeyError, ValueError, TypeError, AttributeError, AssertionError, NotImplementedError, gym.error.Error,
)  # fmt: skip
"""What minari raises for sets that are not as it expects them."""


def read(
    id_or_folder: str | os.PathLike[str],
    *,
    env: str | EnvSpec | None = None,
    unfinished: Literal["error", "cut"] = "error",
) -> Dataset:
    """A Minari set: Box or Discrete observations, or a flat Dict of these; Box or Discrete actions.

    Nothing that the file names is imported or run: ``info.env`` only records what to evaluate in (``eval_env_spec``
    where there is one), without wrappers from elsewhere; ``about["env_left_out"]`` has the id of an environment that
    is not taken because its id imports a module of others. Columns keep their types, rewards become float32; actions
    outside of their Box by rounding only are brought back. Info columns of ``T + 1`` rows, which Minari begins with
    the reset's, belong to the observations: row ``t`` is what was known before step ``t``. Those that are not numbers
    of one shape in every episode are named in ``about["infos_left_out"]``.

    Args:
        id_or_folder: Id, or a set's folder. An id that is not local is downloaded by minari.
        env: Environment to evaluate in, instead of the recorded one.
        unfinished: ``"cut"`` treats an episode whose last step is neither terminated nor truncated as cut there.

    Raises:
        DatasetError: Not found, damaged, with other spaces, with observations, actions or rewards that are not finite,
            or actions outside of their space; names the file, episode, key and step.
        ImportError: minari is not installed.
    """
    data, found = locate(str(id_or_folder)), []
    metadata, file = _metadata(data), data / HDF5
    about, where = _about(metadata, str(data / METADATA)), str(data / METADATA)
    low, high = stated.references(metadata, where)
    spec = _env(metadata, about, where) if env is None else EnvSpec(env) if isinstance(env, str) else env
    seen, done = (_space(metadata, kind, data) for kind in ("observation", "action"))
    for place, episode in _read_episodes(data, unfinished):
        if isinstance(episode, DatasetError):
            raise episode
        for problem in minari_rows.faults(place, episode[0], episode[1], done):
            if problem.severity == "error":
                raise DatasetError(str(problem))
        found.append(episode)
    infos, left_out = _infos([infos for _, infos in found])
    known = infos.pop(NEXT_KNOWN, None)
    columns = {name: _joined([columns[name] for columns, _ in found]) for name in found[0][0]}
    columns["next_known"] = np.ones(len(columns["rewards"]), bool) if known is None else known.astype(bool)
    columns["actions"] = minari_rows.clipped(columns["actions"], done)
    if left_out:
        about["infos_left_out"] = left_out
    info = DatasetInfo(
        id=metadata["dataset_id"],
        env=spec,
        ref_min_score=low,
        ref_max_score=high,
        path=str(data.parent if data.name == "data" else data),
        sha256=_digest(file) if file.is_file() else None,
        about=about,
    )
    return Dataset(**columns, observation_space=seen, action_space=done, info=info, infos=infos)


def spaces(id_or_folder: str | os.PathLike[str]) -> dict[str, gym.Space]:
    """The spaces of the set, ``observation`` and ``action``.

    Raises:
        DatasetError: They cannot be read, or are others than :func:`read` takes.
    """
    data = locate(str(id_or_folder))
    return {kind: _space(_metadata(data), kind, data) for kind in ("observation", "action")}


def check_stated(id_or_folder: str | os.PathLike[str]) -> None:
    """Look at what the set says of its environment and reference scores.

    Raises:
        DatasetError: It keeps the set from being read.
    """
    data = locate(str(id_or_folder))
    metadata, where = _metadata(data), str(data / METADATA)
    stated.references(metadata, where)
    _env(metadata, _about(metadata, where), where)


def episodes(id_or_folder: str | os.PathLike[str], unfinished: str = "error") -> Iterator[tuple[str, Any]]:
    """Where each episode is (file and group), and its columns and infos, or the DatasetError that says what is wrong.

    Raises:
        DatasetError: The set as a whole cannot be read.
    """
    yield from _read_episodes(locate(str(id_or_folder)), unfinished)


def _read_episodes(data: Path, unfinished: str) -> Iterator[tuple[str, Any]]:
    minari, metadata = library(), _metadata(data)
    spaces = {kind: _space(metadata, kind, data) for kind in ("observation", "action")}
    file, number = data / HDF5 if (data / HDF5).is_file() else data, -1
    try:
        for number, episode in enumerate(minari.MinariDataset(str(data)).iterate_episodes()):
            place = f"{file}: episode_{number}"
            try:
                found: Any = _episode(episode, spaces, place, unfinished)
            except DatasetError as error:
                found = error
            yield place, found
    except _DAMAGE as error:
        where = f"{file}: episode_{number + 1}" if number >= 0 else f"{file}"
        raise DatasetError(f"{where} cannot be read by minari: {error}. Fetch or write it again") from error
    if number < 0:
        raise DatasetError(f"{file} has no episodes")


def _metadata(data: Path) -> dict[str, Any]:
    file = data / METADATA
    try:
        metadata = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DatasetError(f"{file} cannot be read: {error}") from error
    missing = [k for k in ("dataset_id", "minari_version", "data_format") if k not in metadata]
    if missing:
        raise DatasetError(f"{file} is not Minari's: it lacks {', '.join(missing)}")
    return metadata


def _space(metadata: Mapping[str, Any], kind: str, data: Path) -> gym.Space:
    """The observation or action space; never taken from the environment, which would run the file's entry point."""
    from minari.serialization import deserialize_space

    key = f"{kind}_space"
    if key not in metadata:
        raise DatasetError(f"{data / METADATA} has no {key}; it would have to be taken from the running environment")
    described = json.loads(metadata[key]) if isinstance(metadata[key], str) else metadata[key]
    flat = described.get("type") == "Dict" and kind == "observation"
    parts = described["subspaces"] if flat else {"": described}
    wanted = "Box or Discrete" + (", or a flat Dict of these" if kind == "observation" else "")
    for name, part in parts.items():
        if part.get("type") not in ("Box", "Discrete"):
            where = f"{data / METADATA}: {key}{f' {name!r}' if name else ''}"
            raise DatasetError(f"{where} is of type {part.get('type')}; expected {wanted}")
    if not flat:
        return deserialize_space(described)
    return gym.spaces.Dict([(name, deserialize_space(part)) for name, part in parts.items()])  # pairs keep the order


def _episode(
    found: Any, spaces: Mapping[str, gym.Space], place: str, unfinished: str
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Columns and infos of one episode, checked."""
    n = len(found.rewards)
    if n == 0:
        raise DatasetError(f"{place} has no steps")

    def fitting(key: str, value: Any, rows: int, shape: tuple[int, ...]) -> np.ndarray:
        array = np.asarray(value)
        if array.shape != (rows, *shape) or array.dtype.kind not in "fiub":
            raise DatasetError(
                f"{place}/{key} is {array.dtype} of shape {array.shape}, expected numbers of shape {(rows, *shape)}"
            )
        return array

    space, seen = spaces["observation"], found.observations
    if isinstance(space, gym.spaces.Dict):
        whole = {k: fitting(f"observations/{k}", seen[k], n + 1, s.shape or ()) for k, s in space.spaces.items()}
        now, following = {k: v[:-1] for k, v in whole.items()}, {k: v[1:] for k, v in whole.items()}
    else:
        array = fitting("observations", seen, n + 1, space.shape or ())
        now, following = array[:-1], array[1:]
    flags = {key: fitting(key, getattr(found, key), n, ()).astype(bool) for key in ("terminations", "truncations")}
    ends = flags["terminations"] | flags["truncations"]
    if ends[:-1].any():
        row = int(np.flatnonzero(ends)[0])
        raise DatasetError(
            f"{place}: its step {row} of {n} ends the episode (terminations, truncations), others follow"
        )
    if not ends[-1]:
        if unfinished != "cut":
            raise DatasetError(
                f"{place} has no end: neither terminations nor truncations is true in its last step. Load it with "
                "unfinished='cut' (--unfinished cut) to treat it as cut there"
            )
        flags["truncations"][-1] = True
    columns = {
        "observations": now,
        "actions": fitting("actions", found.actions, n, spaces["action"].shape or ()),
        "rewards": fitting("rewards", found.rewards, n, ()).astype(np.float32),
        "terminals": flags["terminations"],
        "timeouts": flags["truncations"],
        "next_observations": following,
    }
    return columns, {k: v[:n] if v is not None and len(v) in (n, n + 1) else None for k, v in _flat(found.infos or {})}


def _flat(infos: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    """Info columns by ``group/name``; None for what is not an array of numbers with rows."""
    for name, value in infos.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{above}{name}/")
            continue
        array = np.asarray(value)
        yield f"{above}{name}", array if array.ndim and array.dtype.kind in "fiub" else None


def _infos(episodes: list[dict[str, Any]]) -> tuple[dict[str, np.ndarray], list[str]]:
    """The info columns that all episodes have in one shape, and the names of the others."""
    every = {name for infos in episodes for name in infos}
    shapes = {k: {infos[k].shape[1:] if infos.get(k) is not None else None for infos in episodes} for k in every}
    kept = sorted(k for k in every if None not in shapes[k] and len(shapes[k]) == 1)
    return {k: np.concatenate([infos[k] for infos in episodes]) for k in kept}, sorted(every - set(kept))


def _joined(parts: list[Any]) -> Any:
    if isinstance(parts[0], Mapping):
        return {k: np.concatenate([p[k] for p in parts]) for k in parts[0]}
    return np.concatenate(parts)


def _about(metadata: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Further words of the set."""
    own = metadata.get(OWN) or {}
    if not isinstance(own, dict) or not isinstance(own.get("about", {}), dict):
        raise DatasetError(f"{where}: {OWN} is {str(own)[:80]!r}; expected an object. Remove it from the file")
    about = {k: metadata[k] for k in WORDS if metadata.get(k) not in (None, [], "")}
    for key in ("author", "author_email"):  # Minari keeps sets, in any order
        if key in about and not isinstance(about[key], str):
            about[key] = about[key][0] if len(about[key]) == 1 else sorted(about[key])
    return about | own.get("about", {})


def _env(metadata: Mapping[str, Any], about: dict[str, Any], file: str) -> EnvSpec | None:
    """The environment to evaluate in; what of it cannot be kept is noted in ``about``."""
    own = (metadata.get(OWN) or {}).get("env")
    if own is not None:
        return stated.environment(own, about, f"{file}: {OWN}")
    key = next((k for k in ("eval_env_spec", "env_spec") if metadata.get(k) is not None), None)
    if key is None:
        return None
    try:
        spec = json.loads(metadata[key]) if isinstance(metadata[key], str) else dict(metadata[key])
        env_id, kwargs, limit = spec.get("id"), dict(spec.get("kwargs") or {}), spec.get("max_episode_steps")
        listed = [(w.get("entry_point"), w.get("kwargs"), w.get("name")) for w in spec.get("additional_wrappers") or ()]
    except (AttributeError, TypeError, ValueError) as error:
        raise DatasetError(f"{file}: {key} describes no environment ({error}); give env= yourself") from error
    if (env_id := stated.taken(env_id, about, f"{file}: {key}")) is None:
        return None
    wrappers, left_out = [], []
    for path, arguments, name in listed:
        if isinstance(path, str) and stated.is_from(path, stated.WRAPPERS) and isinstance(arguments, dict):
            wrappers.append((path, arguments))
        else:
            left_out.append(str(name or path))
    if left_out:
        about["wrappers_left_out"] = left_out
    registered = gym.registry.get(env_id)
    if limit is not None and (registered is None or registered.max_episode_steps != limit):
        kwargs["max_episode_steps"] = limit
    return EnvSpec(env_id, kwargs, tuple(wrappers))


def _digest(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
