"""Levels of echelons by hand, and the cost of those of Clark and Scarf."""

import pytest
import torch
from ctrlrl_envs.inventory.network import Link, Network, Store, Warehouse
from inventory.policies.small_networks import check_feasible, make, one_store, serial, simulator, view, warehouse

from ctrlrl.inventory.policies.base import Demanded, PolicyError


def test_each_place_fills_its_echelon_as_far_as_the_place_above_can():
    network = serial()
    made = make("echelon_stock", network)
    made.set_levels([10.0, 20.0, 30.0, 40.0])
    # positions s 6, w1 5, w2 4, w3 3: echelons 6, 11, 15, 18
    plenty = [[-1.0, 3.0, 4.0], [5.0], [2.0, 0.0, 0.0, 2.0], [3.0]]
    # s lacks 4 of w1's 5; w1 lacks 9 of w2's 2; w2 lacks 15 of w3's 3; w3 lacks 22
    over = [[50.0], [5.0], [2.0], [3.0]]
    wanted = torch.tensor([[22.0, 3.0, 2.0, 4.0], [0.0, 0.0, 0.0, 0.0]])  # links are given from the supplier down
    torch.testing.assert_close(made(view(network, [plenty, over])), wanted)


def test_links_may_be_given_in_any_order():
    chain = (Link("supplier", "w2", 2), Link("w1", "s", 2), Link("w2", "w1", 2))
    network = Network((Store("s", 1.0, 9.0),), (Warehouse("w1", 0.5), Warehouse("w2", 0.2)), chain)
    made = make("echelon_stock", network)
    made.set_levels([10.0, 20.0, 30.0])
    # s lacks 4 of 5; w1 lacks 9 of 3; w2 lacks 16
    torch.testing.assert_close(made(view(network, [[[6.0], [5.0], [3.0]]])), torch.tensor([[16.0, 4.0, 3.0]]))


def test_levels_are_sums_of_increments_from_the_store_upwards_and_start_near_tens():
    made = make("echelon_stock", serial())
    assert made.theta.abs().max() <= 1.0 and made.theta.std() > 0.1
    steps = made.levels.diff(prepend=torch.zeros(1))
    torch.testing.assert_close(steps, torch.nn.functional.softplus(made.theta + 10.0))


def test_levels_start_at_the_scale_of_demand():
    """At a mean of 5 the paper's; the same in periods of demand elsewhere, and what is set is set."""
    levels = []
    for mean in (5.0, 0.05, 4000.0):
        made = make("echelon_stock", serial(), Demanded(torch.tensor([mean]), torch.tensor([1.0])))
        levels.append(made.levels / mean)
        made.set_levels([2.0 * mean, 3.0 * mean, 7.0 * mean, 8.0 * mean])
        torch.testing.assert_close(made.levels, mean * torch.tensor([2.0, 3.0, 7.0, 8.0]))
    torch.testing.assert_close(levels[0], levels[1])
    torch.testing.assert_close(levels[0], levels[2])
    assert ((levels[0] > 1.7 * torch.arange(1, 5)) & (levels[0] < 2.3 * torch.arange(1, 5))).all()


def test_levels_that_are_set_are_the_levels_and_others_are_refused():
    made = make("echelon_stock", serial())
    made.set_levels([32.4, 49.0, 72.8, 83.2])
    torch.testing.assert_close(made.levels, torch.tensor([32.4, 49.0, 72.8, 83.2]))
    for wrong in ([1.0, 2.0, 3.0], [10.0, 9.0, 20.0, 30.0], [-1.0, 2.0, 3.0, 4.0]):
        with pytest.raises(ValueError, match="rise"):
            made.set_levels(wrong)


@pytest.mark.parametrize("network", [serial(), one_store()], ids=["serial", "one_store"])
def test_orders_are_feasible_and_gradients_finite(network):
    check_feasible(make("echelon_stock", network), network)


def test_only_chains_have_echelon_levels():
    with pytest.raises(PolicyError, match="5 stores"):
        make("echelon_stock", warehouse())


@torch.no_grad()
def test_levels_of_clark_and_scarf_cost_what_their_recursion_says():
    """4 nodes, N(5, 2) clipped at 0: 10.734; simulated within 1 %, which no off-by-one in the order of events is."""
    network = serial()
    made, system = make("echelon_stock", network), simulator(network)
    made.set_levels([32.4, 49.0, 72.8, 83.2])
    state = system.reset(4096, generator=torch.Generator().manual_seed(0), split="dev")
    periods, total = system.problem.splits["dev"].periods, 0.0
    for t in range(periods):
        state, cost = system.step(state, made(system.view(state)))
        total += float(cost.mean()) * (t >= 50) / (periods - 50)
    assert total == pytest.approx(10.734, rel=0.01)
