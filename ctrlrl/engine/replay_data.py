"""The replay of an off-policy run as a dataset."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch

from ctrlrl.data.dataset import Dataset, DatasetError, DatasetInfo
from ctrlrl.engine import checkpoint as checkpoints
from ctrlrl.engine import runfolder
from ctrlrl.engine.spaces import space_from_json
from ctrlrl.nets.actors import BoxActor, QNetworkConfig
from ctrlrl.types import EnvSpec


def from_run(run: str | os.PathLike[str], checkpoint: str = "last", steps: int | None = None) -> Dataset:
    """The transitions that an off-policy run has in its replay, in order, whole episodes after one another.

    Rows of environments that ran side by side are put together by the observation that one row ended with and another
    began with; episodes are in the order of their first rows. Where an episode was left unfinished (at a border of
    the run, where the environments are built anew, and at its end) it is cut: its last row has a timeout, and the
    observation after it is known, as in all rows. Where the replay is full and has forgotten its oldest rows, the
    episodes whose beginning is lost are left out, as their returns would be wrong; ``about["rows_left_out"]`` counts
    their rows. Actions are in the environment's units; further columns of the replay become info columns.

    Args:
        run: Run folder. Its "last" checkpoint has the replay.
        checkpoint: Only what had been collected when this one was written.
        steps: Only the first so many steps of the run's training.

    Raises:
        DatasetError: The run keeps no replay, or nothing of what was asked for is in it any more.
        CheckpointError: A file is missing or damaged.
    """
    folder = Path(run)
    document = runfolder.read_config(folder)
    _, state = checkpoints.read(folder / runfolder.CHECKPOINTS / "last.safetensors")
    if not state.get("replay"):
        raise DatasetError(
            f"{folder} has no replay: it was trained by {document['method']}, or not yet; only off-policy runs "
            "(sac, td3) keep one, beside their last checkpoint"
        )
    if state.get("decoding"):
        raise DatasetError(f"{folder} keeps latents, which its decoder makes actions of: ctrlrl data make rolls it out")
    added = int(state["replay"][-1]["last"])
    rows, oldest = _rows(folder, state["replay"], max(0, added - _setting(document, "replay_size")))
    # rows are counted anew where training began again without its replay; the steps tell the difference
    behind, end = int(state["steps"]) - added, added
    if checkpoint != "last":
        _, then = checkpoints.read(folder / runfolder.CHECKPOINTS / f"{checkpoint}.safetensors")
        end = min(end, int(then["steps"]) - behind)
    if steps is not None:
        if steps < 1:
            raise ValueError(f"steps={steps} must be at least 1")
        end = min(end, steps - behind)
    if end <= oldest:
        raise DatasetError(
            f"{folder}: the replay has the steps from {oldest + behind:,} to {added + behind:,} of the run, none of "
            f"the first {end + behind:,}"
        )
    rows = {name: value[: end - oldest] for name, value in rows.items()}
    return _dataset(rows, document, folder, checkpoint, oldest)


def _dataset(
    rows: dict[str, np.ndarray], document: Mapping[str, Any], folder: Path, checkpoint: str, oldest: int
) -> Dataset:
    spaces = {k: space_from_json(document["spaces"][f"{k}_space"]) for k in ("observation", "action")}
    terminals, timeouts = rows["terminated"] > 0, rows["truncated"] > 0
    columns = {k: v for k, v in rows.items() if k.partition("/")[0] in ("obs", "next_obs")}
    first, follows = trajectories(columns, terminals | timeouts, int(document["n_envs"]))
    timeouts |= ~follows & ~terminals
    order = np.argsort(first, kind="stable")
    if oldest > 0:  # whether a first row of what is left begins an episode, nobody knows any more
        order = order[first[order] >= int(document["n_envs"])]
        if len(order) == 0:
            raise DatasetError(f"{folder}: the replay holds parts of episodes only, none with its beginning")
    spec = document["env"]
    if spec is not None:
        wrappers = tuple((path, dict(kwargs)) for path, kwargs in spec["wrappers"])
        spec = EnvSpec(spec["id"], dict(spec["kwargs"]), wrappers)

    def column(name: str) -> Any:
        if name in rows:
            return rows[name][order]
        return {k.removeprefix(f"{name}/"): v[order] for k, v in rows.items() if k.startswith(f"{name}/")}

    about = {
        "algorithm": document["method"], "run": folder.resolve().name, "checkpoint": checkpoint,
        "seed": document["seed"], "rows_left_out": len(first) - len(order),
    }  # fmt: skip
    return Dataset(
        observations=column("obs"),
        actions=_to_env(rows["action"][order], spaces["action"], folder),
        rewards=column("reward"),
        terminals=terminals[order],
        timeouts=timeouts[order],
        next_observations=column("next_obs"),
        next_known=np.ones(len(order), bool),
        observation_space=spaces["observation"],
        action_space=spaces["action"],
        info=DatasetInfo(f"{folder.resolve().name}-replay", spec, about=about),
        infos=column("extras"),
    )


def trajectories(columns: Mapping[str, np.ndarray], ends: np.ndarray, n_envs: int) -> tuple[np.ndarray, np.ndarray]:
    """Which rows of environments side by side belong together.

    A row goes on in the one of the next ``n_envs`` rows that begins with the observation it ended with; where several
    do, in the farthest, which is its own where every environment made every step.

    Args:
        columns: ``obs`` and ``next_obs`` (or ``obs/<key>`` ...), each [N, ...].
        ends: [N] bool: the episode ended or was cut here.
        n_envs: Environments.

    Returns:
        [N] int64 the first row of each row's episode, and [N] bool: another row follows in it.
    """
    n = len(ends)
    before, follows = np.arange(n), np.zeros(n, bool)
    for ahead in range(min(n_envs, n - 1), 0, -1):
        rows = np.flatnonzero(~ends[:-ahead] & ~follows[:-ahead] & (before[ahead:] == np.arange(ahead, n)))
        for name in (k for k in columns if k.startswith("obs")):
            following = columns[f"next_{name}"]
            same = columns[name][rows + ahead] == following[rows]
            rows = rows[same.all(tuple(range(1, same.ndim)))]
        before[rows + ahead], follows[rows] = rows, True
    while (before != before[before]).any():  # half the way to the first row each time
        before = before[before]
    return before, follows


def _rows(folder: Path, manifest: list[Mapping[str, Any]], oldest: int) -> tuple[dict[str, np.ndarray], int]:
    """Every column of the rows that the replay holds, and the number of the first."""
    parts: list[dict[str, np.ndarray]] = []
    reached = None
    for entry in manifest:
        if entry["last"] <= oldest:
            continue
        if (reached is not None and entry["first"] != reached) or not _SEGMENT.fullmatch(entry["file"]):
            raise DatasetError(f"{folder}: the list of its replay's files is damaged at {entry['file']!r}")
        expected = {"first": entry["first"], "last": entry["last"]}
        found, _ = checkpoints.read(folder / runfolder.CHECKPOINTS / entry["file"], expect=expected)
        skip = max(0, oldest - entry["first"])
        parts.append({name: value[skip:].numpy() for name, value in found.items()})
        oldest, reached = (oldest, entry["last"]) if reached is not None else (entry["first"] + skip, entry["last"])
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}, oldest


_SEGMENT = re.compile(r"replay-[\d.-]+\.safetensors")


def _to_env(action: np.ndarray, space: gym.Space, folder: Path) -> np.ndarray:
    """[-1, 1]^A as the environment got it, bit for bit."""
    actor = BoxActor(gym.spaces.Box(-1.0, 1.0, (1,)), space, QNetworkConfig(actor_hidden=()))
    if action.shape[1:] != actor.action_shape:
        raise DatasetError(f"{folder}: its replay has actions of {action.shape[1:]} numbers, {space} was expected")
    sent = actor.to_env(torch.empty(0), torch.from_numpy(np.ascontiguousarray(action)))
    return sent.numpy().astype(space.dtype)


def _setting(document: Mapping[str, Any], name: str) -> Any:
    """A setting of the loop, wherever config.json has it."""
    for key, value in document["config"].items():
        if key == name:
            return value
        if isinstance(value, Mapping) and name in value:
            return value[name]
    raise DatasetError(f"the run's config has no {name}")
