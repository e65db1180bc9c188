"""What M2TD3 and RARL share: the agent that sets parameters, what it refuses, and how it leaves an environment."""

import gymnasium as gym
import pytest
from gymnasium.vector import SyncVectorEnv
from helpers.envs import env_id
from online.dials import DIALS, TINY, Dials, quiet, rows

from ctrlrl import api
from ctrlrl.engine.config import ConfigError

BOTH = pytest.mark.parametrize("name", ["m2td3", "rarl"])
ALL = pytest.mark.parametrize("name", ["m2td3", "rarl", "iwocs"])


def make(name, env=DIALS, **settings):
    return api.make(name, env, **TINY | settings)


@BOTH
def test_evaluations_run_the_environment_as_it_is(name):
    """The reward is the gain: 20 by nature, at most 10 in the set."""
    agent = quiet(make(name), 60)
    result = agent.evaluate(5)
    assert result.returns.tolist() == (20.0 * result.lengths).tolist()
    assert agent.predict(rows(agent)[0]["obs"][0].numpy(), deterministic=True)[0].shape == (1,)


@BOTH
def test_a_live_environment_without_params_to_see_is_left_at_its_nominal_ones(name):
    env = Dials()
    agent = quiet(make(name, env), 40)
    assert env.now == {"tilt": 0.0, "gain": 20.0} and rows(agent)[0]["reward"].max() <= 10.0


@ALL
@pytest.mark.parametrize("given", [{"params": {"pole_mass": 10.0}}, {"randomize": True}], ids=lambda g: next(iter(g)))
def test_a_live_environment_is_left_as_its_owner_gave_it(name, given):
    pytest.importorskip("mujoco")
    import ctrlrl_envs  # noqa: F401 - registers the environment

    env = gym.make("ctrlrl/RobustInvertedPendulum-v0", **given)
    before = dict(env.unwrapped.params)
    small = {"default_steps": 20, "model_steps": 20, "max_models": 1, "search": "grid", "grid_points": 2,
             "search_episodes": 1, "thresholds": (1.0,)} if name == "iwocs" else {}  # fmt: skip
    agent = make(name, env, learning_starts=5, iteration_steps=10, **small)
    quiet(agent, 40)
    assert agent.steps >= 20 and env.unwrapped.randomize is ("randomize" in given)
    assert "randomize" in given or env.unwrapped.params == before


@ALL
def test_environments_without_parameters_are_refused_with_one_that_has_them(name):
    with pytest.raises(ValueError, match=r"Pendulum-v1.*parameter_space.*ctrlrl/RobustHopper-v0"):
        make(name, "Pendulum-v1")


@BOTH
def test_parameters_must_be_scalars_with_bounds(name):
    with pytest.raises(ValueError, match="expected a gymnasium Dict of scalar Boxes"):
        make(name, env_id("ParametricToy"))


@BOTH
def test_a_live_vector_environment_that_cannot_be_set_one_by_one_is_refused(name):
    with pytest.raises(ValueError, match="SyncVectorEnv does not offer"):
        make(name, SyncVectorEnv([Dials, Dials]))


@ALL
def test_several_steps_between_looks_at_the_environment_are_refused(name):
    with pytest.raises(ConfigError, match="collect_steps=2"):
        make(name, collect_steps=2)
