"""Inventory networks as environments: rewards, spaces, one against many, and agents of others."""

import warnings

import ctrlrl_envs  # noqa: F401 - registers the ids
import gymnasium as gym
import numpy as np
import pytest
import torch
from ctrlrl_envs.inventory import (
    Inventory,
    InventorySimulator,
    Link,
    Network,
    Normal,
    Problem,
    Series,
    Split,
    Store,
    Warehouse,
)
from ctrlrl_envs.inventory.env import mean_flows
from gymnasium.utils.env_checker import check_env

IDS = (
    "OneStoreBacklogged", "OneStoreLost", "IndependentStores", "Serial", "Transshipment", "OneWarehouse",
    "ManyWarehouses",
)  # fmt: skip


def recorded(objective="cost"):
    """Two stores and a depot, two recorded series, prices of their own, one feature."""
    network = Network(
        (Store("a", 1.0, 9.0), Store("b", 2.0, 8.0)),
        (Warehouse("depot", 0.5),),
        (Link("supplier", "depot", 2, 0.25), Link("depot", "a", 1), Link("depot", "b", 3, 0.5)),
        "lost",
        objective,
    )
    weeks = torch.arange(12.0)
    values = torch.stack([torch.stack([weeks, weeks + 100]), torch.stack([weeks + 200, weeks + 300])])
    demand = Series(values, 3, weeks[:, None] - 5.0, torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    return Problem("recorded", network, demand, {"train": Split(6, 2, 4)}, (0.0, 0.0))


def user_file(tmp_path):
    path = tmp_path / "net.yaml"
    path.write_text(
        "stores: {a: {holding_cost: 1, unmet_cost: 9}}\nlinks: [{from: supplier, to: a, lead_time: 2}]\n"
        "demand: {distribution: poisson, mean: 4}\n"
        "periods: {train: {length: 7}, dev: {length: 8}, test: {length: 9}}\n"
    )
    return path


def vector(name, n, **kwargs):
    return gym.make_vec(f"ctrlrl/{name}-v0", num_envs=n, vectorization_mode="vector_entry_point", **kwargs)


# -- what a step does -----------------------------------------------------------------------------


def test_a_period_worked_by_hand():
    """Store a: 10 on hand; b: 110 on hand; depot: 30, of which 8 + 12 leave. Demand of week 4 is 4 and 104."""
    env = Inventory(recorded())
    stock = torch.zeros(3, 3)
    stock[:, 0] = torch.tensor([10.0, 90.0, 30.0])
    stock[1, 1] = 7.0
    while True:
        env.reset(options={"inventory": stock})
        _, reward, terminated, truncated, info = env.step([5.0, 8.0, 12.0])
        if info["demand"].tolist() == [4.0, 104.0]:
            break
    # holding (10 - 4) * 1 + 10 * 0.5 at the depot; unmet 14 * 2; links 5 * 0.25 + 12 * 0.5; two stores
    assert info["holding_cost"] == pytest.approx((6 + 5) / 2)
    assert info["unmet_cost"] == pytest.approx(28 / 2)
    assert info["link_cost"] == pytest.approx(7.25 / 2)
    assert reward == pytest.approx(-(11 + 28 + 7.25) / 2) and info["cost"] == -reward
    assert info["sent"].tolist() == [5.0, 8.0, 12.0] and not terminated and not truncated
    after = env.simulator.view(env._state).inventory[0]
    assert after.tolist() == [[14.0, 0.0, 0.0], [7.0, 0.0, 12.0], [10.0, 5.0, 0.0]]


def test_profit_is_what_is_sold_less_holding():
    env = Inventory(recorded("profit"))
    stock = torch.zeros(3, 3)
    stock[:, 0] = torch.tensor([10.0, 90.0, 0.0])
    while True:
        env.reset(options={"inventory": stock})
        _, reward, _, _, info = env.step([0.0, 0.0, 0.0])
        if info["demand"].tolist() == [4.0, 104.0]:
            break
    # prices of the first series are 1 and 2
    assert reward == pytest.approx((4 * 1 + 90 * 2 - 6 * 1) / 2)
    assert info["unmet_cost"] == pytest.approx(-(4 + 180) / 2)


def test_impossible_orders_are_cut_to_what_is_there():
    env = Inventory(recorded())
    stock = torch.zeros(3, 3)
    stock[2, 0] = 30.0
    env.reset(seed=0, options={"inventory": stock})
    info = env.step([-3.0, 20.0, 40.0])[4]
    assert info["sent"].tolist() == [0.0, 10.0, 20.0]


def test_observations_hold_pipelines_then_past_costs_and_features():
    env = Inventory(recorded())
    # slots: 1 + 3 + 2; two stores with a window of 3; two prices; one feature
    assert env.observation_space.shape == (6 + 6 + 2 + 1,)
    stock = torch.arange(9.0).reshape(3, 3) * torch.tensor([[1, 0, 0], [1, 1, 1], [1, 1, 0]])
    while True:
        obs, _ = env.reset(options={"inventory": stock})
        if obs[-2] == 2.0:  # the first series
            break
    assert obs.tolist() == [0, 3, 4, 5, 6, 7, 1, 101, 2, 102, 3, 103, 1, 2, -1]
    obs = env.step(np.zeros(3))[0]
    assert obs[6:].tolist() == [2, 102, 3, 103, 4, 104, 1, 2, 0]


def test_views_come_back_from_observations():
    for problem in (recorded(), gym.make("ctrlrl/ManyWarehouses-v0").unwrapped.simulator.problem):
        simulator = InventorySimulator(problem)
        state = simulator.reset(5, generator=torch.Generator().manual_seed(0))
        ones = torch.ones(5, len(problem.network.links))
        view = simulator.view(simulator.step(state, simulator.feasible(simulator.view(state).inventory, ones))[0])
        obs = simulator.observe(view)
        seen = simulator.seen(obs)
        torch.testing.assert_close(seen.inventory, view.inventory)
        torch.testing.assert_close(seen.unmet_cost, view.unmet_cost)
        torch.testing.assert_close(seen.holding_cost, view.holding_cost)
        if view.past is not None:
            torch.testing.assert_close(seen.past, view.past)
            torch.testing.assert_close(seen.time, view.time.expand(5, -1))
        assert seen.future is None
        torch.testing.assert_close(simulator.observe(seen), obs)
        with pytest.raises(ValueError, match="observations have shape"):
            simulator.seen(obs[:, 1:])


def test_gradients_flow_through_observations():
    simulator = InventorySimulator(recorded())
    state = simulator.reset(2, generator=torch.Generator().manual_seed(0))
    action = torch.full((2, 3), 2.0, requires_grad=True)
    view = simulator.view(simulator.step(state, action)[0])
    simulator.seen(simulator.observe(view)).inventory.sum().backward()
    # all that is sent joins a pipeline; the depot, which has nothing, has nothing to lose
    assert action.grad is not None and action.grad.tolist() == [[1.0] * 3] * 2


def test_the_same_problem_elsewhere():
    simulator = InventorySimulator(recorded(), dtype=torch.float64)
    moved = simulator.to("meta")
    assert moved.device.type == "meta" and moved.dtype == torch.float64 and moved.problem is simulator.problem
    assert simulator.device.type == "cpu"


# -- episodes -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*IDS, "Inventory", "scaled"])
def test_environments_keep_the_rules_of_gymnasium(name, tmp_path):
    kwargs = {"network": user_file(tmp_path)} if name == "Inventory" else {}
    scaled = name == "scaled"
    env = gym.make("ctrlrl/Serial-v0", scale_actions=True) if scaled else gym.make(f"ctrlrl/{name}-v0", **kwargs)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*(infinity|render|Box observation space|action space).*")
        check_env(env.unwrapped, skip_render_check=True)
    assert np.isfinite(env.action_space.high).all()


def test_arguments_are_those_of_the_problem(tmp_path):
    env = gym.make("ctrlrl/OneStoreLost-v0", lead_time=2, unmet_cost=39.0, split="test")
    assert env.unwrapped.simulator.network.lead_times == (2,) and env.unwrapped.periods == 500
    assert gym.make("ctrlrl/Transshipment-v0", stores=3).action_space.shape == (4,)
    own = gym.make("ctrlrl/Inventory-v0", network=str(user_file(tmp_path)), split="dev")
    assert own.unwrapped.periods == 8
    with pytest.raises(TypeError, match="lead"):
        gym.make("ctrlrl/OneStoreLost-v0", lead=2)
    with pytest.raises(ValueError, match="split='all' is unknown; this problem has train, dev, test"):
        gym.make("ctrlrl/OneStoreLost-v0", split="all")
    with pytest.raises(ValueError, match="problem='mine' is unknown"):
        Inventory("mine")
    with pytest.raises(ValueError, match="takes no arguments"):
        Inventory(recorded(), stores=3)


def test_seeds_fix_episodes_and_the_next_ones_differ():
    env = gym.make("ctrlrl/OneWarehouse-v0", stores=3)

    def episode(seed):
        obs, _ = env.reset(seed=seed)
        return np.stack([obs, *(env.step(np.full(4, 3.0, np.float32))[0] for _ in range(5))])

    first, again = episode(7), episode(7)
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, episode(8)) and not np.array_equal(episode(None), episode(None))


