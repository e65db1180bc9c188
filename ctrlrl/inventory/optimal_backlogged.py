"""Where unmet demand waits, the best there is: one store in closed form, serial chains by Clark and Scarf."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtr, ndtri

_TAIL = 8.0
"""Standard deviations beyond which demand is cut off: 1e-15 of it."""


@dataclass(frozen=True)
class BaseStock:
    """The best level of one store, and what it costs."""

    level: float
    """Inventory position after ordering: on hand, less backlog, with all that is on its way."""
    cost: float
    """Per period."""


@dataclass(frozen=True)
class EchelonStock:
    """The best levels of a serial chain, and what they cost."""

    levels: tuple[float, ...]
    """By place, the store first. A place orders what its echelon (it, all places towards the customer, and all that is
    on its way to any of them, less backlog) lacks to its level, or as much as the place before it has."""
    cost: float
    """Per period."""


def newsvendor(mean: float, std: float, holding_cost: float, unmet_cost: float) -> BaseStock:
    """The level that costs least for one normal demand, and its cost ``(h + p) phi(z) std`` with ``z`` the quantile
    ``p / (p + h)``.

    Args:
        mean: Of the demand.
        std: Of the demand.
        holding_cost: ``h``, of a unit left.
        unmet_cost: ``p``, of a unit missing.

    Raises:
        ValueError: A deviation or cost is not above 0.

    Source: Arrow, Harris, Marschak (1951).
    """
    _positive(std=std, holding_cost=holding_cost, unmet_cost=unmet_cost)
    z = float(ndtri(unmet_cost / (unmet_cost + holding_cost)))
    return BaseStock(mean + z * std, (holding_cost + unmet_cost) * _density(z) * std)


def newsvendor_cost(level: float, mean: float, std: float, holding_cost: float, unmet_cost: float) -> float:
    """What any level costs for one normal demand: ``h E[level - D]+ + p E[D - level]+``; arguments as of newsvendor.

    Its slope is ``(h + p) Phi((level - mean) / std) - p``.
    """
    _positive(std=std)
    z = (level - mean) / std
    left = std * (_density(z) + z * float(ndtr(z)))
    return holding_cost * left + unmet_cost * (left - level + mean)


def backlogged_store(
    mean: float, std: float, holding_cost: float, unmet_cost: float, lead_time: int, clip: bool = False
) -> BaseStock:
    """One store whose unmet demand waits: the best there is of all policies.

    An order of period t meets demand of t + lead time, so that a level has to last for lead time + 1 demands, and the
    store is a newsvendor of their sum.

    Negative demand (goods that come back) can lift the position above the level, and no policy can send them on. Where
    it is not clipped and not rare, as with a mean below four deviations, the cost is a lower bound that is not reached:
    N(5, 10), lead time 4, costs 1 and 9 give 39.24, and the best base-stock level costs 41.75.

    Args:
        mean: Of demand in a period, before it is clipped.
        std: Of demand in a period, before it is clipped.
        holding_cost: Of a unit left at the end of a period.
        unmet_cost: Of a unit that waits at the end of a period.
        lead_time: Periods, 1 or more.
        clip: Negative demand is none; then by convolution, as of :func:`clark_scarf`.

    Raises:
        ValueError: A number is out of range.
    """
    _whole(lead_time)
    if clip:
        _positive(holding_cost=holding_cost)
        chain = serial_chain([holding_cost], [lead_time], unmet_cost, mean, std, clip=True)
        return BaseStock(chain.levels[0], chain.cost)
    return newsvendor(mean * (lead_time + 1), std * math.sqrt(lead_time + 1), holding_cost, unmet_cost)


def serial_chain(
    holding_costs: Sequence[float], lead_times: Sequence[int], unmet_cost: float, mean: float, std: float,
    clip: bool = False, step: float | None = None,
) -> EchelonStock:  # fmt: skip
    """A serial chain (supplier, places that hold, one store) whose unmet demand waits: the best of all policies.

    Costs are of stock at places; units on their way are never charged. :func:`clark_scarf` charges them to the echelon
    that sent them: their mean, ``holding cost of the sender x mean demand x time``, is taken off. A lower bound that is
    not reached where demand is often negative and not clipped, see :func:`backlogged_store`.

    Args:
        holding_costs: By place, the store first; they must not rise towards the supplier.
        lead_times: Periods of the link into each place, the store first.
        unmet_cost: Of a unit of demand that waits at the end of a period.
        mean: Of demand in a period, before it is clipped.
        std: Of demand in a period, before it is clipped.
        clip: Negative demand is none.
        step: Of the grid; None: a hundredth of ``std``.

    Raises:
        ValueError: A number is out of range, or holding costs rise towards the supplier.
    """
    if len(holding_costs) != len(lead_times) or not holding_costs:
        raise ValueError(f"{len(holding_costs)} holding costs and {len(lead_times)} lead times: give one of each place")
    for time in lead_times:
        _whole(time)
    senders = [*holding_costs[1:], 0.0]
    echelon = [own - sender for own, sender in zip(holding_costs, senders, strict=True)]
    periods = [lead_times[0] + 1, *lead_times[1:]]
    best = clark_scarf(echelon, periods, unmet_cost, mean, std, clip, step)
    moving = sum(cost * time for cost, time in zip(senders, periods, strict=True))
    return EchelonStock(best.levels, best.cost - moving * normal_mean(mean, std, clip))


def clark_scarf(
    echelon_costs: Sequence[float], periods: Sequence[int], unmet_cost: float, mean: float, std: float,
    clip: bool = False, step: float | None = None,
) -> EchelonStock:  # fmt: skip
    """The recursion for serial chains in its textbook form, on a grid with convolutions by FFT.

    With ``U_0(x) = (p + h_1) max(-x, 0)`` and ``D_j`` the demand of ``periods[j]``: ``C_j(y) = E[e_j (y - D_j) +
    U_{j-1}(y - D_j)]``, ``S_j = argmin C_j``, ``U_j(x) = C_j(min(x, S_j))``; the cost is ``C_N(S_N)``. Beyond the grid
    these functions are straight lines, and are taken as such.

    The cost charges units on their way from a place as if they were still there. Figures of textbooks and packages of
    this kind compare with it directly; figures of our networks with :func:`serial_chain`, whose ``periods`` of the
    store are its lead time and one more.

    Args:
        echelon_costs: ``e_j`` by place, the store first: its holding cost less that of the place before it.
        periods: Demands that pass before an order of each place can be passed on, or at the store be charged.
        unmet_cost: ``p``.
        mean: Of demand in a period, before it is clipped.
        std: Of demand in a period, before it is clipped.
        clip: Negative demand is none.
        step: Of the grid; None: a hundredth of ``std``. Levels are as exact as it, costs about its square. The grid has
            ``16 sqrt(sum of periods) std / step`` points, whatever the mean.

    Raises:
        ValueError: A number is out of range.

    Source: Clark and Scarf, "Optimal policies for a multi-echelon inventory problem" (1960); the form is that of Chen
    and Zheng, "Lower bounds for multi-echelon stochastic inventory systems" (1994).
    """
    _positive(unmet_cost=unmet_cost, mean=mean, std=std, step=step or 1.0, holding_cost=sum(echelon_costs))
    if any(cost < -1e-12 for cost in echelon_costs):
        raise ValueError(
            f"echelon costs {[round(c, 6) for c in echelon_costs]} must not be negative: where it is dearer to hold "
            "goods further from the customer, levels of echelons are not the best policy"
        )
    return _recursion(tuple(echelon_costs), tuple(periods), unmet_cost, mean, std, clip, step or std / 100.0)


@lru_cache(maxsize=256)
def _recursion(
    echelon_costs: tuple[float, ...], periods: tuple[int, ...], unmet_cost: float, mean: float, std: float, clip: bool,
    step: float,
) -> EchelonStock:  # fmt: skip
    # The grid is of deviations from ``middle`` steps of demand a period, so that its size does not depend on the mean.
    middle = round(normal_mean(mean, std, clip) / step)
    first, one = _on_grid(mean, std, clip, step, middle)
    total = sum(periods)
    half = math.ceil(_TAIL * std * math.sqrt(total) / step) + total + 2
    x = np.arange(-half, half + 1) * step
    after = (unmet_cost + sum(echelon_costs)) * np.maximum(-x, 0.0)
    levels, cost, passed = [], 0.0, 0
    for own, time in zip(echelon_costs, periods, strict=True):
        expected = _expected(own * (x + passed * middle * step) + after, time * first, _sum_of(one, time))
        best, passed = int(expected.argmin()), passed + time
        levels.append((best - half + passed * middle) * step)
        cost = float(expected[best])
        after = expected[np.minimum(np.arange(len(x)), best)]
    return EchelonStock(tuple(levels), cost)


def normal_mean(mean: float, std: float, clip: bool) -> float:
    """Mean of a normal demand, of which negative values may be taken for none."""
    z = mean / std
    return mean * float(ndtr(z)) + std * _density(z) if clip else mean


def _on_grid(mean: float, std: float, clip: bool, step: float, middle: int) -> tuple[int, NDArray[np.float64]]:
    """Demand of one period less ``middle``, in steps: the lowest, and the probability of each from there on."""
    rest = mean - middle * step
    first, last = math.floor((rest - _TAIL * std) / step), math.ceil((rest + _TAIL * std) / step)
    first = max(first, -middle) if clip else first
    below = ndtr(((np.arange(first, last + 2) - 0.5) * step - rest) / std)
    below[0], below[-1] = 0.0, 1.0
    return first, np.diff(below)


def _sum_of(probability: NDArray[np.float64], times: int) -> NDArray[np.float64]:
    size = times * (len(probability) - 1) + 1
    return np.fft.irfft(np.fft.rfft(probability, _fast(size)) ** times, _fast(size))[:size]


def _expected(values: NDArray[np.float64], first: int, probability: NDArray[np.float64]) -> NDArray[np.float64]:
    """E[values(y - D)] at each y of the grid, ``values`` going on straight beyond both of its ends."""
    left, right = max(first + len(probability) - 1, 0), max(-first, 0)
    before = values[0] + (values[1] - values[0]) * np.arange(-left, 0)
    behind = values[-1] + (values[-1] - values[-2]) * np.arange(1, right + 1)
    longer = np.concatenate([before, values, behind])
    size = _fast(len(longer) + len(probability) - 1)
    mixed = np.fft.irfft(np.fft.rfft(longer, size) * np.fft.rfft(probability, size), size)
    return mixed[left - first : left - first + len(values)]


def _fast(size: int) -> int:
    return 1 << (size - 1).bit_length()


def _density(z: float) -> float:
    return math.exp(-0.5 * z * z) / math.sqrt(2.0 * math.pi)


def _positive(**numbers: float) -> None:
    for name, value in numbers.items():
        if not value > 0.0:
            raise ValueError(f"{name}={value} must be above 0")


def _whole(lead_time: int) -> None:
    if lead_time < 1:
        raise ValueError(f"lead_time={lead_time} must be 1 period or more")
