"""Order up to one learned quantile of the forecast of demand."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ctrlrl.inventory.policies.base import Demanded, InventoryPolicyConfig, register
from ctrlrl.inventory.policies.quantile_newsvendor import QuantileNewsvendor
from ctrlrl.inventory.problem import Network, View


@register
class FixedQuantileNewsvendor(QuantileNewsvendor):
    """quantile_newsvendor with one learned quantile for all stores, series and periods, whatever they cost.

    The quantile is the sigmoid of the parameter. It starts at the mean p / (p + h) of the network's stores; in the
    released code it starts at random.

    Source: Alvo, Russo, Kanoria, Lee (arXiv:2306.11246), and the released code.

    Raises:
        PolicyError: As quantile_newsvendor.
    """

    trainable = True

    def __init__(self, network: Network, demand: Demanded, config: InventoryPolicyConfig) -> None:
        super().__init__(network, demand, config)
        costs = torch.tensor([[store.unmet_cost, store.holding_cost] for store in network.stores])
        ratio = costs[:, 0] / costs.sum(1).clamp_min(torch.finfo(costs.dtype).tiny)
        self.theta = nn.Parameter(ratio.mean().clamp(0.05, 0.95).logit())

    def quantile(self, view: View) -> Tensor:
        """[1, S], all the same."""
        return self.theta.sigmoid().expand(1, len(self.lead_times))
