"""A plain network from all inventories to all orders."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from ctrlrl.inventory.allocation import Fan, softmax
from ctrlrl.inventory.policies.base import Demanded, InventoryPolicyConfig, NetworkPolicy, register
from ctrlrl.inventory.problem import Network, View
from ctrlrl.nets.mlp import mlp


@register
class Vanilla(NetworkPolicy):
    """A multilayer perceptron (ELU) on the raw inventories, with an output ``o`` for each link.

    - Supplier to store: ``softplus(o + 1)``.
    - Supplier to warehouse: ``sigmoid(o) * order_bound * sum(mean demand)``.
    - Warehouses: what they have on hand times a softmax over the outputs of their own links and a constant 1, whose
      share stays; without it where they cannot hold (transshipment). One link only (a chain): ``sigmoid(o)``.

    Source: Alvo, Russo, Kanoria, Lee (arXiv:2306.11246), and the released code.
    """

    slots: Tensor
    stay: Tensor
    to_store: Tensor
    bound: Tensor

    def __init__(self, network: Network, demand: Demanded, config: InventoryPolicyConfig) -> None:
        super().__init__(network, demand, config)
        demand = self.demand
        links, stores = len(network.targets), len(network.stores)
        slots = filled_slots(network)
        self.body = mlp(len(slots), config.hidden, "elu")
        self.head = nn.Linear(config.hidden[-1] if config.hidden else len(slots), links)
        self.fan = Fan(network)
        # softmax over [o, 0] is sigmoid(o)
        stay = torch.where(self.fan.there.sum(1) > 1, 1.0, 0.0).masked_fill(~self.fan.holds, -math.inf)
        self.register_buffer("slots", slots, persistent=False)
        self.register_buffer("stay", stay.unsqueeze(1), persistent=False)
        self.register_buffer("to_store", torch.tensor(network.targets) < stores, persistent=False)
        self.register_buffer("bound", config.order_bound * demand.mean.sum(), persistent=False)

    def orders(self, view: View) -> Tensor:
        """[B, E], see NetworkPolicy."""
        out = self.head(self.body(view.inventory.flatten(1).index_select(1, self.slots)))
        order = torch.where(self.to_store, softplus(out + 1.0), out.sigmoid() * self.bound)
        if not len(self.stay):
            return order
        shares = softmax(self.fan.rows(out, -math.inf), self.fan.stock(view.inventory), self.stay)
        return order * self.fan.supplied + self.fan.flows(shares)


def filled_slots(network: Network) -> Tensor:
    """Which of the N * L slots of an inventory, flattened, can ever be filled."""
    return torch.tensor([p * network.slots + k for p, length in enumerate(network.pipelines) for k in range(length)])
