"""Known ends against those of the environments themselves."""

import math

import gymnasium as gym
import numpy as np
import pytest
import torch

from ctrlrl.engine import terminations
from ctrlrl.types import EnvSpec


def compared(spec, steps=150, seed=0):
    """Ends by the environment and by what is known of it, along random actions and on through the ends."""
    ends = terminations.known(spec)
    env = gym.make(spec.id, **spec.kwargs).unwrapped
    rng = np.random.default_rng(seed)
    truth, following = [], []
    env.reset(seed=seed)
    for t in range(steps):
        action = rng.uniform(env.action_space.low, env.action_space.high)
        obs, _, terminated, _, _ = env.step(action)
        truth.append(terminated)
        following.append(obs)
        if t % 40 == 39:
            env.reset()
    env.close()
    after = torch.from_numpy(np.asarray(following, np.float32))
    return truth, ends(torch.zeros_like(after), torch.zeros(len(after), 1), after).tolist()


@pytest.mark.parametrize(
    "id,kwargs",
    [
        ("Hopper-v5", {}), ("Hopper-v4", {}), ("Walker2d-v5", {}),
        ("Hopper-v5", {"exclude_current_positions_from_observation": False}),
        ("Walker2d-v5", {"exclude_current_positions_from_observation": False, "healthy_angle_range": (-0.3, 0.2)}),
        ("Hopper-v5", {"healthy_z_range": [1.1, 1.25], "healthy_angle_range": [-9, 9], "healthy_state_range": [-3, 4]}),
        ("Ant-v5", {"healthy_z_range": (0.45, 0.7)}),
        ("Ant-v4", {"use_contact_forces": True, "healthy_z_range": (0.45, 0.7)}),
        ("Ant-v5", {"healthy_z_range": (0.45, 0.7), "exclude_current_positions_from_observation": False}),
        ("Humanoid-v5", {}),
    ],
)  # fmt: skip
def test_ends_are_those_of_the_environment(id, kwargs):
    truth, found = compared(EnvSpec(id, kwargs))
    assert found == truth
    assert 5 < sum(truth) < len(truth) - 5  # both are seen


def test_ants_own_range_is_known():
    """It hardly ever leaves it at random, whose ends are healthy."""
    ends = terminations.known(EnvSpec("Ant-v5"))
    obs = torch.zeros(7, 105)
    obs[:, 0] = torch.tensor([0.19, 0.21, 0.99, 1.01, 0.5, 0.2, 1.0])
    obs[4, 3] = math.nan
    assert ends(obs, obs[:, :8], obs).tolist() == [True, False, False, True, True, False, False]


@pytest.mark.parametrize("version", "2345")
def test_the_walkers_have_the_same_ends_in_every_version(version):
    obs = torch.tensor([[1.25, 0.0, *[0.0] * 15], [0.5, 0.0, *[0.0] * 15], [1.25, 0.5, *[0.0] * 15]])
    for name, expected in (("Hopper", [False, True, True]), ("Walker2d", [False, True, False])):
        ends = terminations.known(EnvSpec(f"{name}-v{version}"))
        assert ends(obs, obs, obs).tolist() == expected


@pytest.mark.parametrize(
    "spec",
    [
        EnvSpec("HalfCheetah-v5"), EnvSpec("Swimmer-v4"), EnvSpec("Pendulum-v1"),
        EnvSpec("Hopper-v5", {"terminate_when_unhealthy": False}),
    ],
)  # fmt: skip
def test_some_environments_are_known_to_have_no_end(spec):
    obs = torch.full((3, 17), 1e6)
    assert terminations.known(spec)(obs, obs, obs).tolist() == [False] * 3


@pytest.mark.parametrize(
    "spec",
    [
        None, EnvSpec("CartPole-v1"), EnvSpec("Hopper-v6"), EnvSpec("Hopper"), EnvSpec("module:MyHopper-v5"),
        EnvSpec("Hopper-v5", wrappers=(("gymnasium.wrappers:FlattenObservation", {}),)),
    ],
)  # fmt: skip
def test_of_others_nothing_is_known(spec):
    assert terminations.known(spec) is None


def falls(obs, action, following):
    return following[:, 0] < 0


def test_the_setting_names_what_ends():
    hopper = EnvSpec("Hopper-v5")
    obs = torch.tensor([[-1.0, *[0.0] * 10], [1.25, *[0.0] * 10]])
    assert terminations.chosen("none", hopper) is None
    assert terminations.chosen(f"{__name__}:falls", None) is falls
    assert terminations.chosen("auto", hopper)(obs, obs, obs).tolist() == [True, False]
    with pytest.raises(ValueError, match="termination function"):
        terminations.chosen("no.such:thing", hopper)
