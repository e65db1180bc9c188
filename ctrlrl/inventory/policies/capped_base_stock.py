"""Order up to a level, but never more than a cap."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from ctrlrl.inventory.policies.base import Demanded, InventoryPolicyConfig, inverse_softplus, register
from ctrlrl.inventory.policies.base_stock import BaseStock
from ctrlrl.inventory.problem import Network, View


@register
class CappedBaseStock(BaseStock):
    """As base_stock, but no order is above a cap, one for each store: ``clip(S - position, 0, cap)``.

    For lost sales, where it is near to the best there is (Xin, "Understanding the performance of capped base-stock
    policies in lost-sales inventory models", Operations Research 2021). Caps are softplus of parameters that start at
    twice the mean demand, twice what an order has to be.
    """

    learning_rate = 1.0

    def __init__(self, network: Network, demand: Demanded, config: InventoryPolicyConfig) -> None:
        super().__init__(network, demand, config)
        self.cap = nn.Parameter(inverse_softplus(2.0 * demand.mean))

    @property
    def caps(self) -> Tensor:
        """[S] by store."""
        return softplus(self.cap)

    def forward(self, view: View) -> Tensor:
        """[B, E], see InventoryPolicy."""
        return torch.minimum(super().forward(view), self.caps)
