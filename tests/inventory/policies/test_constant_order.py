"""Constant orders start where mean demand passes through."""

import pytest
import torch
from inventory.policies.small_networks import (
    ALL,
    check_feasible,
    demanded,
    make,
    serial,
    two_warehouses,
    view,
    warehouse,
)

from ctrlrl.inventory.policies.base import Demanded


def test_it_starts_with_the_mean_of_all_that_is_down_the_way():
    network = two_warehouses()  # v-b, supplier-v, w-a, v-a, supplier-w, w-c
    made = make("constant_order", network, Demanded(torch.tensor([4.0, 10.0, 6.0]), torch.ones(3)))
    torch.testing.assert_close(made.orders, torch.tensor([10.0, 12.0, 2.0, 2.0, 8.0, 6.0]))
    chain = make("constant_order", serial(), demanded(serial(), 5.0))
    torch.testing.assert_close(chain.orders, torch.full((4,), 5.0))


def test_it_orders_the_same_whatever_there_is_as_long_as_there_is_enough():
    network = warehouse(2)
    made = make("constant_order", network, Demanded(torch.tensor([3.0, 5.0]), torch.ones(2)))
    seen = view(network, [[[0.0], [0.0], [50.0]], [[90.0], [-7.0], [8.0]], [[0.0], [0.0], [4.0]]])
    wanted = torch.tensor([[8.0, 3.0, 5.0], [8.0, 3.0, 5.0], [8.0, 1.5, 2.5]])
    torch.testing.assert_close(made(seen), wanted)


@pytest.mark.parametrize("kind", ALL)
def test_orders_are_feasible_and_gradients_finite(kind):
    check_feasible(make("constant_order", ALL[kind]()), ALL[kind]())
