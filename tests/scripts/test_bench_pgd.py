"""The benchmark of policy-guided diffusion: what it takes for the truth is the simulator's own."""

import importlib
import sys
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch

SCRIPTS = Path(__file__).parents[2] / "scripts"


@pytest.fixture(scope="module")
def pgd():
    sys.path.insert(0, str(SCRIPTS))
    try:
        return importlib.import_module("pgd_dynamics")
    finally:
        sys.path.remove(str(SCRIPTS))


@pytest.fixture(scope="module")
def pendulum(pgd):
    """Two episodes of the weak policy."""
    return pgd.pendulum_set(400, seed=3)


def steps_of(pgd, data, length):
    """The first rows of each episode as trajectories."""
    return pgd.Steps(*(x.unflatten(0, (-1, pgd.EPISODE))[:, :length] for x in pgd.recorded(data)))


def test_the_pendulums_own_steps_have_no_error_at_any_horizon(pgd, pendulum):
    behaviour, target = pgd.pendulum_policies()
    simulator, std = pgd.Simulator("Pendulum-v1"), pendulum.observations.std(0)
    steps = steps_of(pgd, pendulum, 32)
    found = pgd.measure(simulator, steps, std, target, behaviour)
    assert found["one_step"]["mean"] < 1e-11 and found["open_loop"]["32"]["mean"] < 1e-9
    # after k + 1 steps off by as many deviations, in one of three dimensions
    far = torch.zeros(32, 3)
    far[:, 2] = torch.arange(1, 33) * float(std[2])
    found = pgd.measure(simulator, steps._replace(next_obs=steps.next_obs + far), std, target, behaviour)
    assert found["one_step"]["mean"] == pytest.approx(sum(k * k for k in range(1, 33)) / 32 / 3, rel=1e-4)
    assert {h: e["median"] for h, e in found["open_loop"].items()} == pytest.approx(
        {"1": 1 / 3, "8": 64 / 3, "32": 1024 / 3}, rel=1e-4
    )


def test_likelihoods_are_those_of_the_policy_that_acted(pgd, pendulum):
    behaviour, target = pgd.pendulum_policies()
    rows = pgd.recorded(pendulum)
    entropy = 0.5 * np.log(2 * np.pi * np.e * pgd.STD**2)
    mine, other = (float(p.log_prob(rows.obs, rows.action).mean()) for p in (behaviour, target))
    assert mine == pytest.approx(-entropy, abs=0.12)
    assert other == pytest.approx(-entropy - 0.5 * (pgd.OFFSET / pgd.STD) ** 2, abs=0.35)


def test_the_data_never_cross_an_episode_and_have_the_environments_actions(pendulum):
    assert len(pendulum.episodes) == 2 and pendulum.timeouts.sum() == 2 and not pendulum.terminals.any()
    assert 1.0 < np.abs(pendulum.actions).max() <= 2.0
    same = pendulum.observations[1:] == pendulum.next_observations[:-1]
    assert same.all(1)[np.flatnonzero(~pendulum.ends[:-1])].all()


def test_half_cheetahs_observation_sets_the_state_that_made_it(pgd):
    env, simulator = gym.make("HalfCheetah-v5").unwrapped, pgd.Simulator("HalfCheetah-v5")
    rng = np.random.default_rng(0)
    obs, _ = env.reset(seed=0)
    before, actions, after = [], [], []
    for _ in range(60):
        action = rng.uniform(-1.0, 1.0, 6)
        following, *_ = env.step(action)
        before, actions, after = [*before, obs], [*actions, action], [*after, following]
        obs = following
    assert np.abs(env.data.qpos[0]) > 1e-3  # the place along the track has changed
    found = simulator.following(np.stack(before), np.stack(actions))
    assert np.abs(found - np.stack(after)).max() < 1e-6


def test_other_environments_are_refused(pgd):
    with pytest.raises(ValueError, match="Hopper"):
        pgd.Simulator("Hopper-v5")


def test_merging_averages_over_seeds_and_leaves_out_what_is_missing(pgd):
    def shard(error, likelihood):
        step = {"mean": error, "median": 1.0, "lost": 0.0}
        row = {"source": "x", "one_step": step, "open_loop": {"1": step}, "log_target": likelihood, "ends": 0.0}
        return {"task": "Pendulum-v1", "rows": [row | {"log_behaviour": 0.0}]}

    merged = pgd.table([shard(2.0, -1.0), shard(None, -3.0)])["Pendulum-v1"]["x"]
    assert merged["one_step"]["mean"] == merged["open_loop"]["1"]["mean"] == 2.0
    assert merged["log_target"] == -2.0 and merged["seeds"] == 2
