"""The off-policy loop from outside: what is collected, stored and learnt from, and when."""

import gc
import shutil
import tempfile
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from helpers.agents import quiet, same
from helpers.envs import BothAtOnce, DictObs, OnlyTerminates, OnlyTruncates, env_id
from helpers.off_policy import CONSTANT, STOPPING, Stopping, Told, make

from ctrlrl import api
from ctrlrl.data.transitions import ReplaySizeError
from ctrlrl.engine import checkpoint, hooks
from ctrlrl.engine.config import ConfigError
from ctrlrl.engine.errors import CheckpointError, NonFiniteUpdateError
from ctrlrl.types import EnvSpec


def watched(agent):
    """The learner's updates, as pairs of how many and at which environment step."""
    calls, run = [], agent.learner.run

    def noted(batch, noise, count):
        calls.append((agent.steps, count))
        return run(batch, noise, count)

    agent.learner.run = noted
    return calls


def stored(agent):
    """The rows of the replay in order of time, by column."""
    memory = agent.replay
    return {k: v.numpy() for k, v in memory.rows(memory.oldest, memory.added).items()}


# -- warm-up and actions --------------------------------------------------------------------------


def test_the_warm_up_is_uniform_over_the_action_box_and_learns_nothing():
    env = Told()
    agent = make(env=env, learning_starts=3000, replay_size=3000, iteration_steps=500, collect_steps=50)
    calls, start = watched(agent), agent.learner.state["actor"].clone()
    quiet(agent, 3000 - 500)
    quiet(agent, 500)
    assert len(env.told) == 3000 and not calls and torch.equal(agent.learner.state["actor"], start)
    share = (np.array(env.told) - [-0.1, -2.0]) / [0.4, 9.0]
    for dimension in share.T:
        counts = np.histogram(dimension, bins=10, range=(0, 1))[0]
        # chi-squared with 9 degrees of freedom: 33.7 is passed once in 10,000
        assert ((counts - 300.0) ** 2 / 300.0).sum() < 33.7
        assert np.abs(np.corrcoef(dimension[:-1], dimension[1:])[0, 1]) < 0.08
    assert np.abs(np.corrcoef(share.T)[0, 1]) < 0.08


@pytest.mark.parametrize("name", ["sac", "td3"])
def test_environments_get_actions_they_contain_and_the_replay_those_in_the_unit_box(name):
    env = Told()
    agent = make(name, env, replay_size=100, **({"exploration_noise": 1.5} if name == "td3" else {}))
    quiet(agent, 96)
    inner, sent = stored(agent)["action"], np.array(env.told)
    assert inner.shape == sent.shape == (96, 2) and np.abs(inner).max() <= 1.0
    np.testing.assert_allclose(sent, np.float32([0.1, 2.5]) + inner * np.float32([0.2, 4.5]), rtol=1e-5, atol=1e-6)
    assert np.ptp(inner, axis=0).min() > 1.0
    if name == "td3":
        assert (np.abs(inner) == 1.0).any(), "no noise was cut off"


def test_after_the_warm_up_actions_are_the_policys():
    agent = make(learning_starts=16, learning_rate=0.0, replay_size=100)
    with torch.no_grad():
        agent.policy.mean.bias.fill_(2.0)
        agent.policy.log_std.bias.fill_(-10.0)
    quiet(agent, 48)
    rows = stored(agent)
    with torch.no_grad():
        modes = agent.policy.mode(torch.from_numpy(rows["obs"])).numpy()
    far = np.abs(rows["action"] - modes)[:, 0]
    assert (far[16:] < 1e-2).all() and np.median(far[:16]) > 0.3


# -- how many updates, and when -------------------------------------------------------------------


