"""Sums over the edges of a network's graph, against plain loops over names."""

import math
from itertools import pairwise

import pytest
import torch
from ctrlrl_envs.inventory.network import Link, Network, Store, Warehouse

from ctrlrl.inventory.graph import Graph

NETWORK = Network(
    (Store("a", 1.0, 9.0), Store("b", 0.8, 7.0), Store("c", 1.2, 11.0)),
    (Warehouse("u", 0.3), Warehouse("v", 0.4, holds=False), Warehouse("w", 0.2)),
    (
        Link("v", "c", 2, 0.7),
        Link("supplier", "u", 3, 0.5),
        Link("u", "a", 1, 0.1),
        Link("supplier", "v", 2, 1.5),
        Link("u", "w", 4),
        Link("u", "c", 3, 0.2),
        Link("w", "b", 1, 0.3),
        Link("supplier", "b", 5, 0.4),
    ),
)
FLOWS = [*((x.source, x.target) for x in NETWORK.links), ("u", "u"), ("w", "w")]
"""Links, then what the two warehouses that hold keep."""


def blocks(count: int, seed: int) -> torch.Tensor:
    """[count, B, F]."""
    return torch.randn(count, 2, 3, generator=torch.Generator().manual_seed(seed))


def test_flows_are_links_and_what_warehouses_that_hold_keep():
    graph = Graph(NETWORK)
    assert (graph.nodes, graph.stores, graph.links, graph.flows) == (6, 3, 8, 10)
    assert graph.supplied.tolist() == [source == "supplier" for source, _ in FLOWS[:8]]
    assert graph.keepers.tolist() == [0, 2]
    expected = [[x.lead_time, x.cost] for x in NETWORK.links] + [[0.0, 0.0]] * 2
    torch.testing.assert_close(graph.traits, torch.tensor(expected))


def test_a_flow_hears_both_of_its_ends_and_nothing_from_the_supplier():
    leaving, reaching = blocks(3, 1), blocks(6, 2)
    said = Graph(NETWORK).to_flows(leaving, reaching)
    for (source, target), actual in zip(FLOWS, said, strict=True):
        expected = reaching[NETWORK.names.index(target)]
        if source != "supplier":
            expected = expected + leaving["uvw".index(source)]
        torch.testing.assert_close(actual, expected)


def test_sums_of_flows_are_divided_by_the_square_root_of_their_number_and_self_loops_count_in_both():
    flows, graph = blocks(10, 3), Graph(NETWORK)
    for names, end, sums in ((NETWORK.names, 1, graph.incoming(flows)), ("uvw", 0, graph.outgoing(flows))):
        assert len(sums) == len(names)
        for name, actual in zip(names, sums, strict=True):
            those = [flow for flow, ends in zip(flows, FLOWS, strict=True) if ends[end] == name]
            torch.testing.assert_close(actual, sum(those) / math.sqrt(len(those)))


def test_many_equal_flows_add_up_to_the_square_root_of_their_number():
    links = (Link("supplier", "w", 1), *(Link("w", f"s{i}", 1) for i in range(8)))
    network = Network(tuple(Store(f"s{i}", 1.0, 9.0) for i in range(8)), (Warehouse("w", 0.3),), links)
    out = Graph(network).outgoing(torch.ones(10, 1, 1))
    assert out.item() == pytest.approx(3.0)  # 8 stores and the self-loop


def test_gradients_flow_back_to_the_ends():
    graph = Graph(NETWORK)
    leaving, reaching = blocks(3, 1).double().requires_grad_(), blocks(6, 2).double().requires_grad_()

    def both(leaving, reaching):
        flows = graph.to_flows(leaving, reaching)
        return graph.incoming(flows), graph.outgoing(flows)

    assert torch.autograd.gradcheck(both, (leaving, reaching))


@pytest.mark.parametrize(("below", "rounds"), [(0, 1), (1, 1), (2, 2), (3, 3), (6, 6)])
def test_rounds_are_the_warehouses_between_supplier_and_store_and_at_least_one(below, rounds):
    names = ["supplier", *(f"w{i}" for i in range(below)), "s"]
    links = tuple(Link(a, b, 1) for a, b in pairwise(names))
    warehouses = tuple(Warehouse(name, 0.1) for name in names[1:-1])
    assert Graph(Network((Store("s", 1.0, 9.0),), warehouses, links[::-1])).rounds == rounds


def test_the_longest_of_several_ways_to_a_store_counts():
    assert Graph(NETWORK).rounds == 2  # supplier, u, w, b, though b is supplied directly, too


def test_nothing_of_the_network_is_saved_with_the_weights():
    assert Graph(NETWORK).state_dict() == {}
