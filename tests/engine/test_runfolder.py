"""Run folders: unique, readable back, never over somebody's files."""

from __future__ import annotations

import json
import math
import platform
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from ctrlrl.engine import runfolder
from ctrlrl.types import EnvSpec


def make_run(root: Path, env: str = "Pendulum-v1", method: str = "ppo", seed: int = 0) -> Path:
    folder = runfolder.create(root, env, method, seed)
    spec = EnvSpec(env, wrappers=(("pkg.mod:Wrapper", {"k": 1}),))
    document = {
        "method": method,
        "env": spec,
        "seed": seed,
        "spaces": {"observation": {"shape": (3,)}},
        "total_steps": 5,
    }
    runfolder.write_json(folder / "config.json", document)
    return folder


def test_runs_of_the_same_second_get_their_own_folders(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        folders = list(
            pool.map(lambda _: runfolder.create(tmp_path, "ctrlrl/OneStoreLost-v0", "pkg.mod:Cls", 3), range(40))
        )
    assert len(set(folders)) == 40
    assert all(f.is_dir() and (f / "tb").is_dir() and (f / "checkpoints").is_dir() for f in folders)
    assert folders[0].relative_to(tmp_path).parts[:2] == ("ctrlrl_OneStoreLost-v0", "pkg.mod_Cls")
    assert "-s3" in folders[0].name


@pytest.mark.parametrize("name", ["../../etc", "a/b:c", "..", "", "/", "C:\\x", "ä"])
def test_names_never_leave_the_root(tmp_path: Path, name: str) -> None:
    try:
        folder = runfolder.create(tmp_path, name, "m", 0)
    except ValueError as error:
        assert "no letter or digit" in str(error)
    else:
        assert len(folder.relative_to(tmp_path.resolve() if folder.is_absolute() else tmp_path).parts) == 3
        assert not {"..", ""} & set(folder.relative_to(tmp_path).parts)


def test_config_round_trips_and_finding_searches_below(tmp_path: Path) -> None:
    runs = [make_run(tmp_path, seed=s) for s in (0, 1)] + [make_run(tmp_path, env="A-v0")]
    config = runfolder.read_config(runs[0])
    assert config["method"] == "ppo" and config["env"]["id"] == "Pendulum-v1" and config["total_steps"] == 5
    assert config["env"]["wrappers"] == [["pkg.mod:Wrapper", {"k": 1}]] and config["spaces"]["observation"][
        "shape"
    ] == [3]
    assert set(runfolder.find_runs([tmp_path])) == set(runs)
    assert runfolder.find_runs([runs[0], tmp_path / "Pendulum-v1", runs[0]])[0] == runs[0]
    assert len(runfolder.find_runs([runs[0], tmp_path, runs[0]])) == 3


def test_what_is_no_run_is_said(tmp_path: Path) -> None:
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "config.json").write_text('{"model_type": "bert"}')
    assert not runfolder.is_run(tmp_path / "foreign") and not runfolder.is_run(tmp_path / "none")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        runfolder.find_runs([tmp_path / "none"])
    with pytest.raises(FileNotFoundError, match="has none below it"):
        runfolder.find_runs([tmp_path])
    with pytest.raises(ValueError, match="expected the entries 'method' and 'env'"):
        runfolder.read_config(tmp_path / "foreign")
    with pytest.raises(FileNotFoundError, match="is this a folder of ctrlrl"):
        runfolder.read_config(tmp_path)
    (tmp_path / "foreign" / "config.json").write_text('{"method": "ppo", "env"')
    with pytest.raises(ValueError, match="not valid JSON"):
        runfolder.read_config(tmp_path / "foreign")
    (tmp_path / "foreign" / "config.json").write_text('{"method": "ppo", "env": {}, "format": 9}')
    with pytest.raises(ValueError, match="format 9"):
        runfolder.read_config(tmp_path / "foreign")


def test_metrics_leave_out_a_torn_line_at_every_length(tmp_path: Path) -> None:
    rows = [{"step": 10, "time_s": 0.5, "a": 1.0}, {"step": 20, "time_s": 1.0, "b": None, "a": "inf"}]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    first = len(json.dumps(rows[0])) + 1
    for cut in range(first, len(text)):
        (tmp_path / "metrics.jsonl").write_text(text[:cut])
        assert len(runfolder.read_metrics(tmp_path)) == (2 if cut == len(text) - 1 else 1)
    (tmp_path / "metrics.jsonl").write_text(text)
    table = runfolder.read_metrics(tmp_path)
    assert table["step"].tolist() == [10, 20] and table["step"].dtype == np.int64
    assert table["a"].tolist() == [1.0, math.inf] and np.isnan(table["b"]).all() and table["b"].dtype == np.float64


def test_a_damaged_line_in_the_middle_is_named(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"st\n{"step": 3}\n')
    with pytest.raises(ValueError, match="line 2 is damaged"):
        runfolder.read_metrics(tmp_path)


def test_a_run_without_logs_reads_as_empty(tmp_path: Path) -> None:
    assert runfolder.read_metrics(tmp_path).empty and runfolder.read_evaluations(tmp_path) == []
    assert {"step", "time_s"} <= set(runfolder.read_metrics(tmp_path))


def test_json_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    runfolder.write_json(path, {"x": np.float64(math.nan), "y": (np.arange(2), math.inf), "p": Path("q"), "s": {2, 1}})
    assert runfolder.read_json(path) == {"x": None, "y": [[0, 1], "inf"], "p": "q", "s": [1, 2]}
    with pytest.raises(TypeError, match="cannot hold"):
        runfolder.write_json(path, {"x": object()})
    assert runfolder.read_json(path)["p"] == "q" and [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_versions_name_what_matters_and_no_path() -> None:
    found = runfolder.versions()
    assert found["python"] == platform.python_version() and found["torch"] and found["gymnasium"]
    assert {"git_commit", "git_dirty", "platform", "cpu_count", "torch_threads", "envpool", "mujoco"} <= set(found)
    json.dumps(found)
    assert not any(str(value).startswith("/") for value in found.values())


def test_versions_outside_a_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert runfolder.versions()["git_commit"] is None and runfolder.versions()["git_dirty"] is None
    monkeypatch.setenv("PATH", "")
    assert runfolder.versions()["git_commit"] is None


def test_guard_refuses_foreign_files(tmp_path: Path) -> None:
    runfolder.guard_target(tmp_path / "new")
    runfolder.guard_target(tmp_path)
    run = make_run(tmp_path / "runs")
    runfolder.guard_target(run)
    (run / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"notes\.txt"):
        runfolder.guard_target(run)
    with pytest.raises(FileExistsError, match="is a file"):
        runfolder.guard_target(run / "notes.txt")
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub" / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(FileExistsError, match="not written by ctrlrl"):
        runfolder.guard_target(tmp_path / "hub")
