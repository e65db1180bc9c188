"""MOPO: its update against SAC's, its batches, and the fit of its model as a part of the run."""


import gymnasium as gym
import numpy as np
import pytest
from helpers import off_policy
from helpers.agents import assert_same_tensors
from helpers.off_policy import drawn, transitions
from helpers.offline import learner, recorded, tiny

from ctrlrl import api
from ctrlrl.engine.config import ConfigError

SMALL = {
    "model_members": 3, "model_elites": 2, "model_hidden": (8,), "model_batch_size": 16, "model_max_epochs": 2,
    "rollouts": 12, "rollout_length": 2, "rollouts_every": 6,
}  # fmt: skip
WARNING = "where a rollout of the model ends is not known"


def make(data=None, env=None, seed=0, **settings):
    return api.make("mopo", env, dataset=data or recorded(), seed=seed, **tiny("mopo", **SMALL | settings))


# -- the update ------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, {"entropy_temp": 0.2}, {"target_entropy": -3.0, "n_critics": 3}])
def test_an_update_is_sacs(settings):
    ours, theirs = learner("mopo", **settings), off_policy.learner("sac", **settings)
    for k in range(4):
        found, expected = (x.run(transitions(12, k), drawn(x, 1, 12, k), 1) for x in (ours, theirs))
        assert_same_tensors(found, expected)
    assert_same_tensors(ours.tensors(), theirs.tensors())


def test_the_settings_are_those_of_the_paper_and_of_its_released_code():
    config, own = api.get_method("mopo").blueprint()
    model = config.world_model
    assert (own.rollout_length, own.penalty, own.rollouts_every, own.real_share) == (5, 1.0, 1000, 0.05)
    assert own.target_entropy is None and config.learning_rate == 3e-4 and config.batch_size == 256
    assert (model.model_members, model.model_elites, model.model_hidden) == (7, 5, (200,) * 4)
    assert (model.model_learning_rate, model.model_patience, model.model_held_out) == (1e-3, 5, 1000)
    assert model.model_weight_decay == (2.5e-5, 5e-5, 7.5e-5, 7.5e-5, 1e-4)


def test_the_presets_are_the_released_settings_of_twelve_sets():
    presets = type(learner("mopo").algorithm).presets
    found = {name: (p.pop("rollout_length"), p.pop("penalty"), p) for name, p in map(copied, presets.items())}
    assert len(found) == 12 and all(rest == {"rollouts": 50_000, "target_entropy": -3.0} for *_, rest in found.values())
    for task, expected in {
        "halfcheetah": [(5, 0.5), (1, 1.0), (5, 1.0), (5, 5.0)],
        "hopper": [(5, 1.0), (5, 5.0), (5, 1.0), (5, 1.0)],
        "walker2d": [(1, 1.0), (5, 5.0), (1, 1.0), (1, 2.0)],
    }.items():
        kinds = ("random", "medium", "medium-replay", "medium-expert")
        assert [found[f"{task}-{kind}"][:2] for kind in kinds] == expected
    assert make(preset="hopper-medium").algorithm.penalty == 5.0


def copied(item):
    name, preset = item
    return name, dict(preset)


@pytest.mark.parametrize(
    "settings",
    [
        {"rollout_length": 0}, {"rollouts": 0}, {"rollouts_every": 0}, {"penalty": -1.0}, {"penalty": float("nan")},
        {"real_share": 1.0}, {"real_share": -0.1}, {"model_elites": 9}, {"entropy_temp_init": 0.0},
    ],
)  # fmt: skip
def test_impossible_settings_are_refused(settings):
    (name,) = settings
    with pytest.raises(ConfigError, match=name):
        make(**settings)


@pytest.mark.parametrize(
    "space",
    [
        gym.spaces.Dict({"a": gym.spaces.Box(-1, 1, (2,)), "b": gym.spaces.Box(-1, 1, (1,))}),
        gym.spaces.Box(0, 255, (8, 8, 3), np.uint8), gym.spaces.Box(0, 9, (3,), np.int64),
        gym.spaces.Box(-1, 1, (2, 2)),
    ],
    ids=["dict", "image", "integers", "matrix"],
)  # fmt: skip
def test_observations_must_be_flat_and_of_floats(space):
    with pytest.raises(TypeError, match="flat observations of floats"):
        make(recorded(observation=space, env=None))
