"""What a user brings or mistypes, over the method registry: own networks, own losses, wrong settings."""

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

import gymnasium as gym
import numpy as np
import pytest
import torch
from contracts.test_methods import TRANSITIONS
from helpers.agents import NOISY, assert_same_tensors, tiny
from helpers.envs import Noisy
from torch import nn

import ctrlrl
from ctrlrl import api
from ctrlrl.core import ratio
from ctrlrl.engine.config import ConfigError
from ctrlrl.engine.errors import CheckpointError
from ctrlrl.losses import base as losses
from ctrlrl.losses.base import PolicyLoss

EVERY = pytest.mark.parametrize("name", losses.names())


class Unbounded(Noisy):
    action_space = gym.spaces.Box(-np.inf, np.inf, (1,), np.float32)


gym.register("settings/Unbounded-v0", f"{__name__}:Unbounded")
UNBOUNDED = f"{__name__}:settings/Unbounded-v0"

# -- the user's own parts -------------------------------------------------------------------------


class MyEncoder(nn.Module):
    def __init__(self, space):
        super().__init__()
        self.linear, self.out_features = nn.Linear(space.shape[0], 5), 5

    def forward(self, x):
        return torch.relu(self.linear(x))


@pytest.mark.parametrize("name", TRANSITIONS)
def test_the_users_encoder_by_class_and_by_path_is_one_thing(name, tmp_path):
    """By class too the run can be loaded without passing the class again: its path is recorded."""
    path = f"{__name__}:MyEncoder"
    agents = [api.make(name, NOISY, seed=1, encoder=e, **tiny(name)) for e in (MyEncoder, path)]
    for k, agent in enumerate(agents):
        agent.learn(32, run_dir=tmp_path / str(k), progress=False, tensorboard=False)
        assert agent.config.network.encoder == path
        assert_same_tensors(api.load(tmp_path / str(k)).tensors(), agent.tensors())
    assert_same_tensors(agents[0].tensors(), agents[1].tensors())
    assert_same_tensors(api.load(tmp_path / "0", encoder=MyEncoder).tensors(), agents[0].tensors())


def test_an_encoder_without_an_importable_name_has_to_be_passed_again(tmp_path):
    class Local(MyEncoder):
        pass

    agent = api.make("ppo", NOISY, encoder=Local, **tiny("ppo"))
    agent.save(tmp_path / "agent")
    with pytest.raises(CheckpointError, match="does not fit this agent's network"):
        api.load(tmp_path / "agent")
    assert_same_tensors(api.load(tmp_path / "agent", encoder=Local).tensors(), agent.tensors())


@dataclass(frozen=True)
class Mine(PolicyLoss):
    """-pull r A, and a penalty on leaving the old policy."""

    needs: ClassVar = frozenset({"values"})
    loop_defaults: ClassVar = {"epochs": 3}

    pull: float = 1.0
    """Weight of the gain."""

    def per_token(self, batch, out, knobs):
        r = ratio.ratio(ratio.log_ratio(out.logp, batch.logp_old, batch.mask))
        return (r - 1.0) ** 2 - self.pull * r * batch.coef["advantage"]


@dataclass(frozen=True)
class NeedsTurns(Mine):
    needs: ClassVar = frozenset({"turns"})


def test_the_users_own_loss_by_path(tmp_path):
    path = f"{__name__}:Mine"
    settings = {k: v for k, v in tiny("ppo").items() if k != "epochs"}
    agent = api.make(path, NOISY, pull=0.3, **settings)
    assert (agent.loss, agent.config.epochs, agent.method) == (Mine(0.3), 3, path)
    agent.learn(64, root=tmp_path, progress=False)
    loaded = api.load(agent.run_dir)
    assert loaded.loss == Mine(0.3)
    assert_same_tensors(agent.tensors(), loaded.tensors())
    other = api.make(path, NOISY, pull=0.6, **settings).learn(64, root=None, progress=False)
    assert not torch.equal(other.tensors()["optimizer/m"], agent.tensors()["optimizer/m"])
    with pytest.raises(ConfigError, match=r"no setting 'pul'.*Did you mean pull"):
        api.make(path, NOISY, pul=0.3)
    assert path not in api.available() and "mine" not in api.available("losses")


