"""Feasibility layers by hand, where there is nothing, and over many random wishes."""

import math

import pytest
import torch
from ctrlrl_envs.inventory.network import Link, Network, Store, Warehouse
from hypothesis import given, settings
from hypothesis import strategies as st
from inventory.policies.small_networks import ALL, random_inventory, simulator, two_warehouses, warehouse

from ctrlrl.inventory.allocation import Fan, full, proportional, softmax

WISH = torch.tensor([1.0, 2.0, 5.0])


def uneven():
    """One warehouse holds and has one link, the other cannot hold and has two."""
    return Network(
        (Store("a", 1.0, 9.0), Store("b", 1.0, 9.0)),
        (Warehouse("holds", 0.1), Warehouse("passes", 0.1, holds=False)),
        (
            Link("supplier", "holds", 1),
            Link("supplier", "passes", 1),
            Link("holds", "a", 1),
            Link("passes", "a", 1),
            Link("passes", "b", 1),
        ),
    )


def close(got, wanted):
    torch.testing.assert_close(got, torch.as_tensor(wanted, dtype=got.dtype), atol=1e-6, rtol=1e-6)


def test_proportional_grants_what_there_is_enough_of_and_cuts_all_alike_where_there_is_not():
    close(proportional(WISH, torch.tensor(20.0)), [1.0, 2.0, 5.0])
    close(proportional(WISH, torch.tensor(4.0)), [0.5, 1.0, 2.5])


def test_a_self_loop_takes_its_share_of_scarce_stock_and_none_of_plenty():
    close(proportional(WISH, torch.tensor(4.0), torch.tensor(8.0)), [0.25, 0.5, 1.25])
    close(proportional(WISH, torch.tensor(20.0), torch.tensor(8.0)), [1.0, 2.0, 5.0])


def test_full_sends_all_of_scarce_stock_and_of_plenty():
    close(full(WISH, torch.tensor(4.0)), [0.5, 1.0, 2.5])
    close(full(WISH, torch.tensor(16.0)), [2.0, 4.0, 10.0])


def test_full_sends_equal_parts_where_nothing_is_wished_and_none_along_links_that_do_not_exist():
    close(full(torch.zeros(4), torch.tensor(6.0)), [1.5, 1.5, 1.5, 1.5])
    there = torch.tensor([True, True, False, True])
    close(full(torch.zeros(4), torch.tensor(6.0), there), [2.0, 2.0, 0.0, 2.0])


def test_softmax_leaves_the_share_of_a_logit_of_one_behind_unless_told_not_to():
    logit, total = torch.tensor([0.0, 1.0]), 1.0 + 2.0 * math.e
    close(softmax(logit, torch.tensor(3.0)), [3.0 / total, 3.0 * math.e / total])
    close(softmax(logit, torch.tensor(3.0), stay=None), [3.0 / (1.0 + math.e), 3.0 * math.e / (1.0 + math.e)])
    close(softmax(logit, torch.tensor(3.0), stay=-math.inf), softmax(logit, torch.tensor(3.0), stay=None))
    close(softmax(logit[:1], torch.tensor(3.0), stay=0.0), [1.5])


def test_rows_of_a_batch_are_on_their_own_and_stock_may_keep_its_last_dimension():
    wish, stock = torch.rand(7, 2, 3) * 4.0, torch.rand(7, 2) * 6.0
    for layer in (proportional, full, softmax):
        close(layer(wish, stock)[3, 1], layer(wish[3, 1], stock[3, 1]))
        assert torch.equal(layer(wish, stock), layer(wish, stock.unsqueeze(-1)))
    keep = torch.rand(7, 2)
    assert torch.equal(proportional(wish, stock, keep), proportional(wish, stock, keep.unsqueeze(-1)))


