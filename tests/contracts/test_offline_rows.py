"""What every offline method does with its data: which rows it learns from, how they are scaled, what is refused."""

import copy
import dataclasses

import numpy as np
import pytest
import torch
from helpers.agents import assert_same_tensors, quiet
from helpers.envs import env_id
from helpers.offline import recorded, tiny, trace, watch
from test_methods import ACTIONS, OBSERVATIONS, STRICT
from test_offline_methods import EVERY, POLICIES, STEPS, file, having, learn, row, seen_by  # noqa: F401 - file is a fixture

from ctrlrl import api
from ctrlrl.data.dataset import DatasetError
from ctrlrl.engine.errors import NonFiniteUpdateError
from ctrlrl.nets.normalizer import ObsScaling
from ctrlrl.types import EnvSpec

# -- rows -----------------------------------------------------------------------------------------


@STEPS
def test_the_rows_of_the_batches_are_those_that_can_be_learned_from(name):
    """Unknown next observations never, ends always, cuts where the next observation is known, all as recorded."""
    data = recorded()
    agent = api.make(name, dataset=data, **tiny(name, batch_size=64))
    seen = watch(agent)
    quiet(agent, 30)
    expected = data.next_known | data.terminals
    cuts = data.timeouts & ~data.terminals & data.next_known
    assert cuts.sum() == 4 and (data.timeouts & ~data.next_known).sum() == 4 and data.terminals.sum() == 8
    if not row(name).every_cut:
        expected &= ~cuts
    drawn = [trace(data, batch.obs) for batch in seen]
    assert set(np.concatenate(drawn)) == set(np.flatnonzero(expected))
    for rows, batch in zip(drawn, seen, strict=True):
        assert np.array_equal(batch.next_obs, data.next_observations[rows])
        assert np.array_equal(batch.reward_t, data.rewards[rows])
        assert np.array_equal(batch.terminated_t, data.terminals[rows])
        np.testing.assert_allclose(batch.action, data.actions[rows], rtol=0, atol=1e-7)
        assert not batch.terminated_t[torch.from_numpy(cuts[rows])].any()


@pytest.mark.parametrize("name", ["cdsa", "mopo", "policy_guided_diffusion", "td3_bc"])
def test_an_end_whose_next_observation_is_unknown_counts_for_values_and_ends_only(name):
    """In its place stands the first observation of the next episode: nobody may learn that it comes next."""
    data = recorded()
    data = dataclasses.replace(data, next_known=data.next_known & ~data.terminals)
    agent = quiet(api.make(name, dataset=data, **tiny(name) | ({"window_length": 1} if "guided" in name else {})), 3)
    batch = agent.replay.plain(agent.replay.starts) if "guided" in name else agent.replay.sample(torch.arange(40))
    rows = trace(data, batch.obs)
    ends = data.terminals[rows]
    assert data.next_known[rows].all() == (name in ("cdsa", "mopo")) != ends.any()
    if "guided" in name:
        assert torch.equal(batch.next_obs[ends], batch.obs[ends])


def networks_after(name, data, where):
    """Its critics (or policy) after two updates on all rows, with other next observations at the rows ``where``."""
    agent = quiet(api.make(name, dataset=data, **tiny(name)), 3)
    batch = agent.replay.sample(torch.arange(len(agent.replay)))
    changed = torch.from_numpy(where[trace(data, batch.obs)])[:, None]
    assert changed.any() == where.any()
    noise = agent.algorithm.noise(1, len(changed), 1, torch.Generator().manual_seed(0))
    for _ in range(2):
        agent.learner.run(batch._replace(next_obs=torch.where(changed, 50.0, batch.next_obs)), noise, 1)
    return agent.learner.state["critic" if "critic" in agent.learner.state else "actor"].clone()


@STEPS
def test_the_value_goes_on_where_an_episode_was_cut_and_not_where_it_ended(name):
    data = recorded()
    as_it_is = networks_after(name, data, np.zeros(len(data), bool))
    assert torch.equal(networks_after(name, data, data.terminals), as_it_is) != row(name).looks_beyond
    going_on = data.timeouts & ~data.terminals if row(name).every_cut else ~data.ends
    assert torch.equal(networks_after(name, data, going_on), as_it_is) != row(name).bootstraps


