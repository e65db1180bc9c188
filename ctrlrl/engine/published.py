"""Published results as data: the settings, the number of updates and the score of a method on a set of D4RL.

They lie in ``ctrlrl/offline/published/<name>/<dataset>.toml``, one file for each published number. A name is that of a
method or of a variant of one (``bc_10``: the best tenth of the episodes).
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import resources
from importlib.resources.abc import Traversable
from typing import Any

from ctrlrl.names import hint


@dataclass(frozen=True)
class Published:
    """One published number."""

    name: str
    """Of the method or its variant, as asked for."""
    method: str
    """Registered name of the method."""
    dataset: str
    """Id of the D4RL set."""
    settings: dict[str, Any]
    """Settings of ours that are those of the publication, by name."""
    updates: int
    """Gradient updates of each run."""
    score: float
    """Mean over the seeds of D4RL's normalised score of the last checkpoint."""
    score_std: float | None
    """Deviation over the seeds; None where it was not published."""
    best_score: float | None
    """The same as ``score`` of each seed's best checkpoint, chosen by its own evaluations."""
    seeds: int
    """Runs."""
    episodes: int
    """Evaluation episodes of each checkpoint."""
    source: str
    """Where the score was published."""
    settings_source: str
    """Where the settings were read."""
    note: str
    """What the settings here leave out or do differently; empty where nothing."""


def published(name: str, dataset_id: str) -> Published:
    """The published settings and score of the method or variant ``name`` on the set ``dataset_id``.

    Raises:
        KeyError: None is known; names what is.
    """
    sets = known(name)
    if dataset_id not in sets:
        near = hint(dataset_id, sets) or f" There are {', '.join(sets)}."
        raise KeyError(f"no published settings of {name} on {dataset_id!r} are known.{near}")
    found = tomllib.loads(_root().joinpath(name, f"{dataset_id}.toml").read_text("utf-8"))
    score, source = found["score"], found["source"]
    return Published(
        name, found["method"], dataset_id, found["settings"], found["updates"], score["last"], score.get("std"),
        score.get("best"), score["seeds"], score["episodes"], source["score"], source["settings"],
        source.get("note", ""),
    )  # fmt: skip


def known(name: str) -> list[str]:
    """Ids of the sets of which published settings of the method or variant ``name`` are known, sorted.

    Raises:
        KeyError: There are none; names the nearest that has some.
    """
    if name not in names():
        near = hint(name, names()) or f" There are some of {', '.join(names())}."
        raise KeyError(f"no published settings of {name!r} are known.{near}")
    return sorted(entry.name.removesuffix(".toml") for entry in _root().joinpath(name).iterdir())


def names() -> list[str]:
    """Methods and variants of which published settings are known, sorted."""
    return sorted(entry.name for entry in _root().iterdir() if entry.is_dir())


def everything() -> Iterator[Published]:
    """All of them."""
    return (published(name, dataset_id) for name in names() for dataset_id in known(name))


def _root() -> Traversable:
    return resources.files("ctrlrl").joinpath("offline", "published")