@pytest.mark.parametrize("layer", [proportional, full, softmax])
@pytest.mark.parametrize("wish", [[0.0, 0.0], [1e-30, 2e-30], [3.0, 4.0], [1e20, 1.0]])
@pytest.mark.parametrize("stock", [0.0, -1e-7, 1e-30, 1e-6, 5.0])
def test_nothing_is_sent_where_there_is_nothing_and_gradients_are_finite_at_every_edge(layer, wish, stock):
    wish, stock = torch.tensor(wish, requires_grad=True), torch.tensor(stock, requires_grad=True)
    sent = layer(wish, stock)
    if stock <= 0.0:
        assert torch.equal(sent, torch.zeros(2))
    sent.sum().backward()
    assert wish.grad.isfinite().all() and stock.grad.isfinite()


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.floats(0.0, 1e6, width=32), min_size=1, max_size=6), st.floats(0.0, 1e6, width=32),
    st.floats(0.0, 1e6, width=32),
)  # fmt: skip
def test_no_layer_sends_less_than_nothing_or_more_than_there_is(wish, stock, keep):
    wish, there = torch.tensor(wish), torch.tensor(stock)
    for sent in (proportional(wish, there), proportional(wish, there, torch.tensor(keep)), softmax(wish, there)):
        assert (sent >= 0.0).all() and sent.sum() <= there * (1.0 + 1e-5) + 1e-30  # subnormal numbers are coarse
    assert (proportional(wish, there) <= wish).all()
    torch.testing.assert_close(full(wish, there).sum(), there, rtol=1e-5, atol=1e-30)


def test_gradients_are_those_of_the_formulas():
    wish = torch.tensor([1.0, 2.0, 5.0], dtype=torch.float64, requires_grad=True)
    for stock in (4.0, 20.0):
        there = torch.tensor(stock, dtype=torch.float64, requires_grad=True)
        for layer in (proportional, full, softmax):
            assert torch.autograd.gradcheck(layer, (wish, there))


# -- links of a network in rows ---------------------------------------------------------------------


def test_rows_hold_the_links_of_each_warehouse_and_flows_put_them_back():
    fan = Fan(two_warehouses())  # links leave from v, supplier, w, v, supplier, w
    assert fan.there.tolist() == [[True, True], [True, True]]
    assert fan.rows(torch.arange(6.0)).tolist() == [[0.0, 3.0], [2.0, 5.0]]
    assert fan.supplied.tolist() == [0.0, 1.0, 0.0, 0.0, 1.0, 0.0]
    assert fan.flows(fan.rows(torch.arange(6.0))).tolist() == [0.0, 0.0, 2.0, 3.0, 0.0, 5.0]


def test_short_rows_are_padded_with_what_is_asked_for():
    fan = Fan(uneven())
    assert fan.there.tolist() == [[True, False], [True, True]]
    assert fan.rows(torch.arange(5.0), -math.inf).tolist() == [[2.0, -math.inf], [3.0, 4.0]]
    assert fan.flows(fan.rows(torch.arange(5.0))).tolist() == [0.0, 0.0, 2.0, 3.0, 4.0]


@pytest.mark.parametrize("kind", ALL)
def test_feasible_is_what_the_simulator_itself_makes_of_wishes(kind):
    network = ALL[kind]()
    inventory = random_inventory(network, 32)
    wish = torch.rand(32, len(network.links)) * 6.0
    wish[3] = 0.0
    close(Fan(network).feasible(wish, inventory), simulator(network).feasible(inventory, wish))


def test_a_network_may_mix_warehouses_that_hold_with_those_that_cannot():
    network = uneven()
    inventory = torch.tensor([[[0.0], [0.0], [10.0], [12.0]]])
    wish = torch.tensor([[7.0, 8.0, 3.0, 1.0, 2.0]])
    assert Fan(network).feasible(wish, inventory).tolist() == [[7.0, 8.0, 3.0, 4.0, 8.0]]
    assert Fan(network).feasible(wish, inventory, torch.tensor([[17.0, 5.0]])).tolist() == [[7.0, 8.0, 1.5, 4.0, 8.0]]


def test_a_fan_adds_nothing_to_the_weights_of_a_policy():
    assert not Fan(warehouse()).state_dict()
