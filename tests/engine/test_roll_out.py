"""Rolling policies out: what stands in every column, and how likely the actions were."""

import math

import numpy as np
import pytest
import torch
from engine.data_making_parts import HIGH, LOPSIDED, LOW, assert_same, counted, sac, zeros
from helpers import agents, off_policy
from helpers.envs import env_id
from torch.distributions import AffineTransform, Categorical, Normal, TanhTransform, TransformedDistribution

from ctrlrl import api
from ctrlrl.data.dataset import DatasetError
from ctrlrl.engine.data_making import make
from ctrlrl.engine.roll_out import roll_out
from ctrlrl.nets.actors import GaussianActor, QNetworkConfig
from ctrlrl.types import EnvSpec

# -- known transitions ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "terminals", "timeouts"),
    [("OnlyTruncates", [], [2, 5, 7]), ("OnlyTerminates", [2, 5], [7]), ("BothAtOnce", [2, 5], [2, 5, 7])],
)
def test_every_row_of_a_counting_environment_is_the_one_it_must_be(name, terminals, timeouts):
    data = counted(name, 8)
    assert data.observations[:, 0].tolist() == [10, 11, 12, 20, 21, 22, 30, 31]
    assert data.next_observations[:, 0].tolist() == [11, 12, 13, 21, 22, 23, 31, 32]
    assert data.rewards.tolist() == [1, 2, 3, 1, 2, 3, 1, 2]
    assert np.flatnonzero(data.terminals).tolist() == terminals
    assert np.flatnonzero(data.timeouts).tolist() == timeouts
    assert data.next_known.all() and data.returns.tolist() == [6, 6, 3]
    assert data.observations.dtype == data.next_observations.dtype == data.rewards.dtype == np.float32
    assert data.observation_space.dtype == np.float64 and data.infos == {}


def test_an_end_at_the_last_step_needs_no_cut():
    assert not counted("OnlyTerminates", 6).timeouts.any()


def test_dict_observations_and_the_number_of_the_episode_reach_the_policy():
    seen = []

    def act(obs, index):
        seen.append((obs["vector"][0, 0], obs["mode"][0], index[0]))
        return np.zeros((1, 1), np.float32)

    data = roll_out(act, EnvSpec(env_id("DictObs")), 5, n_envs=1)
    assert seen == [(10, 0, 0), (11, 1, 0), (12, 2, 0), (20, 0, 1), (21, 1, 1)]
    assert data.observations["mode"].tolist() == [0, 1, 2, 0, 1]
    assert data.next_observations["mode"].tolist() == [1, 2, 3, 1, 2]
    assert data.observations["image"].dtype == np.uint8 and data.observations["vector"].dtype == np.float32


def test_positions_and_velocities_of_mujoco_are_those_before_the_step():
    data = roll_out(None, EnvSpec("InvertedPendulum-v5"), 30, seed=1, n_envs=2)
    np.testing.assert_array_equal(np.hstack([data.infos["qpos"], data.infos["qvel"]]), data.observations)
    assert len(data.episodes) > 2 and data.infos["qpos"].dtype == np.float32


# -- seeds ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["uniform", "sac", "ppo", "function"])
def test_data_do_not_depend_on_how_many_environments_run_side_by_side(policy):
    given = {
        "uniform": lambda: None, "sac": lambda: off_policy.make("sac", seed=3), "ppo": lambda: agents.make(seed=3),
        "function": lambda: lambda obs, index: np.tanh(obs[:, :1] + index[:, None]).astype(np.float32),
    }[policy]()  # fmt: skip
    one, many = (roll_out(given, EnvSpec(agents.NOISY), 90, seed=2, n_envs=n) for n in (1, 4))
    assert len(one.episodes) > 5
    assert_same(one, many, rtol=1e-5, atol=1e-5)


def test_the_same_seed_gives_the_same_data_and_another_seed_others():
    agent = off_policy.make("sac", seed=3)
    one, again, other = (roll_out(agent, EnvSpec(agents.NOISY), 64, seed=s, n_envs=4) for s in (7, 7, 8))
    assert_same(one, again)
    assert not np.isclose(one.observations, other.observations).any()
    assert one.infos["action_log_probs"].std() > 0


