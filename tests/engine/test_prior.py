"""Going on in an environment with what was learned from data."""

import dataclasses
import shutil

import gymnasium as gym
import numpy as np
import pytest
import torch
from helpers.agents import NOISY, assert_same_tensors, quiet
from helpers.off_policy import tiny

import ctrlrl
from ctrlrl import api
from ctrlrl.data import d4rl
from ctrlrl.data.dataset import Dataset, DatasetError, DatasetInfo
from ctrlrl.data.transitions import Transitions
from ctrlrl.engine.config import ConfigError
from ctrlrl.engine.errors import CheckpointError
from ctrlrl.engine.prior import mixed

OFFLINE = {
    "batch_size": 8, "iteration_steps": 10, "actor_hidden": (8,), "critic_hidden": (8,), "device": "cpu", "threads": 1,
    "eval_every": None,
}  # fmt: skip


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """Twelve episodes of ten steps on the spaces of the noisy environment; every reward is 50 and more."""
    env = gym.make(NOISY)
    n, rng = 120, np.random.default_rng(0)
    obs = rng.normal(3.0, 2.0, (n, *env.observation_space.shape)).astype(np.float32)
    ends = np.arange(n) % 10 == 9
    data = Dataset(
        obs, rng.uniform(-1, 1, (n, *env.action_space.shape)).astype(np.float32),
        rng.uniform(50, 60, n).astype(np.float32), np.zeros(n, bool), ends, np.roll(obs, -1, 0), ~ends,
        env.observation_space, gym.spaces.Box(-1, 1, env.action_space.shape), DatasetInfo("toy"),
    )  # fmt: skip
    path = tmp_path_factory.mktemp("data") / "toy.hdf5"
    d4rl.write(data, path)
    return path


@pytest.fixture(scope="module")
def run(file, tmp_path_factory):
    """A run of TD3+BC on it, with rewards mapped to 2 r - 3."""
    agent = api.make("td3_bc", dataset=file, reward_scale=2.0, reward_shift=-3.0, gamma=0.9, **OFFLINE)
    return agent.learn(20, root=tmp_path_factory.mktemp("runs"), progress=False).run_dir


def online(method, run, **settings):
    kept = {k: v for k, v in tiny(method).items() if k not in ("actor_hidden", "critic_hidden")}
    return api.make(method, NOISY, start_from=str(run), **kept | settings)


def test_networks_scaling_discount_and_rewards_are_those_of_the_run(run):
    offline, agent = ctrlrl.load(run), online("td3", run)
    for name, module in offline.learner.modules.items():
        assert_same_tensors(module.state_dict(), agent.learner.modules[name].state_dict())
    assert agent.policy.features.preprocess.normalizer.shift.abs().max() > 0.5, "the scaling was not taken over"
    assert (agent.config.gamma, agent.config.reward_scale, agent.config.reward_shift) == (0.9, 2.0, -3.0)
    assert agent.config.network.actor_hidden == (8,)
    assert agent.learner.state["critic/clock"] == 0.0, "its optimiser begins anew"


def test_what_is_set_goes_before_what_the_run_has(run):
    assert online("td3", run, gamma=0.5).config.gamma == 0.5


def test_the_policy_acts_from_the_first_step(run):
    agent = online("td3", run)
    quiet(agent, 8)  # fewer than learning_starts
    rows = agent.replay.rows(0, 8)
    assert (rows["action"] - agent.policy.mode(rows["obs"])).abs().max() < 0.6, "random actions"


def test_the_replay_holds_the_environments_rewards_and_batches_the_mapped_ones(run, monkeypatch):
    agent, seen = online("td3", run, learning_starts=8), []
    update = agent.learner.run
    monkeypatch.setattr(agent.learner, "run", lambda batch, *rest: seen.append(batch.reward_t) or update(batch, *rest))
    quiet(agent, 24)
    rewards = agent.replay.rows(0, 24)["reward"]
    assert rewards.abs().max() < 20  # those of the data are 50 and more
    mapped = {round(float(r), 4) for r in 2.0 * rewards - 3.0}
    assert {round(float(r), 4) for batch in seen for r in batch} <= mapped


def test_the_source_and_its_folder_are_needed_no_more(run, tmp_path):
    moved = tmp_path / "moved"
    shutil.copytree(run, moved)
    online("td3", moved, offline_share=0.5).learn(40, run_dir=tmp_path / "online", progress=False)
    shutil.rmtree(moved)
    quiet(ctrlrl.load(tmp_path / "online"), 24)


