"""A learned transform of the newsvendor's quantile, also behind one warehouse."""

import pytest
import torch
from ctrlrl_envs.inventory.network import SUPPLIER, Link, Network, Store, Warehouse
from helpers.recorded_demand import behind_warehouse, build_policy, costs, direct, normal_values, prepared, recorded

from ctrlrl.inventory.policies.base import PolicyError

NAME = "transformed_newsvendor"


def one_level(transform, probability):
    """Make a transform answer the same for all."""
    transform[-2].weight.data.zero_()
    transform[-2].bias.data.fill_(torch.tensor(probability).logit())


def test_the_transform_learns_that_dearer_demand_is_to_be_met_more_often():
    """Half of the series have p = 1, half p = 9: the best quantiles are 0.5 and 0.9."""
    unmet = torch.tensor([1.0, 9.0]).repeat(75)[:, None]
    simulator = recorded(direct([1]), normal_values(150, 140), 70, unmet=unmet)
    policy = prepared(NAME, simulator, steps=300, batch=512)
    weights = [w for w in policy.parameters() if w.requires_grad]
    optimizer = torch.optim.Adam(weights, policy.learning_rate)
    for _ in range(45):
        optimizer.zero_grad()
        costs(simulator, policy, "train", stretch=8)[2:].mean().backward()
        optimizer.step()
    view = simulator.view(simulator.reset(None, split="test"))
    learned = policy.quantile(view)[:2, 0]
    torch.testing.assert_close(learned, torch.tensor([0.5, 0.9]), atol=0.1, rtol=0.0)
    assert all(weight.grad is None for weight in policy.forecaster.parameters())


def test_the_transform_is_a_network_of_two_layers_of_32_from_the_ratio_to_a_probability():
    policy = build_policy(NAME, recorded(direct([1]), normal_values(5, 80), 40))
    shapes = [tuple(weight.shape) for weight in policy.parameters() if weight.requires_grad]
    assert shapes == [(32, 1), (32,), (32, 32), (32,), (1, 32), (1,)]
    assert policy.trainable
    assert isinstance(policy.transform[-1], torch.nn.Sigmoid)


@pytest.fixture(scope="module")
def constant():
    """Stores that always sell 4 and 10, lead times 1 and 2, behind a warehouse of lead time 3: all levels are known.

    The stores lack 8 and 30 when empty, the system 4 x 5 + 10 x 6 = 80.
    """
    sizes = torch.linspace(0.5, 2.0, 31)[:, None, None]  # the series of 1.0 are those looked at
    values = torch.tensor([[4.0], [10.0]]).expand(31, 2, 60) * sizes
    simulator = recorded(behind_warehouse([1, 2], 3), values, 35)
    return simulator, prepared(NAME, simulator, steps=300, batch=512)


def act(simulator, policy, warehouse, first=(0.0, 0.0), second=(0.0, 0.0)):
    """Flows of the series of size 1, links in order: warehouse, first store, second."""
    stock = torch.zeros(31, 3, 3)
    stock[:, 0, :2], stock[:, 1, :2] = torch.tensor(first), torch.tensor(second)
    stock[:, 2] = torch.tensor(warehouse)
    flows = policy(simulator.view(simulator.reset(None, split="test", inventory=stock)))
    assert (flows >= 0.0).all()
    assert (flows[:, 1:].sum(1) <= stock[:, 2, 0] + 1e-4).all()
    return flows[10]


def close(found, wanted):
    torch.testing.assert_close(found, torch.tensor(wanted), atol=0.4, rtol=0.02)


def test_the_ratio_is_that_of_the_stores_costs(constant):
    simulator, policy = constant
    ratio = policy.ratio(simulator.view(simulator.reset(None)))
    torch.testing.assert_close(ratio, torch.full((1, 2), 0.9))


def test_a_warehouse_with_enough_sends_what_stores_lack(constant):
    close(act(*constant, (50.0, 5.0, 0.0)), [80.0 - 55.0, 8.0, 30.0])
    close(act(*constant, (50.0, 0.0, 0.0), (1.0, 2.0), (3.0, 4.0)), [80.0 - 50.0 - 10.0, 5.0, 23.0])


def test_a_warehouse_with_too_little_shares_in_proportion(constant):
    close(act(*constant, (19.0, 0.0, 0.0)), [80.0 - 19.0, 4.0, 15.0])


def test_a_system_with_enough_orders_nothing(constant):
    flows = act(*constant, (90.0, 0.0, 0.0))
    assert flows[0] == 0.0


def test_stores_and_warehouse_have_transforms_of_their_own():
    simulator = recorded(behind_warehouse([1], 2), normal_values(40, 100, std=2.0), 60)
    policy = prepared(NAME, simulator, steps=100)
    stock = torch.zeros(40, 2, 2)
    stock[:, 1, 0] = 10.0
    view = simulator.view(simulator.reset(None, split="test", inventory=stock))
    much = stock.clone()
    much[:, 1, 0] = 1000.0
    rich = simulator.view(simulator.reset(None, split="test", inventory=much))
    found = {}
    for name in ("transform", "transform_upstream"):
        for probability in (0.3, 0.8):
            one_level(policy.transform, 0.5)
            one_level(policy.transform_upstream, 0.5)
            one_level(getattr(policy, name), probability)
            found[name, probability] = policy(view)[:, 0].mean(), policy(rich)[:, 1].mean()
    (order, sent), (order_more, sent_more) = found["transform", 0.3], found["transform", 0.8]
    assert order == order_more
    assert sent < sent_more - 1.0
    (order, sent), (order_more, sent_more) = found["transform_upstream", 0.3], found["transform_upstream", 0.8]
    assert order < order_more - 1.0
    assert sent == sent_more
    (policy(view).sum() + policy(rich).sum()).backward()
    assert all(float(t[-2].bias.grad) > 0.0 for t in (policy.transform, policy.transform_upstream))


def two_warehouses():
    stores = (Store("a", 1.0, 9.0), Store("b", 1.0, 9.0))
    warehouses = (Warehouse("x", 0.3), Warehouse("y", 0.3))
    links = [Link(SUPPLIER, "x", 1), Link(SUPPLIER, "y", 1), Link("x", "a", 1), Link("y", "b", 1)]
    return Network(stores, warehouses, tuple(links))


def mixed():
    stores = (Store("a", 1.0, 9.0), Store("b", 1.0, 9.0))
    links = [Link(SUPPLIER, "x", 1), Link("x", "a", 1), Link(SUPPLIER, "b", 1)]
    return Network(stores, (Warehouse("x", 0.3),), tuple(links))


def twice():
    stores = (Store("a", 1.0, 9.0), Store("b", 1.0, 9.0))
    links = [Link(SUPPLIER, "x", 1), Link("x", "a", 1), Link("x", "b", 1), Link(SUPPLIER, "b", 1)]
    return Network(stores, (Warehouse("x", 0.3),), tuple(links))


@pytest.mark.parametrize(
    "network", [two_warehouses(), mixed(), twice(), behind_warehouse([1, 1], 1, holds=False)],
    ids=["two warehouses", "one store apart", "two links", "a warehouse that cannot hold"],
)  # fmt: skip
def test_networks_without_a_rule_are_refused(network):
    simulator = recorded(network, normal_values(5, 80).expand(5, 2, -1), 40)
    with pytest.raises(PolicyError, match="one warehouse serves which can hold"):
        build_policy(NAME, simulator)
