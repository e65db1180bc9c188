"""Figures of agents on inventory networks, against trajectories by hand and closed forms."""

import os
from dataclasses import dataclass, replace
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from ctrlrl_envs.inventory import Inventory, InventorySimulator, problems
from ctrlrl_envs.inventory.demand import Demand, Drawn, Series, Split
from ctrlrl_envs.inventory.network import Link, Network, Store, Warehouse
from ctrlrl_envs.inventory.simulator import Problem
from helpers.agents import quiet, tiny
from torch import nn

from ctrlrl import api
from ctrlrl.inventory import comparison, optimal
from ctrlrl.inventory.comparison import begin, behind, compare, play
from ctrlrl.inventory.policies import base as policies
from ctrlrl.types import EnvSpec

DATA = Path(os.environ.get("CTRLRL_DATA", Path(__file__).parents[3] / "shared/data"))


@dataclass
class Fixed(Demand):
    """The same demand [T, S] in every scenario."""

    values_of_one: torch.Tensor
    integer: bool = False

    def __post_init__(self):
        self.mean, self.std = self.values_of_one.mean(0), self.values_of_one.std(0)

    def draw(self, count, split, generator=None):
        if count is None:
            raise ValueError("scenarios of a distribution have no end: say how many")
        return Drawn(self.values_of_one.expand(count, -1, -1))


def chain(unmet_demand="lost", objective="cost", integer=False, ignored=1, **more):
    """Supplier, warehouse and store, a period apart, with nothing at the start; demand 1, 1, 5, 2."""
    network = Network(
        (Store("store", 1.0, 10.0),), (Warehouse("warehouse", 0.5),),
        (Link("supplier", "warehouse", 1, 2.0), Link("warehouse", "store", 1, 3.0)), unmet_demand, objective,
    )  # fmt: skip
    demand = Fixed(torch.tensor([[1.0], [1.0], [5.0], [2.0]]), integer)
    problem = Problem("chain", network, demand, {"test": Split(4, ignored)}, (0.0, 0.0), **more)
    return InventorySimulator(problem)


class Asks:
    """An agent like those of Stable-Baselines3 that always asks for the same; notes what it was given."""

    def __init__(self, *wish):
        self.wish, self.calls = np.array(wish, np.float32), []

    def predict(self, observation, state=None, episode_start=None, deterministic=False):
        self.calls.append((observation, state, episode_start, deterministic))
        return np.tile(self.wish, (len(observation), 1)), (0 if state is None else state[0] + 1,)


def order_up_to(level):
    return lambda view: (level - view.inventory.sum(2)).relu()


def recorded(**more):
    """Profit on twelve recorded series at two stores behind a warehouse."""
    values = torch.poisson(torch.full((12, 2, 40), 6.0), generator=torch.Generator().manual_seed(3))
    network = Network(
        (Store("a", 1.0, 8.0), Store("b", 1.2, 9.0)), (Warehouse("w", 0.3),),
        (Link("supplier", "w", 2), Link("w", "a", 1), Link("w", "b", 2)), "lost", "profit",
    )  # fmt: skip
    problem = Problem("sales", network, Series(values, 4), {"test": Split(30, 10, 6)}, (0.0, 0.0), **more)
    return InventorySimulator(problem)


def just_in_time(simulator):
    demand = simulator.problem.demand
    known = policies.Demanded(demand.mean, demand.std, demand.window, demand.features)
    return policies.build("just_in_time", simulator.network, known, policies.InventoryPolicyConfig())


# -- by hand --------------------------------------------------------------------------------------

BY_HAND = {
    # what the store has is 0, 3, 3 in the counted periods, the warehouse keeps 1, 2, 3; 4 and 3 units are sent in each
    ("lost", "cost"): ((0.5 + 1.0 + 1.5 + 1.0) / 3, (10.0 + 20.0) / 3),
    ("lost", "profit"): ((0.5 + 1.0 + 1.5 + 1.0) / 3, -(30.0 + 20.0) / 3),
    # it has -1, 1, -1: what was short in the first period still waits
    ("backlogged", "cost"): ((0.5 + 1.0 + 1.5) / 3, (20.0 + 40.0 + 30.0) / 3),
}


