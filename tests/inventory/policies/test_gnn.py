"""The graph network against plain loops and against torch-geometric, and what must hold whatever its weights are."""

import math

import pytest
import torch
from ctrlrl_envs.inventory.demand import Normal
from ctrlrl_envs.inventory.network import Link, Network, Store, Warehouse
from ctrlrl_envs.inventory.simulator import InventorySimulator, Problem, View
from torch.nn.functional import elu as torch_elu
from torch.nn.functional import softplus

from ctrlrl.inventory.policies.base import Demanded, InventoryPolicyConfig, PolicyError, build
from ctrlrl.inventory.policies.gnn import elu


def one_warehouse(stores: int = 3, holds: bool = True, lead_times: tuple[int, ...] = (2, 3), **more) -> Network:
    return Network(
        tuple(Store(f"s{i}", 1.0 + 0.1 * i, 9.0 - 0.5 * (i % 7)) for i in range(stores)),
        (Warehouse("w", 0.3, holds),),
        (
            Link("supplier", "w", 3, 0.2),
            *(Link("w", f"s{i}", lead_times[i % len(lead_times)], 0.1 * (i % 5)) for i in range(stores)),
        ),
        **more,
    )


def chain() -> Network:
    links = (Link("supplier", "top", 2), Link("top", "mid", 4), Link("mid", "low", 3), Link("low", "s", 4))
    places = (Warehouse("top", 0.1), Warehouse("mid", 0.2), Warehouse("low", 0.5))
    return Network((Store("s", 1.0, 9.0),), places, links)


def many_warehouses() -> Network:
    """Not every warehouse serves every store, one of them cannot hold, and links come in no order."""
    return Network(
        (Store("a", 1.0, 9.0), Store("b", 0.8, 7.0), Store("c", 1.2, 11.0), Store("d", 1.1, 8.0)),
        (Warehouse("u", 0.3), Warehouse("v", 0.4, holds=False), Warehouse("w", 0.2)),
        (
            Link("v", "c", 2, 0.7),
            Link("supplier", "u", 3, 0.5),
            Link("u", "a", 1, 0.1),
            Link("w", "b", 4, 0.9),
            Link("u", "c", 3, 0.2),
            Link("supplier", "v", 2, 1.5),
            Link("v", "b", 1, 0.3),
            Link("supplier", "w", 1, 0.7),
            Link("supplier", "d", 2, 0.4),
        ),
    )


def independent(stores: int) -> Network:
    names = [f"s{i}" for i in range(stores)]
    return Network(tuple(Store(n, 1.0, 9.0) for n in names), (), tuple(Link("supplier", n, 3) for n in names))


NETWORKS = {
    "one_warehouse": one_warehouse(),
    "transshipment": one_warehouse(holds=False),
    "chain": chain(),
    "many_warehouses": many_warehouses(),
    "independent": independent(2),
}


def demanded(network: Network, **more) -> Demanded:
    stores = len(network.stores)
    return Demanded(torch.linspace(2.5, 7.5, stores), torch.linspace(1.0, 2.0, stores), **more)


def view_of(network: Network, batch: int = 5, seed: int = 0, window: int = 0, features: int = 0) -> View:
    draw = torch.Generator().manual_seed(seed)
    places, stores = len(network.places), len(network.stores)
    inventory = 6.0 * torch.rand(batch, places, network.slots, generator=draw)
    for place, length in enumerate(network.pipelines):
        inventory[:, place, length:] = 0.0
    inventory[:, :stores, 0] -= 2.0  # some backlog
    return View(
        inventory,
        torch.tensor([[p.holding_cost for p in network.places]]),
        torch.tensor([[s.unmet_cost for s in network.stores]]) + torch.rand(batch, stores, generator=draw),
        10.0 * torch.rand(batch, window, stores, generator=draw) if window else None,
        torch.rand(1, features, generator=draw) if features else None,
    )


