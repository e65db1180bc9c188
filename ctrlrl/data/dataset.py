"""Recorded experience: whole episodes one after the other, with truncation apart from termination."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np

from ctrlrl.types import EnvSpec


class DatasetError(ValueError):
    """A dataset cannot be used: says which file, key and row, what was found there and what was expected."""


@dataclass(frozen=True)
class DatasetInfo:
    """What is known of a dataset beside its rows; JSON values."""

    id: str
    """Id or path under which it was loaded."""
    env: EnvSpec | None = None
    """Environment to evaluate in; None where it is not known."""
    ref_min_score: float | None = None
    """Mean return that scores 0 (a random policy)."""
    ref_max_score: float | None = None
    """Mean return that scores 100 (an expert)."""
    path: str | None = None
    """File or folder it was read from."""
    sha256: str | None = None
    """Of the file."""
    about: Mapping[str, Any] = field(default_factory=dict)
    """Further words of the file itself: algorithm, kind, code, checkpoint, versions."""


class Episode(NamedTuple):
    """Rows ``start`` to ``stop - 1`` of a dataset."""

    start: int
    stop: int


@dataclass(frozen=True, eq=False)
class Dataset:
    """``N`` steps of whole episodes, in order. Arrays may be memory maps.

    Raises:
        DatasetError: Columns of different lengths, flags that are no booleans, an empty set, or a last episode without
            an end.
    """

    observations: np.ndarray | Mapping[str, np.ndarray]
    """[N, ...] observation before each step."""
    actions: np.ndarray
    """[N, ...] in the environment's units."""
    rewards: np.ndarray
    """[N] float32."""
    terminals: np.ndarray
    """[N] bool: the episode ended here, its value beyond is zero."""
    timeouts: np.ndarray
    """[N] bool: the episode was cut here, its value goes on. Both may be true; then the end counts."""
    next_observations: np.ndarray | Mapping[str, np.ndarray]
    """[N, ...] observation after each step; anything finite where :attr:`next_known` is false."""
    next_known: np.ndarray
    """[N] bool: the observation after the step was recorded. Never the first one of the next episode."""
    observation_space: gym.Space
    action_space: gym.Space
    info: DatasetInfo
    infos: Mapping[str, np.ndarray] = field(default_factory=dict)
    """Further columns by name, each [N, ...]; ``action_log_probs`` is the behaviour policy's log-density of the action
    in the environment's units."""

    def __post_init__(self) -> None:
        n = len(self.rewards)
        if n == 0:
            raise DatasetError(f"{self.info.id} has no steps")
        for name, column in self.columns().items():
            if len(column) != n:
                raise DatasetError(f"{self.info.id}: {name} has {len(column)} rows, rewards has {n}")
        for name in ("terminals", "timeouts", "next_known"):
            if (found := getattr(self, name)).dtype != bool:
                raise DatasetError(f"{self.info.id}: {name} holds {found.dtype}; expected bool")
        if not self.ends[-1]:
            first = int(np.flatnonzero(self.ends)[-1]) + 1 if self.ends.any() else 0
            raise DatasetError(
                f"{self.info.id}: the episode of rows {first} to {n - 1} has no end: neither terminals nor timeouts is "
                "true in its last row. Load it with unfinished='cut' (--unfinished cut) to treat it as cut there"
            )

    def __len__(self) -> int:
        """Steps."""
        return len(self.rewards)

    def columns(self) -> dict[str, np.ndarray]:
        """Every column by name; those of a Dict observation are ``observations/<key>``."""
        found: dict[str, np.ndarray] = {}
        for name in ("observations", "actions", "rewards", "terminals", "timeouts", "next_observations", "next_known"):
            value = getattr(self, name)
            found |= {f"{name}/{k}": v for k, v in value.items()} if isinstance(value, Mapping) else {name: value}
        return found | {f"infos/{k}": v for k, v in self.infos.items()}

    @property
    def ends(self) -> np.ndarray:
        """[N] bool: last step of an episode."""
        return self.terminals | self.timeouts

    @cached_property
    def episodes(self) -> list[Episode]:
        """The episodes in order."""
        stops = np.flatnonzero(self.ends) + 1
        return [Episode(int(a), int(b)) for a, b in zip(np.r_[0, stops[:-1]], stops, strict=True)]

    @cached_property
    def returns(self) -> np.ndarray:
        """[episodes] float64: undiscounted sums of the rewards."""
        return np.add.reduceat(np.asarray(self.rewards, np.float64), [e.start for e in self.episodes])

    @cached_property
    def usable(self) -> np.ndarray:
        """[N] bool: steps from which a value can be learned: the next observation is known, or nothing follows."""
        return np.asarray(self.next_known | self.terminals)

    def take(self, episodes: list[int] | np.ndarray) -> Dataset:
        """The episodes numbered ``episodes``, in that order."""
        if len(episodes) == 0:
            raise DatasetError(f"no episode of {self.info.id} is left")
        rows = np.concatenate([np.arange(*self.episodes[int(k)]) for k in episodes])

        def pick(x: Any) -> Any:
            return {k: v[rows] for k, v in x.items()} if isinstance(x, Mapping) else x[rows]

        return dataclasses.replace(self, **{name: pick(getattr(self, name)) for name in _ROWS})

    def normalized(self, returns: np.ndarray | float) -> np.ndarray | None:
        """D4RL's score of ``returns``: 0 at the reference minimum, 100 at the maximum; None without references."""
        return normalized(self.info, returns)

    def __iter__(self) -> Iterator[Episode]:
        return iter(self.episodes)


_ROWS = (
    "observations", "actions", "rewards", "terminals", "timeouts", "next_observations", "next_known", "infos",
)  # fmt: skip


def normalized(info: DatasetInfo, returns: np.ndarray | float) -> np.ndarray | None:
    """100 (R - min) / (max - min) (Fu et al. 2020, section 5); None where the references are not known."""
    low, high = info.ref_min_score, info.ref_max_score
    if low is None or high is None:
        return None
    return 100.0 * (np.asarray(returns, np.float64) - low) / (high - low)
