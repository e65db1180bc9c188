"""The report's look inside the updates: shown where there is one, with the numbers that were recorded."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from run.test_report import make_run, page

from ctrlrl.engine.diagnose import QUANTILES, WEIGHT_EDGES
from ctrlrl.run import report_figures as figures
from ctrlrl.run import report_updates as updates
from ctrlrl.run.report_runs import load

BINS = len(WEIGHT_EDGES) + 1
MIDDLE = BINS // 2


def counts(**bins: int) -> list[int]:
    """Histogram with the given counts ``b<bin>``."""
    return [bins.get(f"b{k}", 0) for k in range(BINS)]


def diagnosed(folder: Path, rows: list[dict[str, Any]]) -> Path:
    """Give the first log rows of a run (of ``make_run``) diagnoses."""
    file = folder / "metrics.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    for line, row in zip(lines, rows, strict=False):
        line.update({f"diagnose/{k}": v for k, v in row.items()})
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def everything(entropy: float = 0.5, **more: Any) -> dict[str, Any]:
    return {
        "entropy": entropy, "kl_k1": -0.01, "kl_k2": 0.02, "kl_k3": 0.03,
        "clip_share_positive": 0.25, "clip_share_negative": 0.125, "advantage_positive_share": 0.75,
        "weight_positive_share": 0.5, "gradient_weight": counts(b20=1, b27=2, b40=5),
        **{f"ratio_{name}": 0.5 + level for name, level in QUANTILES.items()}, **more,
    }  # fmt: skip


EPISODES = {"zero_variance_share": 0.4, "length_correct": 3.0, "length_incorrect": 7.0}


def figures_of(source: str) -> dict[str, str]:
    """Descriptions of the section's figures by the first words of their captions."""
    start = source.index('<section id="updates">')
    part = re.sub(r"base64,[^\"]+", "", source[start : source.index("</section>", start)])
    found = re.findall(r'alt="([^"]+)">\s*<figcaption>([^<]+)</figcaption>', part)
    return {caption.partition(".")[0]: alt for alt, caption in found}


def test_without_diagnoses_there_is_no_such_section(tmp_path: Path) -> None:
    make_run(tmp_path / "runs")
    source, text = page([tmp_path / "runs"], tmp_path / "out")
    assert "Inside the updates" not in text and 'id="updates"' not in source
    assert not list((tmp_path / "out").glob("updates-*"))


def test_the_section_shows_what_was_recorded(tmp_path: Path) -> None:
    diagnosed(make_run(tmp_path / "runs", "ppo"), [everything(0.9), everything(0.5)])
    diagnosed(make_run(tmp_path / "runs", "ppo", seed=1), [everything(0.7), everything(0.3)])
    diagnosed(make_run(tmp_path / "runs", "grpo"), [everything(), everything(0.25, **EPISODES)])
    source, text = page([tmp_path / "runs"], tmp_path / "out")
    assert '<a href="#updates">Inside the updates</a>' in source and "Nothing of it enters the training" in text
    shown = figures_of(source)
    assert set(shown) == {
        "Entropy, A-v0", "KL of an update, A-v0", "Clip shares, A-v0", "Positive shares, A-v0",
        "Zero-variance groups, A-v0", "Lengths, A-v0", "Ratio, A-v0", "Gradient weights, A-v0",
    }  # fmt: skip
    assert "ppo, entropy: 0.400" in shown["Entropy, A-v0"]  # mean of 0.5 and 0.3
    assert "grpo, k1: \u22120.010; grpo, k2: 0.020; grpo, k3: 0.030" in shown["KL of an update, A-v0"]
    assert "ppo, A &gt; 0, ratio above the band: 0.250" in shown["Clip shares, A-v0"]
    assert "ppo, of the advantages: 0.750" in shown["Positive shares, A-v0"]
    assert shown["Zero-variance groups, A-v0"].endswith("At the end: grpo, groups: 0.400.")
    assert "grpo, solved: 3.00; grpo, not solved: 7.00" in shown["Lengths, A-v0"]
    assert "ppo: 0.510 to 1.49" in shown["Ratio, A-v0"]
    assert "ppo: 25% next to nothing" in shown["Gradient weights, A-v0"]  # 2 of 8
    written = {p.stem for p in (tmp_path / "out").glob("updates-*.png")}
    ids = ("entropy", "kl", "clip-shares", "positive-shares", "zero-variance", "lengths", "ratio", "weights")
    assert written == {f"updates-A-v0-{name}" for name in ids}
    assert all((tmp_path / "out" / f"{name}.png").read_bytes().startswith(b"\x89PNG") for name in written)


