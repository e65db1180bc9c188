"""Inventory networks as plain data: stores, warehouses, the links between them, and what things cost."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from math import inf
from numbers import Real
from typing import Any, Literal

SUPPLIER = "supplier"
"""Source of links from outside, which never runs out."""


class NetworkError(ValueError):
    """A network that cannot be: it says which part is wrong, and what was expected."""


@dataclass(frozen=True)
class Store:
    """A place with demand."""

    name: str
    holding_cost: float
    """Of a unit left at the end of a period."""
    unmet_cost: float
    """Of a unit of demand that is not met in a period; the price of a unit where the objective is profit."""


@dataclass(frozen=True)
class Warehouse:
    """A place that passes on to others; an echelon of a serial system is one, too."""

    name: str
    holding_cost: float
    """Of a unit left when the orders of a period have gone out. Units on their way are never charged."""
    holds: bool = True
    """False: all there is goes out at once (transshipment)."""


@dataclass(frozen=True)
class Link:
    """A way from a warehouse, or from the supplier, to a place."""

    source: str
    target: str
    lead_time: int
    """Periods, 1 or more: what is ordered at t can meet demand of t + lead_time."""
    cost: float = 0.0
    """Of each unit that is sent along it."""


@dataclass(frozen=True)
class Network:
    """Places and links. An action is one number for every link: what is sent along it.

    Places are numbered stores first, then warehouses, each in the order given; links in the order given.

    Raises:
        NetworkError: It contradicts itself.
    """

    stores: tuple[Store, ...]
    warehouses: tuple[Warehouse, ...]
    links: tuple[Link, ...]
    unmet_demand: Literal["backlogged", "lost"] = "backlogged"
    """Whether demand that is not met waits, or goes elsewhere."""
    objective: Literal["cost", "profit"] = "cost"
    """cost: of holding and of unmet demand. profit: the price of what is sold, less the cost of holding; as a cost it
    is negative."""

    def __post_init__(self) -> None:
        if not self.stores:
            raise NetworkError("there is no store; a network has one or more places with demand")
        for name, count in Counter((SUPPLIER, *self.names)).items():
            if count > 1:
                raise NetworkError(f"the name {name!r} is given {count} times; every place needs a name of its own")
        for place in self.places:
            for what in ("holding_cost", "unmet_cost"):
                _check_amount(place.name, what, getattr(place, what, 0.0))
        sources = {w.name for w in self.warehouses} | {SUPPLIER}
        for link in self.links:
            here = f"link {link.source} -> {link.target}"
            for end, known in ((link.source, sources | set(self.names)), (link.target, set(self.names))):
                if end not in known:
                    raise NetworkError(f"{here}: there is no place {end!r}; places are {', '.join(self.names)}")
            if link.source not in sources:
                raise NetworkError(f"{here}: {link.source} is a store, which sends nothing; only warehouses do")
            if isinstance(link.lead_time, bool) or not isinstance(link.lead_time, int) or link.lead_time < 1:
                raise NetworkError(
                    f"{here}: lead time {link.lead_time!r} must be a whole number of periods, 1 or more: orders are "
                    "decided before demand is seen and arrive after it, so 1 is the soonest"
                )
            _check_amount(here, "cost", link.cost)
        twice = [pair for pair, n in Counter((x.source, x.target) for x in self.links).items() if n > 1]
        if twice:
            raise NetworkError(f"link {twice[0][0]} -> {twice[0][1]} is given twice")
        self._check_supply()
        for warehouse in self.warehouses:
            if all(x.source != warehouse.name for x in self.links):
                raise NetworkError(f"{warehouse.name} supplies nobody: a warehouse needs a link to another place")
        if self.unmet_demand not in ("backlogged", "lost"):
            raise NetworkError(f"unmet_demand {self.unmet_demand!r} must be 'backlogged' or 'lost'")
        if self.objective not in ("cost", "profit"):
            raise NetworkError(f"objective {self.objective!r} must be 'cost' or 'profit'")

    def _check_supply(self) -> None:
        """Every place is reached from the supplier, and nothing goes round in circles."""
        reached, waiting = {SUPPLIER}, [SUPPLIER]
        while waiting:
            source = waiting.pop()
            for link in self.links:
                if link.source == source and link.target not in reached:
                    reached.add(link.target)
                    waiting.append(link.target)
        for name in self.names:
            if name not in reached:
                raise NetworkError(f"nothing ever reaches {name}: no chain of links leads there from the {SUPPLIER}")
        left = list(self.links)
        while left:
            targets = {x.target for x in left}
            kept = [x for x in left if x.source in targets]
            if len(kept) == len(left):
                raise NetworkError(f"goods can go round in a circle: {' and '.join(sorted({x.source for x in kept}))}")
            left = kept

    # -- numbers ------------------------------------------------------------------------------

    @property
    def places(self) -> tuple[Store | Warehouse, ...]:
        """Stores, then warehouses."""
        return (*self.stores, *self.warehouses)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the places."""
        return tuple(p.name for p in self.places)

    @cached_property
    def sources(self) -> tuple[int, ...]:
        """Place that each link leaves from; -1 is the supplier."""
        return tuple(-1 if x.source == SUPPLIER else self.names.index(x.source) for x in self.links)

    @cached_property
    def targets(self) -> tuple[int, ...]:
        """Place that each link leads to."""
        return tuple(self.names.index(x.target) for x in self.links)

    @cached_property
    def lead_times(self) -> tuple[int, ...]:
        """Periods of each link."""
        return tuple(x.lead_time for x in self.links)

    @property
    def slots(self) -> int:
        """Length of a place's inventory vector: the longest lead time."""
        return max(self.lead_times)

    @cached_property
    def pipelines(self) -> tuple[int, ...]:
        """Slots of each place that can ever be filled: the longest lead time of a link that leads to it."""
        return tuple(
            max(t for t, target in zip(self.lead_times, self.targets, strict=True) if target == place)
            for place in range(len(self.places))
        )

    def leaving(self, place: int) -> list[int]:
        """Links that leave from ``place``."""
        return [i for i, source in enumerate(self.sources) if source == place]

    def arriving(self, place: int) -> list[int]:
        """Links that lead to ``place``."""
        return [i for i, target in enumerate(self.targets) if target == place]


def _check_amount(where: str, what: str, value: Any) -> None:
    if not isinstance(value, Real) or isinstance(value, bool) or not 0.0 <= float(value) < inf:
        raise NetworkError(f"{where}: {what} {value!r} must be a finite number of at least 0")
