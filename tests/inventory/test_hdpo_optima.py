"""HDPO against exact optima, by networks that are told nothing of their form: minutes."""

import pytest

import ctrlrl
from ctrlrl.inventory.comparison import compare

pytestmark = pytest.mark.slow


def test_a_network_comes_within_a_quarter_percent_of_the_optimum_where_demand_waits():
    """N(5, 1.6) at 0 or more, L=4, p=9: the base-stock level 29.58 costs 6.2769, the least there is."""
    agent = ctrlrl.HDPO(
        "ctrlrl/OneStoreBacklogged-v0", policy="vanilla", hidden=(32, 32), batch_size=256, learning_rate=1e-2,
        eval_every=None,
    ).learn(1500, root=None, progress=False)  # fmt: skip

    def optimal(view):
        return (29.583 - view.inventory.sum(2)).relu()

    # in the same scenarios, whose luck cancels
    mine, best = (compare(who, agent.simulator, "test", 256, seed=5) for who in (agent.network_policy, optimal))
    assert best.cost == pytest.approx(6.2769, abs=4 * best.standard_error)
    assert 100.0 * float((mine.costs - best.costs).mean()) / 6.2769 <= 0.25


def test_a_network_comes_within_a_quarter_percent_of_the_optimum_where_demand_is_lost():
    """Poisson(5), L=4, p=9, orders rounded: 6.8360 is the least (Zipkin 2008)."""
    agent = ctrlrl.HDPO(
        "ctrlrl/OneStoreLost-v0", env_kwargs={"lead_time": 4, "unmet_cost": 9.0}, policy="vanilla", hidden=(32, 32),
        batch_size=512, learning_rate=5e-3, eval_every=None,
    ).learn(3000, root=None, progress=False)  # fmt: skip
    figures = agent.cost("test", scenarios=2048, seed=5)
    assert 100.0 * (figures.cost - 6.8360) / 6.8360 <= 0.25 + 200.0 * figures.standard_error / 6.8360