@STEPS
def test_observations_are_scaled_by_the_data_and_so_are_those_of_predict(name, tmp_path):
    """Mean 100 and deviation 5: what the networks see has mean 0 and deviation 1, in a loaded agent, too."""
    data = recorded(mean=100.0, std=5.0, episodes=40)
    agent = api.make(name, dataset=data, **tiny(name, normalize_obs=True))
    learn(agent, 9, tmp_path / "run")
    used = data.observations[trace(data, agent.replay.sample(torch.arange(len(agent.replay))).obs)].astype(np.float64)
    mean, std = used.mean(0), used.std(0) + 1e-3
    loaded = api.load(tmp_path / "run")
    for each in (agent, loaded):
        scalings = [m for net in each.learner.modules.values() for m in net.modules() if isinstance(m, ObsScaling)]
        assert len(scalings) == len(each.learner.modules) - ("temperature" in each.learner.modules)
        for scaling in scalings:
            torch.testing.assert_close(scaling.scale, torch.from_numpy(1 / std).float(), rtol=1e-5, atol=0)
            torch.testing.assert_close(scaling.shift, torch.from_numpy(-mean / std).float(), rtol=1e-5, atol=0)
        plain = copy.deepcopy(each.policy)
        for scaling in (m for m in plain.modules() if isinstance(m, ObsScaling)):
            scaling.scale.fill_(1.0), scaling.shift.fill_(0.0)
        seen = torch.from_numpy((data.observations - mean) / std).float()
        with torch.no_grad():
            expected = plain.deterministic(seen).numpy()
        np.testing.assert_allclose(each.predict(data.observations, deterministic=True)[0], expected, atol=1e-4)
        raw = plain.deterministic(torch.from_numpy(data.observations)).detach().numpy()
        assert np.abs(raw - expected).max() > 0.01


@EVERY
def test_a_memory_map_gives_the_same_run_bit_for_bit(name, tmp_path):
    agents = []
    for mapped in (False, True):
        agent = api.make(name, dataset=recorded(), **tiny(name, memory_map=mapped, normalize_obs=True))
        agents.append(learn(agent, 12, tmp_path / str(mapped)))
        quiet(agent, 3, run_dir=tmp_path / f"{mapped}, on")
    assert_same_tensors(*(a.tensors() for a in agents))
    assert agents[0].replay is not None and agents[1].replay is None  # its file was given back


@POLICIES
def test_rewards_are_scaled_then_shifted(name):
    data = recorded()
    agent = api.make(name, dataset=data, **tiny(name, scale_by_returns=True, reward_scale=2.0, reward_shift=-1.0))
    quiet(agent, 3)
    spread = data.returns.max() - data.returns.min()
    every, found = data.rewards * 2000 / spread - 1, agent.replay.columns["reward"].numpy()
    assert len(found) > 60 and np.abs(found[:, None] - every).min(1).max() < 1e-3


@EVERY
def test_what_is_not_a_number_in_an_update_stops_the_run_and_names_it(name, tmp_path):
    agent = api.make(name, dataset=recorded(), **tiny(name, iteration_steps=5))
    run, calls = agent.learner.run, []

    def broken(*args):
        calls.append(1)
        if len(calls) == 5 * 11 + 3:
            agent.learner.state["actor"].fill_(torch.nan)
        return run(*args)

    agent.learner.run = broken
    with pytest.raises(NonFiniteUpdateError) as caught:
        learn(agent, 100, tmp_path / "run")
    error = caught.value
    # a policy that moves at every second update says so at its next one
    before = row(name).before
    assert (error.iteration, error.step) == (11 + before, 60) and error.optimiser_step in (2, 3), error
    assert any("last.safetensors" in note for note in error.__notes__)
    kept = api.load(tmp_path / "run")
    assert kept.steps == 5 * (10 - before) and all(v.isfinite().all() for v in kept.tensors().values())


@EVERY
def test_data_of_another_environment_is_refused(name, file):  # noqa: F811
    for env, message in (
        (env_id("OnlyTruncates"), r"observations of shape .*\(1,\).*toy has .*\(3,\)"),
        (EnvSpec(STRICT, kwargs={"obs": "vector", "action": "double"}), r"actions of shape \(2,\).*toy has \(1,\)"),
    ):
        with pytest.raises(DatasetError, match=f"{message}.*they do not belong together"):
            api.make(name, env, dataset=file, **tiny(name))
    wide = recorded()
    wide.actions[5] = 1.5
    with pytest.raises(DatasetError, match="actions row 5"):
        api.make(name, dataset=wide, **tiny(name))
    with pytest.raises(DatasetError, match="name it by dataset="):
        api.make(name, **tiny(name))


