"""Policy-guided diffusion: what it is trained on, by which loss, and that a run goes on as if never stopped."""

import dataclasses
import json
import math

import numpy as np
import pytest
import torch
from helpers.agents import NOISY, assert_same_tensors, quiet
from helpers.offline import recorded, trace, watch

from ctrlrl import api
from ctrlrl.data import d4rl
from ctrlrl.data.dataset import DatasetError
from ctrlrl.data.windows import windows
from ctrlrl.engine import checkpoint
from ctrlrl.engine.config import ConfigError
from ctrlrl.nets.trajectory_codec import Steps
from ctrlrl.nets.trajectory_denoiser import ResidualMLP

NAME, T = "policy_guided_diffusion", 3
TINY = {
    "batch_size": 8, "iteration_steps": 3, "learning_rate": 1e-2, "device": "cpu", "threads": 1, "checkpoint_every": 1,
    "window_length": T, "window_stride": 1, "denoiser_channels": (8,), "denoiser_width": 16, "denoiser_blocks": 1,
}  # fmt: skip


def make(data=None, **settings):
    return api.make(NAME, dataset=recorded() if data is None else data, **TINY | settings)


def episode_of(data, rows):
    return np.searchsorted(np.flatnonzero(data.ends), rows)


def drawn(agent, updates=60):
    """Rows of the dataset [W, T] that ``agent`` learns from."""
    seen = watch(agent)
    quiet(agent, updates)
    return np.concatenate([trace(agent.data, batch.obs).reshape(-1, agent.algorithm.window_length) for batch in seen])


def learned_from(agent):
    """First rows of the windows to learn from, by the definition."""
    data, own = agent.data, agent.algorithm
    starts = windows(data, own.window_length, own.window_stride, own.drop_timeouts)
    held = set(episode_of(data, agent.replay.held_out.numpy())) if own.window_length > 1 else set()
    return np.array([s for s in starts if episode_of(data, s) not in held])


# -- what it is trained on -------------------------------------------------------------------------


def test_batches_are_windows_within_one_episode_with_the_rows_own_numbers():
    agent = make(held_out=0.0)
    seen = watch(agent)
    quiet(agent, 60)
    data, found = agent.data, set()
    for batch in seen:
        rows = trace(data, batch.obs).reshape(-1, T)
        assert (np.diff(rows) == 1).all() and not data.ends[rows[:, :-1]].any()
        flat = rows.flatten()
        np.testing.assert_array_equal(batch.action, data.actions[flat])
        np.testing.assert_array_equal(batch.reward_t, data.rewards[flat])
        np.testing.assert_array_equal(batch.terminated_t, data.terminals[flat])
        found |= set(rows[:, 0].tolist())
    assert found == set(windows(data, T).tolist())


@pytest.mark.parametrize("length", [1, T])
def test_episodes_held_out_are_never_drawn_and_the_others_all_are(length):
    agent = make(window_length=length, held_out=0.25)
    rows = drawn(agent)
    data = agent.data
    starts = windows(data, length)
    seen = set(episode_of(data, rows[:, 0]))
    assert len(seen) == 12 and len(agent.data.episodes) == 16
    # all that is left is held out for validation: together they are all windows
    assert len(set(rows[:, 0])) == len(agent.replay.starts)
    assert len(agent.replay.starts) + len(agent.replay.held_out) == len(starts)
    assert not set(rows[:, 0]) - set(starts)


def test_single_transitions_are_the_usable_steps_with_their_own_next_observation():
    agent = make(window_length=1, held_out=0.0)
    seen = watch(agent)
    quiet(agent, 100)
    data, found = agent.data, set()
    for batch in seen:
        rows = trace(data, batch.obs)
        np.testing.assert_array_equal(batch.next_obs, data.next_observations[rows])
        found |= set(rows.tolist())
    assert found == set(np.flatnonzero(data.usable)) and not data.usable.all()
    assert isinstance(agent.policy.denoise.network, ResidualMLP)


