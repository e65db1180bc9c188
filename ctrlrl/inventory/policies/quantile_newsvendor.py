"""Order up to a forecast quantile of demand: the newsvendor's."""

from __future__ import annotations

import torch
from torch import Tensor

from ctrlrl.inventory.forecaster import QuantileForecaster
from ctrlrl.inventory.policies.base import Demanded, InventoryPolicy, InventoryPolicyConfig, PolicyError, register
from ctrlrl.inventory.problem import Network, Simulator, View


@register
class QuantileNewsvendor(InventoryPolicy):
    """Each store orders what its inventory position lacks to a quantile of the demand of the lead time and one period.

    The quantile is the newsvendor's: the cost of unmet demand over that and the cost of holding, p / (p + h), as the
    view has them. The forecast is that of a frozen :class:`QuantileForecaster`, which :meth:`prepare` fits; it is
    part of the policy's weights, so a loaded policy needs none. There is nothing else to train.

    Source: Alvo, Russo, Kanoria, Lee (arXiv:2306.11246), and the released code.

    Raises:
        PolicyError: Views have no past demand; a store is not supplied by the supplier alone; or, when acting, the
            forecaster has not been fitted.
    """

    trainable = False
    learning_rate = 0.03

    order: Tensor
    horizon: Tensor

    def __init__(self, network: Network, demand: Demanded, config: InventoryPolicyConfig) -> None:
        super().__init__(network, demand, config)
        if demand.window < 1:
            raise PolicyError(
                f"{self.name} forecasts from past demand, and views of this problem have none; it is for recorded "
                "series. base_stock needs none"
            )
        self._check()
        lead = dict(zip(network.targets, network.lead_times, strict=True))
        self.lead_times = tuple(lead[store] for store in range(len(network.stores)))
        self.forecaster = QuantileForecaster(demand.window, demand.features, sorted(self._horizons()))
        self.register_buffer("order", torch.tensor(network.targets), persistent=False)  # [E] place of each link
        self.register_buffer("horizon", self._index(1), persistent=False)

    def _check(self) -> None:
        """Raise PolicyError where the rule has no meaning."""
        if self.network.warehouses or sorted(self.network.targets) != list(range(len(self.network.stores))):
            raise PolicyError(
                f"{self.name} is for stores that the supplier serves, one link each; transformed_newsvendor is also "
                "for stores behind one warehouse"
            )

    def _horizons(self) -> set[int]:
        """Periods to forecast."""
        return {time + 1 for time in self.lead_times}

    def _index(self, later: int) -> Tensor:
        """[S] the forecaster's horizon of each store's lead time and ``later`` periods."""
        return torch.tensor([self.forecaster.horizons.index(time + later) for time in self.lead_times])

    def prepare(self, simulator: Simulator, generator: torch.Generator | None = None) -> None:
        """Fit the forecaster to the recorded demand of the train split, all stores and series alike.

        To be called once, after the policy has been moved to its device and before it acts or is trained.

        Args:
            simulator: Of the problem; no other split of it is looked at.
            generator: CPU generator of the rows drawn.

        Raises:
            PolicyError: There is no recorded demand, or less of it than a lead time.
        """
        drawn = simulator.scenarios(None, "train")
        if drawn.past is None:
            raise PolicyError(f"{self.name} forecasts from past demand, and scenarios of this problem have none")
        demand, past = (x.transpose(1, 2).flatten(0, 1) for x in (drawn.demand, drawn.past))
        device = self.horizon.device
        time = None if drawn.time is None else drawn.time.to(device)
        try:
            self.forecaster.fit(demand.to(device), past.to(device), time, generator)
        except ValueError as error:
            raise PolicyError(f"{self.name} cannot be fitted to the train split: {error}") from error

    def ratio(self, view: View) -> Tensor:
        """[B, S] or [1, S] the newsvendor's quantile p / (p + h) of each store."""
        holding = view.holding_cost[:, : len(self.lead_times)]
        return view.unmet_cost / (view.unmet_cost + holding).clamp_min(torch.finfo(holding.dtype).tiny)

    def quantile(self, view: View) -> Tensor:
        """[B, S] or [1, S] probability that demand is to be met with."""
        return self.ratio(view)

    def forecast(self, view: View) -> Tensor:
        """[B, S, H, Q] quantiles of the demand to come, by store, horizon and probability."""
        if not self.forecaster.ready:
            raise PolicyError(f"{self.name} has no forecaster yet: call prepare(simulator) once, or load its weights")
        past, time = view.past, view.time
        if past is None:
            raise PolicyError(f"{self.name} forecasts from past demand, and this view has none")
        past = past.transpose(1, 2)
        if time is not None:
            time = time[:, None].expand(*past.shape[:2], -1)
        return self.forecaster(past, time)

    def level(self, forecast: Tensor, horizon: Tensor, quantile: Tensor) -> Tensor:
        """[B, S] of a forecast: each store's quantile [B, S] or [1, S] of the horizon with its index [S]."""
        index = horizon[:, None, None].expand(len(forecast), -1, 1, forecast.shape[3])
        quantiles = forecast.gather(2, index).squeeze(2)
        return self.forecaster.at(quantiles, quantile.expand(quantiles.shape[:2]))

    def forward(self, view: View) -> Tensor:
        """[B, E], see InventoryPolicy."""
        level = self.level(self.forecast(view), self.horizon, self.quantile(view))
        lacking = level - view.inventory.sum(2)
        return (lacking.relu() if self.admissible else lacking).index_select(1, self.order)
