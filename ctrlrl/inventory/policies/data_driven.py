"""A plain network from all that is seen, past demand included, to all orders."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from ctrlrl.inventory.allocation import Fan
from ctrlrl.inventory.policies.base import Demanded, InventoryPolicyConfig, NetworkPolicy, register
from ctrlrl.inventory.policies.vanilla import filled_slots
from ctrlrl.inventory.problem import Network, View
from ctrlrl.nets.mlp import mlp


@register
class DataDriven(NetworkPolicy):
    """A multilayer perceptron (ELU) on inventories, past demand, costs, lead times and features of the period.

    Its outputs are wishes, one for each link, through softplus with a first bias of 1; warehouses share out what they
    have in proportion.

    Source: the data-driven network of Alvo, Russo, Kanoria, Lee (arXiv:2306.11246), and the released code, of which
    one version ends in a relu; softplus, as in the other, keeps its gradient where it orders nothing.
    """

    slots: Tensor
    lead_times: Tensor

    def __init__(self, network: Network, demand: Demanded, config: InventoryPolicyConfig) -> None:
        super().__init__(network, demand, config)
        demand = self.demand
        stores, links = len(network.stores), len(network.targets)
        slots, places = filled_slots(network), stores + len(network.warehouses)
        inputs = len(slots) + places + stores + links + demand.window * stores + demand.features
        self.body = mlp(inputs, config.hidden, "elu")
        self.head = nn.Linear(config.hidden[-1] if config.hidden else inputs, links)
        nn.init.ones_(self.head.bias)
        self.fan = Fan(network)
        self.register_buffer("slots", slots, persistent=False)
        self.register_buffer("lead_times", torch.tensor([network.lead_times], dtype=torch.float32), persistent=False)

    def orders(self, view: View) -> Tensor:
        """[B, E], see NetworkPolicy."""
        seen = [view.inventory.flatten(1).index_select(1, self.slots), view.holding_cost, view.unmet_cost]
        seen += [self.lead_times]
        seen += [view.past.flatten(1)] if view.past is not None else []
        seen += [view.time] if view.time is not None else []
        batch = len(view.inventory)
        out = self.head(self.body(torch.cat([x.expand(batch, -1) for x in seen], 1)))
        return self.fan.feasible(softplus(out), view.inventory)
