"""Published settings and scores: every file fits the methods as they are, and says what was published."""

from __future__ import annotations

from statistics import mean

import pytest

from ctrlrl.data import d4rl_catalogue
from ctrlrl.engine import algorithm
from ctrlrl.engine.config import build, flat
from ctrlrl.engine.published import everything, known, names, published

COLUMNS = "bc td3_bc cql iql rebrac edac decision_transformer".split()
LAST = """
halfcheetah-medium         42.40  48.10±0.18   47.04±0.22   48.31±0.22   64.04±0.68   67.70±1.04    42.20±0.26
halfcheetah-medium-replay  35.66  44.84±0.59   45.04±0.27   44.46±0.22   51.18±0.31   62.06±1.10    38.91±0.50
halfcheetah-medium-expert  55.95  90.78±6.04   95.63±0.42   94.74±0.52   103.80±2.95  104.76±0.64   91.55±0.95
hopper-medium              53.51  60.37±3.49   59.08±3.77   67.53±3.78   102.29±0.17  101.70±0.28   65.10±1.61
hopper-medium-replay       29.81  64.42±21.52  95.11±5.27   97.43±6.39   94.98±6.53   99.66±0.81    81.77±6.87
hopper-medium-expert       52.30  101.17±9.07  99.26±10.91  107.42±7.80  109.45±2.34  105.19±10.08  110.44±0.33
walker2d-medium            63.23  82.71±4.78   80.75±3.28   80.91±3.17   85.82±0.77   93.36±1.38    67.63±2.54
walker2d-medium-replay     21.80  85.62±4.01   73.09±13.22  82.15±3.03   84.25±2.25   87.10±2.78    59.86±2.73
walker2d-medium-expert     98.96  110.03±0.36  109.56±0.39  111.72±0.86  111.86±0.43  114.75±0.74   107.11±0.96
"""
LOCOMOTION = [f"{line.split()[0]}-v2" for line in LAST.strip().splitlines()]
MAZES = "umaze umaze-diverse medium-play medium-diverse large-play large-diverse"
ANTMAZE = [f"antmaze-{maze}-v2" for maze in MAZES.split()]
ADROIT = [f"{task}-{kind}-v1" for task in "pen door hammer relocate".split() for kind in "human cloned expert".split()]


@pytest.mark.parametrize("found", list(everything()), ids=lambda found: f"{found.name} {found.dataset}")
def test_settings_are_those_of_the_method_as_it_is(found):
    method = algorithm.get(found.method)
    config, own = build(method, found.settings, loop=method.agent_class().loop)
    built = flat(config) | flat(own)
    for name, value in found.settings.items():
        assert built[name] == (tuple(value) if isinstance(value, list) else value)
    assert d4rl_catalogue.entry(found.dataset).id == found.dataset
    assert found.updates >= 100_000 and found.seeds == 4
    assert " at " in found.source and found.settings_source.count(" at ") == 2  # each with its commit


@pytest.mark.parametrize("line", LAST.strip().splitlines(), ids=LOCOMOTION)
def test_scores_are_the_table_s_digit_by_digit(line):
    name, *cells = line.split()
    for method, cell in zip(COLUMNS, cells, strict=True):
        found = published(method, f"{name}-v2")
        score, _, std = cell.partition("±")
        assert f"{found.score:.2f}" == score
        assert not std or f"{found.score_std:.2f}" == std


@pytest.mark.parametrize(
    ("name", "sets", "last", "best"),
    [
        ("bc", LOCOMOTION, 50.40, 70.15),
        ("bc_10", LOCOMOTION, 69.29, 80.65),
        ("td3_bc", LOCOMOTION, 76.45, 84.83),
        ("cql", LOCOMOTION, 78.28, 84.68),
        ("iql", LOCOMOTION, 81.63, 86.28),
        ("rebrac", LOCOMOTION, 89.74, 93.00),
        ("edac", LOCOMOTION, 92.92, 96.36),
        ("decision_transformer", LOCOMOTION, 73.84, 77.49),
        ("iql", ANTMAZE, 57.17, 72.00),
        ("rebrac", ANTMAZE, 78.42, 86.71),
        ("iql", ADROIT, 53.43, 62.62),
        ("rebrac", ADROIT, 59.39, 69.71),
    ],
)
def test_means_are_the_published_ones(name, sets, last, best):
    found = [published(name, dataset_id) for dataset_id in sets]
    assert mean(f.score for f in found) == pytest.approx(last, abs=0.00501)
    assert mean(f.best_score for f in found) == pytest.approx(best, abs=0.00501)


def test_the_files_of_a_name_are_one_for_each_set():
    assert names() == sorted([*COLUMNS, "bc_10"])
    assert known("td3_bc") == sorted(LOCOMOTION)
    assert known("rebrac") == sorted(LOCOMOTION + ANTMAZE + ADROIT)
    assert known("bc") == sorted([*LOCOMOTION, "door-human-v1"])
    assert published("bc_10", "hopper-medium-v2").method == "bc"
    assert published("bc_10", "hopper-medium-v2").settings["best_share"] == 0.1


def test_settings_differ_by_set_as_published():
    assert published("edac", "hopper-medium-v2").settings["n_critics"] == 50
    assert published("edac", "halfcheetah-medium-expert-v2").settings["eta"] == 5.0
    assert published("rebrac", "hopper-medium-replay-v2").settings["critic_bc_coef"] == 0.5
    assert published("rebrac", "antmaze-large-play-v2").settings["gamma"] == 0.999
    assert published("iql", "hopper-medium-expert-v2").settings["expectile"] == 0.5
    assert published("iql", "antmaze-umaze-v2").settings["reward_shift"] == -1.0


@pytest.mark.parametrize(
    ("name", "dataset_id", "message"),
    [
        ("td3bc", "hopper-medium-v2", "'td3bc' are known. Did you mean td3_bc"),
        ("zzz", "hopper-medium-v2", "There are some of bc, bc_10, cql"),
        ("iql", "hoper-medium-v2", "iql on 'hoper-medium-v2' are known. Did you mean hopper-medium-v2"),
        ("bc", "zzz", "There are door-human-v1, halfcheetah-medium-expert-v2, "),
    ],
)
def test_unknown_names_are_answered_with_near_ones(name, dataset_id, message):
    with pytest.raises(KeyError) as error:
        published(name, dataset_id)
    assert message in error.value.args[0]