@pytest.mark.parametrize("kind", BY_HAND)
def test_the_parts_of_a_cost_are_those_of_a_trajectory_by_hand(kind):
    """The first period, in which nothing can be sent to the store and 1 unit is short, is left out."""
    found = compare(Asks(4.0, 3.0), chain(*kind), scenarios=2)
    holding, unmet = BY_HAND[kind]
    links = (4 * 2 + 3 * 3) * 3 / 3
    assert (found.holding, found.unmet, found.links) == pytest.approx((holding, unmet, links))
    assert found.cost == pytest.approx(holding + unmet + links)
    assert found.costs == pytest.approx([found.cost] * 2) and found.standard_error == 0.0
    assert (found.scenarios, found.periods, found.split) == (2, 3, "test")


def test_no_period_is_left_out_where_the_split_ignores_none():
    found = compare(Asks(4.0, 3.0), chain(ignored=0), scenarios=1)
    assert found.unmet == pytest.approx((10 + 10 + 20) / 4) and found.links == pytest.approx((8 + 17 * 3) / 4)
    assert np.isnan(found.standard_error)


def test_figures_are_per_store():
    one = compare(lambda v: torch.full((len(v.inventory), 1), 5.0), InventorySimulator(twins(1)), scenarios=3)
    two = compare(lambda v: torch.full((len(v.inventory), 2), 5.0), InventorySimulator(twins(2)), scenarios=3)
    assert two.cost == pytest.approx(one.cost) and two.unmet == pytest.approx(one.unmet) and one.unmet > 0


def twins(stores):
    names = [f"store {i}" for i in range(stores)]
    network = Network(
        tuple(Store(n, 1.0, 9.0) for n in names), (), tuple(Link("supplier", n, 2) for n in names), "lost"
    )
    demand = Fixed(torch.tensor([[3.0], [9.0], [4.0], [7.0], [6.0]]).repeat(1, stores))
    return Problem("twins", network, demand, {"test": Split(5)}, (0.0, 0.0))


def test_orders_and_the_stock_at_the_start_are_whole_units_where_demand_is():
    problem = problems.one_store_lost(lead_time=2)
    asks = Asks(2.6)
    for whole, simulator in ((True, InventorySimulator(problem)), (False, InventorySimulator(twins(1)))):
        found = list(play(asks, simulator, begin(simulator, "test", 7, 0), 5))
        assert torch.equal(found[0].action, torch.full((7, 1), 3.0 if whole else 2.6))
        stock = torch.cat([p.inventory.flatten() for p in found])
        assert torch.equal(stock, stock.round()) == whole
    assert begin(InventorySimulator(problem), "test", 7, 0).inventory.unique().numel() > 2


def test_rounding_never_sends_what_is_not_there():
    simulator = chain(integer=True)
    sent = torch.stack([p.action[0] for p in play(Asks(1.4, 2.6), simulator, begin(simulator, "test", 1, 0), 4)])
    assert sent.tolist() == [[1, 0], [1, 1], [1, 1], [1, 1]]
    policy = list(play(lambda v: v.inventory[:, :, 0].flip(1) + 0.6, simulator, begin(simulator, "test", 1, 0), 2))
    assert policy[0].action.tolist() == [[1.0, 0.0]]


# -- the best there is ----------------------------------------------------------------------------


def test_the_best_base_stock_level_has_no_gap_and_another_that_of_the_closed_form():
    simulator = InventorySimulator(problems.one_store_backlogged(lead_time=2, std=1.2, clip=False))
    mean, std = 15.0, 1.2 * 3**0.5
    best = optimal.newsvendor(mean, std, 1.0, 9.0)
    found = compare(order_up_to(best.level), simulator, scenarios=2000)
    assert found.known == {"optimum": pytest.approx(best.cost)} and found.best == ("optimum", found.known["optimum"])
    assert abs(found.gap) < 4 * found.gap_error and found.gap_error < 0.4
    assert found.gap == pytest.approx(100 * (found.cost / best.cost - 1), abs=1e-4)
    worse = compare(order_up_to(best.level + 3), simulator, scenarios=2000)
    expected = optimal.newsvendor_cost(best.level + 3, mean, std, 1.0, 9.0) - best.cost
    paired = worse.costs - found.costs  # the same scenarios
    assert paired.mean() == pytest.approx(expected, abs=4 * paired.std() / 2000**0.5) and expected > 0.5
    assert found.clairvoyant is None and found.share is None


