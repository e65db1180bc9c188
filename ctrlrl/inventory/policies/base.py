"""Policies on inventory networks: modules from what is seen to what is sent along each link."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from ctrlrl.inventory.problem import Network, Simulator, View
from ctrlrl.names import Registry
from ctrlrl.types import check_types


class PolicyError(ValueError):
    """A policy cannot act on this network, or not with these settings."""


@dataclass(frozen=True)
class Demanded:
    """What a policy is told about demand before it is built: no more than a planner has."""

    mean: Tensor
    """[S] by store."""
    std: Tensor
    """[S] by store."""
    window: int = 0
    """Past periods in a view."""
    features: int = 0
    """Features of the period in a view."""


@dataclass(frozen=True)
class InventoryPolicyConfig:
    """Settings of the policies; each takes those it has."""

    hidden: tuple[int, ...] = (32, 32, 32)
    """Widths of the hidden layers of vanilla and data_driven networks."""
    order_units: Literal["demand", "raw"] = "demand"
    """What networks count stock and orders in: the mean demand of a store in a period, or one, as in the paper."""
    graph_width: int = 32
    """Width of every layer of the graph network and of the symmetry-aware one."""
    graph_rounds: int | None = None
    """Rounds of passing messages; None: as many as links follow one another before a store, less one (at least 1)."""
    graph_bias: float | None = None
    """Of the last layer of the graph network: about what it sends along each link before it has learned. None: 1; in
    raw units 5, but for 1 where it sees past demand."""
    graph_slots: int | None = None
    """Slots of a place's inventory that the graph network reads; None: those of its network. More let the same weights
    run on networks with longer lead times."""
    order_bound: float = 4.0
    """Largest order of a warehouse of vanilla and symmetry-aware networks, in mean demands of all stores."""
    context_width: int = 256
    """Width of what the symmetry-aware network tells each place about all the others."""
    oracle_route: Literal["fastest", "cheapest"] = "fastest"
    """Which link the just-in-time oracle uses to a place that has several: of the shortest lead time, or the lowest
    cost all the way from the supplier; the other decides between equals."""

    def __post_init__(self) -> None:
        check_types(self)
        if self.graph_rounds is not None and self.graph_rounds < 1:
            raise ValueError(f"graph_rounds={self.graph_rounds} must be 1 or more, or None")
        if not self.order_bound > 0.0:
            raise ValueError(f"order_bound={self.order_bound} must be above 0")
        if self.context_width < 1:
            raise ValueError(f"context_width={self.context_width} must be 1 or more")


class InventoryPolicy(nn.Module, ABC):
    """Deterministic and differentiable almost everywhere; what it sends is always there to be sent.

    Args:
        network: Places and links.
        demand: What is known of the demand.
        config: Its settings.

    Raises:
        PolicyError: It has no meaning on this network.
    """

    name: ClassVar[str] = ""
    clairvoyant: ClassVar[bool] = False
    """Whether views show the future: an oracle, not a policy to use."""
    admissible: ClassVar[bool] = True
    """Whether what it sends is never negative; otherwise it is for comparison alone."""
    trainable: ClassVar[bool] = True
    """Whether HDPO has something to train."""
    learning_rate: ClassVar[float] = 1e-3
    """Adam's, by default."""
    scale_free: ClassVar[bool] = False
    """Whether the same weights run on networks with other numbers of places."""

    def __init__(self, network: Network, demand: Demanded, config: InventoryPolicyConfig) -> None:
        super().__init__()
        self.network, self.demand, self.config = network, demand, config

    def prepare(self, simulator: Simulator, generator: torch.Generator) -> None:
        """Fit what is not trained by HDPO (a forecaster), once, on the train split of ``simulator``."""

    @abstractmethod
    def forward(self, view: View) -> Tensor:
        """[B, E] to send along each link: not negative, no more than there is."""


class Seen(NamedTuple):
    """A view in other units of stock; see View."""

    inventory: Tensor
    holding_cost: Tensor
    unmet_cost: Tensor
    past: Tensor | None
    time: Tensor | None
    future: Tensor | None


class NetworkPolicy(InventoryPolicy):
    """A neural network, which counts stock, demand and orders in units of the mean demand of a store.

    The paper's networks see raw numbers. Of their starts on the plainest problem, one store whose demand is 5, three of
    four stood at an order that never changes after 200 updates; in units of demand none did, all were near the optimum.

    Attributes:
        demand: As it was given, in these units.
        unit: What one of them is.
    """

    def __init__(self, network: Network, demand: Demanded, config: InventoryPolicyConfig) -> None:
        mean = float(demand.mean.mean())
        unit = mean if config.order_units == "demand" and mean > 0.0 else 1.0
        super().__init__(network, dataclasses.replace(demand, mean=demand.mean / unit, std=demand.std / unit), config)
        self.unit = unit

    @abstractmethod
    def orders(self, view: View) -> Tensor:
        """What ``forward`` gives, in units of demand for a view in these."""

    def forward(self, view: View) -> Tensor:
        """[B, E], see InventoryPolicy."""
        unit = self.unit
        if unit == 1.0:
            return self.orders(view)
        past, future = (None if x is None else x / unit for x in (view.past, view.future))
        seen = Seen(view.inventory / unit, view.holding_cost, view.unmet_cost, past, view.time, future)
        return self.orders(seen) * unit


def inverse_softplus(value: Tensor) -> Tensor:
    """Where softplus is ``value``; values below 1e-3, which no parameter could leave again, are taken for it."""
    value = value.clamp_min(1e-3)
    return value + torch.log(-torch.expm1(-value))


_REGISTRY = Registry("inventory policy", InventoryPolicy, "ctrlrl.inventory.policies", skip=frozenset(["base"]))
register, names, get = _REGISTRY.enter, _REGISTRY.names, _REGISTRY.get


def build(name: str, network: Network, demand: Demanded, config: InventoryPolicyConfig, **more: Any) -> InventoryPolicy:
    """The policy of that name, its weights drawn from torch's generator."""
    return get(name)(network, demand, config, **more)
