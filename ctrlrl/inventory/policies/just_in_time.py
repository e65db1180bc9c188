"""An oracle that knows the demand to come."""

from __future__ import annotations

import torch
from torch import Tensor

from ctrlrl.inventory.allocation import Fan
from ctrlrl.inventory.policies.base import Demanded, InventoryPolicy, InventoryPolicyConfig, PolicyError, register
from ctrlrl.inventory.problem import Network, View


@register
class JustInTime(InventoryPolicy):
    """Orders what will be demanded when it arrives: at ``t``, for each store, the demand of ``t + lead time``.

    A warehouse orders, for all its stores together, what is demanded once it has passed through. Past the end of the
    horizon, demand stays as it is in the last period; returns (negative demand) are not ordered. Where a warehouse runs
    short, what it sends is cut in proportion.

    A place with several links uses one of them, see ``oracle_route``; both ways are in use. One release of the code of
    Alvo et al. (arXiv:2306.11246) takes the fastest link, that behind their tables the cheapest; for several warehouses
    the latter also takes all lead times to stores for 1, ships returns back, and more than there is. We do none of
    these: the profit on their 21 stores is 650.74 where the tables have 649.76 (two warehouses).

    No strict bound: holding stock early, or not serving a store, may pay. It is what published shares refer to.
    """

    clairvoyant = True
    trainable = False
    link: Tensor
    store: Tensor
    ahead: Tensor

    def __init__(self, network: Network, demand: Demanded, config: InventoryPolicyConfig) -> None:
        super().__init__(network, demand, config)
        needs: list[tuple[int, int, int]] = []
        for store in range(len(network.stores)):
            place, ahead = store, 0
            while place >= 0:
                link = _route(network, place, config.oracle_route)
                ahead += network.lead_times[link]
                needs.append((link, store, ahead))
                place = network.sources[link]
        for name, value in zip(("link", "store", "ahead"), torch.tensor(needs).unbind(1), strict=True):
            self.register_buffer(name, value.clone(), persistent=False)
        self.fan = Fan(network)

    def forward(self, view: View) -> Tensor:
        """[B, E], see InventoryPolicy.

        Raises:
            PolicyError: The view shows no future.
        """
        if view.future is None:
            raise PolicyError("just_in_time needs the demand to come; give it simulator.view(state, clairvoyant=True)")
        future = view.future
        need = future[:, self.ahead.clamp_max(future.shape[1] - 1), self.store]
        wish = need.new_zeros(len(need), len(self.network.targets)).index_add(1, self.link, need)
        return self.fan.feasible(wish.relu(), view.inventory)


def _route(network: Network, place: int, by: str) -> int:
    """The link that serves ``place``."""

    def cost(link: int) -> float:
        source = network.sources[link]
        return float(network.links[link].cost) + (cost(_route(network, source, by)) if source >= 0 else 0.0)

    arriving = [e for e, target in enumerate(network.targets) if target == place]
    if by == "cheapest":
        return min(arriving, key=lambda e: (cost(e), network.lead_times[e]))
    return min(arriving, key=lambda e: (network.lead_times[e], cost(e)))
