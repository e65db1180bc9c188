"""Reports: numbers known by hand, pages that stand alone, and every unfinished state a run can be in."""

from __future__ import annotations

import base64
import html
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ctrlrl.engine import runfolder
from ctrlrl.run import report_statistics as stats
from ctrlrl.run.report import report
from ctrlrl.run.report_figures import short

REPS = 200


def make_run(
    root: Path,
    method: str = "ppo",
    env: str = "A-v0",
    seed: int = 0,
    ends: Any = (1.0, 2.0),
    steps: tuple[int, ...] = (100, 200),
    config: dict[str, Any] | None = None,
    evaluated: bool = True,
    torn: str = "",
) -> Path:
    """A finished run whose evaluation at ``steps[i]`` has the two returns ``ends[i] -+ 1``."""
    folder = runfolder.create(root, env, method, seed)
    document = {
        "method": method, "env": {"id": env}, "config": {"lr": 0.1, **(config or {})}, "seed": seed, "total_steps": 200,
    }  # fmt: skip
    runfolder.write_json(folder / "config.json", document)
    runfolder.write_json(
        folder / "versions.json", {"torch": "2.9", "git_commit": "abc", "platform": "Linux", "cpu_count": 4}
    )
    metrics = [{"step": s, "time_s": s / 10, "rollout/ep_rew_mean": e / 2} for s, e in zip(steps, ends, strict=True)]
    rows = [
        {"step": s, "time_s": s / 10, "returns": [e - 1, e + 1], "lengths": [5, 5], "deterministic": True}
        for s, e in zip(steps, ends, strict=True)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(m) + "\n" for m in metrics) + torn)
    if evaluated:
        (folder / "evaluations.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows) + torn)
    return folder


def page(paths: Any, out: Path, **kwargs: Any) -> tuple[str, str]:
    """The page's source, and its text with tags removed."""
    written = report(paths, out, reps=REPS, **kwargs)
    assert written == out / "report.html"
    source = written.read_text(encoding="utf-8")
    body = re.sub(r'base64,[^"]+', "", source[source.index("<body>") :])
    return source, html.unescape(re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", body)))


def test_iqm_by_hand() -> None:
    # sorted: 1 2 3 4 10 20 30 100; without the lowest and highest two: (3 + 4 + 10 + 20) / 4
    scores = np.array([[1.0, 30.0], [100.0, 2.0], [3.0, 20.0], [10.0, 4.0]])
    estimate = stats.iqm(scores, REPS)
    assert estimate.value == 9.25 and estimate.n == 4
    assert estimate.low is not None and estimate.high is not None and estimate.low <= 9.25 <= estimate.high
    lone = stats.iqm(np.array([[5.0]]), REPS)
    assert (lone.value, lone.low, lone.high) == (5.0, None, None)


def test_probability_of_improvement_by_hand() -> None:
    # pairs 3>1 3>2 3=3 (half) 5>1 5>2 5>3 = 5.5 of 6
    estimate = stats.probability_of_improvement(np.array([[3.0], [5.0]]), np.array([[1.0], [2.0], [3.0]]), REPS)
    assert estimate.value == pytest.approx(5.5 / 6)
    same = np.array([[1.0], [2.0]])
    assert stats.probability_of_improvement(same, same, REPS).value == 0.5


def test_intervals_repeat_and_leave_numpys_generator_alone() -> None:
    scores = np.random.default_rng(0).normal(size=(5, 2))
    np.random.seed(1)
    expected = np.random.random()
    np.random.seed(1)
    first = stats.iqm(scores, REPS)
    assert np.random.random() == expected
    assert stats.iqm(scores, REPS) == first


def test_interval_of_two_runs_by_enumeration() -> None:
    """Resamples of runs {0, 1} have means 0, 0.5, 1 with chances 1/4, 1/2, 1/4: the interval is [0, 1]."""
    estimate = stats.iqm(np.array([[0.0], [1.0]]), REPS)
    assert (estimate.value, estimate.low, estimate.high) == (0.5, 0.0, 1.0)


def test_curves_are_cut_to_the_common_range() -> None:
    a, b = (np.array([0.0, 10.0, 20.0]), np.array([0.0, 1.0, 2.0])), (np.array([5.0, 10.0]), np.array([3.0, 5.0]))
    drawn = stats.curve([a, b])
    assert drawn is not None and drawn.cut
    assert drawn.x.tolist() == [5.0, 10.0] and drawn.mean.tolist() == [1.75, 3.0]
    assert drawn.low.tolist() == [0.5, 1.0] and drawn.high.tolist() == [3.0, 5.0]
    apart = stats.curve([a, (np.array([30.0]), np.array([1.0]))])
    assert apart is not None and not len(apart.x) and apart.cut
    assert stats.curve([(np.array([1.0]), np.array([np.nan]))]) is None


def test_the_page_holds_the_numbers(tmp_path: Path) -> None:
    for seed, end in enumerate((10.0, 20.0, 40.0, 90.0)):
        make_run(tmp_path / "runs", "bpo", seed=seed, ends=(1.0, end))
        make_run(tmp_path / "runs", "ppo", seed=seed, ends=(1.0, end / 10), config={"lr": 0.2})
    source, text = page([tmp_path / "runs"], tmp_path / "out")
    assert "A-v0 bpo 2 episodes at step 200, deterministic 4 30.00" in text  # IQM: (20 + 40) / 2
    assert "40.00" in text  # the mean
    # pairs in which bpo (10 20 40 90) is above ppo (1 2 4 9): all 16
    assert "bpo > ppo 1 4 and 4 1.00" in text
    assert "config.lr 0.1 0.2" in text
    assert "A-v0 bpo 4 200 0:00:20 10" in text  # 200 steps in 20 s
    assert "narrower than the truth" in text and "How the numbers were computed" in text
    assert "Machine: Linux, 4 CPUs" in text and "torch 2.9" in text
    images = re.findall(r'<img src="data:image/png;base64,([^"]+)" alt="([^"]+)"', source)
    assert len(images) == 4 and all(len(alt) > 40 for _, alt in images)
    files = {p.name: p.read_bytes() for p in (tmp_path / "out").glob("*.png")}
    assert set(files) == {"final-scores.png", "improvement.png", "curve-A-v0-steps.png", "curve-A-v0-time.png"}
    assert {base64.b64decode(data) for data, _ in images} == set(files.values())
    assert all(data.startswith(b"\x89PNG") for data in files.values())


def test_the_page_needs_nothing_from_outside(tmp_path: Path) -> None:
    make_run(tmp_path / "runs")
    source, _ = page([tmp_path / "runs"], tmp_path / "out")
    assert not re.search(r"https?:|//[a-z]|<script|<link|@import|url\(", re.sub(r'base64,[^"]+', "", source))
    assert 'lang="en"' in source and "viewport" in source and "prefers-color-scheme:dark" in source
    assert str(tmp_path) not in source
    assert not list((tmp_path / "out").glob("*.tmp-*"))


def test_one_run_says_what_cannot_be_computed(tmp_path: Path) -> None:
    run = make_run(tmp_path / "runs", ends=(1.0, 7.5))
    _, text = page(run, tmp_path / "out")
    assert "one run, so there is no interval" in text and "7.50 none: one run" in text
    assert "There is one method, so nothing to compare" in text and "There is one run" in text


def test_aggregate_over_environments_by_hand(tmp_path: Path) -> None:
    for seed, (a, b) in enumerate(((10.0, 300.0), (20.0, 400.0))):
        make_run(tmp_path / "runs", env="A-v0", seed=seed, ends=(0.0, a))
        make_run(tmp_path / "runs", env="B-v0", seed=seed, ends=(0.0, b))
    _, text = page([tmp_path / "runs"], tmp_path / "out", references={"A-v0": (0, 100), "B-v0": (200, 400)})
    # normalised: 0.1 0.2 / 0.5 1.0; without the lowest and highest: (0.2 + 0.5) / 2
    assert (
        "Normalised score over all environments [2] Method Runs per environment IQM 95 % interval ppo 2 0.350" in text
    )
    _, text = page([tmp_path / "runs"], tmp_path / "out", references={"A-v0": (0, 100)})
    assert "No score over all environments" in text and "B-v0 has no reference" in text
    with pytest.raises(ValueError, match="two different returns"):
        page([tmp_path / "runs"], tmp_path / "out", references={"A-v0": (1, 1)})


def test_settings_make_groups_and_seeds_do_not(tmp_path: Path) -> None:
    for seed in (0, 1):
        for lr in (0.1, 0.3):
            make_run(tmp_path / "runs", seed=seed, config={"lr": lr})
    _, text = page([tmp_path / "runs"], tmp_path / "out")
    assert "ppo, lr=0.1" in text and "ppo, lr=0.3" in text and "4 runs, 2 methods" in text


def test_a_run_still_going(tmp_path: Path) -> None:
    make_run(tmp_path / "runs", seed=0)
    make_run(tmp_path / "runs", seed=1, steps=(100,), ends=(5.0,), torn='{"step": 200, "ti')
    _, text = page([tmp_path / "runs"], tmp_path / "out")
    assert "1 of 2 runs is unfinished" in text and "different length (100 to 200 steps)" in text
    assert "2 episodes at step 100 to 200" in text and "mean and band stop at the shortest" in text
    assert "100 of 200" in text


def test_runs_without_evaluations_or_without_anything(tmp_path: Path) -> None:
    make_run(tmp_path / "runs", seed=0, ends=(1.0, 8.0), evaluated=False)
    make_run(tmp_path / "runs", seed=1, ends=(1.0, 6.0))
    _, text = page([tmp_path / "runs"], tmp_path / "out")
    assert "1 run has no evaluation yet" in text and "training return 2 3.50" in text  # (4 + 3) / 2, not 6
    empty = make_run(tmp_path / "empty", steps=(), ends=(), evaluated=False)
    _, text = page([empty], tmp_path / "out2")
    assert "1 of 1 runs have recorded no return yet" in text and "no curve over environment steps" in text


def test_returns_that_are_not_finite_are_told(tmp_path: Path) -> None:
    make_run(tmp_path / "runs", seed=0, ends=(1.0, 4.0))
    bad = make_run(tmp_path / "runs", seed=0, ends=(1.0, 2.0))
    rows = (bad / "evaluations.jsonl").read_text().splitlines()
    (bad / "evaluations.jsonl").write_text(rows[0] + "\n" + rows[1].replace("[1.0, 3.0]", "[null, 3.0]") + "\n")
    _, text = page([tmp_path / "runs"], tmp_path / "out")
    assert "1 of 2 runs ended in returns that are not finite" in text and "1 of 2 4.00 none: one run" in text
    assert "seed 0 occurs more than once" in text


def test_names_cannot_inject_markup(tmp_path: Path) -> None:
    make_run(tmp_path / "runs", method="<script>alert(1)</script>", env="A<img src=x>/../v0")
    source, _ = page([tmp_path / "runs"], tmp_path / "out")
    assert "<script>" not in source and "<img src=x" not in source
    assert all(p.parent == tmp_path / "out" for p in (tmp_path / "out").rglob("*.png"))


def test_a_live_environment_is_named_by_its_folder(tmp_path: Path) -> None:
    run = make_run(tmp_path / "runs", env="Mine-v0")
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps({**config, "env": None}))
    _, text = page([run], tmp_path / "out")
    assert "ppo on Mine-v0" in text


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="does not exist"):
        report([tmp_path / "none"], tmp_path / "out")
    with pytest.raises(FileNotFoundError, match="is not a run and has none below it"):
        report([tmp_path], tmp_path / "out")
    with pytest.raises(FileNotFoundError, match="no runs were given"):
        report([], tmp_path / "out")
    run = make_run(tmp_path / "runs")
    with pytest.raises(FileExistsError, match="expected a folder"):
        report([run], run / "config.json")
    assert not (tmp_path / "out").exists()


def test_short_numbers() -> None:
    values = (0, 0.25, 1500, 20_000, 1_500_000, -3.5, -20_000)
    assert [short(v) for v in values] == ["0", "0.25", "1500", "20k", "1.5M", "\u22123.5", "\u221220k"]
