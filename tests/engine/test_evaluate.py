"""Evaluation is the plain loop over its seeds, whatever runs beside it; the best checkpoint is the best."""

import gymnasium as gym
import numpy as np
import pytest
from helpers.agents import Recorder, make, quiet, same
from helpers.envs import env_id

from ctrlrl import api
from ctrlrl.engine import runfolder
from ctrlrl.engine.evaluate import Evaluation
from ctrlrl.types import EnvSpec


class OddIsLong(gym.Env):
    """Episodes of odd seeds last 60 steps and pay 1 each, those of even seeds last 2 and pay nothing."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (2,), np.float32)
    action_space = gym.spaces.Box(-1, 1, (1,), np.float32)

    def __init__(self, paid_for_acting=False):
        self.paid_for_acting = paid_for_acting

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        if seed is not None:
            self.odd = bool(seed % 2)
        self.t = 0
        return self.obs(), {}

    def obs(self):
        return self.np_random.normal(size=2).astype(np.float32)

    def step(self, action):
        self.t += 1
        reward = float(self.odd) + (float(action[0]) if self.paid_for_acting else 0.0)
        return self.obs(), reward, self.t == (60 if self.odd else 2), False, {}


class Target(gym.Env):
    """Five steps; the reward is how near the action is to a half."""

    observation_space = gym.spaces.Box(-1, 1, (1,), np.float32)
    action_space = gym.spaces.Box(-1, 1, (1,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t = 0
        return np.ones(1, np.float32), {}

    def step(self, action):
        self.t += 1
        return np.ones(1, np.float32), -abs(float(action[0]) - 0.5), False, self.t == 5, {}


gym.register("loop/OddIsLong-v0", f"{__name__}:OddIsLong")
gym.register("loop/Target-v0", f"{__name__}:Target")


def local(name):
    return f"{__name__}:loop/{name}-v0"


def hand_loop(agent, result):
    spec = agent.env_spec
    env = gym.make(spec.id, **spec.kwargs)
    returns, lengths = [], []
    for seed in result.seeds:
        obs, _ = env.reset(seed=int(seed))
        total, length, ended = 0.0, 0, False
        while not ended:
            obs, reward, terminated, truncated, _ = env.step(agent.predict(obs, deterministic=True)[0])
            total, length, ended = total + reward, length + 1, terminated or truncated
        returns.append(total)
        lengths.append(length)
    return np.array(returns), np.array(lengths)


@pytest.mark.parametrize("n_envs", [None, 1, 3, 40])
def test_evaluation_is_the_plain_loop_over_its_seeds_and_not_biased_by_length(n_envs):
    """Half the seeds are odd and thirty times longer: taking the first episodes to finish would miss them."""
    agent = make(local("OddIsLong"))
    result = agent.evaluate(episodes=40, n_envs=n_envs)
    returns, lengths = hand_loop(agent, result)
    assert np.array_equal(result.returns, returns) and np.array_equal(result.lengths, lengths)
    assert len(set(result.seeds.tolist())) == 40
    odd = result.seeds % 2 == 1
    assert 10 <= odd.sum() <= 30 and np.array_equal(result.lengths, np.where(odd, 60, 2))


def test_evaluation_does_not_depend_on_the_width():
    agent = make(local("OddIsLong"), env_kwargs={"paid_for_acting": True})
    agent = quiet(agent, 64)
    reference = agent.evaluate(20, n_envs=1)
    assert np.array_equal(reference.returns, hand_loop(agent, reference)[0])
    for n_envs in (2, 7, 20, 50):
        result = agent.evaluate(20, n_envs=n_envs)
        assert np.array_equal(result.lengths, reference.lengths) and np.array_equal(result.seeds, reference.seeds)
        np.testing.assert_allclose(result.returns, reference.returns, atol=1e-4)
    assert np.array_equal(agent.evaluate(5).seeds, reference.seeds[:5])
    assert not np.array_equal(agent.evaluate(5, seed=1).seeds, reference.seeds[:5])


def test_evaluation_uses_the_wrappers_and_arguments_of_the_run():
    spec = EnvSpec(env_id("OnlyTruncates"), {"length": 4}, (("helpers.envs:AddOne", {"amount": 10.0}),), 2)
    agent = make(spec)
    assert agent.evaluate(3).returns.tolist() == [50.0] * 3 and agent.evaluate(3).lengths.tolist() == [4] * 3


def test_evaluating_changes_nothing():
    """Neither the run that goes on, nor the statistics of the normaliser."""
    seen = []

    class Evaluate:
        def on_update(self, agent, step, metrics):
            before = {k: v.clone() for k, v in agent.tensors().items()}
            seen.append(agent.evaluate(3, deterministic=False))
            assert same(before, agent.tensors())

    plain, watched = quiet(make(), 96), quiet(make(), 96, callbacks=[Evaluate()])
    assert len(seen) == 3 and same(plain.tensors(), watched.tensors())


def test_the_best_checkpoint_is_the_best_evaluation(tmp_path):
    recorder = Recorder()
    agent = make(local("Target"), eval_every=32, eval_episodes=2, learning_rate=0.05, epochs=8)
    quiet(agent, 32 * 25, run_dir=tmp_path / "run", callbacks=[recorder])
    means = [e.mean for _, e in recorder.of("evaluation")]
    steps = [s for s, _ in recorder.of("evaluation")]
    assert len(means) == 25 and len(set(means)) > 10
    best = api.load(tmp_path / "run", "best")
    assert best.steps == steps[int(np.argmax(means))] and best.steps < agent.steps
    assert best.evaluate(2).mean == max(means) == agent.best
    assert [np.mean(e["returns"]) for e in runfolder.read_evaluations(tmp_path / "run")] == pytest.approx(means)


def test_every_run_folder_gets_a_best_checkpoint_of_its_own(tmp_path):
    agent = make(local("Target"), eval_every=32, eval_episodes=1, learning_rate=0.05)
    for name in ("first", "second"):
        quiet(agent, 32 * 6, run_dir=tmp_path / name)
        agent.best = 0.0  # as if the first run had reached the optimum, which the second cannot beat
        best = api.load(tmp_path / name, "best")
        means = {e["step"]: np.mean(e["returns"]) for e in runfolder.read_evaluations(tmp_path / name)}
        assert means[best.steps] == max(means.values())


# -- risk -----------------------------------------------------------------------------------------


def results(*returns):
    n = len(returns)
    return Evaluation(np.array(returns, float), np.ones(n, np.int64), np.arange(n))


def test_the_worst_share_of_ten_episodes_by_hand():
    """Returns 1 to 10: the worst tenth is 1, the worst quarter (1 + 2 + 3 / 2) / 2.5 = 1.8, all of them 5.5."""
    found = results(*np.random.default_rng(0).permutation(np.arange(1.0, 11.0)))
    assert [found.value_at_risk(p) for p in (0.1, 0.25, 0.5, 1.0)] == [1.0, 3.0, 5.0, 10.0]
    assert found.conditional_value_at_risk(0.1) == 1.0
    assert found.conditional_value_at_risk(0.25) == pytest.approx(1.8)
    assert found.conditional_value_at_risk(1.0) == pytest.approx(found.mean)


def test_the_share_is_not_rounded_up_by_floating_point():
    found = results(*np.arange(1.0, 101.0))
    assert [found.value_at_risk(p) for p in (0.07, 0.14, 0.28, 0.55, 0.075)] == [7.0, 14.0, 28.0, 55.0, 8.0]


def test_a_share_of_less_than_one_episode_is_the_worst_episode():
    found = results(3.0, -7.0, 2.0)
    assert found.value_at_risk(0.1) == -7.0
    assert found.conditional_value_at_risk(0.1) == pytest.approx(-7.0)


def test_the_mean_of_the_worst_approaches_that_of_a_normal():
    """CVaR of N(0, 1) at 0.1 is -phi(z) / 0.1 = -1.755, VaR is z = -1.2816."""
    found = results(*np.random.default_rng(0).normal(size=200_000))
    assert found.value_at_risk(0.1) == pytest.approx(-1.2816, abs=0.01)
    assert found.conditional_value_at_risk(0.1) == pytest.approx(-1.7550, abs=0.01)


@pytest.mark.parametrize("level", [0.0, -0.1, 1.1, float("nan")])
def test_levels_are_shares(level):
    for ask in (results(1.0).value_at_risk, results(1.0).conditional_value_at_risk):
        with pytest.raises(ValueError, match="level="):
            ask(level)
