"""The wrapper that tells a policy its stock: the identity of the returns, resets, vector environments, saved runs."""

import dataclasses
import json

import ctrlrl_envs  # noqa: F401 - registers the ids
import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from helpers.envs import DictObs
from helpers.trajectories import Scripted

from ctrlrl import api
from ctrlrl.engine import environments
from ctrlrl.engine.stock import PATH, Stock, stock_of, stocked, stocked_space
from ctrlrl.types import EnvSpec

LADDER, DRIVES = "ctrlrl/Ladder-v0", "ctrlrl/Homeostasis-v0"


def told(obs):
    return float(obs["stock"][0]), float(obs["discount"][0])


def test_the_stock_and_the_discount_are_those_worked_out_by_hand():
    """C = 3, (3 + 1) / .5 = 8, (8 - 2) / .5 = 12, (12 + 4) / .5 = 32; what is told is C times .5^t."""
    env = Stock(Scripted([1.0, -2.0, 4.0]), initial=3, gamma=0.5, timestep=True)
    for _ in range(2):
        obs, info = env.reset(options={"a": 1})
        assert info == {"reset": {"a": 1}}
        seen = [told(obs)]
        for t, (reward, end) in enumerate([(1.0, False), (-2.0, False), (4.0, True)], 1):
            assert env.observation_space.contains(obs)
            obs, found, terminated, truncated, info = env.step(None)
            assert (found, terminated, truncated, info) == (reward, False, end, {"t": 1})
            assert obs["timestep"].tolist() == [t] and obs["observation"].tolist() == [t] * 3
            seen.append(told(obs))
        assert seen == [(3, 1), (4, 0.5), (3, 0.25), (4, 0.125)]
        assert [stock / discount for stock, discount in seen] == [3, 8, 12, 32]


@pytest.mark.parametrize("gamma", [1.0, 0.5, 0.9])
def test_the_stock_and_the_return_to_go_are_the_whole_return_at_every_step(gamma):
    rewards = np.random.default_rng(0).normal(size=30)
    env = Stock(Scripted(rewards), initial=-1.5, gamma=gamma)
    obs, _ = env.reset()
    whole = -1.5 + (gamma ** np.arange(30) * rewards).sum()
    for t in range(31):
        stock, discount = told(obs)
        to_go = (gamma ** np.arange(30 - t) * rewards[t:]).sum()
        assert discount == pytest.approx(gamma**t, rel=1e-6)
        # gamma^t (C_t + G_t)
        assert discount * (stock / discount + to_go) == pytest.approx(whole, abs=1e-5)
        if t < 30:
            obs = env.step(None)[0]


def test_long_episodes_do_not_blow_up():
    env = Stock(Scripted([1.0] * 3000), gamma=0.5)
    obs, _ = env.reset()
    for _ in range(3000):
        obs = env.step(None)[0]
    assert told(obs) == (2.0, 0.0)
    env = Stock(Scripted([0.1] * 1000), initial=1e6)
    obs, _ = env.reset()
    for _ in range(1000):
        obs = env.step(None)[0]
    assert told(obs) == (np.float32(1e6 + 100), 1.0)


# -- where an episode begins ----------------------------------------------------------------------


def test_first_stocks_are_drawn_from_the_range_and_the_seed_decides():
    env = Stock(Scripted([1.0]), initial=[-3, 5])

    def firsts(seed):
        return [told(env.reset(seed=seed if i == 0 else None)[0])[0] for i in range(400)]

    drawn = firsts(1)
    assert drawn == firsts(1) != firsts(2)
    assert min(drawn) > -3 and max(drawn) < 5 and len(set(drawn)) == 400
    assert np.mean(drawn) == pytest.approx(1.0, abs=0.5) and max(drawn) - min(drawn) > 7