def test_episodes_end_with_the_split_and_only_there():
    env = gym.make("ctrlrl/OneStoreLost-v0")
    assert env.unwrapped.max_episode_steps == 50
    with pytest.raises(gym.error.ResetNeeded):
        env.unwrapped.step([1.0])
    env.reset(seed=0)
    ends = [env.step(np.array([5.0], np.float32))[2:4] for _ in range(50)]
    assert ends == [(False, False)] * 49 + [(False, True)]
    with pytest.raises(gym.error.ResetNeeded):
        env.unwrapped.step([1.0])
    with pytest.raises(ValueError, match="unknown reset options \\['stock'\\]"):
        env.reset(options={"stock": 1})
    with pytest.raises(ValueError, match=r"inventory has shape \(2,\); expected \(1, 4\)"):
        env.reset(options={"inventory": [1.0, 2.0]})
    env.reset()
    with pytest.raises(ValueError, match=r"action has shape \(2,\)"):
        env.unwrapped.step([1.0, 2.0])


def test_the_bounds_of_orders_cover_the_stores_that_a_link_leads_to():
    network = recorded().network
    demand = Normal(torch.tensor([5.0, 8.0]), torch.tensor([1.0, 2.0]))
    env = Inventory(Problem("two", network, demand))
    # 5 + 3 * 1 and 8 + 3 * 2, of which the depot serves both
    assert env.action_space.high.tolist() == [4 * 22.0, 4 * 8.0, 4 * 14.0]
    assert Inventory(recorded()).action_space.high.tolist() == [4 * (211 + 311), 4 * 211.0, 4 * 311.0]


