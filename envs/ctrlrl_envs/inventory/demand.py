"""Where demand comes from: distributions, or recorded series."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, NoReturn

import numpy as np
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


def per_store(value: float | Sequence[float] | Tensor, stores: int, name: str = "value") -> Tensor:
    """[S] float32 of a number for all or one for each.

    Raises:
        ValueError: Other shapes, or numbers below 0 or not finite; the message calls them ``name``.
    """
    try:
        given = torch.as_tensor(value, dtype=torch.float32)
    except (TypeError, ValueError, RuntimeError):
        given = torch.tensor(-1.0)
    if given.shape not in ((), (stores,)) or not _amounts(given):
        raise ValueError(f"{name}={value!r} must be a finite number of at least 0, or {stores} of them, by store")
    return given.expand(stores).clone()


def _amounts(given: Tensor) -> bool:
    return bool(((given >= 0.0) & (given < torch.inf)).all())


def _check_stores(**given: Tensor) -> None:
    """Each is [S] with the same S, finite and not negative."""
    stores = None
    for name, value in given.items():
        if not isinstance(value, Tensor) or value.ndim != 1 or not len(value) or len(value) != (stores or len(value)):
            expected = "[S], a number of each store" if stores is None else f"[{stores}], as many as before it"
            found = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
            raise ValueError(f"{name} must be a tensor {expected}; found {found}")
        if not _amounts(value):
            raise ValueError(f"{name}={value.tolist()} must be finite numbers of at least 0")
        stores = len(value)


@dataclass
class Normal(Demand):
    """Normal demand, independent over time and correlated between stores.

    Args:
        mean: [S].
        std: [S].
        correlation: Between each two stores; a number, or their matrix [S, S], before negative demand is clipped.
        clip: Take negative demand for none.

    Raises:
        ValueError: Something negative, not finite or of another shape, or correlations that cannot be.
    """

    mean: Tensor
    std: Tensor
    correlation: float | Tensor | np.ndarray = 0.0
    clip: bool = True

    def __post_init__(self) -> None:
        _check_stores(mean=self.mean, std=self.std)
        self._factor = self._root().float()

    def _root(self) -> Tensor:
        """[S, S] float64, lower triangular: what turns independent noise into correlated one."""
        stores = len(self.mean)
        try:
            given = torch.as_tensor(self.correlation).to("cpu", torch.float64)
        except (TypeError, ValueError, RuntimeError):
            self._refuse(f"{self.correlation!r}")
        unit = torch.eye(stores, dtype=torch.float64)
        if given.ndim == 0:
            # below this, the variance of the sum of all would be negative
            if not -1.0 / max(stores - 1, 1) < float(given) < 1.0:
                self._refuse(f"{self.correlation!r}")
            given = given + (1.0 - given) * unit
        elif given.shape != (stores, stores):
            self._refuse(f"numbers of shape {tuple(given.shape)}")
        elif not torch.allclose(given.diagonal(), unit.diagonal(), rtol=0.0, atol=1e-6):
            self._refuse(f"the diagonal {given.diagonal().tolist()}")
        elif not torch.allclose(given, given.T, rtol=0.0, atol=1e-6):
            self._refuse("a matrix that is not symmetric")
        root, failed = torch.linalg.cholesky_ex(given)
        if failed:
            self._refuse("one that is not positive definite: no demand has such correlations")
        return root

    def _refuse(self, found: str) -> NoReturn:
        stores = len(self.mean)
        raise ValueError(
            f"correlation must be above {-1.0 / max(stores - 1, 1):.4g} (with {stores} stores) and below 1, or a "
            f"symmetric matrix [{stores}, {stores}] with ones on its diagonal; found {found}"
        )

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
        _check_stores(mean=self.mean)
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
        training: First periods, up to the end of the train split, of which mean and std are taken, and all else that
            policies and environments are told beforehand; None is all periods.

    Raises:
        ValueError: There are not so many periods.
    """

    values: Tensor
    window: int = 16
    time: Tensor | None = None
    unmet: Tensor | None = None
    training: int | None = None

    def __post_init__(self) -> None:
        periods = self.values.shape[2]
        if self.training is not None and not 1 <= self.training <= periods:
            raise ValueError(f"training={self.training} must be 1 or more periods of the {periods} of these series")
        flat = self.values[:, :, : self.training].transpose(1, 2).flatten(0, 1)
        self.mean, self.std = flat.mean(0), flat.std(0, correction=min(1, len(flat) - 1))
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
