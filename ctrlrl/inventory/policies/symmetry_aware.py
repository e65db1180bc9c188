"""One small network for all stores, and one for all warehouses, which hear of the others through a context."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from ctrlrl.inventory.allocation import Fan
from ctrlrl.inventory.policies.base import Demanded, InventoryPolicyConfig, NetworkPolicy, PolicyError, register
from ctrlrl.inventory.policies.vanilla import filled_slots
from ctrlrl.inventory.problem import Network, View
from ctrlrl.nets.mlp import mlp


@register
class SymmetryAware(NetworkPolicy):
    """Weights shared by all stores, and by all warehouses.

    - Context: ``sigmoid`` of a network on everything that changes: all inventories, past demand, the period's features.
    - Every link to a store: ``softplus`` of the store network, on the store's inventory, holding and unmet cost, its
      demand (mean and deviation; where there is one, the past instead), the period's features, the link's lead time
      and cost, and the context. Warehouses share out what they have in proportion.
    - Every order to the supplier: ``sigmoid`` of the warehouse network, on the warehouse's inventory, holding cost,
      lead time and the context, times ``order_bound * sum(mean demand)``.

    Source: the symmetry-aware network of the first versions of Alvo, Russo, Kanoria, Lee (arXiv:2306.11246), and
    code released with them. There it is for one warehouse: holding costs, link costs and the warehouse's lead time are
    our additions, without which warehouses could not be told apart. For a warehouse that cannot hold, the code puts a
    softmax on top of softplus; here all goes out in the proportions of the wishes.

    Raises:
        PolicyError: A warehouse supplies another one.
    """

    slots: Tensor
    store_links: Tensor
    store_of: Tensor
    supply_links: Tensor
    supplied: Tensor
    store_static: Tensor
    supply_static: Tensor
    bound: Tensor

    def __init__(self, network: Network, demand: Demanded, config: InventoryPolicyConfig) -> None:
        super().__init__(network, demand, config)
        demand = self.demand
        stores = len(network.stores)
        ends = list(enumerate(zip(network.sources, network.targets, strict=True)))
        if any(source >= 0 and target >= stores for _, (source, target) in ends):
            raise PolicyError("symmetry_aware is for warehouses that the supplier serves; echelon_stock is for chains")
        store_links = [e for e, (_, target) in ends if target < stores]
        supply_links = [e for e, (_, target) in ends if target >= stores]
        of_link = torch.tensor([[float(x.lead_time), float(x.cost)] for x in network.links])
        store_of = torch.tensor([network.targets[e] for e in store_links])
        known = torch.stack([demand.mean, demand.std], 1).float()[store_of]
        slots, length, width = filled_slots(network), network.slots, config.graph_width
        statics = [of_link[store_links]] + ([known] if demand.window == 0 else [])
        buffers = {
            "slots": slots,
            "store_links": torch.tensor(store_links),
            "store_of": store_of,
            "supply_links": torch.tensor(supply_links, dtype=torch.long),
            "supplied": torch.tensor([network.targets[e] for e in supply_links], dtype=torch.long),
            "store_static": torch.cat(statics, 1),
            "supply_static": of_link[supply_links],
            "bound": config.order_bound * demand.mean.sum(),
        }
        for name, value in buffers.items():  # they follow from the network: no part of the weights
            self.register_buffer(name, value, persistent=False)
        self.fan = Fan(network)
        whole = len(slots) + demand.window * stores + demand.features
        store = length + 2 + demand.window + demand.features + self.store_static.shape[1] + config.context_width
        supply = length + 1 + 2 + config.context_width
        self.context = nn.Sequential(
            mlp(whole, (config.context_width,), "elu"),
            nn.Linear(config.context_width, config.context_width),
            nn.Sigmoid(),
        )
        self.store = nn.Sequential(mlp(store, (width, width), "elu"), nn.Linear(width, 1))
        self.warehouse = nn.Sequential(mlp(supply, (width, width), "elu"), nn.Linear(width, 1))

    def orders(self, view: View) -> Tensor:
        """[B, E], see NetworkPolicy."""
        inventory, batch = view.inventory, len(view.inventory)
        time = [] if view.time is None else [view.time.expand(batch, -1)]
        changing = [inventory.flatten(1).index_select(1, self.slots), *time]
        own = [inventory, view.holding_cost.expand(batch, -1).unsqueeze(2)]
        of_store = [view.unmet_cost.expand(batch, -1).unsqueeze(2)]
        if view.past is not None:
            changing.append(view.past.flatten(1))
            of_store.append(view.past.transpose(1, 2))
        context = self.context(torch.cat(changing, 1))

        place = torch.cat(own, 2)
        store = torch.cat([place[:, : len(self.network.stores)], *of_store], 2)
        wish = softplus(self._each(self.store, store, self.store_of, self.store_static, [context, *time]))
        order = self._each(self.warehouse, place, self.supplied, self.supply_static, [context]).sigmoid() * self.bound
        flows = inventory.new_zeros(batch, len(self.network.targets))
        flows = flows.index_copy(1, self.store_links, wish).index_copy(1, self.supply_links, order)
        return self.fan.feasible(flows, inventory)

    @staticmethod
    def _each(net: nn.Module, place: Tensor, which: Tensor, static: Tensor, shared: list[Tensor]) -> Tensor:
        """[B, links] of a network on each link's place, what is fixed of the link, and what all have in common."""
        shape = (len(place), len(which), -1)
        seen = [place.index_select(1, which), static.expand(*shape), *(x.unsqueeze(1).expand(*shape) for x in shared)]
        return net(torch.cat(seen, 2)).squeeze(2)