def test_a_loss_that_needs_what_the_loop_has_not_is_refused():
    with pytest.raises(
        ConfigError, match=r"NeedsTurns cannot run on continuous control here: it needs turns \(turns: "
    ):
        api.make(f"{__name__}:NeedsTurns", NOISY)
    for path in ("no.such:Loss", f"{__name__}:Missing", f"{__name__}:MyEncoder"):
        with pytest.raises(KeyError):
            api.make(path, NOISY)


# -- wrong settings -------------------------------------------------------------------------------


@EVERY
def test_unknown_settings_name_the_nearest_one(name):
    fields = dataclasses.fields(losses.get(name))
    for wrong, near in {"n_step": "n_steps", "learning_rte": "learning_rate", "actor_hiden": "actor_hidden"}.items():
        with pytest.raises(ConfigError, match=rf"{name} has no setting '{wrong}'.*Did you mean .*\b{near}\b"):
            api.make(name, NOISY, **{wrong: 1})
    for field in fields:
        with pytest.raises(ConfigError, match=rf"'{field.name}x'.*Did you mean .*\b{field.name}\b"):
            api.make(name, NOISY, **{f"{field.name}x": 1})
    with pytest.raises(ConfigError, match="no preset 'nonsense'"):
        api.make(name, NOISY, preset="nonsense")


def test_unknown_methods_name_the_nearest_one():
    with pytest.raises(KeyError, match=r"no method named 'ppoo'.*Did you mean ppo"):
        api.make("ppoo", NOISY)
    with pytest.raises(AttributeError, match="no attribute 'PPOO'"):
        ctrlrl.PPOO  # noqa: B018


CONTRADICTIONS = {
    "value batch without value epochs": ({"value_batch_size": 8}, "value_epochs is not"),
    "graphs without a gpu": ({"cudagraphs": True, "device": "cpu"}, "needs a CUDA device"),
    "gamma above one": ({"gamma": 1.01}, r"gamma=1\.01 must lie in \[0, 1\]"),
    "nan": ({"learning_rate": float("nan")}, "must not be negative"),
    "no epochs": ({"epochs": 0}, "epochs=0 must be positive"),
    "no steps": ({"n_steps": 0}, "n_steps=0 must be positive"),
    "word for a number": ({"n_steps": "many"}, "expected int"),
    "unknown schedule": ({"learning_rate_schedule": "cosine"}, "expected one of 'constant', 'linear'"),
    "unknown activation": ({"activation": "swish"}, "activation='swish' is unknown"),
    "unknown action map": ({"action_map": "sigmoid"}, "action_map='sigmoid' is unknown"),
    "squashing onto no bounds": ({"action_map": "tanh"}, "needs finite bounds"),
    "negative clip": ({"eps": -0.2}, "eps=-0.2 must be positive"),
    "no environments": ({"n_envs": 0}, "n_envs=0"),
    "kwargs that no JSON holds": ({"env_kwargs": {"obs": object()}}, "JSON values"),
    "unknown backend": ({"backend": "gpu"}, "backend='gpu' is unknown"),
}


@pytest.mark.parametrize("case", CONTRADICTIONS)
def test_contradictory_settings_are_refused(case):
    settings, message = CONTRADICTIONS[case]
    with pytest.raises(ValueError, match=message):
        api.make("ppo", UNBOUNDED, **settings)


def test_a_live_environment_brings_its_own_width_and_arguments():
    env = Noisy()
    for settings in ({"n_envs": 2}, {"backend": "async"}, {"env_kwargs": {"obs": "dict"}}):
        with pytest.raises(ValueError, match="cannot be set for a live environment"):
            api.make("ppo", env, **settings)


def test_a_gpu_that_is_not_there_is_refused():
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(ValueError, match=r"device='cuda'.*finds no CUDA device"):
        api.make("ppo", NOISY, device="cuda")


def test_presets_are_under_the_users_settings():
    agent = api.make("bpo", NOISY, preset="released", actor_hidden=(8,), device="cpu")
    assert agent.config.network.actor_hidden == (8,) and agent.config.network.critic_hidden == (256, 256)
    assert agent.config.normalize_obs is False and agent.loss.median_temp == 1.0
