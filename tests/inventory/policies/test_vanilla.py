"""What vanilla networks make of their outputs, by kind of network, and what they read."""

import math

import pytest
import torch
from inventory.policies.small_networks import (
    ALL,
    check_feasible,
    make,
    one_store,
    random_inventory,
    serial,
    transshipment,
    two_warehouses,
    view,
    warehouse,
)
from inventory.policies.small_networks import given as seen_as
from torch.nn.functional import softplus


def fixed(network, outputs, **settings):
    """Its outputs are these numbers, whatever it sees."""
    made = make("vanilla", network, **settings)
    made.head.weight.data.zero_()
    made.head.bias.data = torch.tensor(outputs)
    return made


def check(made, seen, wanted):
    torch.testing.assert_close(made(seen), torch.tensor([wanted]), atol=1e-5, rtol=1e-5)


def sigmoid(x):
    return 1.0 / (1.0 + math.exp(-x))


def test_a_store_orders_softplus_of_the_output_and_one():
    network = one_store()
    check(fixed(network, [2.0]), view(network, [[[7.0]]]), [math.log1p(math.exp(3.0))])


def test_a_warehouse_shares_its_stock_by_a_softmax_with_one_and_orders_a_share_of_the_bound():
    network = warehouse(2)  # mean demand 5 each
    total = math.exp(0.5) + math.exp(-1.0) + math.e
    shares = [12.0 * math.exp(0.5) / total, 12.0 * math.exp(-1.0) / total]
    seen = view(network, [[[1.0], [2.0], [12.0, 30.0]]])
    check(fixed(network, [0.3, 0.5, -1.0]), seen, [sigmoid(0.3) * 4.0 * 10.0, *shares])
    check(fixed(network, [0.3, 0.5, -1.0], order_bound=2.0), seen, [sigmoid(0.3) * 2.0 * 10.0, *shares])


def test_a_transshipment_center_sends_all_it_has():
    network = transshipment()
    total = math.exp(0.5) + math.exp(-1.0) + 2.0
    seen = view(network, [[[1.0], [2.0], [3.0], [4.0], [12.0]]])
    shares = [12.0 * x / total for x in (math.exp(0.5), math.exp(-1.0), 1.0, 1.0)]
    check(fixed(network, [0.0, 0.5, -1.0, 0.0, 0.0]), seen, [0.5 * 4.0 * 20.0, *shares])


def test_a_chain_passes_on_a_share_of_what_is_above():
    network = serial()
    seen = view(network, [[[1.0], [10.0], [20.0], [30.0]]])  # s, w1, w2, w3; links from the supplier down
    wanted = [sigmoid(-1.0) * 20.0, sigmoid(0.5) * 30.0, sigmoid(2.0) * 20.0, sigmoid(0.1) * 10.0]
    check(fixed(network, [-1.0, 0.5, 2.0, 0.1]), seen, wanted)


def test_each_of_several_warehouses_shares_among_its_own_links_alone():
    network = two_warehouses()  # v-b, supplier-v, w-a, v-a, supplier-w, w-c
    seen = view(network, [[[1.0], [2.0], [3.0], [8.0], [6.0]]])
    v, w = math.exp(0.5) + math.exp(1.5) + math.e, math.exp(-0.5) + 1.0 + math.e
    wanted = [
        8.0 * math.exp(0.5) / v, 0.5 * 60.0, 6.0 * math.exp(-0.5) / w, 8.0 * math.exp(1.5) / v, 0.5 * 60.0, 6.0 / w
    ]  # fmt: skip
    check(fixed(network, [0.5, 0.0, -0.5, 1.5, 0.0, 0.0]), seen, wanted)


def test_it_reads_every_slot_that_can_be_filled_and_no_other():
    network = two_warehouses()  # longest lead times to a, b, c, v, w are 3, 2, 1, 3, 2
    made = make("vanilla", network)
    assert made.body[0].in_features == 3 + 2 + 1 + 3 + 2
    inventory = random_inventory(network, 8)[3:].requires_grad_()
    made.body(inventory.flatten(1).index_select(1, made.slots)).square().sum().backward()
    reads = (inventory.grad.abs().sum(0) > 0.0).tolist()
    assert reads == [[k < length for k in range(3)] for length in network.pipelines]


def test_layers_have_the_widths_of_the_settings_and_there_may_be_none():
    assert [m.out_features for m in make("vanilla", one_store(), hidden=(7, 5)).body[::2]] == [7, 5]
    made = make("vanilla", one_store(2), hidden=())
    made.head.weight.data = torch.tensor([[0.5, 2.0]])
    made.head.bias.data.zero_()
    check(made, view(one_store(2), [[[4.0, -1.0]]]), [float(softplus(torch.tensor(1.0)))])


def test_first_orders_of_warehouses_are_generous():
    network = warehouse()
    order = make("vanilla", network)(seen_as(network, random_inventory(network)))[:, 0]
    assert (order > 0.8 * 25.0).all()  # mean demand of all stores is 25


@pytest.mark.parametrize("kind", ALL)
def test_orders_are_feasible_and_gradients_finite(kind):
    check_feasible(make("vanilla", ALL[kind]()), ALL[kind]())
