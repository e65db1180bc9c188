"""IWOCS stopped in training and in its searches, and resumed."""

import json

import numpy as np
import pytest
from helpers.agents import assert_same_tensors
from test_iwocs import make, never_repeats, quiet

from ctrlrl import api
from ctrlrl.engine import hooks, worst_case
from ctrlrl.engine.runfolder import read_lines

# -- stopped and resumed --------------------------------------------------------------------------


class Killed(Exception):
    """Stands for the machine going away."""


def lines(path):
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in ("time_s", "time/fps")} for row in rows]


CMA = {"search": "cma", "population": 4, "generations": 3, "iteration_steps": 4, "checkpoint_every": 1,
       "eval_every": 20, "eval_episodes": 2, "n_envs": 2}  # fmt: skip


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that was never stopped, and its folder."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    with pytest.MonkeyPatch.context() as patch:
        never_repeats(patch)
        agent = quiet(make(seed=3, **CMA), run_dir=folder)
    assert [row["steps"] for row in agent.rows] == [40, 64, 88, 112] and agent.iteration == 28
    return agent, folder


def assert_same_run(whole, two, b):
    one, a = whole
    assert_same_tensors(one.tensors(), two.tensors())
    assert {k: v for k, v in one.counters().items() if k != "replay"} == {
        k: v for k, v in two.counters().items() if k != "replay"
    }
    for name in ("metrics.jsonl", "evaluations.jsonl"):
        assert lines(a / name) == lines(b / name), name
    assert (a / "config.json").read_bytes() == (b / "config.json").read_bytes()


class KillAt:
    def __init__(self, iteration):
        self.iteration = iteration

    def on_update(self, agent, step, metrics):
        if agent.iteration == self.iteration:
            raise Killed


def killed_in_search(monkeypatch, generations, error=Killed):
    """Dies (or is asked to stop) right after so many generations have been recorded."""
    original, left = worst_case.Record.add, [generations]

    def add(self, *rest):
        original(self, *rest)
        left[0] -= 1
        if left[0] == 0:
            raise error

    monkeypatch.setattr(worst_case.Record, "add", add)
    return lambda: monkeypatch.setattr(worst_case.Record, "add", original)


def test_killed_in_training_and_in_searches_and_resumed_equals_never_stopped(monkeypatch, tmp_path, whole):
    """Borders at iterations 10 and 20; phases end at 10, 16, 22 and 28."""
    never_repeats(monkeypatch)
    folder = tmp_path / "killed"
    with pytest.raises(Killed):
        quiet(make(seed=3, **CMA), run_dir=folder, callbacks=[KillAt(4)])
    for kill in (2, KillAt(15), 5, 3, 7):
        restore = killed_in_search(monkeypatch, kill) if isinstance(kill, int) else lambda: None
        with pytest.raises(Killed):
            callbacks = [] if isinstance(kill, int) else [kill]
            api.load(folder).resume(folder, progress=False, tensorboard=False, callbacks=callbacks)
        restore()
    resumed = api.load(folder).resume(folder, progress=False, tensorboard=False)
    assert_same_run(whole, resumed, folder)
    assert len(read_lines(folder / "metrics.jsonl")) >= 28


def test_generations_that_were_finished_are_not_played_again(monkeypatch, tmp_path):
    folder, played = tmp_path / "run", []
    original = worst_case.Trials.run
    monkeypatch.setattr(
        worst_case.Trials, "run", lambda self, act, params: played.append(len(params)) or original(self, act, params)
    )
    restore = killed_in_search(monkeypatch, 2)
    with pytest.raises(Killed):
        quiet(make(seed=3, **CMA), 40, run_dir=folder)
    restore()
    assert played == [4, 4]
    api.load(folder).resume(folder, progress=False, tensorboard=False)
    assert played == [4, 4, 4]


def test_ctrl_c_in_a_search_stops_at_once_and_can_be_resumed(monkeypatch, tmp_path, whole):
    never_repeats(monkeypatch)
    folder, agent = tmp_path / "stopped", make(seed=3, **CMA)
    original, seen = worst_case.Record.add, []

    def add(self, *rest):
        original(self, *rest)
        seen.append(rest)
        if len(seen) == 3 + 5:  # in the search of the first model
            agent.interrupted["asked"] = True

    monkeypatch.setattr(worst_case.Record, "add", add)
    with pytest.raises(hooks.Interrupted) as caught:
        quiet(agent, run_dir=folder)
    assert len(seen) == 8 and caught.value.steps == 64 and caught.value.run_dir == folder
    stopped = api.load(folder, "interrupted")
    assert stopped.steps == 64 and len(stopped.rows) == 1 and stopped.models == []
    obs = np.ones((3, 2), np.float32)
    assert np.array_equal(stopped.predict(obs, deterministic=True)[0], agent.predict(obs, deterministic=True)[0])
    monkeypatch.setattr(worst_case.Record, "add", original)
    resumed = api.load(folder).resume(folder, progress=False, tensorboard=False)
    assert_same_run(whole, resumed, folder)
