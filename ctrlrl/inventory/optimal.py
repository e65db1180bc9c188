"""What is known about the best there is: exact optima and bounds, and which of them is that of a problem."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import lru_cache
from itertools import pairwise
from typing import Any, NamedTuple

from ctrlrl.inventory.optimal_backlogged import (
    BaseStock,
    EchelonStock,
    backlogged_store,
    clark_scarf,
    newsvendor,
    newsvendor_cost,
    serial_chain,
)
from ctrlrl.inventory.optimal_lost_sales import LostSales
from ctrlrl.inventory.optimal_lost_sales import lost_sales_store as _lost_sales_store
from ctrlrl.inventory.problem import Network
from ctrlrl.inventory.transshipment_bound import TransshipmentBound, transshipment_bound, transshipment_flows

__all__ = [
    "BaseStock",
    "EchelonStock",
    "LostSales",
    "TransshipmentBound",
    "backlogged_store",
    "clark_scarf",
    "known",
    "lost_sales_store",
    "newsvendor",
    "newsvendor_cost",
    "serial_chain",
    "transshipment_bound",
    "transshipment_flows",
]

lost_sales_store = lru_cache(maxsize=8)(_lost_sales_store)
"""That of :mod:`ctrlrl.inventory.optimal_lost_sales`; what it has solved it remembers."""

_RARELY_NEGATIVE = 4.0
"""Deviations from 0 from which on a mean makes negative demand negligible: 3e-5 of it."""
_LARGEST_MEAN = 10.0
_LONGEST_LEAD_TIME = 4
"""Of lost sales: beyond these the exact solution takes minutes."""


class _Store(NamedTuple):
    mean: float
    std: float
    holding_cost: float
    unmet_cost: float
    lead_time: int


def known(problem: Any) -> dict[str, float]:
    """``{"optimum": cost}`` or ``{"lower_bound": cost}``, per store and period, or ``{}`` where neither is known.

    Of problems whose objective is cost, without costs of links, with demand that is independent over time, these are
    known:

    - Stores served by the supplier alone, one link each: normal demand backlogged, or Poisson demand lost (mean at most
      10, lead time at most 4). Each store is solved for itself, so correlation does not matter.
    - A chain of places that hold, then one store: normal demand backlogged, holding costs not rising upstream.
    - One warehouse that cannot hold: normal demand backlogged and unclipped, equal costs and lead times (a bound).

    Of the first two, normal demand that is not clipped has but a bound where its mean is below four deviations: goods
    that come back cannot be sent on.

    Args:
        problem: With a network and demand (mean [S] and std [S]). Demand is normal if it has a correlation and says
            whether it is clipped (``clip``), Poisson if it is ``integer`` with a variance equal to the mean.
    """
    network, demand = problem.network, problem.demand
    kind = _kind(demand)
    if kind is None or network.objective != "cost" or any(link.cost for link in network.links):
        return {}
    served = dict(zip(network.targets, network.lead_times, strict=True))
    if len(served) < len(network.targets):  # some place has a choice of senders
        return {}
    stores = [
        _Store(float(mean), float(std), store.holding_cost, store.unmet_cost, served[place])
        for place, (mean, std, store) in enumerate(zip(demand.mean, demand.std, network.stores, strict=True))
    ]
    if min(min(store) for store in stores) <= 0.0:
        return {}
    case = (kind, network.unmet_demand)
    reached = getattr(demand, "clip", True) or all(s.mean >= _RARELY_NEGATIVE * s.std for s in stores)
    name = "optimum" if reached else "lower_bound"
    if not network.warehouses:
        if case == ("normal", "backlogged"):
            return {name: _mean_of(lambda s: backlogged_store(*s, clip=demand.clip).cost, stores)}
        if case == ("poisson", "lost") and all(
            s.mean <= _LARGEST_MEAN and s.lead_time <= _LONGEST_LEAD_TIME for s in stores
        ):
            return {"optimum": _mean_of(lambda s: lost_sales_store(s.mean, *s[2:]).cost, stores)}
    elif case == ("normal", "backlogged"):
        if len(stores) == 1 and all(w.holds for w in network.warehouses):
            cost = _chain(network, stores[0], demand.clip)
            return {} if cost is None else {name: cost}
        if len(network.warehouses) == 1 and not network.warehouses[0].holds and not demand.clip:
            return _transshipment(stores, served[len(stores)], demand.correlation, network)
    return {}


def _kind(demand: Any) -> str | None:
    if hasattr(demand, "correlation") and hasattr(demand, "clip"):
        return "normal"
    if getattr(demand, "integer", False) and all(
        abs(std * std - mean) < 1e-4 * mean for mean, std in zip(demand.mean, demand.std, strict=True)
    ):
        return "poisson"
    return None


def _mean_of(cost: Callable[[_Store], float], stores: list[_Store]) -> float:
    """Equal stores are solved once."""
    return sum(times * cost(store) for store, times in Counter(stores).items()) / len(stores)


def _chain(network: Network, store: _Store, clip: bool) -> float | None:
    """With one link into each place and one store, every place has one way on: places are in the order of that way."""
    sender = dict(zip(network.targets, network.sources, strict=True))
    lead_time = dict(zip(network.targets, network.lead_times, strict=True))
    order = [0]
    while sender[order[-1]] >= 0:
        order.append(sender[order[-1]])
    if len(order) <= len(network.warehouses):
        return None
    places = [*network.stores, *network.warehouses]
    costs = [places[i].holding_cost for i in order]
    if any(own < before for own, before in pairwise(costs)):
        return None
    return serial_chain(costs, [lead_time[i] for i in order], store.unmet_cost, store.mean, store.std, clip).cost


def _transshipment(stores: list[_Store], lead_time: int, correlation: Any, network: Network) -> dict[str, float]:
    if len({store[2:] for store in stores}) > 1 or sorted(network.sources) != [-1, *[len(stores)] * len(stores)]:
        return {}
    _, _, holding_cost, unmet_cost, store_lead_time = stores[0]
    means, stds = [s.mean for s in stores], [s.std for s in stores]
    bound = transshipment_bound(means, stds, correlation, lead_time, store_lead_time, holding_cost, unmet_cost)
    return {"lower_bound": bound.cost}
