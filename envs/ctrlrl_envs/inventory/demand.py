"""Where demand comes from: distributions, or recorded series."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


class Split(NamedTuple):
    """A part of a study: how long its horizon is, and from where on its figures count."""

    periods: int
    ignored: int = 0
    """First periods that are trained on, but left out of figures: the stock at the start is arbitrary."""
    first: int = 0
    """Of a recorded series: the period at which it begins."""


class Drawn(NamedTuple):
    """Demand of ``B`` scenarios, and what is known of them."""

    demand: Tensor
    """[B, T, S] of each period and store."""
    past: Tensor | None = None
    """[B, W, S] of the periods before, the newest last."""
    time: Tensor | None = None
    """[T, F] features of the periods, the same in all scenarios."""
    unmet_cost: Tensor | None = None
    """[B, S], where scenarios have costs of their own; else those of the network."""


class Demand(ABC):
    """What demand is drawn from, for ``S`` stores.

    Attributes:
        mean: [S] by store.
        std: [S] by store.
        integer: Orders are of whole units; they are rounded where policies are compared, never in training.
        window: Past periods that policies see.
        features: Features of a period that policies see.
    """

    mean: Tensor
    std: Tensor
    integer: bool = False
    window: int = 0
    features: int = 0

    @abstractmethod
    def draw(self, count: int | None, split: Split, generator: torch.Generator | None = None) -> Drawn:
        """``count`` scenarios of ``split.periods`` periods; None of a recorded series takes each of them once."""


def per_store(value: float | Sequence[float], stores: int) -> Tensor:
    """[S] float32 of a number for all or one for each."""
    given = torch.as_tensor(value, dtype=torch.float32)
    return given.expand(stores).clone() if given.ndim == 0 else given


@dataclass
class Normal(Demand):
    """Normal demand, independent over time and correlated between stores.

    Args:
        mean: [S].
        std: [S].
        correlation: Between each two stores.
        clip: Take negative demand for none.
    """

    mean: Tensor
    std: Tensor
    correlation: float = 0.0
    clip: bool = True

    def __post_init__(self) -> None:
        stores = len(self.mean)
        matrix = self.correlation + (1.0 - self.correlation) * torch.eye(stores, dtype=torch.float64)
        self._factor = torch.linalg.cholesky(matrix).float()

    def draw(self, count: int | None, split: Split, generator: torch.Generator | None = None) -> Drawn:
        if count is None:
            raise ValueError("scenarios of a distribution have no end: say how many")
        noise = torch.randn(count, split.periods, len(self.mean), generator=generator)
        demand = torch.addcmul(self.mean, noise @ self._factor.T, self.std)
        return Drawn(demand.clamp_min(0.0) if self.clip else demand)


@dataclass
class Poisson(Demand):
    """Poisson demand, independent over time and stores, with a mean [S]."""

    mean: Tensor
    integer = True

    def __post_init__(self) -> None:
        self.std = self.mean.sqrt()

    def draw(self, count: int | None, split: Split, generator: torch.Generator | None = None) -> Drawn:
        if count is None:
            raise ValueError("scenarios of a distribution have no end: say how many")
        rate = self.mean.expand(count, split.periods, len(self.mean))
        return Drawn(torch.poisson(rate, generator=generator))


@dataclass
class Series(Demand):
    """Recorded demand: each scenario is one of the series (a product), at all stores.

    Args:
        values: [K, S, W] by series, store and period.
        window: Periods before a scenario's first that policies see.
        time: [W, F] features of the periods.
        unmet: [K, S] costs of unmet demand (prices) of each series.
    """

    values: Tensor
    window: int = 16
    time: Tensor | None = None
    unmet: Tensor | None = None

    def __post_init__(self) -> None:
        flat = self.values.transpose(1, 2).flatten(0, 1)
        self.mean, self.std = flat.mean(0), flat.std(0)
        self.features = 0 if self.time is None else self.time.shape[1]

    def draw(self, count: int | None, split: Split, generator: torch.Generator | None = None) -> Drawn:
        rows = slice(None) if count is None else torch.randint(len(self.values), (count,), generator=generator)
        weeks = slice(split.first, split.first + split.periods)
        before = slice(split.first - self.window, split.first)
        if split.first < self.window or split.first + split.periods > self.values.shape[2]:
            raise ValueError(
                f"{split} needs periods {before.start} to {weeks.stop} of a series of {self.values.shape[2]}"
            )
        values = self.values[rows].transpose(1, 2)
        return Drawn(
            values[:, weeks],
            values[:, before],
            None if self.time is None else self.time[weeks],
            None if self.unmet is None else self.unmet[rows],
        )
