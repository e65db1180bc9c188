"""The graph of a network as indices, worked out once, and the sums that messages along it need.

Tensors have nodes or edges first, then the batch: ``[N, B, F]``. A node or an edge is then one block
of memory, so that looking up, adding and leaving out are copies of whole blocks.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from ctrlrl.inventory.problem import Network


class Graph(nn.Module):
    """A node for each of ``N`` places, stores first, and edges of three kinds:

    - flows: the links of the network in their order, those from the supplier among them; then a self-loop at each
      warehouse that holds, for what it keeps;
    - demand: one edge from each of ``S`` stores to its customers.

    Supplier and customers are virtual: they say nothing, and nothing is passed on to them.

    Attributes:
        nodes: N.
        stores: S.
        links: Flows that are links.
        flows: Flows.
        rounds: Links that follow one another on the longest way to a store, less one (at least 1): after so many rounds
            of messages, the first order from the supplier has heard of the demand.
        supplied: [links] bool: from the supplier.
        keepers: [flows - links] the warehouses with self-loops, counted without the stores.
        traits: [flows, 2] lead time in periods and cost of a unit; (0, 0) for self-loops.
    """

    supplied: Tensor
    keepers: Tensor
    traits: Tensor
    _source: Tensor
    _target: Tensor
    _scale_in: Tensor
    _scale_out: Tensor

    def __init__(self, network: Network) -> None:
        super().__init__()
        stores, warehouses = len(network.stores), len(network.warehouses)
        keepers = [w for w, warehouse in enumerate(network.warehouses) if warehouse.holds]
        source = torch.tensor([warehouses if s < 0 else s - stores for s in network.sources] + keepers)
        target = torch.tensor([*network.targets, *(w + stores for w in keepers)])
        self.nodes, self.stores, self.links, self.flows = stores + warehouses, stores, len(network.links), len(source)
        self.rounds = max(1, max(_depths(network)[:stores]) - 1)
        traits = torch.zeros(self.flows, 2)
        traits[: self.links, 0] = torch.tensor(network.lead_times, dtype=torch.float32)
        traits[: self.links, 1] = torch.tensor([x.cost for x in network.links], dtype=torch.float32)
        buffers = {
            "supplied": source[: self.links] == warehouses,
            "keepers": torch.tensor(keepers, dtype=torch.long),
            "traits": traits,
            "_source": source,  # of warehouses; one past the last is the supplier
            "_target": target,
            "_scale_in": target.bincount(minlength=self.nodes).rsqrt()[:, None, None],
            "_scale_out": source.bincount(minlength=warehouses + 1)[:-1].rsqrt()[:, None, None],
        }
        for name, value in buffers.items():  # they follow from the network: no part of the weights
            self.register_buffer(name, value, persistent=False)

    def split(self, nodes: Tensor) -> tuple[Tensor, Tensor]:
        """Those of stores [S, B, F] and of warehouses [N - S, B, F]."""
        stores, warehouses = nodes.split([self.stores, self.nodes - self.stores])
        return stores, warehouses

    def to_flows(self, leaving: Tensor, reaching: Tensor) -> Tensor:
        """[flows, B, F]: the sum of what the two ends of each flow say to it.

        Args:
            leaving: [N - S, B, F] what each warehouse says to flows that leave from it.
            reaching: [N, B, F] what each place says to flows that lead to it.
        """
        leaving = pad(leaving, (0, 0, 0, 0, 0, 1))  # the supplier says nothing
        return leaving.index_select(0, self._source) + reaching.index_select(0, self._target)

    def incoming(self, flows: Tensor) -> Tensor:
        """[N, B, F]: sums of flows [flows, B, F] by the place they lead to, over the square root of their number."""
        total = flows.new_zeros(self.nodes, *flows.shape[1:]).index_add_(0, self._target, flows)
        return total * self._scale_in

    def outgoing(self, flows: Tensor) -> Tensor:
        """[N - S, B, F]: likewise by the warehouse they leave from. Of a store, only its edge of demand leaves."""
        total = flows.new_zeros(len(self._scale_out) + 1, *flows.shape[1:]).index_add_(0, self._source, flows)
        return total[:-1] * self._scale_out


def _depths(network: Network) -> list[int]:
    """Links on the longest way from the supplier to each place."""
    depths = [0] * (len(network.stores) + len(network.warehouses))
    for _ in depths:
        for source, target in zip(network.sources, network.targets, strict=True):
            depths[target] = max(depths[target], 1 + (0 if source < 0 else depths[source]))
    return depths