# -- actions around 0 -----------------------------------------------------------------------------


def test_mean_flows_are_what_is_needed_downstream_shared_by_the_links_that_bring_it():
    """Store a needs 6 and has two warehouses, b needs 4 and has one; so v passes on 3 and w 3 + 4."""
    network = Network(
        (Store("a", 1.0, 9.0), Store("b", 1.0, 9.0)),
        (Warehouse("v", 0.5), Warehouse("w", 0.5)),
        tuple(Link(*ends, 1) for ends in (("w", "a"), ("supplier", "w"), ("v", "a"), ("supplier", "v"), ("w", "b"))),
    )
    problem = Problem("two", network, Normal(torch.tensor([6.0, 4.0]), torch.ones(2)))
    assert mean_flows(problem).tolist() == [3.0, 7.0, 3.0, 3.0, 4.0]
    # over both series and all weeks: 5.5 and 205.5 at a, 100 more at b
    assert mean_flows(recorded()).tolist() == [105.5 + 205.5, 105.5, 205.5]


def test_scaled_actions_ask_for_up_to_three_times_the_mean_flow():
    mean = np.array([311.0, 105.5, 205.5])
    stock = torch.zeros(3, 3)
    stock[2, 0] = 1e4
    env = Inventory(recorded(), scale_actions=True)
    assert env.action_space == gym.spaces.Box(-1.0, 1.0, (3,), np.float32)
    many = vector("OneStoreLost", 4, problem=recorded(), scale_actions=True)
    assert many.single_action_space == env.action_space
    asked = {-1.0: 0.0, -0.5: 0.0, 0.0: 1.0, 1.0: 3.0}
    many.reset(seed=0)
    many._inventory[:] = stock
    many.step(np.repeat(np.float32(list(asked))[:, None], 3, 1))
    for row, (action, times) in enumerate(asked.items()):
        env.reset(seed=0, options={"inventory": stock})
        np.testing.assert_allclose(env.flows([[action] * 3] * 2), [times * mean] * 2)
        np.testing.assert_allclose(env.step([action] * 3)[4]["sent"], times * mean)
        # of the first link, which joins the depot's second slot
        assert many._inventory[row, 2, 1].item() == times * mean[0]
    plain = Inventory(recorded())
    assert plain.flows([1.0, 2.0, 3.0]).tolist() == [1.0, 2.0, 3.0]
    with pytest.raises(ValueError, match=r"actions have shape \(2, 1\); expected one number for each of 3 links"):
        env.flows([[0.0], [0.0]])


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_actions_that_are_not_finite_are_refused_with_their_link(value, scaled):
    message = f"the action of link depot -> a is {value}; expected a finite number"
    env = Inventory(recorded(), scale_actions=scaled)
    env.reset(seed=0)
    with pytest.raises(ValueError, match=message):
        env.step([0.0, value, value])
    many = vector("OneStoreLost", 2, problem=recorded(), scale_actions=scaled)
    many.reset(seed=0)
    actions = np.zeros((2, 3), np.float32)
    actions[0, 1] = value
    with pytest.raises(ValueError, match=message):
        many.step(actions)
    many._truncated[0] = True  # a row that has ended takes no action
    assert np.isfinite(many.step(actions)[0]).all()