def test_the_gap_is_to_what_the_problem_says_of_itself():
    found = compare(Asks(4.0, 3.0), chain(known={"lower_bound": 25.0}), scenarios=2)
    assert found.best == ("lower_bound", 25.0) and found.gap == pytest.approx(100 * (85 / 3 / 25 - 1))
    earns = compare(Asks(1.0, 1.0), chain(objective="profit", known={"optimum": -10.0}), scenarios=2)
    # sells 0, 1 and 1 units for 10, and sends 3 times 5
    assert earns.cost == pytest.approx((-20 + 15) / 3) and earns.gap == pytest.approx(100 * (10 - 5 / 3) / 10)
    unknown = compare(Asks(4.0, 3.0), chain(), scenarios=2)
    assert unknown.best is None and unknown.gap is None and unknown.gap_error is None


def test_the_clairvoyant_has_all_of_its_own_profit_and_others_have_less():
    simulator = recorded()
    oracle = just_in_time(simulator)
    found = compare(oracle, simulator)
    assert (found.scenarios, found.periods) == (12, 20)  # every product once
    assert found.share == pytest.approx(100.0) and found.cost < 0 and found.clairvoyant == pytest.approx(found.cost)
    half = compare(Asks(*[6.0] * 3), simulator)
    assert half.clairvoyant == found.clairvoyant and 20 < half.share < 95
    assert half.share == pytest.approx(100 * half.cost / found.cost)


def test_profit_without_recorded_series_has_a_clairvoyant_in_the_same_scenarios():
    problem = problems.one_store_lost(lead_time=2)
    simulator = InventorySimulator(replace(problem, network=replace(problem.network, objective="profit")))
    found = compare(just_in_time(simulator), simulator, scenarios=3)
    assert found.share == pytest.approx(100.0) and found.known == {} and len(set(found.costs)) == 3


@pytest.mark.skipif(not (DATA / "favorita-21-stores-weekly-sales.npz").exists(), reason="the recorded sales")
def test_the_clairvoyant_earns_what_was_published_on_real_sales():
    simulator = InventorySimulator(problems.real_stores(stores=3, data=DATA))
    found = compare(just_in_time(simulator), simulator)
    assert -found.cost == pytest.approx(749.2100, abs=5e-5) and found.share == pytest.approx(100.0)
    assert (found.scenarios, found.periods) == (288, 21)


# -- scenarios ------------------------------------------------------------------------------------


def test_scenarios_are_of_the_seed_and_not_of_the_agent():
    simulator = InventorySimulator(problems.one_store_backlogged(lead_time=1))
    first, again, other = (compare(order_up_to(13.0), simulator, scenarios=20, seed=s).costs for s in (0, 0, 1))
    assert np.array_equal(first, again) and not np.array_equal(first, other)
    assert len(set(first)) == 20
    met = [list(play(a, simulator, begin(simulator, "test", 3, 5), 3)) for a in (Asks(2.0), Asks(9.0))]
    assert all(torch.equal(x.demand, y.demand) for x, y in zip(*met, strict=True))
    assert torch.equal(met[0][0].inventory, met[1][0].inventory)


def test_many_scenarios_are_run_in_turns_of_their_own_demand(monkeypatch):
    simulator = InventorySimulator(problems.one_store_backlogged(lead_time=1))
    whole = compare(order_up_to(13.0), simulator, scenarios=8).costs
    monkeypatch.setattr(comparison, "_AT_ONCE", 500 * 8)
    found = compare(order_up_to(13.0), simulator, scenarios=20)
    assert len(found.costs) == len(set(found.costs)) == 20 and np.array_equal(found.costs[:8], whole)