def test_channels_are_standardised_over_the_windows_to_learn_from_and_saved(tmp_path):
    data = recorded(mean=3.0, std=5.0)
    rewards = np.full(len(data), 0.1, np.float32)
    rewards[::2] = np.nextafter(rewards[0], np.float32(1.0))
    data = dataclasses.replace(data, rewards=rewards)
    agent = quiet(make(data, window_stride=2), 3)
    rows = learned_from(agent)[:, None] + np.arange(T)
    channels = np.concatenate(
        [data.observations, np.arctanh(np.clip(data.actions, -0.999, 0.999)), data.rewards[:, None],
         data.terminals[:, None]], 1,
    )[rows].reshape(-1, 6)  # fmt: skip
    std = channels.std(0, dtype=np.float64)
    std[4] = 1.0  # a constant, up to rounding
    agent.save(tmp_path / "run")
    loaded = api.load(tmp_path / "run")
    for model in [m for a in (agent, loaded) for m in a.learner.modules.values()]:
        np.testing.assert_allclose(model.codec.mean, channels.mean(0, dtype=np.float64), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(model.codec.std, std, rtol=1e-4)


def test_settings_of_rewards_are_of_no_effect():
    data = recorded()
    agent = make(data, reward_scale=3.0, reward_shift=-1.0, scale_by_returns=True, held_out=0.0)
    quiet(agent, 3)
    np.testing.assert_array_equal(agent.replay.columns["reward"], data.rewards)


def test_one_episode_leaves_nothing_to_hold_out_and_short_ones_are_refused():
    long = recorded().take([int(np.argmax([e.stop - e.start for e in recorded().episodes]))])
    agent = quiet(make(long, held_out=0.5), 3)
    assert len(agent.replay.held_out) == 0
    with pytest.raises(DatasetError, match="no window of 9 steps: the longest episode has 6"):
        quiet(make(window_length=9), 3)


# -- the loss --------------------------------------------------------------------------------------


def test_an_update_is_adam_on_edms_loss_and_the_average_follows():
    """The loss from the paper's formulas; the step from torch's Adam, with an epsilon that outweighs rounding: biases
    before a normalisation have a gradient of 0."""
    agent = make(iteration_steps=1, batch_size=4, actor_schedule="constant", warmup_share=0.0, adam_eps=1e-2)
    seen, metrics = watch(agent), []
    agent._open()
    agent.span = (0, 2)
    model, average = agent.policy, agent.averaged
    before = [p.clone() for p in model.parameters()]
    metrics.append(agent._iterate())
    (batch,) = seen

    steps = Steps(*(x.view(4, T, *x.shape[1:]) for x in batch[:5]))
    sigma = torch.exp(-1.2 + 1.2 * batch.extras["level"].view(4, T)[:, 0]).view(4, 1, 1)
    noise = batch.extras["noise"].view(4, T, 6).transpose(1, 2)
    assert (batch.extras["level"].view(4, T) == batch.extras["level"].view(4, T)[:, :1]).all()
    x = model.codec.encode(steps)
    other = make(iteration_steps=1).policy
    plain = other.denoise.network
    with torch.no_grad():
        for parameter, value in zip(other.parameters(), before, strict=True):
            parameter.copy_(value)
    other.requires_grad_(True)
    noisy = x + sigma * noise
    answer = plain(noisy / (1 + sigma**2).sqrt(), (sigma.log() / 4).flatten())
    denoised = noisy / (sigma**2 + 1) + sigma / (sigma**2 + 1).sqrt() * answer
    loss = ((sigma**2 + 1) / sigma**2 * (denoised - x) ** 2).mean()
    assert metrics[0]["train/actor_loss"] == pytest.approx(loss.item(), rel=1e-4)
    loss.backward()
    torch.optim.Adam(other.parameters(), lr=1e-2, eps=1e-2).step()
    for mine, expected, slow, old in zip(
        model.parameters(), other.parameters(), average.parameters(), before, strict=True
    ):
        torch.testing.assert_close(mine, expected.detach(), rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(slow, old + 0.9 * (mine - old))


def test_the_average_follows_by_a_rate_that_falls_to_tau():
    """5e-4 at every update is 5e-3 at every tenth: 0.9995^10 = 0.995."""
    agent = make()
    agent.span = (0, 10)
    for updates, ramp, expected in ((0, True, 0.9), (90, True, 0.09), (10**6, True, 5e-4), (0, False, 5e-4)):
        agent.learner.updates = updates
        agent.algorithm = dataclasses.replace(agent.algorithm, ema_rampup=ramp)
        agent._schedule()
        assert float(agent.learner.knobs["tau"]) == pytest.approx(expected)
    assert (1 - agent.config.tau) ** 10 == pytest.approx(0.995, abs=2e-5)


@pytest.mark.parametrize("schedule, end", [("cosine", 0.0), ("constant", 1.0)])
def test_the_learning_rate_rises_over_a_tenth_of_the_run_and_then_falls(schedule, end):
    agent, found = make(actor_schedule=schedule), {}
    agent.span = (100, 1100)
    for steps in (100, 150, 200, 650, 1100):
        agent.steps = steps
        agent._schedule()
        found[steps] = float(agent.learner.knobs["lr/actor"]) / 1e-2
    half = 1.0 if schedule == "constant" else 0.5
    assert found == pytest.approx({100: 0.1, 150: 0.55, 200: 1.0, 650: half, 1100: end}, abs=1e-6)


def test_the_validation_loss_is_of_the_average_on_the_same_draws_every_time():
    agent = quiet(make(), 6)
    memory = agent._memory()
    first, second = agent._validation_loss(memory), agent._validation_loss(memory)
    assert first == second and math.isfinite(first)
    agent.learner.state["actor"].add_(1.0)
    assert agent._validation_loss(memory) == first
    agent.learner.state["actor_ema"].add_(0.1)
    assert agent._validation_loss(memory) != first


# -- stopped and resumed ---------------------------------------------------------------------------


class Stop:
    def on_update(self, agent, step, metrics):
        if agent.iteration == 14:
            raise KeyboardInterrupt


@pytest.mark.parametrize("length", [1, T])
def test_killed_and_resumed_equals_never_killed(length, tmp_path):
    d4rl.write(recorded(), tmp_path / "toy.hdf5")
    options = {"progress": False, "tensorboard": False}
    for name in ("whole", "cut"):
        agent = make(str(tmp_path / "toy.hdf5"), window_length=length, env=NOISY, updates_per_graph=2)
        if name == "whole":
            agent.learn(61, run_dir=tmp_path / name, **options)
        else:
            with pytest.raises(KeyboardInterrupt):
                agent.learn(61, run_dir=tmp_path / name, callbacks=[Stop()], **options)
            assert api.load(tmp_path / name).steps == 30
            api.load(tmp_path / name).resume(tmp_path / name, **options)
    files = [checkpoint.read(tmp_path / n / "checkpoints" / "last.safetensors") for n in ("whole", "cut")]
    assert_same_tensors(files[0][0], files[1][0])
    assert files[0][1] == files[1][1]
    logs = [[json.loads(line) for line in (tmp_path / n / "metrics.jsonl").open()] for n in ("whole", "cut")]
    for key in ("train/actor_loss", "train/validation_loss"):
        found = [[row[key] for row in log if key in row] for log in logs]
        assert found[0] == found[1] and len(found[0]) == len(set(found[0])) == 21


def test_the_same_seed_gives_the_same_run_and_another_seed_another():
    first, second, other = (quiet(make(seed=seed), 6) for seed in (1, 1, 2))
    assert_same_tensors(first.tensors(), second.tensors())
    for key in ("actor", "actor_ema"):
        assert not torch.equal(first.learner.state[key], other.learner.state[key])


def test_a_memory_map_gives_the_same_run(tmp_path):
    agents = [quiet(make(memory_map=mapped), 6, root=tmp_path / str(mapped)) for mapped in (False, True)]
    assert_same_tensors(*(a.tensors() for a in agents))
    assert agents[0].replay is not None and agents[1].replay is None


@pytest.mark.slow
@pytest.mark.parametrize("length", [1, T])
def test_compiled_updates_equal_eager_ones(length):
    # a channel normalised on its own blows rounding up a thousandfold at every update, and its bias has no gradient
    # but rounding, of which Adam's usual epsilon makes a whole step
    settings = {"window_length": length, "updates_per_graph": 2, "denoiser_channels": (32,), "adam_eps": 1e-3}
    settings["learning_rate"] = 1e-3
    agents = [quiet(make(compile=c, **settings), 6) for c in (False, True)]
    for key, value in agents[0].learner.tensors().items():
        torch.testing.assert_close(agents[1].learner.tensors()[key], value, rtol=1e-3, atol=1e-4, msg=key)


# -- settings --------------------------------------------------------------------------------------


def test_the_presets_have_the_published_numbers():
    released = make(preset="released", window_length=T)
    own, config = released.algorithm, released.config
    assert (own.window_length, own.drop_timeouts, own.held_out, own.ema_rampup) == (T, True, 0.05, False)
    blueprint, method = type(released).blueprint("released")
    assert (blueprint.batch_size, blueprint.learning_rate, blueprint.tau) == (32, 2e-3, 5e-4)
    assert (method.window_length, method.window_stride, method.warmup_share) == (32, 8, 0.1)
    assert config.denoiser.denoiser_channels == (8,)  # the user's own win
    blueprint, method = type(released).blueprint("synther")
    assert (method.window_length, blueprint.batch_size, blueprint.denoiser.denoiser_blocks) == (1, 256, 6)


@pytest.mark.parametrize(
    "settings, word",
    [({"window_length": 0}, "window_length=0"), ({"window_stride": 0}, "window_stride=0"),
     ({"held_out": 1.0}, "held_out=1.0"), ({"warmup_share": -0.1}, "warmup_share=-0.1"),
     ({"denoiser_channels": (9,)}, "multiples of 8"), ({"encoder": "torch.nn:Identity"}, "has no encoder")],
)  # fmt: skip
def test_impossible_settings_are_refused(settings, word):
    with pytest.raises(ConfigError, match=word):
        make(**settings)


def test_it_cannot_go_on_in_an_environment(tmp_path):
    quiet(make(), 3).save(tmp_path / "run")
    with pytest.raises(ConfigError, match="a model of recorded data and no policy"):
        api.make(NAME, NOISY, start_from=str(tmp_path / "run"), n_envs=1)