def policy_of(network: Network, seed: int = 0, *, window: int = 0, features: int = 0, **config):
    """Its last bias is 1, so that weights matter more than they do at the start; units are raw."""
    torch.manual_seed(seed)
    settings = InventoryPolicyConfig(**{"graph_width": 8, "graph_bias": 1.0, "order_units": "raw"} | config)
    return build("gnn", network, demanded(network, window=window, features=features), settings)


# -- two other ways to compute the same ---------------------------------------------------------


def layers(weights: dict, name: str, x: torch.Tensor) -> torch.Tensor:
    """Of one network, from the names of its weights."""
    for layer in ("first", "rest.0", "rest.1"):
        if f"{name}.{layer}.weight" in weights:
            x = torch_elu(x @ weights[f"{name}.{layer}.weight"].T + weights[f"{name}.{layer}.bias"])
    return x


def wish_of(weights: dict, edge: torch.Tensor) -> torch.Tensor:
    return softplus(layers(weights, "output", edge) @ weights["wish.weight"].T + weights["wish.bias"])[..., 0]


def edges_of(network: Network) -> list[tuple[str, str, float, float]]:
    """Source, target, lead time and cost: links, self-loops of warehouses that hold, demand."""
    loops = [(w.name, w.name, 0.0, 0.0) for w in network.warehouses if w.holds]
    demand = [(s.name, "customers", 0.0, 0.0) for s in network.stores]
    return [(x.source, x.target, x.lead_time, x.cost) for x in network.links] + loops + demand


def features_by_hand(network: Network, demand: Demanded, view: View, place: int, row: int) -> torch.Tensor:
    stores = len(network.stores)
    own = [*view.inventory[row, place].tolist(), view.holding_cost.expand(row + 1, -1)[row, place].item()]
    length = 1 + (view.past.shape[1] if demand.window else 2) + demand.features
    rest = [0.0] * length
    if place < stores:
        rest = [view.unmet_cost[row, place].item()]
        if demand.window:
            rest += view.past[row, :, place].tolist()
        else:
            rest += [demand.mean[place].item(), demand.std[place].item()]
        if demand.features:
            rest += view.time[0].tolist()
    return torch.tensor(own + rest)


def sent_by_hand(network: Network, wish: torch.Tensor, view: View) -> torch.Tensor:
    """[B, E] of wishes [B, flows]: from the supplier as wished, from warehouses shares of what is there."""
    sources = [source for source, *_ in edges_of(network)]
    sent = list(wish[:, : len(network.links)].T)
    for place, warehouse in enumerate(network.warehouses, len(network.stores)):
        there = view.inventory[:, place, 0]
        asked = sum(u for u, source in zip(wish.T, sources, strict=False) if source == warehouse.name)
        share = (there / asked).clamp_max(1.0) if warehouse.holds else there / asked
        for link in network.leaving(place):
            sent[link] = wish[:, link] * share
    return torch.stack(sent, 1)


def wishes_by_loops(network: Network, demand: Demanded, weights: dict, rounds: int, view: View, row: int):
    """[flows] of one system, one place and one edge after the other, from the published description."""
    width = len(weights["embed_node.first.bias"])
    edges = edges_of(network)
    node = {
        name: layers(weights, "embed_node", features_by_hand(network, demand, view, i, row))
        for i, name in enumerate(network.names)
    }
    virtual = {"supplier": torch.zeros(width), "customers": torch.zeros(width)}
    edge = []
    for source, target, lead_time, cost in edges:
        ends = {**node, **virtual}
        x = torch.cat([ends[source], ends[target], torch.tensor([float(lead_time), cost])])
        edge.append(layers(weights, "embed_edge", x))
    for _ in range(rounds):
        old = dict(node)
        for name in network.names:
            incoming = [e for e, (_, target, *_) in zip(edge, edges, strict=True) if target == name]
            outgoing = [e for e, (source, *_) in zip(edge, edges, strict=True) if source == name]
            sums = [sum(some) / math.sqrt(len(some)) for some in (incoming, outgoing)]
            node[name] = old[name] + layers(weights, "update_node", torch.cat([old[name], *sums]))
        ends = {**node, **virtual}
        edge = [
            e + layers(weights, "update_edge", torch.cat([e, ends[source], ends[target]]))
            for e, (source, target, *_) in zip(edge, edges, strict=True)
        ]
    return torch.stack([wish_of(weights, e) for e in edge[: len(edges) - len(network.stores)]])