@POLICIES
def test_without_an_environment_it_trains_and_says_that_it_cannot_be_evaluated(name, caplog):
    agent = api.make(name, dataset=recorded(env=None), **tiny(name, eval_every=3))
    quiet(agent, 6)
    assert "No evaluations" in caplog.text and agent.learner.updates == 6
    assert agent.predict(seen_by(agent, 2), deterministic=True)[0].shape == (2, 1)
    with pytest.raises(ValueError):
        agent.evaluate(1)


# -- spaces ---------------------------------------------------------------------------------------


def train_on(name, tmp_path, obs, action):
    env = EnvSpec(STRICT, kwargs={"obs": obs, "action": action})
    data = recorded(OBSERVATIONS[obs], ACTIONS[action], env)
    agent = api.make(name, dataset=data, **tiny(name, normalize_obs=True, eval_every=6, eval_episodes=1))
    before = agent.learner.state["actor"].clone()
    learn(agent, 6, tmp_path / "run")
    assert not torch.equal(before, agent.learner.state["actor"])
    loaded, raw = api.load(tmp_path / "run"), seen_by(agent, 8)
    for deterministic in (True, False) if row(name).policy else ():
        found = agent.predict(raw, deterministic=deterministic)[0]
        assert all(agent.action_space.contains(a) for a in found)
        assert np.array_equal(found, loaded.predict(raw, deterministic=deterministic)[0])
    return agent


@having("box")
@pytest.mark.parametrize("action", ["bounded", "double", "matrix"])
def test_trains_on_box_actions(name, action, tmp_path):
    agent = train_on(name, tmp_path, "vector", action)
    stored = agent.replay.columns["action"]
    space, actions = ACTIONS[action], agent.data.actions.reshape(len(agent.data), -1)
    low, high = (np.asarray(b, np.float64).reshape(-1) for b in (space.low, space.high))
    unit = torch.from_numpy(2 * (actions - low) / (high - low) - 1).float()
    assert torch.cdist(stored.double(), unit.double()).min(1).values.max() < 1e-5 and stored.abs().max() <= 1.0


@having("dict_obs")
def test_trains_on_dict_observations(name, tmp_path):
    agent = train_on(name, tmp_path, "dict", "bounded")
    assert any(v.dtype == torch.int64 for k, v in agent.replay.columns.items() if k.startswith("obs/"))


@having("image_obs")
@pytest.mark.parametrize("obs", ["image", "image_and_vector"])
def test_trains_on_images(name, obs, tmp_path):
    agent = train_on(name, tmp_path, obs, "bounded")
    assert any("cnns" in n for n, _ in agent.policy.named_parameters())
    assert torch.uint8 in {v.dtype for k, v in agent.replay.columns.items() if k.startswith("obs")}


class Half(torch.nn.Module):
    """An encoder of one's own."""

    def __init__(self, space):
        super().__init__()
        self.out_features, self.layer = 2, torch.nn.LazyLinear(2)
        self.layer(torch.zeros(1, 3))

    def forward(self, x):
        return self.layer(x)


@STEPS
def test_trains_with_an_encoder_of_ones_own(name, tmp_path):
    agent = learn(api.make(name, dataset=recorded(), encoder=Half, **tiny(name)), 6, tmp_path / "run")
    encoders = [net.features.encoder for k, net in agent.learner.modules.items() if k != "temperature"]
    assert all(isinstance(e, Half) for e in encoders) and len({id(e) for e in encoders}) == len(encoders)
    assert_same_tensors(agent.tensors(), api.load(tmp_path / "run").tensors())


@having("gpu")
def test_trains_on_the_gpu(name):
    if not torch.cuda.is_available():
        pytest.skip("no GPU here")
    agent = quiet(api.make(name, dataset=recorded(), **tiny(name, device="cuda", normalize_obs=True)), 12)
    assert agent.learner.state["actor"].is_cuda and agent.replay.columns["action"].is_cuda
    assert not row(name).policy or agent.predict(seen_by(agent, 2))[0].shape == (2, 1)


@pytest.mark.slow
@having("compile")
def test_compiled_updates_equal_eager_ones(name):
    agents = []
    for compiled in (False, True):
        # at its usual epsilon a gradient that is 0 but for rounding is a whole step of Adam's, of either sign
        settings = tiny(name, compile=compiled, updates_per_graph=2, learning_rate=1e-3, adam_eps=1e-3)
        agents.append(quiet(api.make(name, dataset=recorded(), **settings), 6))
    for key, value in agents[0].learner.tensors().items():
        torch.testing.assert_close(agents[1].learner.tensors()[key], value, rtol=1e-4, atol=1e-5, msg=key)
