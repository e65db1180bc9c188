"""The robust benchmark: shards in the same terms for every method, merged as they are."""

import importlib.util
import json
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import matplotlib
import numpy as np
import pytest

from ctrlrl import api
from ctrlrl.engine.robust import RobustEvaluation
from ctrlrl.run import report_statistics

SCRIPT = Path(__file__).parents[2] / "scripts" / "bench_robust.py"
SMALL = ["--steps", "64", "--points", "2", "--episodes", "2", "--jobs", "1"]
TINY = {"n_steps": 16, "batch_size": 16, "epochs": 1, "actor_hidden": (8,), "critic_hidden": (8,), "threads": 1}


@pytest.fixture
def script(monkeypatch):
    """The script, whose runs are small PPO agents in this process."""
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    spec = importlib.util.spec_from_file_location("bench_robust", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.asked, module.started, build = [], [], api.make

    def make(method, env, **settings):
        module.asked.append((method, env, settings))
        kept = {k: settings[k] for k in ("env_kwargs", "seed", "backend", "device", "eval_every")}
        agent = build("ppo", env, **kept, **TINY)
        if method == "trpo":
            raise RuntimeError("it broke")
        agent.search_steps = 777 if method == "sac" else 0
        return agent

    class Process:
        returncode = 0

        def __init__(self, command, env, stdout):
            module.started.append(command)
            assert command[:2] == [sys.executable, module.__file__] and env["OMP_NUM_THREADS"] == "1"
            try:
                module.main(command[2:])
            except RuntimeError:
                self.returncode = 1

        def poll(self):
            return self.returncode

    monkeypatch.setattr(api, "make", make)
    # the bootstrap takes seconds
    monkeypatch.setattr(report_statistics, "iqm", lambda s, reps: report_statistics.Estimate(s.mean(), None, None, 1))
    monkeypatch.setattr(module.shards, "subprocess", SimpleNamespace(Popen=Process, DEVNULL=None))
    monkeypatch.setattr(module.shards, "time", SimpleNamespace(sleep=lambda _: None, monotonic=time.monotonic))
    return module


def test_every_method_has_the_same_steps_cells_and_seeds_and_dr_is_the_randomised_environment(script, tmp_path, capsys):
    methods = ["sac_dr", "sac", "td3_dr"]
    script.main([*SMALL, "--env", "InvertedPendulum", "--methods", *methods, "--seeds", "2", "--out", str(tmp_path)])
    assert [(m, s["env_kwargs"], s["seed"]) for m, _, s in script.asked] == [
        (method, {"uncertainty": "2d", **kwargs}, seed)
        for seed in (0, 1)
        for method, kwargs in (("sac", {"randomize": True}), ("sac", {}), ("td3", {"randomize": True}))
    ]
    assert {env for _, env, _ in script.asked} == {"ctrlrl/RobustInvertedPendulum-v0"}
    shards = [json.loads(p.read_text()) for p in sorted((tmp_path / "64" / "InvertedPendulum-2d").iterdir())]
    assert [(s["method"], s["seed"], s["steps"], s["search_steps"]) for s in shards] == [
        ("sac", 0, 64, 777), ("sac", 1, 64, 777), ("sac_dr", 0, 64, 777), ("sac_dr", 1, 64, 777), ("td3_dr", 0, 64, 0),
        ("td3_dr", 1, 64, 0),
    ]  # fmt: skip
    results = [RobustEvaluation.from_document(s["evaluation"]) for s in shards]
    assert all(r.axes[0].tolist() == [1, 31] and r.returns.shape == (4, 2) for r in results)
    assert all(np.array_equal(r.seeds, results[0].seeds) for r in results)

    document = json.loads((tmp_path / "table-64-2d.json").read_text())
    assert document["protocol"].startswith("Every method trains for the same number of steps")
    assert "counted apart" in document["protocol"] and "python" not in document["protocol"]
    rows = document["table"]["InvertedPendulum"]
    assert list(rows) == ["sac", "sac_dr", "td3_dr"] and rows["sac"]["seeds"] == 2
    assert rows["sac"]["search_steps"] == [777] * 2 and rows["sac"]["steps"] == [64] * 2
    for key, value in (("worst", "worst"), ("average", "mean"), ("nominal", "nominal_mean")):
        expected = [round(getattr(r, value), 1) for r in results[:2]]
        assert rows["sac"][key]["runs"] == expected and min(expected) <= rows["sac"][key]["iqm"] <= max(expected)
    assert matplotlib.image.imread(tmp_path / "table-64-2d.png").ndim == 3
    assert "td3_dr" in capsys.readouterr().out


def test_a_later_call_adds_what_is_missing(script, tmp_path):
    words = [*SMALL, "--env", "InvertedPendulum", "--out", str(tmp_path)]
    script.main([*words, "--methods", "sac", "--seeds", "1"])
    script.main([*words, "--methods", "sac", "td3", "--seeds", "1"])
    assert [method for method, _, _ in script.asked] == ["sac", "td3"]
    rows = json.loads((tmp_path / "table-64-2d.json").read_text())["table"]["InvertedPendulum"]
    assert set(rows) == {"sac", "td3"} and rows["sac"]["worst"]["low"] is None


def test_nothing_is_begun_after_the_time_is_over(script, tmp_path, capsys):
    script.main([*SMALL, "--methods", "sac", "--minutes", "0", "--out", str(tmp_path)])
    assert not script.started and not list(tmp_path.iterdir()) and not capsys.readouterr().out


def test_the_heat_maps_are_means_over_seeds(script, tmp_path, monkeypatch):
    shown = {}
    monkeypatch.setattr("ctrlrl.run.robust_figures.comparison", lambda rows: shown.update(rows) or b"")
    words = [*SMALL, "--methods", "sac", "--seeds", "2", "--uncertainty", "1d", "--out", str(tmp_path)]
    script.main([*words, "--env", "InvertedPendulum"])
    paths = sorted((tmp_path / "64" / "InvertedPendulum-1d").iterdir())
    grids = [RobustEvaluation.from_document(json.loads(p.read_text())["evaluation"]).grid for p in paths]
    assert shown["InvertedPendulum"]["sac"].grid == pytest.approx((grids[0] + grids[1]) / 2)


def test_settings_follow_the_method(script):
    assert script.parse("m2td3_dr,tau=0.1,critic_hidden=[8]") == ("m2td3", True, {"tau": 0.1, "critic_hidden": [8]})
    assert script.parse("sac") == ("sac", False, {})


def test_shards_of_another_grid_are_not_mixed(script, tmp_path):
    words = ["--env", "InvertedPendulum", "--methods", "sac", "--seeds", "1", "--out", str(tmp_path)]
    script.main([*SMALL, *words])
    with pytest.raises(SystemExit, match=r"sac-s0.json has points=2, asked is 3; take another --out"):
        script.main([*SMALL, "--points", "3", *words])


def test_an_unknown_method_is_refused_before_the_first_run(script, tmp_path):
    with pytest.raises(SystemExit, match=r"no method named 'sacc'\. Did you mean sac"):
        script.main([*SMALL, "--methods", "sac", "sacc_dr", "--out", str(tmp_path)])
    assert not script.started


def test_a_failed_run_is_said_and_the_others_are_kept(script, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(script, "check", lambda methods: None)
    with pytest.raises(SystemExit, match="1 runs failed"):
        script.main([*SMALL, "--methods", "trpo", "sac", "--seeds", "1", "--out", str(tmp_path)])
    assert "FAILED: InvertedPendulum trpo 0" in capsys.readouterr().out
    assert list(json.loads((tmp_path / "table-64-2d.json").read_text())["table"]["InvertedPendulum"]) == ["sac"]