def geometric(network: Network, weights: dict, rounds: int):
    """The same as a module of torch-geometric: concatenated inputs, messages passed by its ``propagate``."""
    from torch_geometric.nn import MessagePassing
    from torch_geometric.utils import degree

    edges = edges_of(network)
    number = {name: i for i, name in enumerate((*network.names, "supplier", "customers"))}
    index = torch.tensor([[number[source], number[target]] for source, target, *_ in edges]).T
    traits = torch.tensor([[float(lead_time), cost] for *_, lead_time, cost in edges])

    class Round(MessagePassing):
        def __init__(self) -> None:
            super().__init__(aggr="add", node_dim=-2)

        def forward(self, x: torch.Tensor, e: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            size, places = (x.shape[1],) * 2, len(network.places)
            counts = [degree(i, size[0]).clamp_min(1.0).sqrt().unsqueeze(1) for i in (index[1], index[0])]
            sums = [self.propagate(i, e=e, size=size) for i in (index, index.flip(0))]
            said = torch.cat([x, sums[0] / counts[0], sums[1] / counts[1]], -1)
            update = layers(weights, "update_node", said[:, :places])
            x = torch.cat([x[:, :places] + update, x[:, places:]], 1)
            return x, e + self.edge_updater(index, x=x, e=e)

        def message(self, e: torch.Tensor) -> torch.Tensor:
            return e

        def edge_update(self, x_i: torch.Tensor, x_j: torch.Tensor, e: torch.Tensor) -> torch.Tensor:
            return layers(weights, "update_edge", torch.cat([e, x_j, x_i], -1))

    passing = Round()

    def wishes(features: torch.Tensor) -> torch.Tensor:
        x = layers(weights, "embed_node", features)
        x = torch.cat([x, x.new_zeros(len(x), 2, x.shape[2])], 1)
        said = [x[:, index[0]], x[:, index[1]], traits.expand(len(x), -1, -1)]
        e = layers(weights, "embed_edge", torch.cat(said, -1))
        for _ in range(rounds):
            x, e = passing(x, e)
        return wish_of(weights, e[:, : len(edges) - len(network.stores)])

    return wishes


@pytest.mark.parametrize("seen", [{}, {"window": 4, "features": 2}], ids=["statistics", "past"])
@pytest.mark.parametrize("network", NETWORKS.values(), ids=NETWORKS)
def test_actions_are_those_of_plain_loops_over_places_and_edges(network, seen):
    policy, view, demand = policy_of(network, **seen), view_of(network, batch=3, **seen), demanded(network, **seen)
    with torch.no_grad():
        wishes = [wishes_by_loops(network, demand, policy.state_dict(), policy.rounds, view, row) for row in range(3)]
        torch.testing.assert_close(policy(view), sent_by_hand(network, torch.stack(wishes), view), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("network", NETWORKS.values(), ids=NETWORKS)
def test_actions_and_gradients_are_those_of_torch_geometric(network):
    pytest.importorskip("torch_geometric", reason="torch-geometric is not installed")
    policy, view = policy_of(network, graph_rounds=2), view_of(network, batch=7)
    inventory = view.inventory.requires_grad_()
    weights = dict(policy.named_parameters())
    features = policy.features(view).transpose(0, 1)
    expected = sent_by_hand(network, geometric(network, weights, 2)(features), view)
    actual = policy(view)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    direction = torch.randn(actual.shape, generator=torch.Generator().manual_seed(3))
    wanted = [inventory, *weights.values()]
    grads = [torch.autograd.grad((a * direction).sum(), wanted, retain_graph=True) for a in (actual, expected)]
    for name, mine, theirs in zip(["inventory", *weights], *grads, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")


# -- what holds for any weights -----------------------------------------------------------------


@pytest.mark.parametrize("holds", [True, False])
def test_permuting_stores_permutes_actions(holds):
    network, order = one_warehouse(5, holds), [3, 0, 4, 1, 2]
    stores, links = [[some[i] for i in order] for some in (network.stores, network.links[1:])]
    again = Network(tuple(stores), network.warehouses, (*links, network.links[0]))
    view = view_of(network)
    places = [*order, 5]
    permuted = View(view.inventory[:, places], view.holding_cost[:, places], view.unmet_cost[:, order])
    policy, demand = policy_of(network), demanded(network)
    other = build("gnn", again, Demanded(demand.mean[order], demand.std[order]), policy.config)
    other.load_state_dict(policy.state_dict())
    expected = policy(view)[:, [i + 1 for i in order] + [0]]
    torch.testing.assert_close(other(permuted), expected, rtol=1e-5, atol=1e-6)
    assert expected.std(1).min() > 1e-4  # links differ, so that their order matters


@pytest.mark.parametrize("stock", [0.5, 1000.0])
def test_warehouses_send_no_more_than_they_have_and_all_of_it_where_they_cannot_hold(stock):
    network = many_warehouses()
    view = view_of(network, batch=50)
    view.inventory[:, 4:, 0] *= stock / 6.0
    action = policy_of(network)(view).detach()
    assert (action > 0.0).all()
    for place, warehouse in enumerate(network.warehouses, 4):
        there, sent = view.inventory[:, place, 0], action[:, network.leaving(place)].sum(1)
        if warehouse.holds:
            assert (sent < there).all()  # the self-loop keeps its share even where all is wished for
        else:
            torch.testing.assert_close(sent, there)


def test_links_draw_on_their_own_warehouse_and_on_no_other():
    network = many_warehouses()
    policy, view = policy_of(network), view_of(network)
    for place in (4, 5, 6):
        inventory = view.inventory.clone()
        inventory[:, place, 0] = 0.0
        empty = policy(view._replace(inventory=inventory)) == 0.0
        expected = torch.tensor([source == place for source in network.sources])
        assert torch.equal(empty, expected.expand_as(empty))


def test_supplier_links_are_bounded_by_nothing():
    network = one_warehouse()
    policy, view = policy_of(network, graph_bias=1000.0), view_of(network)
    action = policy(view)
    assert (action[:, 0] > 990.0).all()
    assert (action[:, 1:].sum(1) < view.inventory[:, 3, 0]).all()


def test_weights_of_three_stores_run_on_fifty():
    small, large = policy_of(one_warehouse(3), seed=1), policy_of(one_warehouse(50), seed=2)
    assert type(small).scale_free
    large.load_state_dict(small.state_dict())
    view = view_of(one_warehouse(50))
    action = large(view)
    assert action.shape == (5, 51)
    assert (action >= 0.0).all()
    assert (action[:, 1:].sum(1) <= view.inventory[:, 50, 0]).all()


def test_stores_that_share_nothing_act_as_if_each_were_alone():
    one, many = policy_of(independent(1)), policy_of(independent(50), seed=9)
    many.load_state_dict(one.state_dict())
    alone = View(torch.rand(50, 1, 3) * 9.0, torch.ones(1, 1), torch.full((1, 1), 9.0))
    together = View(alone.inventory.transpose(0, 1), torch.ones(1, 50), torch.full((1, 50), 9.0))
    many.known.copy_(one.known.expand(50, 2))
    torch.testing.assert_close(many(together), one(alone).T)


def test_slots_to_spare_let_weights_run_on_longer_lead_times():
    short, long = one_warehouse(3), one_warehouse(3, lead_times=(2, 6))
    spare, exact = policy_of(short, graph_slots=6), policy_of(short, seed=5)
    weights = spare.state_dict()
    first = weights["embed_node.first.weight"]
    exact.load_state_dict(weights | {"embed_node.first.weight": torch.cat([first[:, :3], first[:, 6:]], 1)})
    torch.testing.assert_close(spare(view_of(short)), exact(view_of(short)))
    policy_of(long).load_state_dict(weights)
    with pytest.raises(PolicyError, match="graph_slots=5 is below the longest lead time, 6"):
        policy_of(long, graph_slots=5)


def test_the_first_order_of_a_chain_hears_of_the_store_in_as_many_rounds_as_links_lead_there():
    network = chain()
    for config, heard in (({}, True), ({"graph_rounds": 3}, True), ({"graph_rounds": 2}, False)):
        view = view_of(network)
        inventory = view.inventory.requires_grad_()
        policy_of(network, **config)(view)[:, 0].sum().backward()
        top = network.names.index("top")
        assert (inventory.grad[:, 0].abs().sum() > 0.0).item() == heard
        assert inventory.grad[:, top].abs().sum() > 0.0


def test_no_rounds_are_refused():
    with pytest.raises(ValueError, match="graph_rounds=0 must be 1 or more, or None"):
        InventoryPolicyConfig(graph_rounds=0)


@pytest.mark.parametrize("network", NETWORKS.values(), ids=NETWORKS)
def test_gradients_are_finite_where_there_is_no_stock(network):
    view = view_of(network)._replace(inventory=torch.zeros(5, len(network.places), network.slots, requires_grad=True))
    policy = policy_of(network)
    action = policy(view)
    served = [source >= 0 for source in network.sources]
    assert (action[:, served] == 0.0).all()
    action.square().sum().backward()
    for x in (view.inventory, *policy.parameters()):
        assert x.grad is not None
        assert x.grad.isfinite().all()
    assert view.inventory.grad.abs().sum() > 0.0


@pytest.mark.parametrize(("seen", "bias", "about"), [({}, None, 5.0), ({"window": 4}, None, 1.3), ({}, 3.0, 3.0)])
def test_orders_start_about_where_the_bias_puts_them(seen, bias, about):
    network = independent(3)
    policy = policy_of(network, graph_bias=bias, graph_width=32, **seen)
    orders = policy(view_of(network, **seen)).detach()
    assert orders.mean().item() == pytest.approx(about, abs=0.5)


def test_a_view_without_the_past_is_refused_by_a_policy_that_was_built_for_it():
    network = one_warehouse()
    with pytest.raises(ValueError, match="no past demand"):
        policy_of(network, window=4)(view_of(network))
    with pytest.raises(ValueError, match="no features"):
        policy_of(network, window=4, features=1)(view_of(network, window=4))


def test_the_faster_elu_is_elu():
    x = torch.cat([torch.linspace(-100.0, 100.0, 40001), torch.linspace(-1.0, 1.0, 40001)]).requires_grad_()
    mine, theirs = elu(x), torch_elu(x)
    assert mine.grad_fn.name() == "_EluBackward"
    torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=2e-7)
    grads = [torch.autograd.grad(y.sum(), x)[0] for y in (mine, theirs)]
    torch.testing.assert_close(*grads, rtol=1e-6, atol=2e-7)


def test_it_learns_to_order_for_one_store():
    torch.manual_seed(0)
    network = Network((Store("s", 1.0, 9.0),), (), (Link("supplier", "s", 1),))
    demand = Normal(torch.tensor([5.0]), torch.tensor([1.6]))
    simulator = InventorySimulator(Problem("one store", network, demand))
    policy = build("gnn", network, Demanded(demand.mean, demand.std), InventoryPolicyConfig())

    def cost(batch: int, periods: int, ignored: int = 0) -> torch.Tensor:
        state, total = simulator.reset(batch), torch.zeros(())
        for t in range(periods):
            state, now = simulator.step(state, policy(simulator.view(state)))
            total = total + now.mean() * (t >= ignored)
        return total / (periods - ignored)

    with torch.no_grad():
        before = cost(500, 30, 15).item()
    optimizer = torch.optim.Adam(policy.parameters(), 1e-2)
    for _ in range(40):
        optimizer.zero_grad()
        cost(32, 8).backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
    with torch.no_grad():
        trained = cost(500, 30, 15).item()
    assert trained < 1.1 * 3.971 < before / 5.0  # the known optimum
