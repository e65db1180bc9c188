"""CDSA as it is trained: two systems whose scores are known (D1, D2), its units, and that it is no policy."""

import math

import gymnasium as gym
import numpy as np
import pytest
import torch
from helpers.agents import quiet

from ctrlrl import api
from ctrlrl.data.dataset import Dataset, DatasetInfo
from ctrlrl.engine.corrected import BlendedAgent

NAME = "cdsa"
LINE, REACH = gym.spaces.Box(-np.inf, np.inf, (1,), np.float32), gym.spaces.Box(-5.0, 5.0, (1,), np.float32)
N = 8000


def single_steps(s, a):
    """Episodes of one step with s' = s + a; the rewards are noise."""
    n, ends = len(s), np.ones(len(s), bool)
    s, a = s.astype(np.float32)[:, None], a.astype(np.float32)[:, None]
    return Dataset(
        observations=s, actions=a, rewards=np.random.default_rng(9).normal(size=n).astype(np.float32),
        terminals=ends, timeouts=~ends, next_observations=s + a, next_known=ends, observation_space=LINE,
        action_space=REACH, info=DatasetInfo("line", None),
    )  # fmt: skip


def trained(data, updates, width=64, **settings):
    settings = {"learning_rate": 4e-3, "batch_size": 256, "iteration_steps": 500} | settings
    agent = api.make(NAME, dataset=data, actor_hidden=(width,) * 3, device="cpu", **settings)
    return quiet(agent, updates)


class Recorded:
    """A policy whose actions are given."""

    def __init__(self, actions):
        self.actions = actions[:, None]

    def predict(self, obs, deterministic=False):
        return self.actions, None


# -- D1: linear-Gaussian --------------------------------------------------------------------------

RHO = 0.8 / math.sqrt(0.68)  # of s ~ N(0, 1), a | s ~ N(0.8 s, 0.2^2)


def exact_joint(z, sigma):
    """-(Sigma + sigma^2 I)^-1 z, standardised."""
    return -z @ np.linalg.inv([[1 + sigma**2, RHO], [RHO, 1 + sigma**2]])


@pytest.fixture(scope="module")
def linear():
    rng = np.random.default_rng(0)
    s = rng.normal(size=N)
    return trained(single_steps(s, 0.8 * s + 0.2 * rng.normal(size=N)), 1000, densities="joint")


@pytest.mark.parametrize("sigma,cosine", [(0.03, 0.98), (0.1, 0.99), (0.3, 0.99), (1.0, 0.99)])
def test_d1_the_learned_score_is_the_exact_one(linear, sigma, cosine):
    rng = np.random.default_rng(1)
    z = rng.normal(size=(4000, 2)) @ np.linalg.cholesky([[1, RHO], [RHO, 1]]).T + sigma * rng.normal(size=(4000, 2))
    with torch.no_grad():
        t = torch.tensor(z, dtype=torch.float32)
        parts = [linear.policy.score(t[:, :1], t[:, 1:], torch.tensor(sigma), "joint", k) for k in ("state", "action")]
    found, exact = torch.cat(parts, 1).double().numpy(), exact_joint(z, sigma)
    assert (found * exact).sum() / np.linalg.norm(found) / np.linalg.norm(exact) > cosine
    if sigma >= 0.1:
        assert np.linalg.norm(found - exact) / np.linalg.norm(exact) < 0.15


