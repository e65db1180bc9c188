"""From names to vector environments."""

from __future__ import annotations

import json
import pickle

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.error import DependencyNotInstalled
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv
from helpers import envs

from ctrlrl.engine import environments, envpool
from ctrlrl.engine.environments import UnknownEnvironment, make_vector, resolve
from ctrlrl.engine.sync import LeanSyncVectorEnv
from ctrlrl.types import EnvSpec

# -- names ----------------------------------------------------------------------------------------


def test_an_id_becomes_a_definite_spec():
    assert resolve("CartPole-v1") == EnvSpec("CartPole-v1", backend="sync")
    assert resolve("CartPole", n_envs=3, backend="async") == EnvSpec("CartPole-v1", n_envs=3, backend="async")
    spec = resolve(EnvSpec("CartPole-v1", {"a": 1}, n_envs=2, backend="sync"), env_kwargs={"b": 2}, n_envs=5)
    assert spec == EnvSpec("CartPole-v1", {"a": 1, "b": 2}, n_envs=5, backend="sync")
    assert resolve(envs.env_id("OnlyTruncates")).id == "helpers.envs:test/OnlyTruncates-v0"


def test_a_spec_survives_json():
    spec = resolve(EnvSpec(envs.env_id("OnlyTruncates"), {"length": 2}, (("helpers.envs:AddOne", {"amount": 2.0}),), 2))
    again = EnvSpec(**json.loads(json.dumps(spec.__dict__)))
    assert resolve(again) == spec
    env = make_vector(resolve(again))
    env.reset(seed=0)
    assert env.step(np.zeros((2, 1), np.float32))[1].tolist() == [3.0, 3.0]


def test_live_environments_pass_through():
    env = envs.OnlyTruncates()
    assert resolve(env) is env and environments.width(env) == 1
    with pytest.raises(ValueError, match="n_envs=4 cannot be set for a live environment"):
        resolve(env, n_envs=4)
    with pytest.raises(TypeError, match="found int"):
        resolve(3)


@pytest.mark.parametrize(
    ("wrong", "hint"),
    [
        ("HalfChetah-v5", "HalfCheetah-v5"),
        ("HalfCheetah-v6", "HalfCheetah-v5"),
        ("halfcheetah-v5", "HalfCheetah-v5"),
        ("CartPole-v7", "CartPole-v1"),
        ("no_such_package:Thing-v0", "'no_such_package', which is not installed"),
        ("helpers.envs:test/OnlyTruncate-v0", "test/OnlyTruncates-v0"),
        ("completely different", "ctrlrl list envs"),
    ],
)
def test_unknown_names(wrong, hint):
    with pytest.raises(UnknownEnvironment, match=hint):
        resolve(wrong)


def test_an_uninstalled_companion_package_is_named(monkeypatch):
    monkeypatch.setitem(environments._NAMESPACES, "ctrlrl", ("ctrlrl_envs_that_is_missing", "ctrlrl"))
    with pytest.raises(UnknownEnvironment, match=r"ctrlrl_envs_that_is_missing.*pip install 'ctrlrl'"):
        resolve("ctrlrl/Anything-v0")