def test_the_mode_is_taken_where_it_is_asked_for():
    agent = sac()
    data = roll_out(agent, EnvSpec(LOPSIDED), 20, stochastic=False, n_envs=2)
    expected, _ = agent.predict(data.observations, deterministic=True)
    np.testing.assert_allclose(data.actions, expected, atol=1e-6)
    assert "action_log_probs" not in data.infos and data.info.about["stochastic"] is False


# -- log-probabilities ----------------------------------------------------------------------------


def test_log_probs_of_a_squashed_gaussian_are_in_the_environments_units():
    agent = sac()
    data = roll_out(agent, EnvSpec(LOPSIDED), 200, seed=4)
    with torch.no_grad():
        mean, log_std = off_policy.PlainGaussian(agent.policy).parts(torch.from_numpy(data.observations))
    low, high = torch.from_numpy(LOW).double(), torch.from_numpy(HIGH).double()
    scaled = AffineTransform((low + high) / 2, (high - low) / 2)
    density = TransformedDistribution(Normal(mean.double(), log_std.exp().double()), [TanhTransform(), scaled])
    expected = density.log_prob(torch.from_numpy(data.actions).double()).sum(-1)
    # closer to a bound the float32 action does not say what it was before the squashing
    clear = (np.abs(2 * (data.actions - LOW) / (HIGH - LOW) - 1) < 0.99).all(1)
    assert clear.sum() > 150 and expected[clear].std() > 0.3
    np.testing.assert_allclose(data.infos["action_log_probs"][clear], expected[clear], atol=2e-3)


@pytest.mark.parametrize("action_map", ["clip", "tanh"])
def test_log_probs_of_a_bounded_gaussian(action_map):
    agent = api.make("ppo", LOPSIDED, n_envs=1, **agents.TINY | {"action_map": action_map, "log_std_init": 0.0}, seed=1)
    data = roll_out(agent, EnvSpec(LOPSIDED), 300, seed=4)
    actions = torch.from_numpy(data.actions).double()
    with torch.no_grad():
        found = agent.policy.distribution(torch.from_numpy(data.observations))
        normal = Normal(found.mean.double(), found.log_std.exp().double())
    low, high = torch.from_numpy(LOW).double(), torch.from_numpy(HIGH).double()
    if action_map == "tanh":
        scaled = AffineTransform((low + high) / 2, (high - low) / 2)
        by_dimension = TransformedDistribution(normal, [TanhTransform(), scaled]).log_prob(actions)
    else:
        at_low, at_high = actions <= low, actions >= high
        assert at_low.any() and at_high.any() and (~at_low & ~at_high).any()
        by_dimension = normal.log_prob(actions)
        by_dimension = torch.where(at_low, normal.cdf(low.expand_as(actions)).log(), by_dimension)
        by_dimension = torch.where(at_high, (1 - normal.cdf(high.expand_as(actions))).log(), by_dimension)
    np.testing.assert_allclose(data.infos["action_log_probs"], by_dimension.sum(-1), atol=2e-3)


def test_log_probs_of_an_offline_gaussian_are_in_the_environments_units():
    agent = sac()
    actor = GaussianActor(agent.observation_space, agent.action_space, QNetworkConfig(actor_hidden=(8,)))
    agent.policy = actor
    data = roll_out(agent, EnvSpec(LOPSIDED), 300, seed=4)
    actions = torch.from_numpy(data.actions).double()
    low, high = torch.from_numpy(LOW).double(), torch.from_numpy(HIGH).double()
    middle, half = (low + high) / 2, (high - low) / 2
    with torch.no_grad():
        normal = Normal(middle + half * actor.mode(torch.from_numpy(data.observations)).double(), half)
    expected = normal.log_prob(actions)
    expected = torch.where(actions <= low, normal.cdf(low.expand_as(actions)).log(), expected)
    expected = torch.where(actions >= high, (1 - normal.cdf(high.expand_as(actions))).log(), expected)
    assert (actions <= low).any() and (actions >= high).any()
    np.testing.assert_allclose(data.infos["action_log_probs"], expected.sum(-1), atol=2e-3)


