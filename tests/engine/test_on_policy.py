"""The on-policy loop from outside: watched, steered, and right about truncation."""

import json

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from helpers.agents import NOISY, TINY, Recorder, make, quiet, rows, same
from helpers.envs import Noisy, OnlyTruncates

from ctrlrl import api
from ctrlrl.engine import runfolder
from ctrlrl.engine.evaluate import Evaluation


class Constant(gym.Env):
    """Reward 1 at every step and always the same observation; ends after five steps, one way or the other."""

    observation_space = gym.spaces.Box(-1, 1, (1,), np.float32)
    action_space = gym.spaces.Discrete(2)

    def __init__(self, terminates=False):
        self.terminates = terminates

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t = 0
        return np.ones(1, np.float32), {}

    def step(self, action):
        self.t += 1
        end = self.t == 5
        return np.ones(1, np.float32), 1.0, end and self.terminates, end and not self.terminates, {}


gym.register("loop/Constant-v0", f"{__name__}:Constant")


def local(name):
    return f"{__name__}:loop/{name}-v0"


# -- truncation, end to end -----------------------------------------------------------------------


def learned_value(terminates, seed=0):
    agent = api.make(
        "ppo", local("Constant"), env_kwargs={"terminates": terminates}, seed=seed, n_envs=2, gamma=0.9,
        normalize_reward=False, normalize_obs=False, learning_rate=1e-2,
        **{k: v for k, v in TINY.items() if k not in ("n_steps", "epochs")}, n_steps=32, epochs=4,
    )  # fmt: skip
    quiet(agent, 64 * 60)
    with torch.no_grad():
        return float(agent.policy.values(torch.ones(1, 1))["value"])


def test_a_truncated_episode_is_worth_what_would_have_followed():
    """Reward 1 for ever is worth 1 / (1 - gamma) = 10, however often the clock cuts it; five steps are worth < 4.1."""
    assert learned_value(terminates=False) == pytest.approx(10.0, abs=0.3)
    assert learned_value(terminates=True) < 4.1


@pytest.mark.parametrize("mode", list(AutoresetMode), ids=lambda m: m.name)
def test_truncation_is_seen_through_every_autoreset_mode(mode):
    env = SyncVectorEnv([Constant] * 2, autoreset_mode=mode)
    agent = make(
        env, gamma=0.9, normalize_reward=False, normalize_obs=False, learning_rate=1e-2, n_steps=32, epochs=4
    )  # fmt: skip
    quiet(agent, 64 * 60)
    with torch.no_grad():
        assert float(agent.policy.values(torch.ones(1, 1))["value"]) == pytest.approx(10.0, abs=0.3)


# -- callbacks ------------------------------------------------------------------------------------


class OnlyOneHook:
    count = 0

    def on_update(self, agent, step, metrics):
        self.count += 1


def test_every_hook_is_called_with_what_it_is_about(tmp_path):
    recorder, partial = Recorder(), OnlyOneHook()
    agent = make(eval_every=64, eval_episodes=3, checkpoint_every=1)
    quiet(agent, 32 * 12, run_dir=tmp_path / "run", callbacks=[recorder, partial])
    assert all(a is agent for _, a, _, _ in recorder.seen)
    assert [s for s, _ in recorder.of("update")] == [32 * (i + 1) for i in range(12)]
    assert partial.count == 12
    for step, metrics in recorder.of("update"):
        assert metrics["time/total_timesteps"] == step and np.isfinite(metrics["train/loss"])
    assert [s for s, _ in recorder.of("evaluation")] == [64 * (i + 1) for i in range(6)]
    for _, evaluation in recorder.of("evaluation"):
        assert isinstance(evaluation, Evaluation) and len(evaluation.returns) == 3
    assert [s for s, _ in recorder.of("checkpoint")] == [320, 384]


