"""One store whose unmet demand is lost: the best policy by relative value iteration."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import poisson

_MOST_STATES = 3_000_000


@dataclass(frozen=True, eq=False)
class LostSales:
    """The best policy of one store whose unmet demand is lost, and what it costs."""

    cost: float
    """Per period."""
    orders: NDArray[np.int64]
    """[X + 1, Q + 1, ..., Q + 1], an axis for each period of lead time: what to order with this much on hand and these
    orders on their way, the next to arrive first."""

    def order(self, inventory: ArrayLike) -> NDArray[np.int64]:
        """What to order.

        Args:
            inventory: [..., L] on hand, then what arrives in 1, 2, ... periods; rounded to whole units, and where it is
                more than the table has, taken for the most that it has.

        Returns:
            [...] units.

        Raises:
            ValueError: ``inventory`` has another lead time.
        """
        at = np.asarray(inventory)
        if at.shape[-1] != self.orders.ndim:
            raise ValueError(f"inventory of {at.shape[-1]} slots; this policy is of lead time {self.orders.ndim}")
        most = np.array(self.orders.shape) - 1
        units = np.clip(np.rint(at), 0, most).astype(np.int64)
        return self.orders[tuple(np.moveaxis(units, -1, 0))]


def lost_sales_store(
    mean: float, holding_cost: float, unmet_cost: float, lead_time: int, tolerance: float = 1e-5
) -> LostSales:
    """One store with Poisson demand, lost where it is not met: the best of all policies that order whole units.

    ``V(x, q_1, ..) = h E(x - D)+ + p E(D - x)+ + min_q E V((x - D)+ + q_1, q_2, .., q)`` less its own growth, until all
    states grow alike to ``tolerance``. Stock is bounded by the best level of the same store with demand backlogged, and
    an order by what is found never to be reached.

    Args:
        mean: Of demand in a period.
        holding_cost: ``h``, of a unit left at the end of a period.
        unmet_cost: ``p``, of a unit of demand lost.
        lead_time: Periods, 1 or more: an order of period t meets demand of t + lead time.
        tolerance: Of the cost.

    Raises:
        ValueError: A number is out of range, or the table has too many states.

    Source: Zipkin, "Old and new methods for lost-sales inventory systems" (2008), whose instances it solves.
    """
    for name, value in (("mean", mean), ("holding_cost", holding_cost), ("unmet_cost", unmet_cost)):
        if not value > 0.0:
            raise ValueError(f"{name}={value} must be above 0")
    if lead_time < 1:
        raise ValueError(f"lead_time={lead_time} must be 1 period or more")
    ratio = unmet_cost / (unmet_cost + holding_cost)
    level = int(poisson.ppf(ratio, mean * (lead_time + 1))) + 1
    largest = int(poisson.ppf(ratio, mean)) + 2
    while True:
        found = _solve(mean, holding_cost, unmet_cost, lead_time, level, largest, tolerance)
        if found.orders.max() < largest:
            return found
        largest += 4


def _solve(
    mean: float, holding_cost: float, unmet_cost: float, lead_time: int, level: int, largest: int, tolerance: float
) -> LostSales:
    shape = (level + 1,) + (largest + 1,) * (lead_time - 1)
    states = float(level + 1) * float(largest + 1) ** (lead_time - 1)
    if states > _MOST_STATES:
        raise ValueError(
            f"lead_time={lead_time} and mean={mean} make {states:.0f} states, more than {_MOST_STATES}: the exact "
            "solution is for short lead times and small demand"
        )
    x = np.arange(level + 1)
    gap = x[:, None] - x
    kept = np.where(gap >= 0, poisson.pmf(gap, mean), 0.0)  # [x, y]: y is left of x
    kept[:, 0] = poisson.sf(x - 1, mean)
    left = kept @ x
    period = holding_cost * left + unmet_cost * (mean - x + left)
    period = period.reshape(-1, *[1] * (lead_time - 1))
    values = np.zeros(shape)
    while True:
        new = period + _ahead(values, kept, largest, np.min)
        growth = new - values
        low, high = float(growth.min()), float(growth.max())
        values = new - new.flat[0]
        if high - low < tolerance:
            orders = _ahead(values, kept, largest, np.argmin)
            orders.flags.writeable = False
            return LostSales((low + high) / 2.0, orders)


def _ahead(values: NDArray[np.float64], kept: NDArray[np.float64], largest: int, pick: Callable[..., Any]) -> Any:
    """[x, q_1, ..] by ``pick`` (min, argmin) over q of the expected value after demand, with q_1 arrived and q_2 to q
    on their way. Stock above the table is taken for its most."""
    rows = len(values)
    padded = np.concatenate([values, np.repeat(values[-1:], largest, 0)]).reshape(rows + largest, -1)
    after = (kept @ padded[arrived : arrived + rows] for arrived in range(largest + 1))
    if values.ndim == 1:  # q arrives at once
        return pick(np.stack([a[:, 0] for a in after], 1), axis=-1)
    return np.stack([pick(a.reshape(values.shape), axis=-1) for a in after], 1)
