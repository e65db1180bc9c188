"""Shared weights: what is alike is treated alike, and hears of the others through the context alone."""

import pytest
import torch
from ctrlrl_envs.inventory.network import Link, Network, Store, Warehouse
from inventory.policies.small_networks import (
    ALL,
    check_feasible,
    demanded,
    given,
    make,
    random_inventory,
    serial,
    two_warehouses,
    view,
    warehouse,
)
from torch.nn.functional import softplus

from ctrlrl.inventory.policies.base import Demanded, PolicyError


def deaf(made):
    """It hears nothing of the others: the context is the same whatever there is."""
    made.context[0][0].weight.data.zero_()
    return made


def test_alike_stores_in_the_same_state_get_the_same_and_orders_follow_stores_that_change_places():
    network = warehouse(3)
    network = Network((network.stores[0], Store("s1", 1.0, 5.0), Store("s2", 1.0, 5.0)), *vars_of(network))
    made = deaf(make("symmetry_aware", network))
    same = made(view(network, [[[3.0, 1.0], [3.0, 1.0], [3.0, 1.0], [90.0]]]))[0]
    assert same[1] == same[2] == same[3]
    one = made(view(network, [[[3.0, 1.0], [5.0, 2.0], [-1.0, 0.5], [6.0]]]))[0]
    other = made(view(network, [[[-1.0, 0.5], [3.0, 1.0], [5.0, 2.0], [6.0]]]))[0]
    torch.testing.assert_close(other, one[[0, 3, 1, 2]])
    assert len(set(one[1:].tolist())) == 3


def vars_of(network):
    return network.warehouses, network.links, network.unmet_demand


def test_a_store_hears_of_the_others_through_the_context():
    network = warehouse(2)
    first = torch.tensor([[[3.0, 1.0, 0.0], [5.0, 2.0, 0.0], [90.0, 0.0, 0.0]]], requires_grad=True)
    made = make("symmetry_aware", network)
    heard = torch.autograd.grad(made(given(network, first))[0, 1], first)[0][0]
    assert (heard[1, :2] != 0.0).all() and (heard[2] != 0.0).all()
    silent = torch.autograd.grad(deaf(made)(given(network, first))[0, 1], first)[0][0]
    assert (silent[0, :2] != 0.0).all() and (silent[1:] == 0.0).all()


def test_a_warehouse_hears_of_the_stores_through_the_context():
    network = warehouse(2)
    first = torch.tensor([[[3.0, 1.0, 0.0], [5.0, 2.0, 0.0], [90.0, 4.0, 2.0]]], requires_grad=True)
    made = make("symmetry_aware", network)
    heard = torch.autograd.grad(made(given(network, first))[0, 0], first)[0][0]
    assert (heard[:2, :2] != 0.0).all() and (heard[2] != 0.0).all()
    silent = torch.autograd.grad(deaf(made)(given(network, first))[0, 0], first)[0][0]
    assert (silent[:2] == 0.0).all() and (silent[2] != 0.0).all()


@pytest.mark.parametrize("what", ["holding_cost", "lead_time", "cost"])
def test_warehouses_that_differ_in_one_number_order_differently(what):
    base = {"holding_cost": 0.3, "lead_time": 2, "cost": 1.0}
    two = [base, base | {what: base[what] + 1}]
    network = Network(
        (Store("s", 1.0, 9.0),),
        tuple(Warehouse(f"w{i}", w["holding_cost"]) for i, w in enumerate(two)),
        (
            *(Link("supplier", f"w{i}", w["lead_time"], w["cost"]) for i, w in enumerate(two)),
            *(Link(f"w{i}", "s", 1) for i in range(2)),
        ),
    )
    order = make("symmetry_aware", network)(view(network, [[[3.0], [9.0, 1.0], [9.0, 1.0]]]))[0]
    assert (order[0] - order[1]).abs() > 1e-3


@pytest.mark.parametrize("what", ["mean", "std", "holding_cost", "unmet_cost", "lead_time"])
def test_stores_that_differ_in_one_number_get_different_orders(what):
    base = {"mean": 5.0, "std": 2.0, "holding_cost": 1.0, "unmet_cost": 9.0, "lead_time": 2}
    two = [base, base | {what: base[what] + 1}]
    network = Network(
        tuple(Store(f"s{i}", s["holding_cost"], s["unmet_cost"]) for i, s in enumerate(two)),
        (Warehouse("w", 0.3),),
        (Link("supplier", "w", 3), *(Link("w", f"s{i}", s["lead_time"]) for i, s in enumerate(two))),
    )
    demand = Demanded(torch.tensor([s["mean"] for s in two]), torch.tensor([s["std"] for s in two]))
    order = make("symmetry_aware", network, demand)(view(network, [[[3.0, 1.0], [3.0, 1.0], [90.0]]]))[0]
    assert (order[1] - order[2]).abs() > 1e-4


def test_warehouses_order_a_share_of_the_bound_and_stores_softplus_of_their_network():
    network = two_warehouses()
    made = make("symmetry_aware", network)
    for net, bias in ((made.store, 0.7), (made.warehouse, -0.4)):
        net[1].weight.data.zero_()
        net[1].bias.data.fill_(bias)
    order = made(view(network, [[[0.0], [0.0], [0.0], [50.0], [1.0]]]))[0]
    wish, bound = softplus(torch.tensor(0.7)).item(), torch.tensor(-0.4).sigmoid().item() * 4.0 * 15.0
    torch.testing.assert_close(order, torch.tensor([wish, bound, 0.5, wish, bound, 0.5]))


def test_where_there_is_a_past_it_stands_for_mean_and_deviation():
    network = warehouse(2)
    made = make("symmetry_aware", network, demanded(network, window=4, features=1))
    other = make("symmetry_aware", network, demanded(network, std=7.0, window=4, features=1))
    past, time = torch.rand(3, 4, 2, requires_grad=True), torch.rand(1, 1, requires_grad=True)
    seen = given(network, random_inventory(network, 8)[5:], past=past, time=time)
    assert torch.equal(made(seen), other(seen))
    made(seen).square().sum().backward()
    assert (past.grad != 0.0).all() and (time.grad != 0.0).all()


@pytest.mark.parametrize("kind", [k for k in ALL if k != "serial"])
def test_orders_are_feasible_and_gradients_finite(kind):
    check_feasible(make("symmetry_aware", ALL[kind](), context_width=16), ALL[kind]())


def test_warehouses_that_supply_warehouses_are_refused():
    with pytest.raises(PolicyError, match="echelon_stock"):
        make("symmetry_aware", serial())
