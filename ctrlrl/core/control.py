"""Controllers: small state machines that turn measured statistics into knobs, once per iteration.

They are values. Their state is a dictionary of floats that belongs to the caller, so it can be saved with a run.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

State = dict[str, float]
Knobs = dict[str, float]


@runtime_checkable
class Controller(Protocol):
    """What every controller offers. ``step`` is pure; statistics it does not find leave its knobs as they were."""

    def initial(self) -> State:
        """State before the first step."""
        ...

    def step(self, state: Mapping[str, float], stats: Mapping[str, float]) -> tuple[State, Knobs]:
        """New state and knobs, from the old state and the statistics of the last iteration."""
        ...


@dataclass(frozen=True)
class LinearSchedule:
    """A knob that moves in a straight line over the run.

    k = max(floor, start + (end - start) progress),  ``stats["progress"]`` in [0, 1]
    """

    knob: str
    """Name of the knob."""
    start: float
    """Value at progress 0."""
    end: float
    """Value at progress 1."""
    floor: float | None = None
    """Smallest value; None for no bound."""

    def initial(self) -> State:
        """State before the first step."""
        return {self.knob: self._at(0.0)}

    def step(self, state: Mapping[str, float], stats: Mapping[str, float]) -> tuple[State, Knobs]:
        """Value at the present progress."""
        value = self._at(stats["progress"]) if "progress" in stats else state[self.knob]
        return {self.knob: value}, {self.knob: value}

    def _at(self, progress: float) -> float:
        value = self.start + (self.end - self.start) * progress
        return value if self.floor is None else max(self.floor, value)


@dataclass(frozen=True)
class KLAdaptive:
    """A step size that keeps the divergence between updates near a target (rsl_rl's adaptive learning rate).

    k <- max(low, k / factor)   if kl > 2 target
    k <- min(high, k * factor)  if kl < target / 2

    For the coefficient of a penalty, which must grow with the divergence, use a factor below 1.
    A divergence that is not a number changes nothing.
    """

    knob: str
    """Name of the knob."""
    initial_value: float
    """Value before the first step."""
    target: float
    """Divergence aimed at, in nats."""
    factor: float = 1.5
    """What a step divides or multiplies by."""
    low: float = 1e-5
    """Smallest value."""
    high: float = 1e-2
    """Largest value."""
    stat: str = "approx_kl"
    """Name of the statistic that holds the divergence."""

    def __post_init__(self) -> None:
        if self.target <= 0 or self.factor <= 0:
            raise ValueError(f"target and factor must be positive, not {self.target} and {self.factor}")
        if not self.low <= self.initial_value <= self.high:
            raise ValueError(f"initial_value={self.initial_value} must lie in [{self.low}, {self.high}]")

    def initial(self) -> State:
        """State before the first step."""
        return {self.knob: self.initial_value}

    def step(self, state: Mapping[str, float], stats: Mapping[str, float]) -> tuple[State, Knobs]:
        """Value after looking at the last divergence."""
        value = state[self.knob]
        if self.stat in stats:
            kl = stats[self.stat]
            if kl > 2.0 * self.target:
                value = value / self.factor
            elif kl < 0.5 * self.target:
                value = value * self.factor
            value = min(self.high, max(self.low, value))
        return {self.knob: value}, {self.knob: value}


@dataclass(frozen=True)
class BangBang:
    """A knob with two values, switched by a statistic.

    k = high if stat <= target, else low
    """

    knob: str
    """Name of the knob."""
    stat: str
    """Name of the statistic."""
    target: float
    """Where it switches."""
    low: float
    """Value of the knob while the statistic is above the target."""
    high: float
    """Value of the knob otherwise, and before the first measurement."""

    def initial(self) -> State:
        """State before the first step."""
        return {self.knob: self.high}

    def step(self, state: Mapping[str, float], stats: Mapping[str, float]) -> tuple[State, Knobs]:
        """Value after looking at the last statistic."""
        value = state[self.knob]
        if self.stat in stats:
            value = self.high if stats[self.stat] <= self.target else self.low
        return {self.knob: value}, {self.knob: value}