def test_only_what_was_recorded_is_drawn(tmp_path: Path) -> None:
    """A loss on distributions has no weights, one without a band no clip shares; NaN is no number."""
    diagnosed(make_run(tmp_path / "runs"), [{"entropy": 0.5, "kl_k1": None}, {"entropy": None}])
    source, _ = page([tmp_path / "runs"], tmp_path / "out")
    assert set(figures_of(source)) == {"Entropy, A-v0"}


def test_a_single_diagnosis_can_be_drawn(tmp_path: Path) -> None:
    diagnosed(make_run(tmp_path / "runs"), [everything(**EPISODES)])
    source, _ = page([tmp_path / "runs"], tmp_path / "out")
    assert len(figures_of(source)) == 8


def test_histograms_of_runs_are_added_and_other_bins_left_out(tmp_path: Path) -> None:
    a = diagnosed(make_run(tmp_path), [{"gradient_weight": counts(b1=3)}, {"gradient_weight": counts(b27=1, b2=1)}])
    b = diagnosed(make_run(tmp_path, seed=1), [{"gradient_weight": counts(b5=1)}, {"gradient_weight": [1, 2, 3]}])
    c = diagnosed(make_run(tmp_path, seed=2), [{"gradient_weight": counts()}])
    steps, shares = updates.histograms(load([a, b, c]))
    assert steps.tolist() == [100.0, 200.0]
    assert shares[0, [1, 5]].tolist() == [0.75, 0.25] and shares[1, [2, MIDDLE]].tolist() == [0.5, 0.5]
    assert shares.sum(1).tolist() == [1.0, 1.0]
    steps, shares = updates.histograms([])
    assert len(steps) == 0 and shares.shape == (0, BINS)


def test_runs_know_their_diagnoses_and_how_often_does_not_make_a_group(tmp_path: Path) -> None:
    a = diagnosed(make_run(tmp_path, config={"diagnose_every": 10}), [everything()])
    b = make_run(tmp_path, seed=1, config={"diagnose_every": None})
    loaded = load([a, b])
    assert [len(run.diagnoses) for run in loaded] == [1, 0] and {run.label for run in loaded} == {"ppo"}
    assert loaded[0].diagnoses[0]["step"] == 100 and loaded[0].diagnoses[0]["diagnose/kl_k2"] == 0.02


@pytest.mark.parametrize("used", [(MIDDLE,), (0, BINS - 1), (0,), (BINS - 1,), (22, 23), (MIDDLE, 48)])
@pytest.mark.parametrize("steps", [(0.0,), (5.0, 10.0, 40.0)])
def test_any_histogram_can_be_drawn(used: tuple[int, ...], steps: tuple[float, ...]) -> None:
    shares = np.zeros((len(steps), BINS))
    shares[:, list(used)] = 1 / len(used)
    png = figures.heat_panels({"a": (np.array(steps), shares)}, WEIGHT_EDGES, "x", "y", "share")
    assert png.startswith(b"\x89PNG")


def test_sizes_are_powers_of_two() -> None:
    texts = [figures._fraction(math.copysign(2.0**k, s)) for k, s in ((6, 1), (0, -1), (-4, 1), (-20, -1))]
    assert texts == ["64", "\u22121", "1/16", "\u22121/1,048,576"]
