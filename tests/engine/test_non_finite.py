"""What is not a number is found, named, saved and replayed; the parameters from before it are kept."""

from dataclasses import dataclass
from typing import ClassVar

import gymnasium as gym
import numpy as np
import pytest
import torch
from helpers.agents import NOISY, TINY, make, quiet
from helpers.envs import env_id

from ctrlrl import api
from ctrlrl.engine import checkpoint
from ctrlrl.engine.collector import border_seeds
from ctrlrl.engine.errors import NonFiniteError, NonFiniteUpdateError
from ctrlrl.engine.replay import replay, replay_update
from ctrlrl.losses.base import PolicyLoss


class SometimesNaN(gym.Env):
    """NaN with one chance in fifty, decided by the environment's own generator alone."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (1,), np.float32)
    action_space = gym.spaces.Box(-1, 1, (1,), np.float32)

    def __init__(self, where="reward"):
        self.where = where

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return np.zeros(1, np.float32), {}

    def step(self, action):
        bad = self.np_random.random() < 0.02
        obs = np.full(1, np.nan if bad and self.where == "observation" else 0.5, np.float32)
        return obs, np.nan if bad and self.where == "reward" else 1.0, False, False, {}


gym.register("loop/SometimesNaN-v0", f"{__name__}:SometimesNaN")


def local(name):
    return f"{__name__}:loop/{name}-v0"


def first_nan(seeds):
    """(step, environment) of the first NaN, from the environments alone."""
    found = []
    for i, seed in enumerate(seeds):
        env = SometimesNaN()
        env.reset(seed=seed)
        found.append((next(t for t in range(10_000) if np.isnan(env.step(np.zeros(1))[1])), i))
    return min(found)


@pytest.mark.parametrize("where", ["reward", "observation"])
def test_a_nan_from_the_environment_is_named_saved_and_replayed(where, tmp_path):
    agent = make(local("SometimesNaN"), env_kwargs={"where": where}, n_envs=3, seed=5, n_steps=8)
    step, index = first_nan(border_seeds(5, 0, 3))
    assert step >= 8 and index > 0, "choose a seed where it is not the first environment or rollout"
    with pytest.raises(NonFiniteError, match=f"non-finite {where} in environment {index}, step {step} ") as caught:
        quiet(agent, 3 * 8 * 40, run_dir=tmp_path / "run")
    error = caught.value
    assert (error.what, error.env_index, error.step) == (where, index, step)
    last = tmp_path / "run" / "checkpoints" / "last.safetensors"
    assert any(str(last) in note for note in error.__notes__) and str(error.dump) in str(error)
    assert api.load(tmp_path / "run").steps == 0
    again = replay(error.dump)
    values = again.rewards if where == "reward" else np.array(again.obs)[1:, 0]
    assert (again.what, again.env_index) == (where, index)
    assert np.isnan(values[step]) and np.isfinite(values[:step]).all() and len(values) == step + 1
    assert all(v.isfinite().all() for v in agent.tensors().values())


def test_a_nan_without_a_run_folder_says_the_same_and_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(NonFiniteError) as caught:
        quiet(make(env_id("NaNAt"), env_kwargs={"step": 20}), 320)
    assert caught.value.dump is None and caught.value.step == 20 and list(tmp_path.iterdir()) == []


@dataclass(frozen=True)
class Breaks(PolicyLoss):
    """A loss that becomes NaN, or whose gradient does, at its fifth optimiser step."""

    needs: ClassVar = frozenset({"values"})
    calls: ClassVar[list[int]] = []

    where: str = "loss"
    """loss or gradient."""

    def per_token(self, batch, out, knobs):
        self.calls.append(1)
        gain = -(out.logp - batch.logp_old).exp() * batch.coef["advantage"]
        if len(self.calls) <= 4:
            return gain
        if self.where == "loss":
            return gain * torch.nan
        # sqrt has an infinite slope at zero: the value is finite, the gradient is 0 x inf
        return gain + 0.0 * (out.logp - out.logp.detach()).sqrt()


@pytest.mark.parametrize("where,what", [("loss", "loss"), ("gradient", "grad_norm")])
def test_a_nan_in_the_update_keeps_the_last_good_parameters(where, what, tmp_path):
    Breaks.calls.clear()
    kept = {}

    class Keep:
        def on_update(self, agent, step, metrics):
            kept.update({k: v.clone() for k, v in agent.tensors().items()})

    settings = TINY | {"batch_size": None, "diagnose_every": None}
    agent = api.make(f"{__name__}:Breaks", NOISY, n_envs=2, where=where, **settings)
    # two optimiser steps an iteration: the fifth is in the third one
    with pytest.raises(NonFiniteUpdateError, match=rf"non-finite \w*{what} .*iteration 2,.* 64 environment") as caught:
        quiet(agent, 320, run_dir=tmp_path / "run", callbacks=[Keep()])
    error = caught.value
    assert (error.iteration, error.step, error.optimiser_step) == (2, 64, 0)
    assert any("last.safetensors" in note for note in error.__notes__)
    now = agent.tensors()
    for key in kept:
        if not key.startswith("reward/"):  # the rollout itself was sound
            assert torch.equal(kept[key], now[key]) and now[key].isfinite().all(), key
    assert np.isfinite(agent.predict(np.zeros(3, np.float32))[0]).all()
    tensors, state = checkpoint.read(error.dump)
    assert tensors["batch/obs"].shape[0] == 32 and {"batch/action", "knobs/learning_rate"} <= set(tensors)
    assert state["quantity"] == error.what
    again = api.load(tmp_path / "run")
    assert again.steps == 0
    metrics = replay_update(error.dump, again)
    assert again.iteration == 2 and not metrics[error.what][0].isfinite()
    assert torch.equal(again.updater.flat.flat, agent.updater.flat.flat)