def test_other_data_in_the_place_of_the_sources_are_refused(file, tmp_path):
    copy = tmp_path / "toy.hdf5"
    shutil.copy(file, copy)
    source = api.make("td3_bc", dataset=copy, **OFFLINE).learn(10, root=tmp_path, progress=False).run_dir
    data = d4rl.read(file)
    d4rl.write(dataclasses.replace(data, rewards=data.rewards + 1), copy)
    with pytest.raises(DatasetError, match="is not the data that this run began with"):
        quiet(online("td3", source, offline_share=0.5), 24)


def test_actions_of_other_bounds_are_refused(file, tmp_path):
    data = d4rl.read(file)
    wide = dataclasses.replace(data, action_space=gym.spaces.Box(-3, 3, data.action_space.shape))
    source = api.make("td3_bc", dataset=wide, **OFFLINE).learn(10, root=tmp_path, progress=False).run_dir
    with pytest.raises(CheckpointError, match="the same action would mean another one"):
        online("td3", source)


def test_scores_are_those_of_the_sources_data(file, tmp_path):
    data = d4rl.read(file)
    info = dataclasses.replace(data.info, ref_min_score=10.0, ref_max_score=30.0)
    offline = api.make("td3_bc", dataset=dataclasses.replace(data, info=info), **OFFLINE)
    source = offline.learn(10, root=tmp_path, progress=False).run_dir
    agent = online("td3", source)
    assert agent.normalized(20.0) == 50.0
    assert ctrlrl.load(agent.save(tmp_path / "saved")).normalized(20.0) == 50.0
    assert api.make("td3", NOISY, **tiny("td3")).normalized(20.0) is None


@pytest.mark.parametrize("share, expected", [(0.25, 2), (1.0, 8), (0.0, 0)])
def test_that_share_of_each_batch_is_recorded(run, share, expected, monkeypatch):
    agent, seen = online("td3", run, offline_share=share), []
    update = agent.learner.run

    def watch(batch, noise, count):
        seen.append(int((batch.reward_t > 90).sum()))  # 2 r - 3 of the data's; the environment's own are small
        return update(batch, noise, count)

    monkeypatch.setattr(agent.learner, "run", watch)
    quiet(agent, 24)
    assert seen and set(seen) == {expected}


def test_several_batches_at_once_keep_their_rows_together():
    def rows(value, n):
        x = torch.arange(n, dtype=torch.float32) + value
        return Transitions(x[:, None], x[:, None], x, x, x[:, None], {})

    found = mixed(rows(100, 4), rows(0, 6), count=2).reward_t
    assert found.tolist() == [100, 101, 0, 1, 2, 102, 103, 3, 4, 5]


def test_an_offline_method_goes_on_by_its_own_update(run):
    agent = online("td3_bc", run)
    assert type(agent).__mro__[1].__name__ == "OffPolicyAgent" and agent.algorithm.name == "td3_bc"
    before = agent.learner.state["actor"].clone()
    quiet(agent, 24)
    assert not torch.equal(before, agent.learner.state["actor"])


def test_stopped_and_resumed_equals_never_stopped(run, tmp_path):
    def fresh():
        return online("td3", run, offline_share=0.5, checkpoint_every=1)

    whole = fresh().learn(240, run_dir=tmp_path / "whole", progress=False)

    class Kill:
        def on_update(self, agent, step, metrics):
            if agent.iteration == 13:
                raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        fresh().learn(240, run_dir=tmp_path / "half", callbacks=[Kill()], progress=False)
    resumed = ctrlrl.load(tmp_path / "half").resume(tmp_path / "half", progress=False)
    assert_same_tensors(resumed.tensors(), whole.tensors())


def test_other_policies_are_refused_in_words(run):
    with pytest.raises(CheckpointError, match=r"sac cannot go on with the actor of td3_bc.*td3_bc itself"):
        online("sac", run)


def test_runs_of_online_methods_are_refused(tmp_path):
    agent = api.make("td3", NOISY, **tiny("td3"))
    quiet(agent, 8)
    with pytest.raises(ConfigError, match="expected one of an offline method"):
        online("td3", agent.save(tmp_path / "run"))


def test_a_share_without_a_run_is_refused():
    with pytest.raises(ConfigError, match="offline_share needs start_from"):
        api.make("td3", NOISY, **tiny("td3", offline_share=0.5))


def test_a_method_with_columns_cannot_go_on(run):
    agent = ctrlrl.load(run)
    own = dataclasses.make_dataclass("Columns", [], bases=(type(agent.algorithm),), frozen=True)
    own.columns = lambda self, data, gamma: {"extra": data.rewards}
    from ctrlrl.engine.off_policy import OffPolicyAgent

    agent.algorithm = own()
    with pytest.raises(ConfigError, match="only recorded data has"):
        OffPolicyAgent._check_online(agent)
