"""``ctrlrl ope RUN --dataset PATH`` as a user types it."""

import dataclasses
import json

import gymnasium as gym
import numpy as np
import pytest
from helpers.agents import make as make_ppo
from helpers.off_policy import make

from ctrlrl.data import load as loading
from ctrlrl.engine.roll_out import roll_out
from ctrlrl.run import ope_cli
from ctrlrl.types import EnvSpec


class Swing(gym.Env):
    """A point that is pushed; eight steps, as a pendulum's cost: the squares of place, speed and push."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (2,), np.float32)
    action_space = gym.spaces.Box(-2.0, 2.0, (1,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.x, self.t = self.np_random.normal(size=2), 0
        return self.x.astype(np.float32), {}

    def step(self, action):
        push = float(action[0])
        cost = self.x[0] ** 2 + 0.1 * self.x[1] ** 2 + 0.001 * push**2
        self.x = self.x + 0.1 * np.array([self.x[1], push - self.x[0]])
        self.t += 1
        return self.x.astype(np.float32), -cost, False, self.t == 8, {}


gym.register("ope_cli/Swing-v0", f"{__name__}:Swing")
SWING = f"{__name__}:ope_cli/Swing-v0"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    agent = make("sac", SWING, eval_every=32, eval_episodes=3)
    agent.learn(64, root=tmp_path_factory.mktemp("runs"), progress=False, tensorboard=False)
    return agent


@pytest.fixture
def command(monkeypatch, capsys, run):
    monkeypatch.setenv("COLUMNS", "250")
    data = roll_out(run, EnvSpec(SWING), 160, seed=5)
    asked = []

    def load(name, **settings):
        asked.append(name)
        return data

    monkeypatch.setattr(loading, "load", load)

    def call(*words):
        quick = ("--updates", "20", "--resamples", "2")
        status = ope_cli.main([str(w) for w in (run.run_dir, "--dataset", "some.hdf5", *quick, *words)])
        assert asked == ["some.hdf5"]
        return status, capsys.readouterr().out

    call.data = data
    return call


def test_all_estimates_are_shown_with_the_measured_return_beside(run, command, tmp_path):
    status, out = command("--gamma", "1", "--out", tmp_path / "found.json")
    assert status == 0
    kept = json.loads((tmp_path / "found.json").read_text())
    named = {one["name"]: one for one in kept["estimates"]}
    assert list(named) == ["fqe", "is", "pdis", "wis", "pdwis", "dr", "wdr"]
    for name, one in named.items():
        assert f"{name}: {ope_cli.MEANINGS[name]}" in out and f"{one['value']:.4g}" in out
    # it is the policy's own data, with weights of one: its mean return, over 20 episodes of 8 steps
    mean = command.data.returns.mean()
    assert named["is"]["value"] == pytest.approx(mean, rel=1e-3)
    assert named["is"]["effective_sample_size"] == pytest.approx(20, rel=1e-3) and "20.0 of 20" in out
    assert "return, first 8 steps" in out and f"same measure: {mean:.4g}" in out
    row = kept["measured"]
    assert row["step"] == kept["steps"] == 64 and len(row["returns"]) == 3
    assert f"step 64: mean return {np.mean(row['returns']):.4g} over 3 deterministic" in out
    assert "another measure" not in out and "stochastic policy" in out


def test_a_discount_is_said_to_be_another_measure(command):
    _, out = command("--methods", "fqe", "wis", "--gamma", "0.9")
    assert "another measure" in out and "wis" in out and "pdis" not in out
    rewards = command.data.rewards.reshape(20, 8).astype(np.float64)
    assert f"same measure: {(rewards @ 0.9 ** np.arange(8)).mean():.4g}" in out


def test_a_horizon_holds_for_the_data_beside(command):
    _, out = command("--methods", "pdis", "--gamma", "1", "--horizon", "3")
    assert f"same measure: {command.data.rewards.reshape(20, 8)[:, :3].sum(1).mean():.4g}" in out


def test_the_mode_has_no_density_and_says_so(command):
    _, out = command("--deterministic", "--methods", "fqe", "is")
    assert "refused" in out and "deterministic policy has no density" in " ".join(out.split())
    assert "checkpoint at 64 steps, deterministic policy" in out


def test_a_run_without_evaluations_says_so(command, run, monkeypatch):
    monkeypatch.setattr(ope_cli, "measured", lambda *_: None)
    assert "no evaluation" in command("--methods", "wis")[1]


def test_an_on_policy_run_and_another_runs_densities(monkeypatch, capsys, tmp_path, run):
    folder = make_ppo(SWING).save(tmp_path / "ppo")
    data = roll_out(run, EnvSpec(SWING), 80, seed=5)
    bare = dataclasses.replace(data, infos={})
    found = []
    for one, words in ((data, ()), (bare, ("--behaviour", str(run.run_dir)))):
        monkeypatch.setattr(loading, "load", lambda name, one=one, **_: one)
        out = tmp_path / "found.json"
        assert ope_cli.main([str(folder), "--dataset", "x", "--methods", "pdis", "--out", str(out), *words]) == 0
        assert "stochastic policy" in capsys.readouterr().out
        found.append(json.loads(out.read_text())["estimates"][0]["value"])
    assert found[0] == pytest.approx(found[1], rel=1e-3)


def test_the_evaluation_at_the_checkpoints_step_is_the_one_beside(run):
    assert ope_cli.measured(run.run_dir, 32)["step"] == 32
    assert ope_cli.measured(run.run_dir, 33)["step"] == 64
