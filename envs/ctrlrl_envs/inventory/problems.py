"""The benchmark problems of neural inventory control, with the parameters that their authors drew.

Each function gives a :class:`Problem`. Parameters that are drawn come from NumPy's legacy generator with the seeds of
the released code, so that they are the very same numbers. Horizons are those of the released settings: of one store
and of chains, 50 periods for training and dev, the first 30 of which are ignored, and 500 for test, the first 300
ignored; of independent stores the same, with 5000 and 3000 for test; of warehouses and their stores 50 and 30, 100 and
60, 5000 and 3000. Links and costs of several warehouses (the sixth: 0.6 for holding, 1.1 for a unit) are those of the
settings in the fourth author's fork (github.com/minuk302/Neural_inventory_control), behind the published tables; these
have 50 and 30 periods for dev, too.

Where we differ: slots of a pipeline that no order can reach start empty (the released code fills the longest one
everywhere, which the first, ignored periods wash out), and the mean that stock at the start is drawn from is that of
the distribution, not of the sample; of recorded sales, that of the weeks up to the end of the train split.

Source: Alvo, Russo, Kanoria, Lee, "Neural inventory control in networks via hindsight differentiable policy
optimization" (arXiv:2306.11246), its released code and the settings of its experiments.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from ctrlrl_envs.inventory.demand import Demand, Normal, Poisson, Series, Split, per_store
from ctrlrl_envs.inventory.network import SUPPLIER, Link, Network, Store, Warehouse
from ctrlrl_envs.inventory.series import FAVORITA_SPLITS, favorita
from ctrlrl_envs.inventory.simulator import Problem

Charge = Literal["shipments", "orders"]
"""Which links carry the cost of a warehouse's units: those to its stores (as in the experiments behind the published
tables), or its own one from the supplier (as in the released code)."""

Correlation = float | Tensor | np.ndarray
"""Between each two stores, or their matrix [S, S]."""

_MEAN, _VARIATION, _LEAD, _HOLDING, _UNMET = 33, 92, 41, 73, 28  # the seeds of each parameter
_TRAINING = FAVORITA_SPLITS["train"].first + FAVORITA_SPLITS["train"].periods
_SHORT = {"train": Split(50, 30), "dev": Split(50, 30), "test": Split(500, 300)}

# per echelon from the supplier down to the store: holding costs, and periods of the link that leads to it
_ECHELONS: dict[int, tuple[tuple[float, ...], tuple[int, ...]]] = {
    3: ((0.1, 0.5, 1.0), (2, 3, 4)),
    4: ((0.1, 0.2, 0.5, 1.0), (2, 4, 3, 4)),
    5: ((0.1, 0.2, 0.25, 0.5, 1.0), (2, 4, 1, 3, 4)),
    6: ((0.1, 0.2, 0.25, 0.3, 0.5, 1.0), (2, 4, 1, 3, 3, 4)),
    7: ((0.1, 0.2, 0.25, 0.3, 0.4, 0.5, 1.0), (2, 4, 1, 3, 2, 3, 4)),
}

_WAREHOUSE_HOLDING = (0.3, 0.4, 0.2, 0.5, 0.1, 0.6)
_WAREHOUSE_CHARGE = (0.5, 1.5, 0.7, 1.3, 0.9, 1.1)

# one row per warehouse, one digit per store: periods of the link, 0 where there is none
_MANY: dict[int, tuple[str, ...]] = {
    10: ("0066606560", "2122120222"),
    20: ("00666005606506060060", "22222210212222100202", "50566606664605656560"),
    30: (
        "665505560565506600666660066056",
        "202222220012020001112201010122",
        "060006056000000000006000000000",
        "000300300303002230000000202033",
    ),
    40: (
        "0000000606050060000000060060000600066606",
        "0000122202020020102210110020202120012102",
        "6005600656506664000600066560500056000600",
        "3230000003332330000003000001020002300033",
        "0540005500050050045004000005050505405034",
    ),
    50: (
        "00066600060000666056006606000005500606006000000060",
        "00000020001122000000000000200000020000020120000102",
        "00005060000000006005506664606060000565000005600006",
        "10130000000003300300000000000000033000000000022000",
        "04000000000055000500050000040500054000000040000000",
        "00004033303344004004000044303040000424430344200302",
    ),
}
_REAL: dict[int, tuple[str, ...]] = {
    2: ("666065555555550666655", "111110221220201111112"),
    3: ("666065555555550666655", "111110221200001111112", "555546555550565555545"),
    4: ("000065555550550000065", "111110000000001111110", "555540555500505555545", "000000222211110000001"),
    5: (
        "000065555550550000065",
        "111110000000001111110",
        "555540555500505555545",
        "000000020211110000001",
        "000000444434340000044",
    ),
}


# -- one store, and chains of places --------------------------------------------------------------


def one_store_backlogged(
    lead_time: int = 4, unmet_cost: float = 9.0, holding_cost: float = 1.0, mean: float = 5.0, std: float = 1.6,
    clip: bool = True,
) -> Problem:  # fmt: skip
    """One store whose customers wait: a base-stock level is optimal. Studied: lead times 1 to 20, costs 4 to 39."""
    demand = Normal(per_store(mean, 1, "mean"), per_store(std, 1, "std"), clip=clip)
    network = Network((Store("store", holding_cost, unmet_cost),), (), (Link(SUPPLIER, "store", lead_time),))
    return Problem("one store, backlogged", network, demand, dict(_SHORT))


def one_store_lost(
    lead_time: int = 4, unmet_cost: float = 9.0, holding_cost: float = 1.0, mean: float = 5.0
) -> Problem:
    """One store whose customers leave, Poisson demand (Zipkin 2008). Studied: lead times 1 to 4, costs 4 to 39."""
    network = Network((Store("store", holding_cost, unmet_cost),), (), (Link(SUPPLIER, "store", lead_time),), "lost")
    return Problem("one store, lost", network, Poisson(per_store(mean, 1, "mean")), dict(_SHORT))


def independent_stores(stores: int = 5, lead_time: int = 3, unmet_cost: float = 9.0, mean: float = 5.0) -> Problem:
    """Stores like :func:`one_store_lost` that have nothing to do with each other: what shared weights are worth."""
    names = _names(stores)
    network = Network(
        tuple(Store(name, 1.0, unmet_cost) for name in names), (),
        tuple(Link(SUPPLIER, name, lead_time) for name in names), "lost",
    )  # fmt: skip
    splits = {"train": Split(50, 30), "dev": Split(50, 30), "test": Split(5000, 3000)}
    demand = Poisson(per_store(mean, stores, "mean"))
    return Problem(f"{stores} independent stores", network, demand, splits, (0.0, 0.0))


def serial(
    echelons: int = 4, lead_time: int = 4, unmet_cost: float = 9.0, mean: float = 5.0, std: float = 2.0
) -> Problem:
    """A chain of ``echelons`` places, the last of which is a store whose customers wait (Clark and Scarf 1960).

    Args:
        echelons: 3 to 7, the store included.
        lead_time: Periods of the last link, which leads to the store. Studied: 1 to 4 with four echelons, else 4.
        unmet_cost: Studied: 4 to 39 with four echelons, else 9.
        mean: Of normal demand, clipped at 0.
        std: Of the same.
    """
    _known("echelons", echelons, _ECHELONS)
    holding, times = _ECHELONS[echelons]
    names = [f"echelon {i}" for i in range(1, echelons)] + ["store"]
    network = Network(
        (Store("store", holding[-1], unmet_cost),),
        tuple(Warehouse(name, cost) for name, cost in zip(names[:-1], holding[:-1], strict=True)),
        tuple(
            Link(source, target, time)
            for source, target, time in zip([SUPPLIER, *names], names, (*times[:-1], lead_time), strict=False)
        ),
    )
    demand = Normal(per_store(mean, 1, "mean"), per_store(std, 1, "std"))
    return Problem(f"serial, {echelons} echelons", network, demand, dict(_SHORT))


# -- warehouses and their stores ------------------------------------------------------------------


def transshipment(
    stores: int = 5, lead_time: int = 4, unmet_cost: float = 9.0, correlation: Correlation = 0.5
) -> Problem:
    """A warehouse that cannot hold, and stores whose customers wait; demand is normal and not clipped.

    Studied: lead time 4 and cost 9 with 3 to 50 stores; 2 and 6, 4 and 9 with 3 to 10; correlation 0 and 0.5.
    """
    names = _names(stores)
    network = Network(
        tuple(Store(name, 1.0, unmet_cost) for name in names),
        (Warehouse("warehouse", 0.5, holds=False),),
        (Link(SUPPLIER, "warehouse", 3), *(Link("warehouse", name, lead_time) for name in names)),
    )
    return Problem(f"transshipment, {stores} stores", network, _correlated(stores, correlation, clip=False))


def one_warehouse(stores: int = 5, lead_times: Sequence[int] = (2, 4), correlation: Correlation = 0.5) -> Problem:
    """A warehouse that holds, and stores whose customers leave; costs and lead times are drawn by store.

    Args:
        stores: Studied: 3 to 50.
        lead_times: (low, high): those of the stores are drawn from low to high - 1. The settings say (2, 4), by which
            the published costs are within reach; a search over hyperparameters was run with (2, 6).
        correlation: Between the demands of each two stores, or their matrix [S, S].
    """
    names = _names(stores)
    network = Network(
        _stores(names), (Warehouse("warehouse", 0.3),),
        (Link(SUPPLIER, "warehouse", 3), *_links("warehouse", names, _lead_times(stores, lead_times))), "lost",
    )  # fmt: skip
    return Problem(f"one warehouse, {stores} stores", network, _correlated(stores, correlation))


def many_warehouses(stores: int = 10, charge: Charge = "shipments", correlation: Correlation = 0.5) -> Problem:
    """2, 3, 4, 5 or 6 warehouses, each of which reaches some of 10, 20, 30, 40 or 50 stores; customers leave."""
    _known("stores", stores, _MANY)
    network = _several(_stores(_names(stores)), _MANY[stores], charge, "cost")
    name = f"{len(_MANY[stores])} warehouses, {stores} stores"
    return Problem(name, network, _correlated(stores, correlation))


# -- recorded sales -------------------------------------------------------------------------------


def real_stores(
    stores: int = 21, warehouses: int = 1, products: int = 288, charge: Charge = "shipments",
    data: str | Path | None = None,
) -> Problem:  # fmt: skip
    """Weekly sales of 288 products in 21 stores of a grocer: profit, unmet demand is lost, no stock at the start.

    Prices are drawn by product and store, holding costs by store. Sales below 0 are returns, and stay.

    Args:
        stores: The first of the 21. Studied: 3, 5, 10, 15, 21 with one warehouse, else 21.
        warehouses: 1 to 5; with one, lead times are drawn, else they are those of the study.
        products: The first of the 288. Studied: 64 and 288.
        charge: What carries the cost of a unit from a warehouse, where there are several.
        data: Folder of the files, see :func:`ctrlrl_envs.inventory.series.favorita`.

    Raises:
        FileNotFoundError: The data are not there.
    """
    _within("stores", stores, 21)
    _within("products", products, 288)
    names = _names(stores)
    places = _stores(names)
    if warehouses == 1:
        network = Network(
            places, (Warehouse("warehouse", 0.3),),
            (Link(SUPPLIER, "warehouse", 3), *_links("warehouse", names, _lead_times(stores, (2, 6)))),
            "lost", "profit",
        )  # fmt: skip
    else:
        _known("warehouses", warehouses, (1, *_REAL))
        network = _several(places, [row[:stores] for row in _REAL[warehouses]], charge, "profit")
    sales = favorita(data)
    prices = _uniform(_UNMET, 6.3, 11.7, products * stores).reshape(products, stores)
    demand = Series(sales.values[:products, :stores], 16, sales.time, torch.from_numpy(prices).float(), _TRAINING)
    name = f"real sales, {stores} stores, {warehouses} warehouse{'s' * (warehouses > 1)}"
    return Problem(name, network, demand, dict(FAVORITA_SPLITS), (0.0, 0.0))


def real_one_store(lead_time: int = 5, series: int = 6048, data: str | Path | None = None) -> Problem:
    """One store, supplied from outside, of which each of the 6048 series of a product and a store is a scenario.

    The study has 32768 series that were not released, weeks and lead times (4 to 6, drawn by series) of their own;
    here these are the series of :func:`real_stores`, and one lead time for all.
    """
    _within("series", series, 6048)
    network = Network((Store("store", 1.0, 9.0),), (), (Link(SUPPLIER, "store", lead_time),), "lost", "profit")
    sales = favorita(data)
    values = sales.values.flatten(0, 1)[:series, None]
    prices = torch.from_numpy(_uniform(_UNMET, 6.3, 11.7, series)).float()[:, None]
    demand = Series(values, 16, sales.time, prices, _TRAINING)
    return Problem("real sales, one store", network, demand, dict(FAVORITA_SPLITS), (0.0, 0.0))


# -- what is drawn --------------------------------------------------------------------------------


def demand_parameters(stores: int) -> tuple[Tensor, Tensor]:
    """Mean [S] and standard deviation [S] of the stores of all problems with normal demand at several stores."""
    mean = _uniform(_MEAN, 2.5, 7.5, stores).round(3)
    std = (mean * _uniform(_VARIATION, 0.25, 0.5, stores)).round(3)
    return torch.from_numpy(mean).float(), torch.from_numpy(std).float()


def _correlated(stores: int, correlation: Correlation, clip: bool = True) -> Demand:
    return Normal(*demand_parameters(stores), correlation, clip)


def _uniform(seed: int, low: float, high: float, count: int) -> np.ndarray:
    return np.random.RandomState(seed).uniform(low, high, count)


def _lead_times(stores: int, bounds: Sequence[int]) -> list[int]:
    given = tuple(bounds) if isinstance(bounds, Sequence) else ()
    if len(given) != 2 or any(type(bound) is not int for bound in given) or not 1 <= given[0] < given[1]:
        raise ValueError(
            f"lead_times={bounds!r} must be (low, high), whole numbers with 1 <= low < high: times are drawn from low "
            "to high - 1"
        )
    low, high = given
    return np.random.RandomState(_LEAD).randint(low, high, stores).tolist()


def _names(stores: int) -> list[str]:
    _within("stores", stores, 10_000)
    return [f"store {i}" for i in range(1, stores + 1)]


def _stores(names: Sequence[str]) -> tuple[Store, ...]:
    holding = _uniform(_HOLDING, 0.7, 1.3, len(names)).tolist()
    unmet = _uniform(_UNMET, 6.3, 11.7, len(names)).tolist()
    return tuple(map(Store, names, holding, unmet))


def _links(source: str, targets: Sequence[str], times: Sequence[int]) -> list[Link]:
    return [Link(source, target, time) for target, time in zip(targets, times, strict=True)]


def _several(
    stores: tuple[Store, ...], rows: Sequence[str], charge: Charge, objective: Literal["cost", "profit"]
) -> Network:
    if charge not in ("shipments", "orders"):
        raise ValueError(f"charge={charge!r} must be 'shipments' or 'orders'")
    names = [f"warehouse {i}" for i in range(1, len(rows) + 1)]
    costs = dict(zip(names, _WAREHOUSE_CHARGE, strict=False))
    ordered, shipped = (1.0, 0.0) if charge == "orders" else (0.0, 1.0)
    links = [Link(SUPPLIER, name, 3, ordered * costs[name]) for name in names]
    for name, row in zip(names, rows, strict=True):
        times = [(store.name, int(digit)) for store, digit in zip(stores, row, strict=True) if digit != "0"]
        links += [Link(name, store, time, shipped * costs[name]) for store, time in times]
    warehouses = tuple(map(Warehouse, names, _WAREHOUSE_HOLDING))
    return Network(stores, warehouses, tuple(links), "lost", objective)


def _known(name: str, value: int, known: Collection[int]) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value not in known:
        raise ValueError(f"{name}={value!r} is not one of those studied: {', '.join(map(str, known))}")


def _within(name: str, value: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= high:
        raise ValueError(f"{name}={value!r} must be a whole number from 1 to {high}")
