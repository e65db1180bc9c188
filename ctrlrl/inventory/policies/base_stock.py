"""Order up to a level."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from ctrlrl.inventory.policies.base import (
    Demanded,
    InventoryPolicy,
    InventoryPolicyConfig,
    PolicyError,
    inverse_softplus,
    register,
)
from ctrlrl.inventory.problem import Network, View


@register
class BaseStock(InventoryPolicy):
    """Each store orders what its inventory position lacks to a level of its own, straight from the supplier.

    Optimal where unmet demand is backlogged and there is one store (Arrow, Harris, Marschak 1951). Levels are
    softplus of the parameters, which start at the mean demand of the lead time and one period more.

    Raises:
        PolicyError: A store is not supplied by the supplier alone.
    """

    learning_rate = 0.5

    def __init__(self, network: Network, demand: Demanded, config: InventoryPolicyConfig) -> None:
        super().__init__(network, demand, config)
        if tuple(network.targets) != tuple(range(len(network.stores))) or any(s >= 0 for s in network.sources):
            raise PolicyError(
                "base_stock is for stores that the supplier serves, one link each; echelon_stock is for chains"
            )
        start = demand.mean * (torch.tensor(network.lead_times) + 1.0)
        self.theta = nn.Parameter(inverse_softplus(start))

    @property
    def levels(self) -> Tensor:
        """[S] by store."""
        return softplus(self.theta)

    def forward(self, view: View) -> Tensor:
        """[B, E], see InventoryPolicy."""
        return (self.levels - view.inventory.sum(2)).relu()
