"""The data-driven network: its first orders, and that it reads all there is to see."""

import pytest
import torch
from inventory.policies.small_networks import (
    ALL,
    check_feasible,
    demanded,
    given,
    make,
    random_inventory,
    two_warehouses,
    view,
    warehouse,
)


def test_without_weights_it_wishes_softplus_of_the_bias_of_one_and_warehouses_cut_in_proportion():
    network = warehouse(2)
    made = make("data_driven", network)
    made.head.weight.data.zero_()
    wish = 1.3132617  # log(1 + e)
    orders = made(view(network, [[[1.0], [2.0], [30.0]], [[1.0], [2.0], [1.0]]]))
    torch.testing.assert_close(orders, torch.tensor([[wish, wish, wish], [wish, 0.5, 0.5]]))


def test_it_reads_inventories_past_demand_prices_and_features_of_the_period():
    network = two_warehouses()
    made = make("data_driven", network, demanded(network, window=16, features=2))
    inventory = random_inventory(network, 8)[3:].requires_grad_()
    past, time = torch.rand(5, 16, 3, requires_grad=True), torch.rand(1, 2, requires_grad=True)
    seen = given(network, inventory, past=past, time=time)
    price = torch.rand(5, 3, requires_grad=True)
    made(seen._replace(unmet_cost=price)).square().sum().backward()
    for tensor in (past, time, price):
        assert (tensor.grad.abs().sum(0) > 0.0).all()
    assert (inventory.grad.abs().sum(0) > 0.0).sum() == sum(network.pipelines)


def test_lead_times_and_holding_costs_are_among_what_it_reads():
    network = warehouse(2)  # slots 2 + 2 + 3, holding 3, unmet 2, lead times 3
    assert make("data_driven", network).body[0].in_features == 15


@pytest.mark.parametrize("kind", ALL)
def test_orders_are_feasible_and_gradients_finite(kind):
    check_feasible(make("data_driven", ALL[kind]()), ALL[kind]())
