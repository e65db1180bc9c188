"""Networks: numbers of places and links, and what is refused."""

import pytest
from ctrlrl_envs.inventory import Link, Network, NetworkError, Store, Warehouse

A, B = Store("a", 1.0, 9.0), Store("b", 1.0, 9.0)
DEPOT, HUB = Warehouse("depot", 0.3), Warehouse("hub", 0.2)
TO_DEPOT, TO_HUB = Link("supplier", "depot", 3), Link("supplier", "hub", 1)
LINKS = (TO_DEPOT, Link("depot", "a", 2), Link("depot", "b", 1, 0.5))


def test_places_are_stores_then_warehouses_and_links_keep_their_order():
    network = Network((A, B), (DEPOT, HUB), (*LINKS, TO_HUB, Link("hub", "b", 4)))
    assert network.names == ("a", "b", "depot", "hub")
    assert network.sources == (-1, 2, 2, -1, 3)
    assert network.targets == (2, 0, 1, 3, 1)
    assert network.lead_times == (3, 2, 1, 1, 4)
    assert network.slots == 4
    # b is reached within 1 and within 4 periods: the longest counts
    assert network.pipelines == (2, 4, 3, 1)
    assert network.leaving(2) == [1, 2] and network.arriving(1) == [2, 4]


@pytest.mark.parametrize(
    ("stores", "warehouses", "links", "text"),
    [
        ((), (), (), "no store"),
        ((A, A), (DEPOT,), LINKS, "'a' is given 2 times"),
        ((Store("supplier", 1, 9),), (), (Link("supplier", "supplier", 1),), "'supplier' is given 2 times"),
        ((Store("a", -1.0, 9.0),), (), (Link("supplier", "a", 1),), "a: holding_cost -1.0"),
        ((Store("a", 1.0, -9.0),), (), (Link("supplier", "a", 1),), "a: unmet_cost -9.0"),
        ((Store("a", float("nan"), 9.0),), (), (Link("supplier", "a", 1),), "a: holding_cost nan"),
        ((A,), (), (Link("supplier", "a", 0),), "supplier -> a: lead time 0 must be a whole number"),
        ((A,), (), (Link("supplier", "a", 1.5),), "lead time 1.5"),
        ((A,), (), (Link("supplier", "a", True),), "lead time True"),
        ((A,), (), (Link("supplier", "a", 1, -0.1),), "cost -0.1 must be a finite number of at least 0"),
        ((A,), (), (Link("supplier", "a", 1, "1"),), "supplier -> a: cost '1' must be a finite number"),
        ((Store("a", 1.0, "9"),), (), (Link("supplier", "a", 1),), "a: unmet_cost '9' must be a finite number"),
        ((Store("a", float("inf"), 9.0),), (), (Link("supplier", "a", 1),), "a: holding_cost inf"),
        ((Store("a", True, 9.0),), (), (Link("supplier", "a", 1),), "a: holding_cost True"),
        ((A,), (Warehouse("depot", None),), (TO_DEPOT, Link("depot", "a", 1)), "depot: holding_cost None"),
        ((A,), (), (Link("supplier", "a", 1), Link("supplier", "a", 2)), "supplier -> a is given twice"),
        ((A,), (), (Link("mars", "a", 1),), "no place 'mars'"),
        ((A,), (), (Link("supplier", "mars", 1),), "no place 'mars'"),
        ((A,), (), (Link("supplier", "supplier", 1),), "no place 'supplier'"),
        ((A, B), (), (Link("supplier", "a", 1), Link("a", "b", 1)), "a is a store, which sends nothing"),
        ((A, B), (DEPOT,), LINKS[:2], "nothing ever reaches b"),
        ((A, B), (DEPOT,), LINKS[1:], "nothing ever reaches a"),
        ((A, B), (DEPOT, HUB), (*LINKS, TO_HUB), "hub supplies nobody"),
        ((A, B), (DEPOT, HUB), (*LINKS, Link("depot", "hub", 1), Link("hub", "depot", 1)), "circle: depot and hub"),
    ],
)
def test_what_cannot_be_is_refused(stores, warehouses, links, text):
    with pytest.raises(NetworkError, match=text):
        Network(stores, warehouses, links)


def test_unknown_kinds_are_refused():
    with pytest.raises(NetworkError, match="unmet_demand 'gone'"):
        Network((A,), (), (Link("supplier", "a", 1),), "gone")
    with pytest.raises(NetworkError, match="objective 'joy'"):
        Network((A,), (), (Link("supplier", "a", 1),), "lost", "joy")