def test_the_default_number_of_scenarios_keeps_the_work_alike():
    few, middle, many = (replace_periods(n) for n in (1, 2_000, 2_000_000))
    assert comparison._turns(few, 1, None) == [comparison.MOST]
    assert sum(comparison._turns(middle, 2_000, None)) == 2**22 // 2_000
    assert sum(comparison._turns(many, 2_000_000, None)) == comparison.LEAST


def replace_periods(periods):
    problem = problems.one_store_lost()
    return InventorySimulator(replace(problem, splits={"test": Split(periods)}))


# -- who acts -------------------------------------------------------------------------------------


def test_an_agent_is_asked_for_its_deterministic_action_and_gets_its_memory_back():
    asks, simulator = Asks(4.0, 3.0), chain()
    compare(asks, simulator, scenarios=2)
    observations, states, starts, modes = zip(*asks.calls, strict=True)
    assert observations[2].dtype == np.float32
    assert observations[2].tolist() == [[3.0, 5.0]] * 2  # what the store and the warehouse have on hand, by hand
    assert states == (None, (0,), (1,), (2,)) and modes == (True,) * 4
    assert [s.tolist() for s in starts] == [[True] * 2] + [[False] * 2] * 3


def test_an_agent_of_the_library_acts_by_its_session():
    class Agent:
        def session(self, noise=None):
            assert noise is None
            return lambda obs, episodes: np.full((len(episodes), 2), [4.0, 3.0], np.float32)

        def predict(self, *_, **__):
            raise AssertionError("its session keeps its memory")

    assert compare(Agent(), chain(), scenarios=2).unmet == pytest.approx(10.0)


def test_a_policy_of_views_acts_without_a_graph_and_leaves_no_mode_behind():
    class Level(nn.Module):
        def __init__(self):
            super().__init__()
            self.level = nn.Parameter(torch.tensor(20.0))

        def forward(self, view):
            assert torch.is_inference_mode_enabled()
            return (self.level - view.inventory.sum(2)).relu()

    simulator = InventorySimulator(problems.one_store_backlogged(lead_time=2))
    compare(Level(), simulator, scenarios=2)
    played = play(Level(), simulator, begin(simulator, "test", 2, 0), 3)
    assert not next(played).action.requires_grad and not torch.is_inference_mode_enabled()


def test_wrappers_that_rescale_actions_are_done_to_them():
    env = gym.wrappers.RescaleAction(Inventory(Problem("chain", *_parts(chain()))), np.float32(-1.0), np.float32(1.0))
    high = env.unwrapped.action_space.high
    scaled = 2 * np.array([4.0, 3.0]) / high - 1
    found = compare(Asks(*scaled), gym.wrappers.TimeLimit(env, 3), scenarios=2)
    assert found.links == pytest.approx(17.0) and found.unmet == pytest.approx(10.0)
    twice = gym.wrappers.RescaleAction(env, np.float32(0.0), np.float32(1.0))
    found = compare(Asks(*(np.array([4.0, 3.0]) / high)), twice, scenarios=2)
    assert found.links == pytest.approx(17.0)


def test_scaled_actions_are_the_flows_that_the_environment_takes_them_for():
    """The mean flow of both links is 2.25, the mean of demand 1, 1, 5, 2."""
    env = Inventory(Problem("chain", *_parts(chain())), scale_actions=True)
    scaled = (np.array([4.0, 3.0]) / 2.25 - 1) / 2
    found = compare(Asks(*scaled), env, scenarios=2)
    assert found.links == pytest.approx(17.0) and found.unmet == pytest.approx(10.0)
    halved = gym.wrappers.RescaleAction(env, np.float32(-0.5), np.float32(0.5))
    found = compare(Asks(*(scaled / 2)), gym.wrappers.TimeLimit(halved, 3), scenarios=2)
    assert found.links == pytest.approx(17.0) and found.unmet == pytest.approx(10.0)
    with pytest.raises(ValueError, match=r"shape \(2, 1\); expected one number for each of 2 links"):
        compare(Asks(1.0), env, scenarios=2)


