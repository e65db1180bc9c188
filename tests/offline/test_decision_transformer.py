"""Decision Transformer: the windows it learns from, its update, and that it follows the return asked for."""

import copy
import dataclasses

import gymnasium as gym
import numpy as np
import pytest
import torch
from helpers.agents import Recorder, assert_same_tensors, quiet
from helpers.envs import DictObs, env_id
from helpers.offline import recorded, watch
from helpers.trajectories import PAID, K, Paid, Scripted, dataset, make
from torch import nn

from ctrlrl import api
from ctrlrl.engine.config import ConfigError
from ctrlrl.engine.wrappers import ReturnToGo, target_of
from ctrlrl.offline.decision_transformer import DecisionTransformer, existing, return_to_go, timestep

NAME = "decision_transformer"


# -- the data --------------------------------------------------------------------------------------


@pytest.mark.parametrize("ends", ["terminals", "timeouts"])
def test_the_return_to_go_counts_from_the_step_itself_to_the_episodes_end(ends):
    data = dataset([3, 1, 2], rewards=[1, 10, 100, -5, 0.5, 0.25], ends=ends)
    assert return_to_go(data).tolist() == [111, 110, 100, -5, 0.75, 0.25]
    assert timestep(data).tolist() == [0, 1, 2, 0, 0, 1]
    seen = DecisionTransformer().select(data)
    assert seen.observations["return_to_go"].tolist() == [[111], [110], [100], [-5], [0.75], [0.25]]
    assert seen.observations["observation"] is data.observations


def test_a_long_set_of_large_rewards_does_not_blur_small_ones():
    assert return_to_go(dataset([1, 2], rewards=[1e9, 0.25, 0.25])).tolist() == [1e9, 0.5, 0.25]


def test_the_data_are_what_the_wrapper_would_have_shown():
    data, env = dataset([3], rewards=[1, 10, 100]), ReturnToGo(Scripted([1, 10, 100]), 111.0)
    seen = DecisionTransformer().select(data).observations
    obs, _ = env.reset()
    for i in range(3):
        assert (obs["return_to_go"], obs["timestep"]) == (seen["return_to_go"][i], seen["timestep"][i])
        obs = env.step(None)[0]


def test_windows_end_with_their_episode_and_are_padded_on_the_left_by_their_first_step():
    agent = make(dataset([2, 6, 1]))
    rows = agent._memory().sample(torch.arange(9)).obs["observation"][:, 0].view(9, K).int().tolist()
    assert rows == [
        [0, 0, 0, 1], [1, 1, 1, 1],
        [2, 3, 4, 5], [3, 4, 5, 6], [4, 5, 6, 7], [5, 5, 6, 7], [6, 6, 6, 7], [7, 7, 7, 7],
        [8, 8, 8, 8],
    ]  # fmt: skip


def test_padding_is_known_by_its_timesteps():
    found = existing(torch.tensor([[4, 4, 4, 5], [0, 0, 0, 0], [2, 3, 4, 5], [0, 0, 1, 2]]))
    assert found.int().tolist() == [[0, 0, 1, 1], [0, 0, 0, 1], [1, 1, 1, 1], [0, 1, 1, 1]]


def test_episodes_are_drawn_in_proportion_to_their_length():
    agent = make(dataset([1, 3, 6]), batch_size=500, iteration_steps=10)
    seen = watch(agent)
    quiet(agent, 10)
    last = torch.cat([b.obs["observation"][:, 0].view(-1, K)[:, -1] for b in seen])
    assert len(last) == 5000
    share = torch.histc(last, bins=10, min=0, max=9)
    share = torch.stack([share[:1].sum(), share[1:4].sum(), share[4:].sum()]) / len(last)
    torch.testing.assert_close(share, torch.tensor([0.1, 0.3, 0.6]), atol=0.025, rtol=0)  # 3.5 deviations


def test_no_step_is_left_out_and_actions_come_in_units_of_their_range():
    data = dataset([2, 3], ends="timeouts")  # whose last steps have no next observation
    rows = make(data)._memory()
    assert len(rows) == 5
    rows.length = 1
    expected = torch.from_numpy((data.actions - [0, 1.5]) / [2, 1.5]).float()
    torch.testing.assert_close(rows.sample(torch.arange(5)).action, expected)


def test_observations_are_normalised_by_every_step_once():
    data = dataset([1, 9])
    agent = make(data)
    quiet(agent, 3)
    scaling = agent.policy.features.preprocess.normalizer
    mean, std = data.observations.mean(0), data.observations.std(0)
    torch.testing.assert_close(scaling.scale, torch.from_numpy(1 / (std + 1e-3)), rtol=1e-5, atol=0)
    torch.testing.assert_close(scaling.shift, torch.from_numpy(-mean / (std + 1e-3)), rtol=1e-5, atol=1e-5)
    assert agent._memory().length == K


