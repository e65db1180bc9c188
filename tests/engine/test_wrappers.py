"""The wrapper that tells a policy which return is still to be reached."""

import gymnasium as gym
import numpy as np
import pytest
from helpers.envs import DictObs
from helpers.trajectories import PAID, Scripted

from ctrlrl.engine import environments
from ctrlrl.engine.wrappers import ReturnToGo


def test_the_wrapper_lowers_the_target_by_the_rewards_and_counts_the_steps():
    env = ReturnToGo(Scripted([1.5, -2.0, 0.25]), 10)
    for _ in range(2):
        obs, info = env.reset(options={"a": 1})
        assert info == {"reset": {"a": 1}}
        numbers = [(float(obs["return_to_go"][0]), int(obs["timestep"][0]))]
        for reward, end in ((1.5, False), (-2.0, False), (0.25, True)):
            assert env.observation_space.contains(obs)
            obs, found, terminated, truncated, info = env.step(None)
            assert (found, terminated, truncated, info) == (reward, False, end, {"t": 1})
            numbers.append((float(obs["return_to_go"][0]), int(obs["timestep"][0])))
        assert numbers == [(10, 0), (8.5, 1), (10.5, 2), (10.25, 3)]
        assert obs["observation"].tolist() == [3, 3, 3]


def test_many_small_rewards_are_taken_off_exactly():
    env = ReturnToGo(Scripted([0.1] * 1000), 1e6)
    env.reset()
    for _ in range(1000):
        obs = env.step(None)[0]
    assert obs["return_to_go"][0] == np.float32(1e6 - 100)


def test_a_dict_observation_keeps_its_entries():
    env = ReturnToGo(DictObs(), 3.0)
    obs, _ = env.reset()
    assert set(obs) == {"image", "vector", "mode", "return_to_go", "timestep"} == set(env.observation_space.spaces)


def test_the_wrapper_refuses_to_be_applied_twice_or_without_a_finite_target():
    with pytest.raises(ValueError, match="return_to_go, timestep already"):
        ReturnToGo(ReturnToGo(Scripted([1]), 1.0), 1.0)
    with pytest.raises(ValueError, match="target_return=nan must be finite"):
        ReturnToGo(Scripted([1]), float("nan"))


def test_a_live_environment_in_the_wrapper_can_be_built_again():
    spec = environments.spec_of(ReturnToGo(gym.make(PAID, disable_env_checker=True), 7.0))
    assert spec.wrappers == (("ctrlrl.engine.wrappers:ReturnToGo", {"target_return": 7.0}),)
    assert environments.build_env(spec).reset()[0]["return_to_go"] == 7.0