@pytest.mark.parametrize("answer", [False, np.bool_(False)])
@pytest.mark.parametrize("hook,step", [("update", 96), ("evaluation", 128), ("checkpoint", 320)])
def test_returning_false_stops_after_the_iteration_and_saves(hook, step, answer, tmp_path):
    agent = make(eval_every=64, checkpoint_every=1, eval_episodes=2)
    quiet(agent, 32 * 30, run_dir=tmp_path / "run", callbacks=[Recorder(hook, step, answer)])
    assert agent.steps == step == rows(tmp_path / "run")[-1]["step"]
    loaded = api.load(tmp_path / "run")
    assert loaded.steps == step and same(loaded.tensors(), agent.tensors())
    assert loaded.resume(tmp_path / "run", progress=False, tensorboard=False).steps == 32 * 30
    assert [r["step"] for r in rows(tmp_path / "run")] == [32 * (i + 1) for i in range(30)]


def test_returning_true_or_nothing_goes_on():
    agent = make()
    quiet(agent, 96, callbacks=[Recorder("update", 32, True)])
    assert agent.steps == 96


def test_something_without_any_hook_is_refused():
    """A function would otherwise be taken and never be called."""
    with pytest.raises(TypeError, match="on_update"):
        quiet(make(), 32, callbacks=[lambda *_: False])


# -- settings have the effect they name -----------------------------------------------------------


def test_target_kl_stops_the_update():
    free = quiet(make(epochs=10, learning_rate=0.02), 64)
    bound = quiet(make(epochs=10, learning_rate=0.02, target_kl=1e-3), 64)
    # 2 batches, 10 epochs, 2 iterations
    assert free.updater.state.clock[0] == 40
    assert 0 < bound.updater.state.clock[0] < 20


def test_the_entropy_bonus_keeps_the_policy_wide():
    wide, narrow = (
        quiet(make(entropy_coef=c, learning_rate=0.02, normalize_reward=False), 640).policy.head.log_std.item()
        for c in (1.0, 0.0)
    )
    assert wide > narrow + 0.2


def test_the_learning_rate_falls_to_zero_over_the_planned_steps(tmp_path):
    for schedule in ("linear", "constant"):
        quiet(make(learning_rate_schedule=schedule, learning_rate=1e-3), 32 * 5, run_dir=tmp_path / schedule)
    rate = lambda schedule: [r["train/learning_rate"] for r in rows(tmp_path / schedule)]  # noqa: E731
    assert rate("constant") == [1e-3] * 5
    assert rate("linear") == pytest.approx([1e-3 * (1 - i / 5) for i in range(5)])
    a, b = (api.load(tmp_path / s).tensors() for s in ("linear", "constant"))
    assert not torch.equal(a["optimizer/m"], b["optimizer/m"])


def test_no_epochs_beyond_the_learning_rate_of_zero_move_anything():
    agent = make(learning_rate=0.0)
    before = agent.updater.state.params.clone()
    assert torch.equal(quiet(agent, 64).updater.state.params, before)


# -- learn, and where it writes -------------------------------------------------------------------


def test_learning_twice_goes_on():
    """From a border on, two calls are one longer call."""
    once, twice = make(checkpoint_every=1), make(checkpoint_every=1)
    quiet(once, 32 * 20)
    for _ in range(2):
        quiet(twice, 32 * 10)
    assert twice.steps == once.steps == 640 and twice.iteration == 20
    assert same(once.tensors(), twice.tensors()) and once.counters()["recent"] == twice.counters()["recent"]


def test_learning_twice_into_one_folder_is_one_record(tmp_path):
    agent = make()
    for _ in range(2):
        quiet(agent, 32 * 3, run_dir=tmp_path / "run")
    assert [r["step"] for r in rows(tmp_path / "run")] == [32 * (i + 1) for i in range(6)]
    assert api.load(tmp_path / "run").steps == 192
    assert json.loads((tmp_path / "run" / "config.json").read_text())["total_steps"] == 192