def test_policies_of_views_give_flows_whatever_the_environment_does_to_actions():
    env = Inventory(Problem("chain", *_parts(chain())), scale_actions=True)
    level = order_up_to(5.0)
    for outer in (env, gym.wrappers.RescaleAction(env, np.float32(0.0), np.float32(9.0))):
        assert behind(level, outer) is level
    oracle = just_in_time(env.simulator)
    assert compare(oracle, env, scenarios=2).cost == compare(oracle, env.simulator, scenarios=2).cost


@pytest.mark.parametrize("method", ["ppo", "reinforce"])
def test_agents_of_other_methods_train_on_scaled_actions_and_are_compared_as_they_play(method):
    spec = EnvSpec("ctrlrl/OneStoreBacklogged-v0", {"lead_time": 1, "scale_actions": True}, n_envs=2)
    small = {"n_groups": 2, "group_size": 2, "actor_hidden": (8,), "device": "cpu", "threads": 1, "eval_every": None}
    agent = api.make(method, spec, **(small if method == "reinforce" else tiny(method)))
    before = [p.detach().clone() for p in agent.policy.parameters()]
    quiet(agent, 200)
    assert not all(torch.equal(x, y) for x, y in zip(before, agent.policy.parameters(), strict=True))
    env = gym.make("ctrlrl/OneStoreBacklogged-v0", lead_time=1, scale_actions=True, split="test")
    found = compare(agent, env, scenarios=1)
    # the same scenario, through the environment itself
    inner, state = env.unwrapped, begin(env.unwrapped.simulator, "test", 1, 0)
    obs, _ = env.reset(options={"inventory": state.inventory[0]})
    inner._state = state
    act, costs = agent.session(None), []
    for _ in range(inner.periods):
        action = act(obs[None], np.arange(1))[0]
        obs, _, _, _, info = env.step(action)
        assert info["sent"] == pytest.approx(np.maximum(5.0 * (1 + 2 * action), 0.0), abs=1e-4)
        costs.append(info["cost"])
    assert found.cost == pytest.approx(np.mean(costs[300:]), rel=1e-4)


def _parts(simulator):
    problem = simulator.problem
    return problem.network, problem.demand, problem.splits | {"train": problem.splits["test"]}, problem.initial


@pytest.mark.parametrize("wrapper", [gym.wrappers.NormalizeObservation, gym.wrappers.TimeAwareObservation])
def test_wrappers_that_the_simulator_cannot_follow_are_refused(wrapper):
    env = wrapper(gym.wrappers.TimeLimit(Inventory(problems.one_store_lost()), 9))
    with pytest.raises(ValueError, match=f"{wrapper.__name__} stands between"):
        compare(Asks(1.0), env)


WRONG = {
    "split": ({"split": "tests"}, ValueError, "no split 'tests'; there are test"),
    "scenarios": ({"scenarios": 0}, ValueError, "scenarios=0"),
    "actions": ({"agent": Asks(1.0)}, ValueError, r"shape \(2, 1\), expected \(2, 2\)"),
    "agent": ({"agent": 3}, TypeError, "int cannot act"),
    "environment": ({"simulator": gym.make("CartPole-v1")}, TypeError, "no simulator of an inventory network"),
    "horizon": ({"simulator": chain(ignored=4)}, ValueError, "ignores all of its 4 periods"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_be_compared_is_refused(case):
    changes, error, message = WRONG[case]
    given = {"agent": Asks(4.0, 3.0), "simulator": chain(), "scenarios": 2} | changes
    with pytest.raises(error, match=message):
        compare(**given)


def test_the_document_holds_every_figure():
    found = compare(Asks(4.0, 3.0), chain(known={"optimum": 20.0}), scenarios=2).document()
    assert found["cost"] == pytest.approx(85 / 3) and found["gap"] == pytest.approx(100 * (85 / 60 - 1))
    assert found["scenarios"] == 2 and len(found["costs"]) == 2 and found["share"] is None
    parts = found["holding"] + found["unmet"] + found["links"]
    assert parts == pytest.approx(found["cost"])