def test_a_reset_can_set_the_stock_of_one_episode():
    env = Stock(Scripted([1.0]), initial=[-3, 5])
    plain = [told(env.reset(seed=s)[0])[0] for s in (1, None)]
    obs, info = env.reset(seed=1, options={"stock": 7.5, "a": 2})
    assert told(obs) == (7.5, 1.0) and info == {"reset": {"a": 2}}
    assert told(env.step(None)[0])[0] == 8.5
    assert told(env.reset()[0])[0] == plain[1]  # as if it had not been set
    assert env.reset(options={"stock": 0})[1] == {"reset": None}
    for wrong in (float("nan"), [1.0, 2.0]):
        with pytest.raises(ValueError, match=r"options\['stock'\] is .*; expected 1 finite number$"):
            env.reset(options={"stock": wrong})


def test_the_environment_draws_what_it_draws_without_the_wrapper():
    def rewards(env):
        env.reset(seed=5)
        return [env.step(1)[1] for _ in range(60)]

    ladder = gym.make(LADDER, max_episode_steps=100)
    assert rewards(Stock(ladder, initial=[-9, 9])) == rewards(ladder)


# -- observations and rewards ---------------------------------------------------------------------


def test_a_discrete_observation_stays_one():
    env = Stock(gym.make("ctrlrl/RiskyGrid-v0"), initial=[-1, 1])
    assert env.observation_space["observation"] == gym.spaces.Discrete(24)
    obs, _ = env.reset(seed=0)
    assert set(env.observation_space) == {"observation", "stock", "discount"} and obs["observation"] == 18
    assert environments.space_from_json(environments.space_to_json(env.observation_space)) == env.observation_space
    check_env(env, skip_render_check=True)


def test_a_dict_observation_keeps_its_entries():
    env = Stock(DictObs(), initial=3.0, timestep=True)
    obs, _ = env.reset()
    assert set(obs) == {"image", "vector", "mode", "stock", "discount", "timestep"} == set(env.observation_space)


def test_a_vector_reward_has_a_stock_of_its_own_for_each_component():
    env = Stock(gym.make(DRIVES), initial=[-2, [0, 4]], gamma=0.5, key="reward_vector")
    assert env.observation_space["stock"].shape == (2,)
    for seed in range(5):
        obs, _ = env.reset(seed=seed)
        expected = obs["stock"].astype(float)
        assert expected[0] == -2 and 0 < expected[1] < 4
        for t, action in enumerate([1, 0, 0, 0, 2]):
            obs, _, _, _, info = env.step(action)
            expected = expected + 0.5**t * info["reward_vector"]
            np.testing.assert_allclose(obs["stock"], expected, atol=1e-6)
    obs, _ = env.reset(options={"stock": [1, -1]})
    assert obs["stock"].tolist() == [1, -1]
    check_env(Stock(gym.make(DRIVES), initial=[0, 0], key="reward_vector"), skip_render_check=True)


def test_a_step_without_the_vector_reward_is_refused():
    env = Stock(Scripted([1.0]), initial=[0.0], key="reward_vector")
    env.reset()
    with pytest.raises(ValueError, match=r"no 'reward_vector', the vector reward; it has \['t'\]"):
        env.step(None)
    env = Stock(gym.make(DRIVES), initial=[0, 0, 0], key="reward_vector")
    env.reset()
    with pytest.raises(ValueError, match="expected 3 finite numbers"):
        env.step(0)


def test_a_finite_horizon_is_an_end():
    for finite in (False, True):
        env = Stock(gym.make(LADDER), finite_horizon=finite)
        for _ in range(2):
            env.reset(seed=0)
            ends = [env.step(1)[2:4] for _ in range(3)]
            assert ends == [(False, False), (False, False), (True, False) if finite else (False, True)]


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"gamma": 0.0}, "gamma=0.0 must be above 0"),
        ({"gamma": 1.1}, "gamma=1.1"),
        ({"initial": float("inf")}, "initial=inf must be a number or a range"),
        ({"initial": [2, 1]}, r"initial=\[2, 1\]"),
        ({"initial": [1, 2, 3]}, r"initial=\[1, 2, 3\]"),
        ({"initial": "1"}, "initial='1'"),
        ({"initial": 1.0, "key": "r"}, "for each component of the vector reward, in a list"),
        ({"initial": [], "key": "r"}, r"initial=\[\]"),
        ({"initial": [0, [3, 1]], "key": "r"}, "in a list"),
    ],
)
def test_arguments_out_of_range_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Stock(Scripted([1.0]), **arguments)


