"""Writing a dataset as a Minari set."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.envs.registration import EnvSpec as GymSpec
from gymnasium.envs.registration import WrapperSpec

from ctrlrl.data.dataset import Dataset, DatasetError
from ctrlrl.data.minari_root import NEXT_KNOWN, OWN, WORDS, is_id, library, local_root
from ctrlrl.types import EnvSpec


def write(
    dataset: Dataset,
    dataset_id: str,
    *,
    root: str | os.PathLike[str] | None = None,
    author: str | None = None,
    author_email: str | None = None,
    code_permalink: str | None = None,
    algorithm_name: str | None = None,
    description: str | None = None,
) -> Path:
    """Write ``dataset`` as the Minari set ``dataset_id`` in HDF5, all of it or nothing, and return its folder.

    Kept are the info columns, the reference scores, the environment and ``info.about``; images are stored as they are.
    The words about the set default to those of ``info.about``.

    Minari has no way to say that the observation after a step is unknown. A cut episode whose last observation was
    not recorded therefore loses that step, and is cut one step earlier; ``about["steps_left_out"]`` counts them. After
    a termination, where nothing depends on it, the row of ``next_observations`` is written and marked in an info column
    ``next_known``, which :func:`read` understands.

    Args:
        dataset: The set. Observations of Box, Discrete or a flat Dict of these; actions of Box or Discrete.
        dataset_id: ``[namespace/]name-vN``.
        root: Where; Minari's own root by default.
        author, author_email, code_permalink, algorithm_name, description: See Minari's documentation.

    Raises:
        DatasetError: The id is malformed or taken, a space that :func:`read` would refuse, or nothing is left to write.
        ImportError: minari is not installed.
    """
    library()
    if not is_id(dataset_id) or "://" in dataset_id:
        raise DatasetError(
            f"{dataset_id!r} is no Minari id; expected [namespace/]name-vN, such as ctrlrl/hopper/medium-v0"
        )
    top = local_root() if root is None else Path(root)
    target = top / dataset_id
    if target.exists():
        raise DatasetError(f"{target} exists; raise the version in {dataset_id}, or remove that folder")
    check_spaces(dataset.observation_space, dataset.action_space, dataset.info.id)
    given = {
        "author": author, "author_email": author_email, "code_permalink": code_permalink,
        "algorithm_name": algorithm_name, "description": description,
    }  # fmt: skip
    missing = [folder for folder in target.parents if not folder.exists()]
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.tmp-{os.getpid()}")  # hidden, so Minari does not list it
    try:
        _write(dataset, dataset_id, temporary / "data", {k: v for k, v in given.items() if v is not None})
        os.replace(temporary, target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        with contextlib.suppress(OSError):  # one that is not empty belongs to others, and so do those above it
            for folder in missing:
                folder.rmdir()
        raise
    for folder in target.parents:
        if folder == top:
            break
        if not (folder / "namespace_metadata.json").exists():
            (folder / "namespace_metadata.json").write_text("{}", encoding="utf-8")
    return target


def _write(dataset: Dataset, dataset_id: str, data: Path, words: dict[str, str]) -> None:
    from minari import __version__
    from minari.dataset.minari_storage import MinariStorage

    info, about = dataset.info, dict(dataset.info.about)
    words = {k: about.pop(k) for k in WORDS if k in about} | words
    episodes, left_out = _kept(dataset)
    if left_out:
        about["steps_left_out"] = left_out
    metadata: dict[str, Any] = {"dataset_id": dataset_id, "minari_version": __version__, **words}
    for key in ("author", "author_email"):
        if key in metadata:
            metadata[key] = {metadata[key]} if isinstance(metadata[key], str) else set(metadata[key])
    if info.ref_min_score is not None and info.ref_max_score is not None:
        metadata |= {"ref_min_score": float(info.ref_min_score), "ref_max_score": float(info.ref_max_score)}
    metadata[OWN] = {"about": about, "env": None if info.env is None else dataclasses.asdict(info.env)}
    data.mkdir(parents=True)
    storage = MinariStorage.new(
        data, dataset.observation_space, dataset.action_space, None if info.env is None else _gym_spec(info.env),
        data_format="hdf5", jpeg_encoding=False,
    )  # fmt: skip
    storage.update_metadata(metadata)
    storage.update_episodes(_buffers(dataset, episodes))


def _kept(dataset: Dataset) -> tuple[list[tuple[int, int]], int]:
    """Rows of the episodes to write, without last steps of cut episodes whose outcome is not known; and how many."""
    found, left_out = [], 0
    for start, stop in dataset.episodes:
        if not dataset.next_known[stop - 1] and not dataset.terminals[stop - 1]:
            left_out += 1
            stop -= 1
        if stop > start:
            found.append((start, stop))
    if not found:
        raise DatasetError(f"{dataset.info.id}: no step has a known next observation, there is nothing to write")
    return found, left_out


def _buffers(dataset: Dataset, episodes: list[tuple[int, int]]) -> Iterator[Any]:
    from minari.data_collector import EpisodeBuffer

    unknown = not all(dataset.next_known[start:stop].all() for start, stop in episodes)
    for start, stop in episodes:
        rows = slice(start, stop)

        def seen(now: np.ndarray, following: np.ndarray, rows: slice = rows) -> np.ndarray:
            return np.concatenate([now[rows], following[rows.stop - 1 : rows.stop]])

        now, following = dataset.observations, dataset.next_observations
        if isinstance(now, Mapping) and isinstance(following, Mapping):
            observations: Any = {k: seen(now[k], following[k]) for k in now}
        else:
            observations = seen(now, following)  # type: ignore[arg-type]
        timeouts = np.array(dataset.timeouts[rows])
        timeouts[-1] |= not dataset.terminals[stop - 1]  # cut here, also where the step that was cut is left out
        infos = {name: np.asarray(column[rows]) for name, column in dataset.infos.items()}
        if unknown:
            infos[NEXT_KNOWN] = np.asarray(dataset.next_known[rows])
        yield EpisodeBuffer(
            observations=observations,
            actions=np.asarray(dataset.actions[rows]),  # type: ignore[arg-type]
            rewards=np.asarray(dataset.rewards[rows]),  # type: ignore[arg-type]
            terminations=np.asarray(dataset.terminals[rows]),  # type: ignore[arg-type]
            truncations=timeouts,  # type: ignore[arg-type]
            infos=infos,
        )


def check_spaces(observation: gym.Space, action: gym.Space, id: str) -> None:
    """Refuse a set called ``id`` that :func:`read` would refuse.

    Raises:
        DatasetError: Names the space.
    """
    parts = dict(observation.spaces) if isinstance(observation, gym.spaces.Dict) else {"observation": observation}
    for name, space in {**parts, "action": action}.items():
        if not isinstance(space, gym.spaces.Box | gym.spaces.Discrete):
            raise DatasetError(f"{id}: {name} is of type {type(space).__name__}; expected Box or Discrete")


def _gym_spec(env: EnvSpec) -> GymSpec | None:
    """What Gymnasium and Minari build the environment from; None where its entry point has no name."""
    name = env.id.rpartition(":")[2]
    spec = copy.deepcopy(gym.registry.get(name)) or GymSpec(name)
    spec.kwargs = {**spec.kwargs, **env.kwargs}
    spec.max_episode_steps = spec.kwargs.pop("max_episode_steps", spec.max_episode_steps)
    wrappers = tuple(WrapperSpec(path.rpartition(":")[2], path, dict(kwargs)) for path, kwargs in env.wrappers)
    spec.additional_wrappers = (*spec.additional_wrappers, *wrappers)
    try:
        spec.to_json()
    except (TypeError, ValueError):
        return None
    return spec
