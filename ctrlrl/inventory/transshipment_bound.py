"""A warehouse that cannot hold, and its stores: the bound of Federgruen and Zipkin, and a policy that comes close."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from ctrlrl.inventory.optimal_backlogged import newsvendor


@dataclass(frozen=True)
class TransshipmentBound:
    """What no policy is below, and the level that would reach it."""

    cost: float
    """Per store and period."""
    level: float
    """Up to which the warehouse orders for all: on hand, less backlog, and on the way anywhere."""


def transshipment_bound(
    mean: Sequence[float], std: Sequence[float], correlation: ArrayLike, warehouse_lead_time: int,
    store_lead_time: int, holding_cost: float, unmet_cost: float,
) -> TransshipmentBound:  # fmt: skip
    """Where a warehouse passes on all it gets to stores whose unmet demand waits: a lower bound of the cost.

    If stores could give goods back, each would always be served equally well, and the system would be a newsvendor
    whose demand has the variance ``V = (l + 1) (sum_i s_i)^2 + L sum_ij rho_ij s_i s_j``: the demand of all during the
    warehouse's ``L`` periods, and of each store alone during its ``l + 1``. The bound is ``(p + h) phi(z) sqrt(V)``.
    Normal demand has to be unclipped, independent over time; stores have equal costs and lead times.

    Args:
        mean: [S] of demand in a period.
        std: [S] of demand in a period.
        correlation: Between each two stores, or their matrix [S, S]. The released code of the paper takes .5 whatever
            it is, so that its table repeats that bound for 0.
        warehouse_lead_time: ``L``, from the supplier.
        store_lead_time: ``l``, from the warehouse.
        holding_cost: ``h``, of a unit left at a store at the end of a period.
        unmet_cost: ``p``, of a unit that waits at the end of a period.

    Raises:
        ValueError: A number is out of range, or sizes differ.

    Source: Federgruen and Zipkin, "Approximations of dynamic, multilocation production and inventory problems" (1984).
    """
    if len(mean) != len(std):
        raise ValueError(f"{len(mean)} means and {len(std)} deviations: give one of each store")
    if min(warehouse_lead_time, store_lead_time) < 1:
        raise ValueError(f"lead times {warehouse_lead_time} and {store_lead_time} must be 1 period or more")
    deviation = np.asarray(std, dtype=np.float64)
    together = deviation @ _matrix(correlation, len(deviation)) @ deviation
    variance = (store_lead_time + 1) * deviation.sum() ** 2 + warehouse_lead_time * together
    periods = warehouse_lead_time + store_lead_time + 1
    system = newsvendor(periods * sum(mean), math.sqrt(variance), holding_cost, unmet_cost)
    return TransshipmentBound(system.cost / len(mean), system.level)


def transshipment_flows(
    inventory: Tensor, level: float, mean: Sequence[float], std: Sequence[float], store_lead_time: int
) -> tuple[Tensor, Tensor]:
    """The policy of the bound, made possible: order for all up to ``level``, and serve all stores equally well.

    What the warehouse has goes out so that each store's position is ``mean_i (l + 1) + k std_i sqrt(l + 1)`` with one
    ``k`` for all. Where a store has more already, it gets nothing, and the others in proportion less. It comes close to
    the bound unless stores are many and demand varies much.

    Args:
        inventory: [B, S + 1, slots] of the stores, then the warehouse: on hand (less backlog), and what is on its way.
        level: Of :func:`transshipment_bound`.
        mean: [S] of demand in a period.
        std: [S] of demand in a period.
        store_lead_time: ``l``.

    Returns:
        [B] ordered by the warehouse and [B, S] sent to the stores.
    """
    position, on_hand = inventory[:, :-1].sum(2), inventory[:, -1, :1].clamp_min(0.0)
    ordered = (level - inventory.sum((1, 2))).clamp_min(0.0)
    wanted = torch.as_tensor(mean).to(position) * (store_lead_time + 1)
    spread = torch.as_tensor(std).to(position)
    spare = position.sum(1, keepdim=True) + on_hand - wanted.sum()
    lacking = (wanted + spare * spread / spread.sum() - position).clamp_min(0.0)
    asked = lacking.sum(1, keepdim=True)
    sent = torch.where(asked > 0.0, on_hand * lacking / asked.clamp_min(1e-30), on_hand / len(mean))
    return ordered, sent


def _matrix(correlation: ArrayLike, stores: int) -> NDArray[np.float64]:
    given = np.asarray(correlation, dtype=np.float64)
    if given.ndim == 0:
        return given + (1.0 - given) * np.eye(stores)
    if given.shape != (stores, stores):
        raise ValueError(f"correlation of shape {given.shape}: give a number or a matrix [{stores}, {stores}]")
    return given
