"""Which optimum or bound is that of a problem."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from ctrlrl_envs.inventory.demand import Normal, Poisson, Series
from ctrlrl_envs.inventory.network import Link, Network, Store, Warehouse
from ctrlrl_envs.inventory.simulator import Problem

from ctrlrl.inventory.optimal import known, lost_sales_store


def normal(*mean, std=1.6, **more):
    return Normal(torch.tensor(mean), torch.full((len(mean),), std), **more)


def direct(count=1, lead_time=4, unmet_cost=9.0, **more):
    stores = tuple(Store(f"store{i}", 1.0, unmet_cost) for i in range(count))
    return Network(stores, (), tuple(Link("supplier", s.name, lead_time) for s in stores), **more)


def chain(**more):
    """supplier -> far -> middle -> near -> store, its places and links in no order."""
    warehouses = (Warehouse("middle", 0.2), Warehouse("near", 0.5), Warehouse("far", 0.1))
    links = (Link("far", "middle", 4), Link("near", "store", 4), Link("supplier", "far", 2), Link("middle", "near", 3))
    return Network((Store("store", 1.0, 9.0),), warehouses, links, **more)


def hub(count=3, holds=False, stores=None, more_links=()):
    stores = stores or tuple(Store(f"store{i}", 1.0, 9.0) for i in range(count))
    links = (*[Link("hub", s.name, 4) for s in stores], Link("supplier", "hub", 3), *more_links)
    return Network(stores, (Warehouse("hub", 0.0, holds=holds),), links)


def hub_demand(clip=False, correlation=0.5):
    mean = np.random.RandomState(33).uniform(2.5, 7.5, 3).round(3)
    std = (mean * np.random.RandomState(92).uniform(0.25, 0.5, 3)).round(3)
    return Normal(torch.tensor(mean).float(), torch.tensor(std).float(), correlation, clip)


def optimum(network, demand):
    return known(Problem("problem", network, demand)).get("optimum")


def bound(network, demand):
    return known(Problem("problem", network, demand)).get("lower_bound")


def test_one_store_backlogged():
    assert optimum(direct(), normal(8.0, clip=False)) == pytest.approx(6.2788, abs=5e-5)
    assert optimum(direct(), normal(5.0)) == pytest.approx(6.2769, abs=5e-5)


def test_one_store_lost():
    assert optimum(direct(unmet_demand="lost"), Poisson(torch.tensor([5.0]))) == pytest.approx(6.8360, abs=1e-4)


def test_independent_stores_cost_the_mean_of_single_ones():
    lost = direct(4, 3, unmet_demand="lost")
    assert optimum(lost, Poisson(torch.full((4,), 5.0))) == pytest.approx(6.5314, abs=1e-4)
    stores = (Store("a", 1.0, 9.0), Store("b", 1.0, 4.0))
    mixed = Network(stores, (), (Link("supplier", "b", 1), Link("supplier", "a", 4)))
    alike = normal(8.0, 8.0, clip=False, correlation=0.5)
    assert optimum(mixed, alike) == pytest.approx((6.2788 + 3.1674) / 2, abs=1e-4)


def test_chain_in_any_order_of_places():
    assert optimum(chain(), normal(5.0, std=2.0)) == pytest.approx(10.734, abs=6e-4)
    assert optimum(chain(), normal(8.0, std=2.0, clip=False)) == pytest.approx(10.762, abs=6e-4)


def test_demand_that_is_often_negative_has_but_a_bound():
    """The best base-stock level of N(5, 10) costs 41.75: goods that come back cannot be sent on."""
    often = normal(5.0, std=10.0, clip=False)
    assert bound(direct(), often) == pytest.approx(39.243, abs=6e-4) and optimum(direct(), often) is None
    assert bound(chain(), normal(5.0, std=2.0, clip=False)) == pytest.approx(10.762, abs=6e-4)
    # one such store among others is enough
    mixed = Normal(torch.tensor([5.0, 5.0]), torch.tensor([1.0, 2.0]), clip=False)
    assert bound(direct(2), mixed) is not None and optimum(direct(2), mixed) is None
    assert optimum(direct(), normal(5.0, std=10.0)) > 15.0 and bound(direct(), normal(5.0, std=10.0)) is None


def test_what_has_been_solved_is_not_solved_again():
    assert lost_sales_store(4.0, 1.0, 9.0, 2) is lost_sales_store(4.0, 1.0, 9.0, 2)
    before = lost_sales_store.cache_info().misses
    for _ in range(2):
        optimum(direct(lead_time=2, unmet_demand="lost"), Poisson(torch.tensor([3.0])))
    assert lost_sales_store.cache_info().misses == before + 1


def test_transshipment_has_a_bound():
    problem = Problem("hub", hub(), hub_demand())
    assert known(problem) == {"lower_bound": pytest.approx(8.533674, abs=1e-6)}
    other = replace(problem, demand=hub_demand(correlation=0.0))
    assert known(other)["lower_bound"] < 8.3


@pytest.mark.parametrize(
    ("network", "demand"),
    [
        (direct(unmet_demand="lost"), normal(5.0)),
        (direct(), Poisson(torch.tensor([5.0]))),
        (direct(objective="profit"), normal(5.0)),
        (direct(unmet_cost=0.0), normal(5.0)),
        (direct(), Series(torch.ones(2, 1, 60))),
        (direct(lead_time=5, unmet_demand="lost"), Poisson(torch.tensor([5.0]))),
        (direct(unmet_demand="lost"), Poisson(torch.tensor([11.0]))),
        (Network((Store("a", 1.0, 9.0),), (), (Link("supplier", "a", 2, cost=0.5),)), normal(5.0)),
        (chain(unmet_demand="lost"), normal(5.0)),
        (hub(holds=True), hub_demand()),
        (hub(), hub_demand(clip=True)),
        (hub(stores=(Store("a", 1.0, 9.0), Store("b", 1.0, 8.0), Store("c", 1.0, 9.0))), hub_demand()),
        (hub(more_links=(Link("supplier", "store0", 4),)), hub_demand()),
        (
            Network(
                (Store("a", 1.0, 9.0),), (Warehouse("w", 2.0),), (Link("supplier", "w", 2), Link("w", "a", 2))
            ),
            normal(5.0),
        ),
    ],
    ids=[
        "lost normal", "backlogged poisson", "profit", "no unmet cost", "series", "long lead time", "large mean",
        "cost of a link", "lost chain", "hub that holds", "clipped hub", "unequal stores", "two senders",
        "dearer upstream",
    ],
)  # fmt: skip
def test_nothing_is_said_of_what_is_not_known(network, demand):
    assert known(Problem("problem", network, demand)) == {}


def test_numbers_are_plain():
    (value,) = known(Problem("problem", direct(), normal(5.0))).values()
    assert type(value) is float