# -- the update ------------------------------------------------------------------------------------


def test_updates_are_those_of_torchs_adamw_on_the_steps_that_exist():
    data = dataset([2, 6, 1])
    agent = make(
        data, dropout=0.0, weight_decay=0.3, learning_rate=1e-2, warmup_updates=3, max_grad_norm=0.05,
        normalize_obs=False, iteration_steps=5,
    )  # fmt: skip
    assert agent.algorithm.noise(1, 8, 2, torch.Generator()) == {}
    plain = copy.deepcopy(agent.policy)
    for parameter in plain.parameters():  # which share one memory
        parameter.data = parameter.data.clone()
    plain.requires_grad_(True)
    optimiser = torch.optim.AdamW(plain.parameters(), lr=1e-2, weight_decay=0.3)
    warmup = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: min((step + 1) / 3, 1))
    seen, losses = watch(agent), []
    quiet(agent, 5, callbacks=[recorder := Recorder()])
    episodes = np.repeat([0, 1, 2], [2, 6, 1])
    for batch in seen:
        number = batch.obs["observation"][:, 0].int().view(-1, K)
        errors = []
        for window in number:  # each without its padding
            real = window[-len(window.unique()) :].numpy()
            assert len({episodes[i] for i in real}) == 1
            obs = {
                "observation": torch.from_numpy(data.observations[real]),
                "return_to_go": torch.from_numpy(return_to_go(data)[real])[:, None],
                "timestep": torch.from_numpy(timestep(data)[real])[:, None],
            }
            action = torch.from_numpy((data.actions[real] - [0, 1.5]) / [2, 1.5]).float()
            errors.append((plain(obs, action, torch.ones(1, len(real), dtype=bool))[0] - action).square())
        loss = torch.cat(errors).mean()
        optimiser.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(plain.parameters(), 0.05)
        assert norm > 0.05
        optimiser.step()
        warmup.step()
        losses.append(loss.item())
    for (name, mine), theirs in zip(agent.policy.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs.detach(), rtol=1e-3, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}")
    ((_, metrics),) = recorder.of("update")
    assert metrics["train/actor_loss"] == pytest.approx(np.mean(losses), rel=1e-4)


def test_without_weight_decay_the_step_is_adams():
    agents = [make(weight_decay=decay, warmup_updates=0) for decay in (0.0, 0.5)]
    first = [a.policy.out.weight.clone() for a in agents]
    for agent in agents:
        quiet(agent, 1)
    # the gradient is the same at the first step, so that the difference is the decay alone
    torch.testing.assert_close(
        agents[0].policy.out.weight - agents[1].policy.out.weight, 1e-2 * 0.5 * first[0], rtol=1e-2, atol=1e-7
    )  # fmt: skip
    assert torch.equal(first[0], first[1])


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_the_learning_rate_rises_linearly_over_the_first_updates(schedule):
    agent = make(warmup_updates=4, learning_rate=0.5, iteration_steps=8, actor_schedule=schedule)
    rates, run = [], agent.learner.run

    def noted(batch, noise, count):
        rates.append(float(agent.learner.knobs["lr/actor"]))
        return run(batch, noise, count)

    agent.learner.run = noted
    quiet(agent, 8)
    share = np.ones(8) if schedule == "constant" else (1 + np.cos(np.pi * np.arange(8) / 8)) / 2
    np.testing.assert_allclose(rates, 0.5 * share * np.minimum(np.arange(1, 9) / 4, 1), rtol=1e-6)


def test_dropout_leaves_out_its_share_and_is_drawn_from_the_given_generator():
    own = DecisionTransformer(context=3, width=8, layers=2, heads=2, dropout=0.3)
    first, again, other = (own.noise(5, 6, 1, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1))
    assert first["features"].shape == (5, 6, 5, 8, 8) and first["attention"].shape == (5, 6, 2, 2, 8, 8)
    for name, value in first.items():
        assert value.dtype == torch.bool and value.float().mean() == pytest.approx(0.7, abs=0.02)
        assert torch.equal(value, again[name]) and not torch.equal(value, other[name])


def test_updates_drop_out():
    runs = [make(dropout=rate, warmup_updates=0) for rate in (0.0, 0.5)]
    for agent in runs:
        quiet(agent, 1)
    assert not torch.equal(runs[0].policy.out.weight, runs[1].policy.out.weight)