def test_the_wrapper_is_not_applied_twice():
    with pytest.raises(ValueError, match="discount, stock already"):
        Stock(Stock(Scripted([1.0])))
    assert set(stocked_space(gym.spaces.Discrete(2), 3, timestep=True)) == {
        "observation", "stock", "discount", "timestep",
    }  # fmt: skip


# -- part of the EnvSpec --------------------------------------------------------------------------


def test_a_spec_is_stocked_once_and_its_stock_can_be_read_and_replaced():
    assert stock_of(LADDER) is None and stock_of(EnvSpec(LADDER)) is None
    spec = stocked(LADDER, initial=[-3, 3], gamma=0.5)
    assert spec.wrappers == ((PATH, {"initial": [-3, 3], "gamma": 0.5}),) and stock_of(spec) == [-3, 3]
    other = ("gymnasium.wrappers:TransformReward", {})
    both = dataclasses.replace(spec, wrappers=(*spec.wrappers, other))
    aimed = stocked(both, initial=-1.0)
    assert aimed.wrappers == ((PATH, {"initial": -1.0, "gamma": 0.5}), other) and stock_of(aimed) == -1.0
    assert stock_of(spec) == [-3, 3]
    assert stock_of(stocked(LADDER)) == 0.0
    again = environments.resolve(EnvSpec(**json.loads(json.dumps(dataclasses.asdict(aimed)))))
    assert stock_of(again) == -1.0


def test_a_live_environment_in_the_wrapper_can_be_built_again():
    live = Stock(gym.make(LADDER, disable_env_checker=True), initial=[1, 2], timestep=True)
    spec = environments.spec_of(live)
    assert stock_of(spec) == [1, 2]
    assert environments.build_env(spec).observation_space == live.observation_space


@pytest.mark.parametrize("backend", ["sync", "async"])
def test_the_identity_holds_over_the_ends_of_episodes_in_vector_environments(backend):
    n, gamma = 3, 0.5
    spec = dataclasses.replace(stocked(LADDER, initial=[-2, 2], gamma=gamma), n_envs=n, backend=backend)
    env = environments.make_vector(spec)
    try:
        obs = environments.start(env, [1, 2, 3])
        first = np.array(obs["stock"][:, 0], dtype=float)
        assert len(set(first)) == n and (abs(first) < 2).all()
        begun = {tuple(first)}
        for _ in range(4):
            expected = first
            for t in range(3):
                assert (obs["discount"] == gamma**t).all()
                obs, reward, terminated, truncated, infos = env.step(np.ones(n, dtype=np.int64))
                expected = expected + gamma**t * reward
                assert not terminated.any() and (truncated == (t == 2)).all()
                if t < 2:
                    np.testing.assert_allclose(obs["stock"][:, 0], expected, atol=1e-6)
            ends = np.array([told(o) for o in infos["final_obs"]])
            np.testing.assert_allclose(ends, np.stack([expected, np.full(n, gamma**3)], 1), atol=1e-6)
            first = np.array(obs["stock"][:, 0], dtype=float)
            begun.add(tuple(first))
        assert len(begun) == 5  # each episode draws its own
    finally:
        env.close()


def test_a_saved_agent_acts_with_the_stock(tmp_path):
    settings = {"n_steps": 8, "batch_size": 8, "epochs": 1, "actor_hidden": (8,), "critic_hidden": (8,), "threads": 1,
                "device": "cpu", "eval_every": None}  # fmt: skip
    spec = stocked(LADDER, initial=[-2, 2], timestep=True, finite_horizon=True)
    agent = api.make("ppo", spec, seed=0, **settings)
    agent.learn(16, run_dir=tmp_path / "run", progress=False, tensorboard=False)
    again = api.load(tmp_path / "run")
    assert again.env_spec.wrappers == spec.wrappers
    env = environments.build_env(again.env_spec)
    obs, _ = env.reset(seed=3, options={"stock": 1.0})
    assert env.action_space.contains(np.int64(again.predict(obs, deterministic=True)[0]))
    assert again.predict(obs, deterministic=True)[0] == agent.predict(obs, deterministic=True)[0]