def test_a_flow_has_no_log_probs():
    agent = api.make("flow_grpo", agents.NOISY, **agents.EPISODES | {"horizon": 6})
    data = roll_out(agent, EnvSpec(agents.NOISY), 20, seed=4)
    assert data.infos == {} and len(np.unique(data.actions)) > 10


def test_log_probs_of_two_choices_at_once():
    agent = agents.make(env_id("Switches"), n_envs=1)
    data = roll_out(agent, EnvSpec(env_id("Switches")), 30)
    with torch.no_grad():
        found = agent.policy.distribution(torch.from_numpy(data.observations))
    parts = [
        Categorical(logits=p.logits).log_prob(torch.from_numpy(data.actions[:, k])) for k, p in enumerate(found.parts)
    ]
    np.testing.assert_allclose(data.infos["action_log_probs"], sum(parts), atol=1e-5)


def test_log_probs_of_a_choice():
    agent = agents.make(env_id("Choice"), n_envs=1)
    data = roll_out(agent, EnvSpec(env_id("Choice")), 30)
    with torch.no_grad():
        logits = agent.policy.distribution(torch.from_numpy(data.observations)).logits
    expected = Categorical(logits=logits).log_prob(torch.from_numpy(data.actions) - 5)
    assert set(data.actions.tolist()) == {5, 6, 7}
    np.testing.assert_allclose(data.infos["action_log_probs"], expected, atol=1e-5)


def test_random_actions_are_uniform_over_the_space():
    data = roll_out(None, EnvSpec(LOPSIDED), 2000)
    unit = (data.actions - LOW) / (HIGH - LOW)
    assert unit.min() >= 0 and unit.max() <= 1
    np.testing.assert_allclose(np.quantile(unit, [0.1, 0.5, 0.9], axis=0), [[0.1] * 2, [0.5] * 2, [0.9] * 2], atol=0.04)
    assert abs(np.corrcoef(unit.T)[0, 1]) < 0.1
    np.testing.assert_allclose(data.infos["action_log_probs"], -math.log(0.4 * 9.0), rtol=1e-6)
    choice = roll_out(None, EnvSpec(env_id("Choice")), 300)
    assert np.bincount(choice.actions)[5:].min() > 70 and len(np.bincount(choice.actions)) == 8
    np.testing.assert_allclose(choice.infos["action_log_probs"], -math.log(3), rtol=1e-6)


def test_a_deterministic_policy_has_no_log_probs():
    agent = off_policy.make("td3", LOPSIDED)
    data = roll_out(agent, EnvSpec(LOPSIDED), 20)
    assert "action_log_probs" not in data.infos
    np.testing.assert_allclose(data.actions, agent.predict(data.observations, deterministic=True)[0], atol=1e-6)


# -- what cannot be -------------------------------------------------------------------------------


def test_a_value_that_is_not_finite_is_named():
    with pytest.raises(DatasetError, match=r"rewards is not finite in step 5 of episode 0 \(row 5\)"):
        roll_out(zeros, EnvSpec(env_id("NaNAt")), 9, n_envs=1)
    with pytest.raises(DatasetError, match=r"next_observations is not finite in step 2 of episode 0 \(row 2\)"):
        roll_out(zeros, EnvSpec(env_id("NaNFinal")), 9, n_envs=1)


def test_settings_that_make_no_sense_are_refused():
    with pytest.raises(ValueError, match="steps=0"):
        counted("OnlyTruncates", 0)
    with pytest.raises(ValueError, match="n_envs=0"):
        roll_out(zeros, EnvSpec(env_id("OnlyTruncates")), 3, n_envs=0)
    with pytest.raises(ValueError, match="sac policy has the observation space"):
        roll_out(sac(), EnvSpec(env_id("OnlyTruncates")), 3)
    with pytest.raises(ValueError, match="unknown"):
        make("best", EnvSpec(LOPSIDED), None, 3)