@pytest.mark.parametrize(
    "sigma,count,noted",
    [(0.1, 1, 0.376), (0.1, 5, 0.091), (0.1, 20, 0.008), (0.3, 1, 0.376), (0.3, 5, 0.106), (0.3, 20, 0.065)],
)  # fmt: skip
def test_d1_the_correction_comes_as_near_as_theory_says(linear, sigma, count, noted):
    """Steps of 0.3 / Lambda_aa leave 0.7 of the distance to the fixed point rho s / (1 + sigma^2)."""
    rng = np.random.default_rng(2)
    s = rng.normal(size=4000)
    a = 0.8 * s + 0.2 * rng.normal(size=4000) + 0.5 * rng.normal(size=4000)
    precision = -exact_joint(np.array([[0.0, 1.0]]), sigma)[0, 1]
    agent = linear.correct(
        Recorded(a), eta_action=0.3 / precision / sigma**2, sigma_start=sigma, sigma_end=sigma, steps=(count,),
        score_on="joint", skip_in_data=False,
    )  # fmt: skip
    found = agent.predict(s[:, None].astype(np.float32))[0][:, 0]
    fixed = 0.8 * s / (1 + sigma**2)
    theory = np.sqrt(np.square(fixed + 0.7**count * (a - fixed) - 0.8 * s).mean())
    assert theory == pytest.approx(noted, rel=0.03, abs=0.003)
    error = np.sqrt(np.square(found - 0.8 * s).mean())
    # 0.005 is the accuracy of the network itself, which is seen where theory says 0.008
    assert error == pytest.approx(theory, rel=0.15, abs=0.005)
    if (sigma, count) == (0.1, 5):
        before, after = (-np.square(x - 0.8 * s).mean() / 0.08 for x in (a, found))
        assert before == pytest.approx(-3.6, abs=0.2) and after == pytest.approx(-0.12, abs=0.05)


def test_dynamics_are_learned(linear):
    """s' = s + a."""
    model, rng = linear.policy, np.random.default_rng(3)
    s = torch.tensor(rng.normal(size=(500, 1)), dtype=torch.float32)
    a = 0.8 * s + 0.2 * torch.randn(500, 1, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        z, unit = model.standard_obs(s), model.standard_action(a / 5.0)
        assert (model.change(z, unit) * model.obs_std - a).square().mean().sqrt() < 0.03
        assert (5.0 * model.unit_action(model.action_for(z, a / model.obs_std)) - a).square().mean().sqrt() < 0.03


def test_nine_tenths_of_the_data_are_left_as_they_are(linear):
    rng = np.random.default_rng(4)
    s = rng.normal(size=4000)
    good, bad = 0.8 * s + 0.2 * rng.normal(size=4000), 0.8 * s + 1.0
    settings = {"steps": (1,), "sigma_end": 0.1, "score_on": "joint"}
    moved = [linear.correct(Recorded(x), **settings).predict(s[:, None])[0][:, 0] - x for x in (good, bad)]
    assert (np.abs(moved[0]) > 1e-5).mean() == pytest.approx(0.1, abs=0.03)
    assert (np.abs(moved[1]) > 1e-5).mean() > 0.99 and (moved[1] < -0.02).mean() > 0.99


# -- D2: two modes --------------------------------------------------------------------------------


def test_d2_actions_go_to_their_own_mode_which_no_regression_does():
    rng = np.random.default_rng(0)

    def modes(n):
        s = rng.normal(size=n)
        side = rng.choice([-1.0, 1.0], n)
        return s, side, side * (0.6 + 0.2 * s) + 0.05 * rng.normal(size=n)

    s, _, a = modes(N)
    agent = trained(single_steps(s, a), 1200, densities="joint")
    s, side, a = modes(4000)
    a = a + 0.25 * rng.normal(size=4000)
    obs = s[:, None].astype(np.float32)
    middle = np.abs(0.6 + 0.2 * s)

    def near(x):
        return (np.abs(np.abs(x) - middle) < 0.15).mean()

    assert near(a) == pytest.approx(0.45, abs=0.03)
    corrected = agent.correct(Recorded(a), sigma_start=0.3, sigma_end=0.05, score_on="joint", skip_in_data=False)
    found = corrected.predict(obs)[0][:, 0]
    assert near(found) >= 0.97
    kept = (np.sign(found) == np.sign(side * (0.6 + 0.2 * s))).mean()
    assert kept > 0.96
    # the mean of the modes, which behaviour cloning gives, is 0
    about = {"observation_space": LINE, "action_space": REACH}
    assert near(BlendedAgent(Recorded(a), Recorded(0.0 * a), 1.0, **about).predict(obs)[0][:, 0]) <= 0.05
