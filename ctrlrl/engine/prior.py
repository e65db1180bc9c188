"""Going on in an environment with what was learned from data: networks, reward map, and the data itself."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from torch import Tensor

from ctrlrl.data.dataset import Dataset, DatasetError
from ctrlrl.data.transitions import TransitionReplay, Transitions
from ctrlrl.engine import checkpoint, runfolder
from ctrlrl.engine.agent import load_module
from ctrlrl.engine.config import ConfigError
from ctrlrl.engine.errors import CheckpointError
from ctrlrl.engine.learner import Learner
from ctrlrl.engine.spaces import space_from_json

REFERENCES = ("ref_min_score", "ref_max_score")
OWN_NAME = "offline"
"""Where config.json of an offline run holds the method's settings."""


def document_of(folder: str | os.PathLike[str]) -> Mapping[str, Any]:
    """config.json of the offline run in ``folder``.

    Raises:
        ConfigError: It is a run of another kind.
    """
    document = runfolder.read_config(folder)
    if OWN_NAME not in document:
        raise ConfigError(
            f"start_from={os.fspath(folder)!r} is a run of {document['method']}, expected one of an offline method; "
            "ctrlrl train --resume goes on with a run of another"
        )
    return document


def settings_of(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """The settings that a run must share with the one it starts from: networks, discount and rewards."""
    document = document_of(folder)
    config = document["config"]
    return {**config["network"], "gamma": config["gamma"], **document["data"]["reward_map"]}


def source_of(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """What a run keeps of the one it started from, so that it does not need its folder again."""
    document = document_of(folder)
    data = document["data"]
    kept = {k: document["config"][k] for k in ("dataset", "like")}
    return {**kept, "method": document["method"], "rows": data["rows"], **{k: data.get(k) for k in REFERENCES}}


def take_over(learner: Learner, folder: str | os.PathLike[str], method: str, action_space: gym.Space) -> list[str]:
    """Put the networks of the run in ``folder`` into ``learner``; their optimisers begin anew.

    Returns:
        Names of the networks that the run does not have and that stay as they were initialised.

    Raises:
        CheckpointError: A network of the run does not fit, or its actions have other bounds.
    """
    document = document_of(folder)
    theirs = space_from_json(document["spaces"]["action_space"])
    if not same_bounds(theirs, action_space):
        raise CheckpointError(
            f"{os.fspath(folder)} was trained for actions in {theirs}, the environment has {action_space}: the same "
            "action would mean another one. Train it with env= (--env) set to this environment"
        )
    path = Path(folder) / runfolder.CHECKPOINTS / "last.safetensors"
    tensors, _ = checkpoint.read(path, expect={})
    fresh = []
    for name, module in learner.modules.items():
        prefix = "policy/" if name == "actor" else f"learner/{name}/net/"
        if not any(key.startswith(prefix) for key in tensors):
            fresh.append(name)
            continue
        try:
            load_module(module, tensors, prefix)
        except CheckpointError as error:
            other = document["method"]
            raise CheckpointError(
                f"{method} cannot go on with the {name} of {other} in {os.fspath(folder)}: {error}. Train on with "
                f"{other} itself, or with a method that has the same kind of {name}"
            ) from None
    for copy, source in learner.copies.items():
        if copy in fresh and source not in fresh:
            learner.copy(copy, source)
            fresh.remove(copy)
    return fresh


def recorded(source: Mapping[str, Any], folder: Path | None = None) -> Dataset:
    """The dataset that the run ``source`` learned from.

    Args:
        source: What :func:`source_of` gave.
        folder: Keep it in files there instead of memory.

    Raises:
        DatasetError: It is not there any more, or has changed.
    """
    from ctrlrl.data.load import load

    # that an end was missing has been said when that run began
    data = load(source["dataset"], like=source["like"], unfinished="cut", memory_map=folder)
    refuse_other(source["dataset"], fingerprint(data), source["rows"])
    return data


def fingerprint(data: Dataset) -> dict[str, Any]:
    """What tells whether two datasets are the same one: cheap, and no proof."""
    ends = np.flatnonzero(data.ends)
    return {"steps": len(data), "episodes": len(ends), "reward_sum": float(np.sum(data.rewards, dtype=np.float64))}


def refuse_other(name: str, found: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """Raise DatasetError where two fingerprints differ."""
    if dict(found) != dict(expected):
        raise DatasetError(f"{name} is not the data that this run began with: found {found}, expected {expected}")


def same_bounds(a: gym.Space, b: gym.Space) -> bool:
    """Whether actions of two spaces mean the same, up to the rounding of their bounds."""
    if not (isinstance(a, gym.spaces.Box) and isinstance(b, gym.spaces.Box)):
        return a == b
    return a.shape == b.shape and bool(np.allclose(a.low, b.low) and np.allclose(a.high, b.high))


def mixed(old: Transitions, new: Transitions, count: int) -> Transitions:
    """``count`` batches one after the other, each the rows of ``old`` that belong to it and then those of ``new``."""

    def join(a: Any, b: Any) -> Any:
        if isinstance(a, Mapping):
            return {k: join(a[k], b[k]) for k in a}
        return torch.cat([_batches(a, count), _batches(b, count)], 1).flatten(0, 1)

    return Transitions(*(join(a, b) for a, b in zip(old, new, strict=True)))


def _batches(x: Tensor, count: int) -> Tensor:
    return x.unflatten(0, (count, -1))


class PriorData:
    """Recorded transitions that are mixed into every batch.

    Args:
        replay: The transitions.
        share: Of each batch, rounded to whole rows.
    """

    def __init__(self, replay: TransitionReplay, share: float) -> None:
        self.replay, self.share = replay, share

    def sample(self, memory: TransitionReplay, count: int, batch_size: int, generator: torch.Generator) -> Transitions:
        """``count`` batches of ``batch_size`` rows from both, one batch after the other."""
        old = round(self.share * batch_size)
        new = batch_size - old
        recorded = self.replay.sample(self.replay.draw(count, old, generator).flatten())
        if new == 0:
            return recorded
        return mixed(recorded, memory.sample(memory.draw(count, new, generator).flatten()), count)
