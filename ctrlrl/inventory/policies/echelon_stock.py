"""Order up to levels of echelons, in a chain."""

from __future__ import annotations

from collections.abc import Sequence

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
class EchelonStock(InventoryPolicy):
    """Each place of a chain orders what its echelon lacks to a level, as far as the place above has it on hand.

    The echelon of a place is all that is in it, on its way to it, and further down the chain. Optimal for backlogged
    demand (Clark and Scarf 1960). Levels are sums, from the store upwards, of increments ``softplus(theta + 10)``, in
    fifths of mean demand: a level of their own for each would lead into bad local minima (Alvo et al.,
    arXiv:2306.11246). Parameters start uniform in (-1, 1), so levels near 2, 4, ... periods of demand. The paper's
    increments are in units of stock, whatever demand is; its problems have a mean of 5, where both are the same.

    Raises:
        PolicyError: The network is not a chain: supplier, warehouses one after another, one store.
    """

    learning_rate = 0.5
    chain: Tensor
    rank: Tensor
    unit: Tensor

    def __init__(self, network: Network, demand: Demanded, config: InventoryPolicyConfig) -> None:
        super().__init__(network, demand, config)
        places = len(network.stores) + len(network.warehouses)
        if len(network.stores) != 1 or sorted(network.targets) != list(range(places)):
            raise PolicyError(
                f"echelon_stock is for a chain, from the supplier through warehouses to one store; this network has "
                f"{len(network.stores)} stores, {len(network.warehouses)} warehouses and {len(network.targets)} links"
            )
        link = [network.targets.index(0)]  # of each place of the chain, the store first
        while (source := network.sources[link[-1]]) >= 0:
            link.append(network.targets.index(source))
        self.register_buffer("chain", torch.tensor([network.targets[e] for e in link]), persistent=False)
        self.register_buffer("rank", torch.tensor(link).argsort(), persistent=False)
        self.register_buffer("unit", demand.mean[0].float().clamp_min(1e-6) / 5.0, persistent=False)
        self.theta = nn.Parameter(torch.empty(places).uniform_(-1.0, 1.0))

    @property
    def levels(self) -> Tensor:
        """[N] of the echelons, from the store upwards."""
        return self.unit * softplus(self.theta + 10.0).cumsum(0)

    def set_levels(self, levels: Sequence[float] | Tensor) -> None:
        """Take these levels, from the store upwards: those of Clark and Scarf, or any others.

        Raises:
            ValueError: They are not one for each place, above 0 and rising.
        """
        given = torch.as_tensor(levels, dtype=self.theta.dtype, device=self.theta.device)
        steps = given.diff(prepend=given.new_zeros(1))
        if given.shape != self.theta.shape or not (steps > 0.0).all():
            raise ValueError(
                f"levels {given.tolist()} must be {len(self.theta)} numbers above 0 that rise from the store upwards"
            )
        with torch.no_grad():
            self.theta.copy_(inverse_softplus(steps / self.unit) - 10.0)

    def forward(self, view: View) -> Tensor:
        """[B, E], see InventoryPolicy."""
        place = view.inventory.index_select(1, self.chain)
        order = (self.levels - place.sum(2).cumsum(1)).relu()
        above = place[:, 1:, 0].relu()
        return torch.cat([torch.minimum(order[:, :-1], above), order[:, -1:]], 1).index_select(1, self.rank)
