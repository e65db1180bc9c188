"""CDSA as it is trained: two systems whose scores are known (D1, D2), its units, and that it is no policy."""

import dataclasses
import math

import gymnasium as gym
import numpy as np
import pytest
import torch
from helpers.agents import quiet
from helpers.envs import DictObs, env_id
from helpers.offline import recorded, tiny

from ctrlrl import api
from ctrlrl.data.dataset import Dataset, DatasetInfo
from ctrlrl.engine.config import ConfigError
from ctrlrl.engine.corrected import BlendedAgent, CorrectionConfig
from ctrlrl.offline import cdsa as module

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


# -- the agent ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small():
    return quiet(api.make(NAME, dataset=recorded(), **tiny(NAME)), 6)


def test_quantities_are_standardised_over_the_rows_that_are_learned_from(small):
    data, model = recorded(), small.policy
    rows = data.usable
    obs, change = data.observations[rows], (data.next_observations - data.observations)[rows]
    for name, x in {"obs": obs, "action": data.actions[rows], "change": change}.items():
        np.testing.assert_allclose(getattr(model, f"{name}_mean"), x.mean(0), rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(getattr(model, f"{name}_std"), x.std(0), rtol=1e-4)
    assert model.typical.min() > 0


def test_rewards_are_of_no_account(small):
    data = recorded()
    other = dataclasses.replace(data, rewards=data.rewards * -3.0 + 1.0)
    again = quiet(api.make(NAME, dataset=other, **tiny(NAME)), 6)
    for a, b in zip(small.policy.parameters(), again.policy.parameters(), strict=True):
        assert torch.equal(a, b)


def test_noise_levels_are_uniform_in_the_logarithm_and_noise_has_every_dimension(small):
    drawn = small.algorithm.noise(2, 5000, 3 + 1, torch.Generator().manual_seed(0))
    assert drawn["uniform"].shape == (2, 5000) and drawn["noise"].shape == (2, 5000, 3 + 1)
    assert drawn["uniform"].mean() == pytest.approx(0.5, abs=0.02) and drawn["noise"].std() == pytest.approx(
        1, abs=0.02
    )
    assert small.policy.sigma_range == (0.03, 1.0)


def test_a_saved_agent_corrects_as_before(small, tmp_path):
    small.save(tmp_path / "run")
    again = api.load(tmp_path / "run")
    policy, obs = Recorded(np.full(4, 0.7)), np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)
    settings = {"eta_action": 2.0, "eta_state": 1.0}
    first = small.correct(policy, **settings).predict(obs)[0]
    np.testing.assert_array_equal(again.correct(policy, CorrectionConfig(**settings)).predict(obs)[0], first)
    np.testing.assert_array_equal(module.correct(policy, again, **settings).predict(obs)[0], first)
    assert again.correct(policy).env_spec == small.env_spec and again.correct(policy, seed=4).seed == 4


def test_it_is_no_policy_and_says_what_to_do(small):
    asked = [lambda: small.predict(np.zeros(3)), small.evaluate, small.session]
    for ask in asked:
        with pytest.raises(ValueError, match=r"agent\.correct\(policy\)"):
            ask()
    assert not small.can_evaluate


def test_densities_say_what_is_learned():
    networks = {
        "both": {"joint", "conditional", "marginal"},
        "joint": {"joint"},
        "conditional": {"conditional", "marginal"},
    }
    for densities, wanted in networks.items():
        agent = api.make(NAME, dataset=recorded(), **tiny(NAME, densities=densities))
        found = {k for k, v in agent.policy.named_children() if v is not None} & networks["both"]
        assert found == wanted
    quiet(agent, 3)
    with pytest.raises(ValueError, match="densities='both'"):
        agent.correct(Recorded(np.zeros(1)), score_on="joint")


def test_what_cannot_be_done_is_refused(small):
    with pytest.raises(ValueError, match="learned nothing yet"):
        api.make(NAME, dataset=recorded(), **tiny(NAME)).correct(Recorded(np.zeros(1)))
    with pytest.raises(ValueError, match="not both"):
        small.correct(Recorded(np.zeros(1)), CorrectionConfig(), eta_state=1.0)
    with pytest.raises(TypeError, match="eta_stat"):
        small.correct(Recorded(np.zeros(1)), eta_stat=1.0)
    with pytest.raises(ConfigError, match="encoder"):
        api.make(NAME, dataset=recorded(), encoder="helpers.off_policy:Double", **tiny(NAME))
    with pytest.raises(TypeError, match="flat observations"):
        api.make(NAME, dataset=recorded(DictObs.observation_space, env=env_id("DictObs")), **tiny(NAME))
    for settings in ({"sigma_low": 0.0}, {"sigma_high": 0.01}, {"densities": "all"}):
        with pytest.raises(ValueError, match=next(iter(settings))):
            api.make(NAME, dataset=recorded(), **tiny(NAME, **settings))


def test_the_settings_are_those_of_the_reconstruction():
    config, own = api.get_method(NAME).blueprint()
    assert (config.batch_size, config.learning_rate, config.actor_schedule) == (512, 1e-3, "cosine")
    assert config.network.actor_hidden == (256, 256, 256) and config.network.activation == "silu"
    assert (own.sigma_low, own.sigma_high, own.densities) == (0.03, 1.0, "both") and config.eval_every is None
