"""The same order in every period."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from ctrlrl.inventory.allocation import Fan
from ctrlrl.inventory.policies.base import Demanded, InventoryPolicy, InventoryPolicyConfig, inverse_softplus, register
from ctrlrl.inventory.problem import Network, View


@register
class ConstantOrder(InventoryPolicy):
    """A constant wish for each link, whatever the state; warehouses share out what they have in proportion.

    Asymptotically optimal for lost sales as the lead time grows (Goldberg, Katz-Rogozhnikov, Lu, Sharma, Squillante,
    Mathematics of Operations Research 2016). Wishes are softplus of parameters, which start where mean demand passes
    through the network, in equal parts where a place has several links.
    """

    learning_rate = 0.1

    def __init__(self, network: Network, demand: Demanded, config: InventoryPolicyConfig) -> None:
        super().__init__(network, demand, config)
        self.fan = Fan(network)
        self.theta = nn.Parameter(inverse_softplus(mean_flows(network, demand.mean)))

    @property
    def orders(self) -> Tensor:
        """[E] wished along each link."""
        return softplus(self.theta)

    def forward(self, view: View) -> Tensor:
        """[B, E], see InventoryPolicy."""
        return self.fan.feasible(self.orders.expand(len(view.inventory), -1), view.inventory)


def mean_flows(network: Network, mean: Tensor) -> Tensor:
    """[E] along each link so that every store gets its mean demand [S], and no warehouse more than it passes on."""
    places = len(network.stores) + len(network.warehouses)
    arriving = [[e for e, target in enumerate(network.targets) if target == place] for place in range(places)]
    leaving = [[e for e, source in enumerate(network.sources) if source == place] for place in range(places)]
    flow: dict[int, float] = {}
    waiting = list(range(places))
    while waiting:  # from the stores up: a warehouse's turn comes when all that it supplies have had theirs
        place = next(p for p in waiting if all(e in flow for e in leaving[p]))
        waiting.remove(place)
        need = float(mean[place]) if place < len(network.stores) else sum(flow[e] for e in leaving[place])
        flow.update({e: need / len(arriving[place]) for e in arriving[place]})
    return torch.tensor([flow[e] for e in range(len(network.targets))])
