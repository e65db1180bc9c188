"""A graph network: one set of weights for every place and link."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ctrlrl.inventory.allocation import Fan, full, proportional
from ctrlrl.inventory.graph import Graph
from ctrlrl.inventory.policies.base import Demanded, InventoryPolicyConfig, NetworkPolicy, PolicyError, register
from ctrlrl.inventory.problem import Network, View

_LOG2_E = 1.0 / math.log(2.0)
_LARGE = 2**16  # elements, from which on it pays to call a function of our own


@register
class GraphPolicy(NetworkPolicy):
    """Places tell one another, along the links, what they have and need; then each link says what it wants to carry.

    Every function below is a network of two hidden layers, the same for all places and links, with ELU behind each
    layer. ``s`` and ``t`` are the places at the ends of a link, ``l`` and ``c`` its lead time and cost:

    1. ``n = embed_node(x)``: inventory, padded with zeros to the longest; then holding cost; of stores also the cost of
       unmet demand, and the mean and standard deviation of demand, or past demand and features of the period where they
       are seen (zeros for warehouses).
    2. ``e = embed_edge(n_s, n_t, l, c)`` on the edges of :class:`~ctrlrl.inventory.graph.Graph`.
    3. In each round ``n += update_node(n, in, out)`` with the sums of ``e`` over the edges that lead to the place and
       over those that leave from it, each divided by the square root of their number; then
       ``e += update_edge(e, n_s, n_t)``.
    4. ``u = softplus(output(e))`` is the wish of a link, and what a warehouse wishes to keep. Links from the supplier
       carry it; a warehouse that holds cuts all of its wishes in proportion to what it has, one that does not sends
       all it has in proportion to them.

    The weights know nothing of the network: those trained on one run on any other, of other size and form, whose
    ``graph_slots`` and kinds of features are the same. Load them there by ``load_state_dict``.

    Source: Alvo, Russo, Kanoria, Lee (arXiv:2306.11246), and the released code. There the cost of links is a feature of
    the warehouse, which has one for all of its links; here each link has its own, as in our networks. On real data the
    paper has a ``graph_width`` of 64.

    Raises:
        PolicyError: ``graph_slots`` are fewer than lead times need.
    """

    scale_free = True

    known: Tensor

    def __init__(self, network: Network, demand: Demanded, config: InventoryPolicyConfig) -> None:
        super().__init__(network, demand, config)
        demand = self.demand
        self.slots = network.slots if config.graph_slots is None else config.graph_slots
        if self.slots < network.slots:
            raise PolicyError(f"graph_slots={self.slots} is below the longest lead time, {network.slots}")
        self.graph, self.fan = Graph(network), Fan(network)
        self.all_hold = len(self.graph.keepers) == len(network.warehouses)
        self.rounds = config.graph_rounds or self.graph.rounds
        known = torch.stack([demand.mean, demand.std], 1).float()
        self.register_buffer("known", known, persistent=False)  # [S, 2]
        self.seen = demand.window > 0
        features = self.slots + 2 + demand.features + (demand.window if self.seen else known.shape[1])
        width = config.graph_width
        self.embed_node = Layers(features, width)
        self.embed_edge = Layers(2 * width + 2, width)
        self.update_node = Layers(3 * width, width)
        self.update_edge = Layers(3 * width, width)
        self.output, self.wish = Layers(width, width, depth=2), nn.Linear(width, 1)
        bias = config.graph_bias
        first = 1.0 if self.seen or config.order_units == "demand" else 5.0
        nn.init.constant_(self.wish.bias, first if bias is None else bias)

    def orders(self, view: View) -> Tensor:
        """[B, E], see NetworkPolicy."""
        # First layers are multiplied part by part: W [a, b] = W_a a + W_b b. What a place says to many links is then
        # worked out once, before they look it up. In the last round, edges of demand have nothing more to say.
        graph, width = self.graph, self.config.graph_width
        start, node, edge = self.embed_edge, self.update_node, self.update_edge
        start_source, start_target, start_traits = start.parts(width, width, 2)
        node_own, node_in, node_out = node.parts(width, width, width)
        edge_own, edge_source, edge_target = edge.parts(width, width, width)

        nodes = self.embed_node(self.features(view))
        stores, warehouses = graph.split(nodes)
        said = graph.to_flows(F.linear(warehouses, start_source), F.linear(nodes, start_target))
        flows = start.after(said + F.linear(graph.traits, start_traits, start.bias).unsqueeze(1))
        demand = start.after(F.linear(stores, start_source, start.bias))
        for left in reversed(range(self.rounds)):
            out = torch.cat([F.linear(demand, node_out), F.linear(graph.outgoing(flows), node_out)])
            said = F.linear(graph.incoming(flows), node_in) + out
            nodes = nodes + node.after(F.linear(nodes, node_own, node.bias) + said)
            stores, warehouses = graph.split(nodes)
            said = graph.to_flows(F.linear(warehouses, edge_source), F.linear(nodes, edge_target))
            flows = flows + edge.after(F.linear(flows, edge_own, edge.bias) + said)
            if left:
                said = F.linear(stores, edge_source)
                demand = demand + edge.after(F.linear(demand, edge_own, edge.bias) + said)
        wish = F.softplus(self.wish(self.output(flows))).squeeze(2).T  # [B, flows]
        return self._allocate(wish, view.inventory)

    def features(self, view: View) -> Tensor:
        """[N, B, features] of the places, see the class."""
        inventory, graph = view.inventory, self.graph
        batch, stores = len(inventory), graph.stores
        of_store = [view.unmet_cost.T.unsqueeze(2)]
        if self.seen:
            if view.past is None:
                raise ValueError("the view has no past demand, but the policy was built for it (window above 0)")
            of_store.append(view.past.permute(2, 0, 1))
        else:
            of_store.append(self.known.unsqueeze(1))
        if self.demand.features:
            if view.time is None:
                raise ValueError("the view has no features of the period, but the policy was built for them")
            of_store.append(view.time.expand(stores, -1, -1))
        other = torch.cat([x.expand(stores, batch, -1) for x in of_store], 2)
        return torch.cat(
            [
                F.pad(inventory.transpose(0, 1), (0, self.slots - inventory.shape[2])),
                view.holding_cost.T.unsqueeze(2).expand(-1, batch, 1),
                F.pad(other, (0, 0, 0, 0, 0, graph.nodes - stores)),
            ],
            2,
        )

    def _allocate(self, wish: Tensor, inventory: Tensor) -> Tensor:
        """[B, E] of wishes [B, flows], what warehouses keep behind those of the links."""
        graph, fan = self.graph, self.fan
        wish, kept = wish[:, : graph.links], wish[:, graph.links :]
        if graph.nodes == graph.stores:
            return wish
        rows, stock = fan.rows(wish), fan.stock(inventory)
        if len(graph.keepers) == 0:
            sent = full(rows, stock, fan.there)
        else:
            sent = proportional(rows, stock, wish.new_zeros(stock.shape).index_copy(1, graph.keepers, kept))
            if not self.all_hold:
                sent = torch.where(fan.holds.unsqueeze(1), sent, full(rows, stock, fan.there))
        return torch.where(graph.supplied, wish, fan.flows(sent))


class Layers(nn.Module):
    """Linear layers of the same width, an ELU behind each.

    Args:
        inputs: Of the first layer.
        width: Of all layers.
        depth: How many; 3 is two hidden layers and an output.
    """

    def __init__(self, inputs: int, width: int, depth: int = 3) -> None:
        super().__init__()
        self.first = nn.Linear(inputs, width)
        self.rest = nn.ModuleList(nn.Linear(width, width) for _ in range(depth - 1))

    def forward(self, x: Tensor) -> Tensor:
        """[..., width] of [..., inputs]."""
        return self.after(self.first(x))

    def after(self, first: Tensor) -> Tensor:
        """What follows the first layer's linear map."""
        x = elu(first)
        for layer in self.rest:
            x = elu(layer(x))
        return x

    @property
    def bias(self) -> Tensor:
        """[width] of the first layer."""
        return self.first.bias

    def parts(self, *widths: int) -> tuple[Tensor, ...]:
        """The first layer's weights for parts of its input of these widths."""
        return self.first.weight.split(widths, 1)


def elu(x: Tensor) -> Tensor:
    """ELU; of large tensors in eager mode on a CPU in 0.6 of the time, for there it costs more than linear layers."""
    if x.is_cpu and x.numel() >= _LARGE and not torch.compiler.is_compiling():
        return _Elu.apply(x)
    return F.elu(x)


class _Elu(torch.autograd.Function):
    """``max(x, 2^(min(x, 0) / log 2) - 1)``: powers of 2 are faster than exp(x) - 1, and as good to 1e-7."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        y = x.clamp_max(0.0).mul_(_LOG2_E).exp2_().sub_(1.0)
        torch.maximum(x, y, out=y)
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (y,) = ctx.saved_tensors
        return torch.ops.aten.elu_backward(grads[0], 1.0, 1.0, 1.0, True, y)
