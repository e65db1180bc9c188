"""The on-policy loop from outside: killed, interrupted, watched, poisoned, and right about truncation."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from helpers.envs import Noisy, OnlyTruncates, env_id

from ctrlrl import api
from ctrlrl.engine import checkpoint, runfolder
from ctrlrl.engine.collector import border_seeds
from ctrlrl.engine.errors import NonFiniteError, NonFiniteUpdateError
from ctrlrl.engine.evaluate import Evaluation
from ctrlrl.engine.replay import replay
from ctrlrl.losses.base import PolicyLoss

TINY = {
    "n_steps": 16, "batch_size": 16, "epochs": 2, "actor_hidden": (8,), "critic_hidden": (8,), "device": "cpu",
    "threads": 1, "eval_every": None,
}  # fmt: skip
NOISY = env_id("Noisy")


def make(env=NOISY, n_envs=2, **settings):
    return api.make("ppo", env, **({"n_envs": n_envs} if isinstance(env, str) else {}), **TINY | settings)


def quiet(agent, steps, **kwargs):
    return agent.learn(steps, **{"root": None, "progress": False, "tensorboard": False} | kwargs)


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def rows(folder):
    return [r for r in runfolder.read_lines(Path(folder) / "metrics.jsonl") if "train/loss" in r]


# -- environments ---------------------------------------------------------------------------------


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


for _cls in (Constant, OddIsLong, Target, SometimesNaN):
    gym.register(f"loop/{_cls.__name__}-v0", f"{__name__}:{_cls.__name__}")


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


# -- killed and interrupted -----------------------------------------------------------------------

STEPS = 32 * 160
CHOICES = {
    "n_envs": 2, "seed": 4, "n_steps": 16, "batch_size": 16, "epochs": 1, "eval_every": 640, "eval_episodes": 2,
    "checkpoint_every": 1, "device": "cpu", "threads": 1, "actor_hidden": (64, 64), "critic_hidden": (64, 64),
}  # fmt: skip


def command(*words):
    root = Path(__file__).resolve().parents[2]
    paths = [str(root), str(root / "envs"), str(root / "tests")]
    return subprocess.Popen(
        [sys.executable, "-m", "ctrlrl", "train", *map(str, words)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def start_training(root, **changes):
    words = ["ppo", "--env", NOISY, "--steps", STEPS, "--root", root, "--quiet"]
    for name, value in (CHOICES | changes).items():
        words += [f"--{name.replace('_', '-')}", *(value if isinstance(value, tuple) else (value,))]
    return command(*words)


def wait_for(process, condition, seconds=60.0):
    end = time.monotonic() + seconds
    while not condition():
        if process.poll() is not None:
            raise AssertionError(f"ended with {process.returncode}: {process.communicate()}")
        assert time.monotonic() < end, "it takes too long"
        time.sleep(0.0005)


def run_below(root):
    found = list(Path(root).glob("*/*/*/checkpoints/last.safetensors"))
    return found[0].parents[1] if found else None


def logged(run):
    file = run / "metrics.jsonl"
    return file.read_bytes().count(b"\n") if file.exists() else 0


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "run"
    api.make("ppo", NOISY, backend="auto", **CHOICES).learn(STEPS, run_dir=folder, progress=False)
    return folder


def assert_equal_runs(run, whole):
    (tensors, state), (expected, expected_state) = (
        checkpoint.read(f / "checkpoints" / "last.safetensors") for f in (run, whole)
    )
    assert state == expected_state and same(tensors, expected)
    assert same(*(checkpoint.read(f / "checkpoints" / "best.safetensors")[0] for f in (run, whole)))
    clock = ("time_s", "time/fps")
    for name in ("metrics.jsonl", "evaluations.jsonl"):
        a, b = ([{k: v for k, v in r.items() if k not in clock} for r in runfolder.read_lines(f / name)]
                for f in (run, whole))  # fmt: skip
        assert a == b
    assert (run / "config.json").read_bytes() == (whole / "config.json").read_bytes()


def test_killed_at_any_moment_and_resumed_is_the_run_never_killed(tmp_path, uninterrupted):
    """SIGKILL in the middle of writing a checkpoint, at a random moment, and in the middle of writing again."""
    process = start_training(tmp_path)
    wait_for(process, lambda: run_below(tmp_path) is not None)
    run = run_below(tmp_path)
    rng = np.random.default_rng()
    moments = [("writing", 14), ("anywhere", 30 + int(rng.integers(40))), ("writing", 75 + int(rng.integers(40)))]
    for moment, lines in moments:
        wait_for(process, lambda: logged(run) >= lines)  # noqa: B023
        if moment == "writing":
            wait_for(process, lambda: any(".tmp-" in n for n in os.listdir(run / "checkpoints")))
        else:
            time.sleep(float(rng.random()) * 0.05)
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        process = command("--resume", run, "--quiet")
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert str(run) in out
    assert_equal_runs(run, uninterrupted)
    assert not [p for p in run.rglob("*") if ".tmp-" in p.name], "a killed write left something behind"


def test_ctrl_c_saves_says_how_to_go_on_and_goes_on(tmp_path, uninterrupted):
    process = start_training(tmp_path)
    wait_for(process, lambda: run_below(tmp_path) is not None)
    run = run_below(tmp_path)
    wait_for(process, lambda: logged(run) >= 15)
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in err
    assert re.search(rf"ctrlrl train --resume {re.escape(str(run))}\s", out)
    interrupted, last = api.load(run, "interrupted"), api.load(run)
    assert interrupted.steps > last.steps and interrupted.steps % 32 == 0
    assert f"{interrupted.steps:,}" in out
    process = command("--resume", run, "--quiet")
    _, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert_equal_runs(run, uninterrupted)


def test_ctrl_c_in_a_terminal_reaches_the_workers_too_and_still_saves(tmp_path):
    process = start_training(tmp_path, backend="async", eval_every=10**9)
    wait_for(process, lambda: run_below(tmp_path) is not None)
    run = run_below(tmp_path)
    wait_for(process, lambda: logged(run) >= 12)
    os.killpg(process.pid, signal.SIGINT)  # the whole group, as a terminal does
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "Traceback" not in err and "--resume" in out
    assert api.load(run, "interrupted").steps > 0


def test_outside_the_main_thread_training_works_without_a_signal_handler():
    import threading

    agents = []
    thread = threading.Thread(target=lambda: agents.append(quiet(make(), 32)))
    before = signal.getsignal(signal.SIGINT)
    thread.start()
    thread.join()
    assert agents[0].steps == 32 and signal.getsignal(signal.SIGINT) is before


def test_the_signal_handler_is_given_back():
    before = signal.getsignal(signal.SIGINT)
    quiet(make(), 32)
    assert signal.getsignal(signal.SIGINT) is before


# -- callbacks ------------------------------------------------------------------------------------


class Recorder:
    def __init__(self, stop_hook="", stop_step=0, answer=False):
        self.seen = []
        self.stop = (stop_hook, stop_step, answer)

    def _note(self, hook, agent, step, value):
        self.seen.append((hook, agent, step, value))
        return self.stop[2] if (hook, step) == self.stop[:2] else None

    def on_update(self, agent, step, metrics):
        return self._note("update", agent, step, dict(metrics))

    def on_evaluation(self, agent, step, evaluation):
        return self._note("evaluation", agent, step, evaluation)

    def on_checkpoint(self, agent, step, path):
        assert checkpoint.read(path)[1]["steps"] == step
        return self._note("checkpoint", agent, step, path)

    def of(self, hook):
        return [(step, value) for h, _, step, value in self.seen if h == hook]


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


# -- evaluation -----------------------------------------------------------------------------------


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
    from ctrlrl.types import EnvSpec

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


# -- what is not a number -------------------------------------------------------------------------


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

    agent = api.make(f"{__name__}:Breaks", NOISY, n_envs=2, where=where, **TINY | {"batch_size": None})
    # two optimiser steps an iteration: the fifth is in the third one
    with pytest.raises(NonFiniteUpdateError, match=rf"non-finite \w*{what} .*iteration 2, 64 environment") as caught:
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
    assert tensors["obs"].shape[0] == 32 and {"action", "advantage", "logp_old"} <= set(tensors)
    assert state["quantity"] == error.what
    assert api.load(tmp_path / "run").steps == 0


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


def test_an_environment_only_envpool_has_trains_without_evaluations():
    pytest.importorskip("envpool")
    agent = api.make("ppo", "Catch-v0", n_envs=2, backend="envpool", **TINY | {"eval_every": 32})
    quiet(agent, 64)
    assert agent.steps == 64 and agent.best == -np.inf
    with pytest.raises(ValueError, match=r"Catch-v0.*EnvPool"):
        agent.evaluate(1)