@pytest.mark.parametrize("context", [1, 4])
def test_the_action_follows_the_return_that_is_asked_for(context):
    """Two kinds of episodes, all of one action each: the return alone tells which."""
    sign = np.repeat([1.0, -1.0], 3 * 8)
    data = dataset(
        [3] * 16, rewards=5.0 * (sign > 0), actions=sign[:, None], obs=np.zeros((48, 1), np.float32), env=PAID,
        space=Paid.observation_space, action_space=Paid.action_space,
    )  # fmt: skip
    agent = make(data, context=context, layers=1, warmup_updates=10, iteration_steps=25)
    assert target_of(agent.env_spec) == 15.0
    quiet(agent, 100)
    assert agent.evaluate(2).returns.tolist() == [15.0, 15.0]
    assert agent.evaluate(2, target_return=0.0).returns.tolist() == [0.0, 0.0]
    assert agent.evaluate(2, n_envs=1).returns.tolist() == [15.0, 15.0]
    for target, expected in ((15.0, 1.0), (0.0, -1.0)):
        told = {"observation": np.zeros(1, np.float32), "return_to_go": np.float32([target]), "timestep": np.array([0])}
        assert agent.predict(told)[0] == pytest.approx(expected, abs=0.2)


# -- with everything else --------------------------------------------------------------------------


def test_a_run_that_was_stopped_goes_on_bit_for_bit(tmp_path):
    data = recorded()
    whole = make(data, warmup_updates=7)
    quiet(whole, 12)
    part = make(data, warmup_updates=7)
    quiet(part, 12, run_dir=tmp_path, callbacks=[Recorder("update", 6, False)])
    assert part.steps == 6
    again = make(data, warmup_updates=7)
    again.resume(tmp_path, progress=False, tensorboard=False)
    assert again.steps == 12
    assert_same_tensors(again.tensors(), whole.tensors())


def test_several_updates_at_once_are_the_same_updates():
    alone, together = (make(updates_per_graph=n, iteration_steps=4, dropout=0.0, warmup_updates=0) for n in (1, 2))
    quiet(alone, 4), quiet(together, 4)
    assert_same_tensors(alone.tensors(), together.tensors())


@pytest.mark.parametrize("memory_map", [False, True])
def test_dict_and_image_observations_are_learned_from(memory_map, tmp_path):
    agent = make(recorded(DictObs.observation_space, env=None), memory_map=memory_map)
    before = agent.policy.embed["observation"].weight.clone()
    quiet(agent, 3, **({"run_dir": tmp_path} if memory_map else {}))
    assert not torch.equal(before, agent.policy.embed["observation"].weight)
    obs = agent.observation_space.sample() | {"timestep": np.array([2])}
    assert np.isfinite(agent.predict(obs)[0]).all()


class Half(nn.Module):
    out_features = 1

    def __init__(self, space):
        super().__init__()
        assert isinstance(space, gym.spaces.Box), space
        self.layer = nn.Linear(space.shape[0], 1)

    def forward(self, x):
        return self.layer(x)


def test_an_encoder_of_ones_own_is_built_for_the_observation_alone():
    agent = make(encoder=Half)
    before = agent.policy.features.encoder.layer.weight.clone()
    quiet(agent, 3)
    assert not torch.equal(before, agent.policy.features.encoder.layer.weight)


def test_it_does_not_go_on_in_an_environment(tmp_path):
    make().save(tmp_path)
    with pytest.raises(ConfigError, match="cannot go on in an environment"):
        api.make(NAME, env_id("Noisy"), start_from=str(tmp_path), device="cpu")


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"context": 0}, "context=0 must be at least 1"),
        ({"heads": 3}, "heads=3 must divide width=128"),
        ({"dropout": 1.0}, "dropout=1.0"),
        ({"return_scale": 0.0}, "return_scale=0.0"),
        ({"weight_decay": -1.0}, "must not be negative"),
        ({"warmup_updates": -1}, "must not be negative"),
        ({"target_return": float("inf")}, "target_return=inf"),
    ],
)
def test_settings_that_make_no_sense_are_refused(setting, message):
    with pytest.raises(ValueError, match=message):
        DecisionTransformer(**setting)


def test_settings_are_those_that_were_published():
    config, own = api.get_method(NAME).blueprint()
    assert dataclasses.asdict(own) == {
        "context": 20, "width": 128, "layers": 3, "heads": 1, "dropout": 0.1, "return_scale": 1000.0,
        "timesteps": 1000, "weight_decay": 1e-4, "warmup_updates": 10_000, "target_return": None,
    }  # fmt: skip
    assert (config.batch_size, config.learning_rate, config.max_grad_norm) == (64, 1e-4, 0.25)


@pytest.mark.slow
def test_compiled_updates_are_the_eager_ones():
    plain, compiled = (make(compile=c, layers=1, warmup_updates=2, weight_decay=0.1) for c in (False, True))
    quiet(plain, 6), quiet(compiled, 6)
    for (name, a), b in zip(plain.policy.named_parameters(), compiled.policy.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")
