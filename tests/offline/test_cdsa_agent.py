"""The agent of CDSA: its units, what it saves, and that it is no policy."""

import dataclasses

import numpy as np
import pytest
import torch
from helpers.agents import quiet
from helpers.envs import DictObs, env_id
from helpers.offline import recorded, tiny
from test_cdsa import NAME, Recorded

from ctrlrl import api
from ctrlrl.engine.config import ConfigError
from ctrlrl.engine.corrected import CorrectionConfig
from ctrlrl.offline import cdsa as module

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