def test_a_missing_dependency_names_the_extra(monkeypatch):
    def missing(*args, **kwargs):
        raise DependencyNotInstalled("MuJoCo is not installed")

    monkeypatch.setattr(gym, "make", missing)
    with pytest.raises(DependencyNotInstalled, match=r"pip install 'gymnasium\[mujoco\]'"):
        environments.build_env(EnvSpec("Hopper-v5"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"n_envs": 0}, "at least 1"),
        ({"backend": "threads"}, "expected one of auto, sync, async, envpool"),
        ({"env_kwargs": {"f": object()}}, "JSON values"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        resolve("CartPole-v1", **settings)


def test_a_wrapper_that_does_not_exist():
    with pytest.raises(ValueError, match=r"helpers\.envs:Nothing"):
        environments.build_env(EnvSpec("CartPole-v1", wrappers=(("helpers.envs:Nothing", {}),)))


def test_auto_takes_envpool_only_for_what_agrees(monkeypatch):
    monkeypatch.setattr(envpool, "ids", lambda: frozenset({"Hopper-v5", "Pusher-v4", "FrozenLake-v1"}))
    monkeypatch.setattr(envpool, "same_physics", lambda: False)
    assert resolve("Hopper-v5", n_envs=8).backend == "sync", "an older MuJoCo computes otherwise than EnvPool's"
    monkeypatch.setattr(envpool, "same_physics", lambda: True)
    assert resolve("Hopper-v5", n_envs=8).backend == "envpool"
    assert resolve("Hopper-v5").backend == "sync", "one environment is faster in this process"
    assert resolve("Hopper-v5", n_envs=8, env_kwargs={"ctrl_cost_weight": 0.5}).backend == "sync"
    assert resolve(EnvSpec("Hopper-v5", wrappers=(("helpers.envs:AddOne", {}),), n_envs=8)).backend == "sync"
    assert resolve("Pusher-v4", n_envs=8).backend == resolve("FrozenLake-v1", n_envs=8).backend == "sync"
    monkeypatch.setattr(envpool, "ids", frozenset)
    assert resolve("Hopper-v5", n_envs=8).backend == "sync"


def test_the_spec_of_a_live_environment():
    env = gym.make("CartPole-v1", sutton_barto_reward=True)
    assert environments.spec_of(env) == EnvSpec("CartPole-v1", {"sutton_barto_reward": True}, backend="sync")
    wrapped = gym.wrappers.TimeAwareObservation(env)
    spec = environments.spec_of(wrapped)
    assert spec is not None and environments.build_env(spec).observation_space == wrapped.observation_space
    assert environments.spec_of(envs.OnlyTruncates()) is None
    assert environments.spec_of(gym.wrappers.TransformReward(env, lambda r: r)) is None


def test_spaces_and_width():
    obs, action = environments.spaces(resolve("CartPole-v1", n_envs=3))
    assert obs.shape == (4,) and action.n == 2 and environments.width(resolve("CartPole-v1", n_envs=3)) == 3


def test_listed():
    found = dict(environments.listed())
    assert "sync" in found["CartPole-v1"] and "HalfCheetah-v4" not in found


def test_torch_threads_are_restored():
    before = torch.get_num_threads()
    with environments.torch_threads(1):
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == before


# -- saved spaces ---------------------------------------------------------------------------------

SPACES = [
    gym.spaces.Box(-np.inf, np.inf, (3,), np.float64),
    gym.spaces.Box(np.array([-1.0, -np.inf], np.float32), np.array([0.1, 2.0], np.float32)),
    gym.spaces.Box(0, 255, (84, 84, 3), np.uint8),
    gym.spaces.Box(-1, 1, (), np.float32),
    gym.spaces.Discrete(5, start=-2),
    gym.spaces.MultiDiscrete([2, 3], start=[1, 0]),
    gym.spaces.MultiDiscrete(np.array([[2, 3], [4, 5]])),
    gym.spaces.MultiBinary(4),
    gym.spaces.MultiBinary([2, 3]),
    gym.spaces.Dict({"b": gym.spaces.Discrete(2), "a": gym.spaces.Dict({"x": gym.spaces.Box(0, 1, (2,))})}),
]


@pytest.mark.parametrize("space", SPACES, ids=str)
def test_spaces_survive_json(space):
    text = json.dumps(environments.space_to_json(space), allow_nan=False)
    again = environments.space_from_json(json.loads(text))
    assert again == space and again.dtype == space.dtype and len(text) < 400
    if isinstance(space, gym.spaces.Dict):
        assert list(again.spaces) == list(space.spaces)


def test_spaces_that_cannot_be_saved():
    with pytest.raises(TypeError, match="Tuple"):
        environments.space_to_json(gym.spaces.Tuple([gym.spaces.Discrete(2)]))
    with pytest.raises(ValueError, match="Hyper"):
        environments.space_from_json({"type": "Hyper"})
    with pytest.raises(ValueError, match="lacks the entry 'n'"):
        environments.space_from_json({"type": "Discrete"})


# -- the lean vector environment ------------------------------------------------------------------

MAKERS = {
    "noisy": envs.Noisy,
    "truncates": lambda: envs.OnlyTruncates(3),
    "both": lambda: envs.BothAtOnce(2),
    "dict": lambda: envs.DictObs(3),
    "image": lambda: envs.Image(2),
    "choice": lambda: envs.Choice(3),
    "cartpole": lambda: gym.make("CartPole-v1"),
    "hopper": lambda: gym.make("Hopper-v5"),
}


def equal(a, b) -> bool:
    if isinstance(a, dict):
        return set(a) == set(b) and all(equal(a[k], b[k]) for k in a)
    return np.asarray(a).dtype == np.asarray(b).dtype and np.array_equal(a, b)


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("copy", [True, False])
def test_same_step_equals_gymnasium(name, copy):
    lean = LeanSyncVectorEnv([MAKERS[name]] * 3, copy=copy, keep_infos=True)
    own = SyncVectorEnv([MAKERS[name]] * 3, autoreset_mode=AutoresetMode.SAME_STEP)
    assert lean.observation_space == own.observation_space and lean.action_space == own.action_space
    assert equal(lean.reset(seed=5)[0], own.reset(seed=5)[0])
    own.action_space.seed(0)
    ends = 0
    for _ in range(120):
        action = own.action_space.sample()
        a, b = lean.step(action), own.step(action)
        assert equal(a[0], b[0]) and all(equal(x, y) for x, y in zip(a[1:4], b[1:4], strict=True))
        assert set(a[4]) == set(b[4])
        if "final_obs" in b[4]:
            ends += 1
            assert np.array_equal(a[4]["_final_obs"], b[4]["_final_obs"])
            for x, y in zip(a[4]["final_obs"], b[4]["final_obs"], strict=True):
                assert (x is None and y is None) or (equal(x, y) if isinstance(x, dict) else np.array_equal(x, y))
    assert ends > 1


@pytest.mark.parametrize("name", ["noisy", "dict", "cartpole"])
def test_disabled_equals_gymnasium(name):
    lean = LeanSyncVectorEnv([MAKERS[name]] * 3, AutoresetMode.DISABLED)
    own = SyncVectorEnv([MAKERS[name]] * 3, autoreset_mode=AutoresetMode.DISABLED)
    assert equal(lean.reset(seed=[4, 4, 9])[0], own.reset(seed=[4, 4, 9])[0])
    for k in range(100):
        action = own.action_space.sample()
        a, b = lean.step(action), own.step(action)
        assert equal(a[0], b[0]) and all(equal(x, y) for x, y in zip(a[1:4], b[1:4], strict=True))
        if (ended := a[2] | a[3]).any():
            options = {"reset_mask": ended}
            assert equal(
                lean.reset(seed=[k] * 3, options=options)[0], own.reset(seed=[k] * 3, options=dict(options))[0]
            )
            assert "reset_mask" in options


def test_disabled_refuses_ended_environments_or_leaves_them_alone():
    env = LeanSyncVectorEnv([lambda: envs.OnlyTruncates(1)] * 2, AutoresetMode.DISABLED)
    env.reset(seed=0)
    action = np.zeros((2, 1), np.float32)
    env.step(action)
    with pytest.raises(RuntimeError, match="reset_mask"):
        env.step(action)
    env.reset(options={"reset_mask": np.array([True, True])})
    env.skip_ended = True
    first = env.step(action)
    second = env.step(action)
    assert equal(first[0], second[0]) and second[1].tolist() == [0, 0] and second[3].all()
    for bad in (np.array([1, 0]), np.array([False, False]), [True, False], np.array([True])):
        with pytest.raises(ValueError, match="reset_mask"):
            env.reset(options={"reset_mask": bad})


def test_attributes_and_calls():
    env = LeanSyncVectorEnv([lambda: envs.ParametricToy(3)] * 2)
    env.call("set_params", {"gain": 4.0})
    assert env.get_attr("gain") == (4.0, 4.0)
    env.set_attr("gain", [1.0, 2.0])
    assert env.get_attr("gain") == (1.0, 2.0)
    with pytest.raises(ValueError, match="3 values"):
        env.set_attr("gain", [1, 2, 3])
    with pytest.raises(ValueError, match="3 seeds for 2"):
        env.reset(seed=[1, 2, 3])
    assert env.render() == (None, None)
    env.close()


def test_environments_that_differ_are_refused():
    with pytest.raises(ValueError, match="environment 1 has another observation space"):
        LeanSyncVectorEnv([envs.OnlyTruncates, envs.Image])


# -- construction ---------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["sync", "async"])
def test_vector_environments_keep_sticky_params_across_autoreset(backend):
    env = make_vector(EnvSpec(envs.env_id("ParametricToy"), {"length": 2}, n_envs=2, backend=backend))
    assert isinstance(env, AsyncVectorEnv if backend == "async" else LeanSyncVectorEnv)
    assert env.metadata["autoreset_mode"] == AutoresetMode.SAME_STEP
    environments.set_params(env, [{"gain": 3.0}, {"gain": 4.0}])
    env.reset(seed=0)
    for _ in range(5):
        assert env.step(np.zeros((2, 1), np.float32))[1].tolist() == [3.0, 4.0]
    with pytest.raises(ValueError, match="3 parameter mappings for 2"):
        environments.set_params(env, [{"gain": 3.0}] * 3)
    env.close()


def test_workers_can_be_sent_to_another_process():
    env = make_vector(EnvSpec("CartPole-v1", n_envs=2, backend="async"))
    for fn in env.env_fns:
        pickle.loads(pickle.dumps(fn))
    env.close()