def test_without_a_root_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    agent = make(eval_every=32, eval_episodes=1, checkpoint_every=1)
    agent.learn(32 * 11, root=None, progress=False)
    assert agent.run_dir is None and agent.best > -np.inf and list(tmp_path.iterdir()) == []


def test_a_run_folder_is_made_below_the_root_and_is_complete(tmp_path):
    agent = make(eval_every=32, eval_episodes=1)
    agent.learn(64, root=tmp_path, progress=False)
    assert agent.run_dir.is_relative_to(tmp_path) and agent.run_dir.parent.name == "ppo"
    names = {p.name for p in agent.run_dir.iterdir()}
    assert names == {"config.json", "versions.json", "metrics.jsonl", "evaluations.jsonl", "tb", "checkpoints"}
    assert {p.name for p in (agent.run_dir / "checkpoints").iterdir()} == {"last.safetensors", "best.safetensors"}
    assert runfolder.find_runs([tmp_path]) == [agent.run_dir]


def test_a_folder_with_something_else_is_refused_before_anything_happens(tmp_path):
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(FileExistsError, match=r"thesis\.tex"):
        quiet(make(), 32, run_dir=tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize("steps", [0, -5])
def test_no_steps_are_refused(steps):
    with pytest.raises(ValueError, match=f"steps={steps} must be at least 1"):
        make().learn(steps, root=None)


def test_steps_are_rounded_up_to_whole_iterations():
    assert quiet(make(), 33).steps == 64


# -- live environments ----------------------------------------------------------------------------


def test_a_live_environment_trains_as_its_id_does(tmp_path):
    env = gym.make(NOISY)
    live, by_id = quiet(make(env), 320), quiet(make(NOISY, n_envs=1), 320)
    assert same(live.tensors(), by_id.tensors())
    env.reset(seed=0)  # still open: it is the caller's
    assert live.env_spec.id == "test/Noisy-v0" and len(live.evaluate(2).returns) == 2


@pytest.mark.parametrize("mode", list(AutoresetMode), ids=lambda m: m.name)
def test_live_vector_environments_of_every_autoreset_mode_train(mode, tmp_path):
    env = SyncVectorEnv([OnlyTruncates] * 2, autoreset_mode=mode)
    agent = quiet(make(env, eval_every=32), 32 * 4, run_dir=tmp_path / "run")
    # rewards 1, 2, 3 and then an end: reset steps must count neither as steps nor as rewards
    assert agent.recent and set(agent.recent) == {(6.0, 3)}
    loaded = api.load(tmp_path / "run", env=OnlyTruncates())
    assert np.array_equal(loaded.predict(np.ones((2, 1)), deterministic=True)[0],
                          agent.predict(np.ones((2, 1)), deterministic=True)[0])  # fmt: skip
    with pytest.raises(ValueError, match="live environment"):
        agent.evaluate(2)
    with pytest.raises(ValueError, match=r"live environment.*pass it as env="):
        api.load(tmp_path / "run")


def test_resetting_within_the_step_or_by_hand_is_the_same_run():
    agents = [
        quiet(make(SyncVectorEnv([Noisy] * 2, autoreset_mode=mode)), 320)
        for mode in (AutoresetMode.SAME_STEP, AutoresetMode.DISABLED)
    ]
    assert same(agents[0].tensors(), agents[1].tensors())


def test_a_run_can_be_loaded_with_another_number_of_environments(tmp_path):
    quiet(make(n_envs=2), 64, run_dir=tmp_path / "run")
    loaded = api.load(tmp_path / "run", env=gym.make(NOISY))
    assert loaded.n_envs == 1 and quiet(loaded, 16).steps == 80


def test_an_environment_only_envpool_has_trains_and_is_evaluated_there():
    pytest.importorskip("envpool")
    agent = api.make("ppo", "Catch-v0", n_envs=2, backend="envpool", **TINY | {"eval_every": 32})
    quiet(agent, 64)
    assert agent.steps == 64 and agent.best > -np.inf
    assert np.array_equal(agent.evaluate(3).returns, agent.evaluate(3).returns)