@pytest.mark.parametrize("ratio", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("n_envs,learning_starts", [(1, 10), (3, 10), (3, 0), (1, 0)])
def test_updates_are_the_replay_ratio_times_the_steps_after_the_warm_up(ratio, n_envs, learning_starts):
    agent = make(n_envs=n_envs, replay_ratio=ratio, learning_starts=learning_starts, iteration_steps=6)
    calls = watched(agent)
    quiet(agent, 30)
    assert agent.steps == 30
    assert agent.learner.updates == sum(n for _, n in calls) == int(ratio * (30 - learning_starts))
    done = 0
    for step in range(n_envs, 31, n_envs):
        done += sum(n for at, n in calls if at == step)
        assert done == int(ratio * max(0, step - learning_starts)), f"at step {step}"


def test_rounds_of_several_steps_are_followed_by_their_updates():
    agent = make(n_envs=2, collect_steps=4, learning_starts=10, iteration_steps=16)
    calls = watched(agent)
    quiet(agent, 48)
    at = {step: sum(n for s, n in calls if s == step) for step, _ in calls}
    assert at == {16: 6, 24: 8, 32: 8, 40: 8, 48: 8}
    assert agent.learner.updates == 38 and agent.iteration == 3


def test_updates_go_into_graphs_of_several_where_enough_are_due():
    agent = make(n_envs=1, collect_steps=6, updates_per_graph=4, learning_starts=6, iteration_steps=12)
    calls = watched(agent)
    quiet(agent, 24)
    assert calls == [(s, n) for s in (12, 18, 24) for n in (4, 1, 1)]


def test_an_iteration_is_whole_rounds():
    agent = make(n_envs=3, collect_steps=2, iteration_steps=10)
    steps = []

    class Note:
        def on_update(self, agent, step, metrics):
            steps.append(step)

    quiet(agent, 30, callbacks=[Note()])
    assert agent.steps_bound == 12 and steps == [12, 24, 36]


def test_batches_are_drawn_from_everything_stored_so_far():
    """With a replay of 20 rows and far more draws, each of them comes up, and none that was overwritten."""
    agent = make(env=env_id("OnlyTruncates"), replay_size=20, learning_starts=4, iteration_steps=50)
    seen, run = {}, agent.learner.run

    def noted(batch, noise, count):
        known = set(agent.replay.columns["obs"][: len(agent.replay), 0].tolist())
        drawn = set(batch.obs[:, 0].tolist())
        assert drawn <= known
        seen[agent.steps] = drawn
        return run(batch, noise, count)

    agent.learner.run = noted
    quiet(agent, 100)
    rows = stored(agent)["obs"][:, 0].tolist()
    late = set().union(*(v for s, v in seen.items() if s > 70))
    assert len(set(rows)) == 20 and min(seen) == 5
    assert late >= set(rows[:-5]), "the newest may not have come up yet"
    assert not late & set().union(*(v for s, v in seen.items() if s <= 50))


# -- what is stored -------------------------------------------------------------------------------

ENDS = {"OnlyTruncates": (0.0, 1.0), "OnlyTerminates": (1.0, 0.0), "BothAtOnce": (1.0, 0.0)}
CLASSES = {"OnlyTruncates": OnlyTruncates, "OnlyTerminates": OnlyTerminates, "BothAtOnce": BothAtOnce}


def check_rows(rows, kind, n_envs, count):
    """Observations are 10 x episode + step, three steps to an episode, reward t: a row follows from its first entry."""
    terminated, truncated = ENDS[kind]
    assert len(rows["reward"]) == count
    ended = 0
    for n in range(n_envs):
        obs, following = rows["obs"][n::n_envs, 0], rows["next_obs"][n::n_envs, 0]
        step = obs % 10
        assert step.max() == 2.0 and (following == obs + 1).all()
        assert (rows["reward"][n::n_envs] == step + 1).all()
        last = step == 2
        assert (rows["terminated"][n::n_envs] == np.where(last, terminated, 0.0)).all()
        assert (rows["truncated"][n::n_envs] == np.where(last, truncated, 0.0)).all()
        # the row after an end is the first of an episode, and no other is skipped
        assert (obs[1:][last[:-1]] % 10 == 0).all() and (obs[1:][~last[:-1]] == obs[:-1][~last[:-1]] + 1).all()
        ended += last.sum()
    assert ended >= count // 3 - n_envs


@pytest.mark.parametrize(
    "kind,collect_steps,backend",
    [(kind, steps, "sync") for kind in ENDS for steps in (1, 4)] + [("OnlyTruncates", 4, "async")],
)
def test_every_row_has_its_true_next_observation(kind, collect_steps, backend):
    spec = EnvSpec(env_id(kind), n_envs=2, backend=backend)
    agent = make(env=spec, learning_starts=48, collect_steps=collect_steps, iteration_steps=48)
    quiet(agent, 48)
    check_rows(stored(agent), kind, 2, 48)


@pytest.mark.parametrize("kind", ENDS)
@pytest.mark.parametrize("collect_steps", [1, 4])
@pytest.mark.parametrize("mode", list(AutoresetMode), ids=lambda m: m.name)
def test_every_row_has_its_true_next_observation_whatever_the_autoreset(kind, collect_steps, mode):
    """Steps that only reset are no rows."""
    env = SyncVectorEnv([CLASSES[kind]] * 2, autoreset_mode=mode)
    agent = make(env=env, learning_starts=48, collect_steps=collect_steps, iteration_steps=48)
    quiet(agent, 40)
    assert agent.steps >= 40
    check_rows(stored(agent), kind, 2, min(48, agent.steps))


def test_with_next_step_autoreset_only_valid_steps_count():
    """Three valid steps in four: 2 environments x 20 rounds are 30 rows, and 30 - 10 updates."""
    env = SyncVectorEnv([OnlyTruncates] * 2, autoreset_mode=AutoresetMode.NEXT_STEP)
    agent = make(env=env, learning_starts=10, iteration_steps=30)
    quiet(agent, 30)
    assert agent.steps == agent.replay.added == 30 and agent.learner.updates == 20


def test_envpools_rows_have_their_true_next_observations():
    """Pendulum is cut after 200 steps: nothing jumps within a row, and the next row starts elsewhere."""
    pytest.importorskip("envpool")
    spec = EnvSpec("Pendulum-v1", n_envs=2, backend="envpool")
    agent = make(env=spec, learning_starts=1000, replay_size=1000, iteration_steps=500)
    quiet(agent, 900)
    # both environments are cut at the same steps, so that their rows alternate
    rows = {k: v.reshape(-1, 2, *v.shape[1:]) for k, v in stored(agent).items()}
    assert not rows["terminated"].any()
    assert np.flatnonzero(rows["truncated"][:, 0]).tolist() == [199, 399]
    # angular speed is at most 8, a step 0.05
    angle, following = (np.arctan2(rows[k][..., 1], rows[k][..., 0]) for k in ("obs", "next_obs"))
    turned = np.abs((following - angle + np.pi) % (2 * np.pi) - np.pi)
    assert turned.max() <= 0.4 + 1e-4
    np.testing.assert_allclose(turned, np.abs(rows["next_obs"][..., 2]) * 0.05, atol=1e-4)
    inside = rows["truncated"][:-1] == 0
    assert (rows["next_obs"][:-1][inside] == rows["obs"][1:][inside]).all()
    assert (rows["next_obs"][:-1][~inside] != rows["obs"][1:][~inside]).any(-1).all()


def test_dict_observations_are_stored_by_key():
    env = SyncVectorEnv([DictObs] * 2)
    agent = make(env=env, learning_starts=48, iteration_steps=48)
    quiet(agent, 40)
    rows = stored(agent)
    assert (rows["next_obs/vector"] == rows["obs/vector"] + 1).all() and rows["obs/image"].dtype == np.uint8
    assert (rows["next_obs/mode"] == rows["obs/mode"] + 1).all() and rows["obs/mode"].max() == 2
    assert (rows["next_obs/image"][:, 0, 0, 0] == rows["obs/image"][:, 0, 0, 0] + 1).all()


def test_a_truncated_episode_is_worth_what_would_have_followed():
    """Reward 1 for ever is worth 1 / (1 - 0.8) = 5, however often the clock cuts it; five steps are worth < 3.4."""
    value = {}
    for terminates in (False, True):
        agent = make("td3", CONSTANT, env_kwargs={"terminates": terminates}, gamma=0.8, tau=0.1, replay_size=1000)
        quiet(agent, 400)
        with torch.no_grad():
            value[terminates] = agent.learner.modules["critic"](torch.ones(1, 1), torch.zeros(1, 1)).mean().item()
    assert value[False] == pytest.approx(5.0, abs=0.3) and 1.0 < value[True] < 3.4


# -- what is refused ------------------------------------------------------------------------------


def test_discrete_and_unbounded_actions_are_refused_with_a_way_out():
    with pytest.raises(TypeError, match=r"Box actions.*Discrete.*try ppo"):
        make(env="CartPole-v1")

    class Unbounded(Told):
        action_space = gym.spaces.Box(-np.inf, np.inf, (2,), np.float32)

    with pytest.raises(ValueError, match=r"finite bounds.*RescaleAction"):
        make(env=Unbounded())


@pytest.mark.parametrize("memory_map", [False, True])
def test_a_replay_that_cannot_fit_is_refused_before_anything_is_taken(memory_map):
    agent = make(replay_size=10**13, memory_map=memory_map)
    with pytest.raises(ReplaySizeError, match=r"GiB.*replay_size"):
        quiet(agent, 8)


def test_a_warm_up_that_the_replay_cannot_hold_is_refused():
    with pytest.raises(ConfigError, match=r"learning_starts=49.*replay_size=48"):
        make(learning_starts=49)


def test_an_update_on_numbers_that_are_not_finite_names_them_and_saves_nothing(tmp_path):
    agent = make(learning_starts=8, iteration_steps=8, checkpoint_every=1)

    class Poison:
        def on_update(self, agent, step, metrics):
            if agent.iteration == 12:
                agent.replay.columns["reward"].fill_(torch.nan)

    with pytest.raises(NonFiniteUpdateError, match="critic_loss") as caught:
        quiet(agent, 160, run_dir=tmp_path / "run", callbacks=[Poison()])
    assert caught.value.what == "critic_loss" and "last.safetensors" in caught.value.__notes__[-1]
    assert [p.name for p in (tmp_path / "run" / "checkpoints").glob("[a-z]*st.safetensors")] == ["last.safetensors"]
    tensors, state = checkpoint.read(tmp_path / "run" / "checkpoints" / "last.safetensors")
    assert state["iteration"] == 10 and all(v.isfinite().all() for v in tensors.values())


# -- memory-mapped --------------------------------------------------------------------------------


def test_a_memory_mapped_run_is_the_same_bit_for_bit_and_leaves_no_files(tmp_path, monkeypatch):
    """Nor does one that is loaded and trained on, with a second replay in the same process."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    mapped, plain = make(memory_map=True, n_envs=2), make(n_envs=2)
    quiet(mapped, 120, run_dir=tmp_path / "mapped")
    quiet(plain, 120, run_dir=tmp_path / "plain")
    assert same(mapped.tensors(), plain.tensors())
    assert same(mapped.replay.columns, plain.replay.columns) and mapped.replay.added == 120 > mapped.replay.capacity
    for agent in (mapped, plain):
        agent.load_checkpoint(agent.run_dir)
        quiet(agent, 16)
    assert same(mapped.replay.columns, plain.replay.columns) and mapped.replay.added == 136
    del mapped, agent
    gc.collect()
    assert not list((tmp_path / "temporary").iterdir())
    names = [{p.relative_to(tmp_path / k) for p in (tmp_path / k).rglob("*")} for k in ("mapped", "plain")]
    assert names[0] == names[1]


# -- Ctrl-C ---------------------------------------------------------------------------------------


def stopping(folder, at, **settings):
    Stopping.steps, Stopping.at = 0, at
    agent = make("td3", STOPPING, seed=5, checkpoint_every=1, **settings)
    return agent.learn(8 * 24, run_dir=folder, progress=False, tensorboard=False)


@pytest.mark.parametrize("at,border", [(8 * 13 + 5, 80), (8 * 9 + 3, 0)], ids=["between borders", "just before one"])
def test_ctrl_c_within_an_iteration_saves_it_and_resuming_goes_on_from_the_border(at, border, tmp_path):
    whole = stopping(tmp_path / "whole", None)
    with pytest.raises(hooks.Interrupted):
        stopping(tmp_path / "run", at)
    run = tmp_path / "run"
    interrupted, last = api.load(run, "interrupted"), api.load(run)
    assert interrupted.steps == at and last.steps == border, "the iteration was not left at once"
    assert not same(interrupted.tensors(), last.tensors())
    resumed = last.resume(run, progress=False, tensorboard=False)
    assert same(resumed.tensors(), whole.tensors()) and resumed.counters() == whole.counters()
    assert same(resumed.replay.columns, whole.replay.columns)
    assert not (run / "checkpoints" / "interrupted.safetensors").exists()


# -- checkpoints and the replay -------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained") / "run"
    agent = make(n_envs=2, eval_every=32, eval_episodes=2, checkpoint_every=1)
    return folder, agent.learn(176, run_dir=folder, progress=False, tensorboard=False)


@pytest.fixture
def run(trained, tmp_path):
    """A copy of the run's folder, and the agent that wrote it, to be left as it is."""
    folder, agent = trained
    return Path(shutil.copytree(folder, tmp_path / "run")), agent


def test_the_best_checkpoint_acts_but_has_no_replay(run):
    folder, agent = run
    best = api.load(folder, "best")
    assert best.segments == [] and best.replay is None and best.steps <= agent.steps
    obs = np.zeros((4, 3), np.float32)
    assert best.predict(obs, deterministic=True)[0].shape == (4, 1)
    assert len(best.evaluate(2).returns) == 2 and best.replay is None
    # training on starts with an empty one, which is filled before anything is learnt from it
    before, updates = {k: v.clone() for k, v in best.tensors().items()}, best.learner.updates
    quiet(best, 7)
    assert best.replay.added == 8 and best.learner.updates == updates and same(best.tensors(), before)
    quiet(best, 8)
    assert best.learner.updates == updates + 8


def test_a_run_is_resumed_only_by_an_agent_of_its_settings(run):
    folder, _ = run
    for wrong, name in (({"seed": 1}, "seed=1"), ({"gamma": 0.5}, r"gamma=0\.5"), ({"n_envs": 3}, "n_envs=3")):
        with pytest.raises(ValueError, match=f"{name}.*the run has"):
            make(**{"n_envs": 2, "eval_every": 32, "eval_episodes": 2, "checkpoint_every": 1} | wrong).resume(folder)


def test_a_run_too_short_to_learn_anything_says_so(caplog):
    quiet(make(learning_starts=40), 40)
    assert "No update will be made: the run's 40 steps" in caplog.text


def test_an_agent_that_only_acts_does_not_read_the_replay(run):
    folder, agent = run
    files = list((folder / "checkpoints").glob("replay-*"))
    assert files and sum(e["last"] - e["first"] for e in agent.segments) >= 48
    for file in files:
        file.unlink()
    loaded = api.load(folder)
    assert np.array_equal(loaded.evaluate(3).returns, agent.evaluate(3).returns) and loaded.replay is None
    with pytest.raises(CheckpointError, match="replay-"):
        quiet(loaded, 8)


def test_a_loaded_agent_has_the_replay_of_the_saved_one(run):
    folder, agent = run
    loaded = api.load(folder)
    assert loaded.replay is None
    memory = loaded._memory()
    assert memory.added == agent.replay.added == 176 and same(memory.columns, agent.replay.columns)


def test_saving_elsewhere_takes_the_replay_along(run, tmp_path):
    folder, agent = run
    loaded = api.load(folder)
    loaded.save(tmp_path / "other")
    for file in (folder / "checkpoints").glob("replay-*"):
        file.unlink()
    assert same(api.load(tmp_path / "other")._memory().columns, agent.replay.columns)


def test_training_on_in_another_run_leaves_the_first_as_it_was(run, tmp_path):
    folder, _ = run
    before = {p: p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
    loaded = api.load(folder)
    loaded.learn(16, run_dir=tmp_path / "second", progress=False, tensorboard=False)
    assert {p: p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()} == before
    assert api.load(tmp_path / "second")._memory().added == 192


def test_files_of_rows_that_were_overwritten_go(run):
    folder, agent = run
    on_disk = {p.name for p in (folder / "checkpoints").glob("replay-*")}
    assert on_disk == {e["file"] for e in agent.segments}
    assert agent.segments[0]["first"] > 0, "the run is longer than its replay"