# -- many at once ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*IDS, "recorded", "scaled"])
def test_many_do_what_single_ones_do(name):
    """Other actions in every row, a row reset in the middle of an episode, and all episodes to their ends."""
    own = name == "recorded"
    target, kwargs = ("OneStoreLost", {"problem": recorded()}) if own else (name, {})
    if name == "scaled":
        target, kwargs = "OneWarehouse", {"scale_actions": True}
    many = vector(target, 3, **kwargs)
    singles = [gym.make(f"ctrlrl/{target}-v0", **kwargs).unwrapped for _ in range(3)]
    obs, _ = many.reset(seed=[4, 5, 6])
    for env, row, seed in zip(singles, obs, (4, 5, 6), strict=True):
        np.testing.assert_allclose(env.reset(seed=seed)[0], row, rtol=1e-6)
    draws, periods = np.random.default_rng(0), singles[0].periods
    for step in range(periods + 2):
        actions = draws.uniform(0.0, 0.1, many.action_space.shape) * many.action_space.high
        before = obs
        obs, rewards, terminated, truncated, infos = many.step(actions.astype(np.float32))
        for i, env in enumerate(singles):
            if env._state.period >= periods:
                assert truncated[i] and rewards[i] == 0.0 and infos["cost"][i] == 0.0
                np.testing.assert_array_equal(obs[i], before[i])
                continue
            row, reward, _, over, info = env.step(actions[i].astype(np.float32))
            np.testing.assert_allclose(obs[i], row, rtol=1e-4, atol=1e-3)
            assert rewards[i] == pytest.approx(reward, rel=1e-4, abs=1e-4) and truncated[i] == over
            for part in ("cost", "holding_cost", "unmet_cost", "link_cost"):
                assert infos[part][i] == pytest.approx(info[part], rel=1e-4, abs=1e-4)
            total = info["holding_cost"] + info["unmet_cost"] + info["link_cost"]
            assert total == pytest.approx(info["cost"], rel=1e-4, abs=1e-4)
        assert not terminated.any()
        if step == 2:
            seed = 9 if own or name == "Serial" else None  # None: the stream of the row goes on
            obs, _ = many.reset(seed=[None, seed, None], options={"reset_mask": np.array([False, True, False])})
            np.testing.assert_allclose(obs[1], singles[1].reset(seed=seed)[0], rtol=1e-6)


def test_many_can_be_cut_short_and_refuse_other_options():
    env = gym.make_vec("ctrlrl/Serial-v0", num_envs=2, vectorization_mode="vector_entry_point", max_episode_steps=3)
    env.reset(seed=0)
    zeros = np.zeros(env.action_space.shape, np.float32)
    assert [env.step(zeros)[3].tolist() for _ in range(3)] == [[False] * 2, [False] * 2, [True] * 2]
    assert env.max_episode_steps == 3 and vector("Serial", 2, split="test").max_episode_steps == 500
    with pytest.raises(ValueError, match="reset_mask"):
        env.reset(options={"inventory": 0})


def test_agents_of_others_train_on_it_and_scaled_actions_begin_near_the_mean_demand():
    ppo = pytest.importorskip("stable_baselines3").PPO
    costs = []
    for scaled in (False, True):
        env = gym.make("ctrlrl/OneStoreLost-v0", scale_actions=scaled)
        agent = ppo("MlpPolicy", env, n_steps=64, batch_size=64, n_epochs=1, seed=0, device="cpu")
        before = [p.detach().clone() for p in agent.policy.parameters()]
        agent.learn(128)
        assert not all(torch.equal(x, y) for x, y in zip(before, agent.policy.parameters(), strict=True))
        assert [episode["l"] for episode in agent.ep_info_buffer] == [50, 50]
        costs.append(-np.mean([episode["r"] for episode in agent.ep_info_buffer]) / 50)
    # a unit that is not sold costs 9, and 5 are asked for; orders around 0 leave nearly all of these
    assert costs[0] > 36 and costs[1] < 32
