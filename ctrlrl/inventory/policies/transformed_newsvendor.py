"""Order up to a forecast quantile that is learned from the newsvendor's."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ctrlrl.inventory.allocation import proportional
from ctrlrl.inventory.policies.base import Demanded, InventoryPolicyConfig, PolicyError, register
from ctrlrl.inventory.policies.quantile_newsvendor import QuantileNewsvendor
from ctrlrl.inventory.problem import Network, View
from ctrlrl.nets.mlp import mlp


def _transform() -> nn.Sequential:
    """From p / (p + h) [..., 1] to a probability [..., 1]."""
    net = mlp(1, (32, 32), "elu")
    return net.append(nn.Linear(32, 1)).append(nn.Sigmoid())


@register
class TransformedNewsvendor(QuantileNewsvendor):
    """quantile_newsvendor with a small network from p / (p + h) to the quantile, the same for all stores.

    Behind one warehouse, stores get what they lack, in proportion where there is not enough for all. The warehouse
    orders what it and all stores together lack to the sum over stores of a quantile of the demand of both lead times
    and one period; a second network of the same kind gives that quantile.

    Source: Alvo, Russo, Kanoria, Lee (arXiv:2306.11246), and the released code; the rule of the warehouse is that of
    an author's research code, where the warehouse's lead time is fixed at 6 and the forecaster of the longer horizons
    is another one.

    Raises:
        PolicyError: As quantile_newsvendor; or stores are neither all served by the supplier, nor all by one warehouse
            that can hold.
    """

    trainable = True

    total: Tensor

    def __init__(self, network: Network, demand: Demanded, config: InventoryPolicyConfig) -> None:
        super().__init__(network, demand, config)
        self.transform = _transform()
        if network.warehouses:
            self.transform_upstream = _transform()
            self.register_buffer("total", self._index(self._upstream() + 1), persistent=False)

    def _check(self) -> None:
        network, stores = self.network, len(self.network.stores)
        one_link_each = sorted(network.targets) == list(range(stores + len(network.warehouses)))
        behind = [s for s, target in zip(network.sources, network.targets, strict=True) if target < stores]
        one_source = len(network.warehouses) <= 1 and len(set(behind)) == 1
        if not (one_link_each and one_source and all(w.holds for w in network.warehouses)):
            raise PolicyError(
                f"{self.name} is for stores that the supplier serves, or that one warehouse serves which can hold, "
                "one link each"
            )

    def _upstream(self) -> int:
        """Lead time of the warehouse."""
        return self.network.lead_times[tuple(self.network.sources).index(-1)]

    def _horizons(self) -> set[int]:
        horizons = super()._horizons()
        return horizons | {h + self._upstream() for h in horizons} if self.network.warehouses else horizons

    def quantile(self, view: View) -> Tensor:
        """[B, S] or [1, S]."""
        return self.transform(self.ratio(view).unsqueeze(-1)).squeeze(-1)

    def forward(self, view: View) -> Tensor:
        """[B, E], see InventoryPolicy."""
        if not self.network.warehouses:
            return super().forward(view)
        stores, position = len(self.lead_times), view.inventory.sum(2)
        forecast = self.forecast(view)
        lacking = (self.level(forecast, self.horizon, self.quantile(view)) - position[:, :stores]).relu()
        sent = proportional(lacking, view.inventory[:, stores, 0])
        quantile = self.transform_upstream(self.ratio(view).unsqueeze(-1)).squeeze(-1)
        needed = self.level(forecast, self.total, quantile).sum(1)
        ordered = (needed - position.sum(1)).relu()
        return torch.cat([sent, ordered[:, None]], 1).index_select(1, self.order)
