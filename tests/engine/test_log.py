"""Logs: what is written is what is read, and a resumed run's files are those of one never stopped."""

from __future__ import annotations

import io
import json
import math
import sys
import time
import types
from pathlib import Path
from typing import Any

import pytest

from ctrlrl.engine.log import Histogram, Progress, RunLogger
from ctrlrl.engine.runfolder import read_evaluations, read_lines, read_metrics


def train(logger: RunLogger, steps: range) -> None:
    for step in steps:
        logger.log(step, {"rollout/ep_rew_mean": step * 1.1, "train/approx_kl": 1.0 / step})
        if step % 20 == 0:
            logger.evaluation(step, [step / 3, 2.0], [7, 8], {"deterministic": True})


def without_times(file: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    return [{key: value for key, value in row.items() if key != "time_s"} for row in rows]


def points(folder: Path, tag: str) -> list[tuple[int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tb"))
    events.Reload()
    return [(point.step, point.value) for point in events.Scalars(tag)]


def test_rows_are_on_disk_at_once_and_exact(tmp_path: Path) -> None:
    logger = RunLogger(tmp_path, tensorboard=False)
    logger.log(3, {"a": 0.1, "b": math.nan, "c": math.inf, "d": 5})
    row = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert row.pop("time_s") >= 0 and row == {"step": 3, "a": 0.1, "b": None, "c": "inf", "d": 5.0}
    logger.close()
    logger.close()
    table = read_metrics(tmp_path)
    assert math.isnan(table["b"].tolist()[0]) and table["c"].tolist() == [math.inf]


def test_evaluations_keep_raw_returns(tmp_path: Path) -> None:
    with RunLogger(tmp_path, tensorboard=False) as logger:
        logger.evaluation(10, [1.0, 0.1], [4, 5], {"checkpoint": "last"})
    (row,) = read_evaluations(tmp_path)
    assert row["returns"] == [1.0, 0.1] and row["lengths"] == [4, 5] and row["checkpoint"] == "last"
    table = read_metrics(tmp_path)
    assert table["eval/mean_reward"].tolist() == [0.55] and table["eval/mean_ep_length"].tolist() == [4.5]


@pytest.mark.parametrize("torn", [False, True])
def test_a_resumed_run_leaves_the_files_of_one_never_stopped(tmp_path: Path, torn: bool) -> None:
    for name in ("whole", "resumed"):
        (tmp_path / name).mkdir()
    with RunLogger(tmp_path / "whole") as logger:
        train(logger, range(10, 101, 10))
    with RunLogger(tmp_path / "resumed") as logger:
        train(logger, range(10, 71, 10))  # killed after step 70, the last checkpoint is of step 40
    if torn:
        with open(tmp_path / "resumed" / "metrics.jsonl", "a") as file:
            file.write('{"step": 80, "tim')
    before = read_metrics(tmp_path / "resumed")
    with RunLogger(tmp_path / "resumed", resume_step=40) as logger:
        assert logger.time_s >= max(before.loc[before["step"] == 40, "time_s"].tolist())
        train(logger, range(50, 101, 10))
    for file in ("metrics.jsonl", "evaluations.jsonl"):
        assert without_times(tmp_path / "whole" / file) == without_times(tmp_path / "resumed" / file)
    for tag in ("rollout/ep_rew_mean", "train/approx_kl", "eval/mean_reward"):
        assert points(tmp_path / "whole", tag) == points(tmp_path / "resumed", tag)
    assert not list((tmp_path / "resumed").glob("*.tmp-*"))
    assert read_metrics(tmp_path / "resumed")["time_s"].is_monotonic_increasing


def test_going_on_in_the_same_folder_appends_after_a_torn_line(tmp_path: Path) -> None:
    for tail in ('{"step": 2, "t', '{"step": 2, "time_s": 1.0}'):
        (tmp_path / "metrics.jsonl").write_text('{"step": 1, "time_s": 100.0}\n' + tail)
        with RunLogger(tmp_path, tensorboard=False) as logger:
            logger.log(3, {})
        steps = read_metrics(tmp_path)["step"].tolist()
        assert steps == ([1, 3] if tail.endswith('"t') else [1, 2, 3])
    assert read_metrics(tmp_path)["time_s"].iloc[-1] >= 1.0


def test_iterations_without_steps_are_removed_by_their_number(tmp_path: Path) -> None:
    with RunLogger(tmp_path, tensorboard=False) as logger:
        for iteration, step in enumerate((10, 20, 20, 20, 30), start=1):
            logger.log(step, {"time/iterations": iteration})
    with RunLogger(tmp_path, tensorboard=False, resume_step=20, resume_iteration=3) as logger:
        logger.log(20, {"time/iterations": 4})
    assert read_metrics(tmp_path)["time/iterations"].tolist() == [1, 2, 3, 4]


def test_resuming_at_nought_starts_over(tmp_path: Path) -> None:
    with RunLogger(tmp_path, tensorboard=False) as logger:
        train(logger, range(10, 41, 10))
    with RunLogger(tmp_path, tensorboard=False, resume_step=0) as logger:
        assert logger.time_s < 1.0
    assert read_metrics(tmp_path).empty and read_evaluations(tmp_path) == []


def test_tags_of_other_tools_change_tensorboard_only(tmp_path: Path) -> None:
    with RunLogger(tmp_path, tags="cleanrl") as logger:
        logger.log(1, {"rollout/ep_rew_mean": 2.0, "own/tag": 3.0})
    assert points(tmp_path, "charts/episodic_return") == [(1, 2.0)] and points(tmp_path, "own/tag") == [(1, 3.0)]
    assert "rollout/ep_rew_mean" in read_metrics(tmp_path)


def drawn(folder: Path, tag: str) -> list[tuple[int, list[float], list[float], float, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tb"), size_guidance={"histograms": 0})
    events.Reload()
    found = []
    for event in events.Histograms(tag):
        value = event.histogram_value
        found.append((event.step, list(value.bucket_limit), list(value.bucket), value.min, value.max))
    return found


def test_histograms_are_lists_of_counts_and_drawn_by_tensorboard(tmp_path: Path) -> None:
    with RunLogger(tmp_path) as logger:
        logger.log(1, {"a": 2.0}, {"diagnose/w": Histogram((-1.0, 0.0, 2.0), (0, 3, 4, 1))})
        logger.log(2, {"a": 3.0}, {"diagnose/w": Histogram((-1.0, 0.0, 2.0), (0, 0, 0, 0))})
        logger.log(3, {"a": 4.0})
    rows = read_lines(tmp_path / "metrics.jsonl")
    assert [row.get("diagnose/w") for row in rows] == [[0, 3, 4, 1], [0, 0, 0, 0], None]
    # readers of numbers pass over it
    table = read_metrics(tmp_path)
    assert table["a"].tolist() == [2.0, 3.0, 4.0] and table["diagnose/w"].isna().all()
    # the open bins get the width of their neighbours; an empty histogram is not drawn
    assert drawn(tmp_path, "diagnose/w") == [(1, [-1.0, 0.0, 2.0, 4.0], [0.0, 3.0, 4.0, 1.0], -1.0, 4.0)]


def test_a_resumed_run_forgets_later_histograms(tmp_path: Path) -> None:
    with RunLogger(tmp_path) as logger:
        for step in (10, 20, 30):
            logger.log(step, {}, {"w": Histogram((0.0, 1.0), (step, 0, 1))})
    time.sleep(1.1)  # files of one second are read in the order of a counter's letters: the tenth before the ninth
    with RunLogger(tmp_path, resume_step=20) as logger:
        logger.log(30, {}, {"w": Histogram((0.0, 1.0), (7, 0, 1))})
    assert [row["w"][0] for row in read_lines(tmp_path / "metrics.jsonl")] == [10, 20, 7]
    assert [(step, counts[0]) for step, _, counts, _, _ in drawn(tmp_path, "w")] == [(10, 10), (20, 20), (30, 7)]


def test_wrong_use_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="create it first"):
        RunLogger(tmp_path / "none")
    with pytest.raises(ValueError, match="choose one of sb3, cleanrl, rsl_rl"):
        RunLogger(tmp_path, tags="sb4")  # type: ignore[arg-type]
    with RunLogger(tmp_path, tensorboard=False) as logger:
        with pytest.raises(ValueError, match="reserved"):
            logger.log(1, {"step": 2.0})
        with pytest.raises(ValueError, match="expected one number"):
            logger.log(1, {"x": [1.0, 2.0]})  # type: ignore[dict-item]
        with pytest.raises(ValueError, match="2 borders and 2 counts; expected one count more"):
            logger.log(1, {}, {"x": Histogram((0.0, 1.0), (1, 2))})
        with pytest.raises(ValueError, match="the tag 'x' is taken"):
            logger.log(1, {"x": 1.0}, {"x": Histogram((0.0, 1.0), (1, 2, 3))})
        with pytest.raises(ValueError, match="2 returns and 1 lengths"):
            logger.evaluation(1, [1.0, 2.0], [3])
        with pytest.raises(ValueError, match="0 returns"):
            logger.evaluation(1, [], [])
        with pytest.raises(ValueError, match="extra holds returns"):
            logger.evaluation(1, [1.0], [3], {"returns": []})
    assert read_metrics(tmp_path).empty


class FakeWandb(types.ModuleType):
    def __init__(self, online: bool, known: bool = True) -> None:
        super().__init__("wandb")
        self.online, self.known, self.calls, self.logged, self.finished = online, known, [], [], 0

    def login(self, prompt: bool = True) -> bool:
        assert prompt is False
        return self.known

    def init(self, **arguments: Any) -> FakeWandb:
        self.calls.append(arguments)
        if arguments.get("mode") != "offline" and not self.online:
            raise ConnectionError("no route to host")
        return self

    def define_metric(self, *_: Any, **__: Any) -> None: ...

    def log(self, row: dict[str, float]) -> None:
        self.logged.append(row)

    def finish(self) -> None:
        self.finished += 1


def test_wandb_goes_offline_where_it_must(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_MODE", raising=False)
    fake = FakeWandb(online=False)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    with pytest.warns(UserWarning, match="kept offline"), RunLogger(tmp_path, False, wandb={"project": "p"}) as logger:
        logger.log(7, {"a": 1.0})
    assert fake.calls[-1]["mode"] == "offline" and fake.calls[-1]["project"] == "p"
    assert fake.logged == [{"a": 1.0, "global_step": 7}] and fake.finished == 1
    fake = FakeWandb(online=True, known=False)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    RunLogger(tmp_path, False, wandb={}).close()
    assert [call.get("mode") for call in fake.calls] == ["offline"]


def test_missing_wandb_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ImportError, match=r"ctrlrl\[wandb\]"):
        RunLogger(tmp_path, False, wandb={})
    RunLogger(tmp_path, False).close()


SCALARS = {"rollout/ep_rew_mean": 12.345, "eval/mean_reward": 20.0, "train/approx_kl": 0.01, "train/loss": 9.0}


def test_progress_away_from_a_terminal_is_plain_lines(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(1000, label="ppo X-v0", interval_s=0.0) as progress:
        progress.update(500, SCALARS)
        progress.update(1000)
    out = capsys.readouterr().out
    assert "\x1b" not in out and "\r" not in out and len(out.splitlines()) == 3
    assert (
        out.startswith("ppo X-v0 | 500/1,000 steps | ")
        and "return 12.35 | eval 20 | kl 0.01" in out
        and "loss" not in out
    )


def test_progress_lines_keep_their_distance(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(1000) as progress:
        for step in range(1000):
            progress.update(step)
    assert len(capsys.readouterr().out.splitlines()) == 1


def test_progress_can_be_silent(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(10, enabled=False) as progress:
        progress.update(10, SCALARS)
    assert capsys.readouterr() == ("", "")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_in_a_terminal_is_live(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "160")
    out = Terminal()
    with Progress(1000, start=200, label="ppo X-v0", file=out) as progress:
        progress.update(700, SCALARS)
    text = out.getvalue()
    assert "\x1b" in text and "700/1000" in text and "return 12.35" in text and "kl 0.01" in text
    with pytest.raises(RuntimeError, match="boom"), Progress(10, file=out):
        raise RuntimeError("boom")
