"""What choosing among policies costs: curves that are known, and the command as a user types it."""

import json
import re

import numpy as np
import pytest
from helpers.agents import make
from helpers.off_policy import CONSTANT

from ctrlrl.engine import runfolder
from ctrlrl.run import tuning_cli
from ctrlrl.run.tuning_cost import tuning_cost


def noisy(means, noise, n=200, seed=0):
    rng = np.random.default_rng(seed)
    return [m + noise * rng.normal(size=n) for m in means]


def test_one_candidate_is_worth_its_mean_after_any_number_of_episodes():
    cost = tuning_cost([np.array([1.0, 2.0, 6.0])], pulls=30, trials=50)
    for curve in (cost.mean, cost.low, cost.high, cost.mean_low, cost.mean_high):
        assert curve.shape == (30,) and np.allclose(curve, 3.0)


def test_without_noise_the_better_of_two_is_known_when_each_was_tried_once():
    cost = tuning_cost([np.full(3, -10.0), np.full(3, -2.0)], pulls=20, trials=4000)
    # after one episode the one that was tried is deployed, also where returns are negative
    assert cost.mean[0] == pytest.approx(-6.0, abs=0.3)
    assert (cost.mean[1:] == -2.0).all() and (cost.low[1:] == -2.0).all()


def test_untried_policies_come_first():
    means = np.arange(8.0)
    cost = tuning_cost(noisy(means, 0.0), pulls=8, trials=3000)
    # the best of k drawn without replacement from 0, ..., 7 is 8 k / (k + 1) + k / (k + 1) - 1 on average
    k = np.arange(1, 9)
    assert np.allclose(cost.mean, 9 * k / (k + 1) - 1, atol=0.12)


def test_more_episodes_choose_better_policies_on_average():
    cost = tuning_cost(noisy([0.0, 1.0, 2.0, 3.0], 3.0), pulls=200, trials=2000)
    blocks = cost.mean[4:].reshape(-1, 28).mean(1)
    assert (np.diff(blocks) > -0.02).all() and blocks[-1] > blocks[0] + 0.15
    assert cost.mean[-1] < 3.2


def test_a_subset_caps_what_can_be_reached():
    means = np.arange(10.0)
    cost = tuning_cost(noisy(means, 0.0), subset=2, pulls=10, trials=5000)
    # the better of two of ten: 11 * 2 / 3 - 1
    assert cost.mean[-1] == pytest.approx(11 * 2 / 3 - 1, abs=0.1)
    assert cost.subset == 2 and cost.candidates == 10
    assert cost.low[-1] < 3 and cost.high[-1] == 9


def test_a_trial_has_no_policy_twice():
    cost = tuning_cost(noisy([1.0, 5.0], 0.0), subset=2, pulls=2, trials=500)
    assert (cost.low[1], cost.mean[1]) == (5.0, 5.0)


def test_the_bonus_says_how_long_the_worse_is_tried_again():
    returns = [np.array([0.0, 1.0]), np.array([0.0, 1.0, 1.0, 1.0])]
    greedy = tuning_cost(returns, alpha=0.0, pulls=100, trials=2000)
    curious = tuning_cost(returns, alpha=2.0, unit=1.0, pulls=100, trials=2000)
    assert curious.mean[-1] > greedy.mean[-1] + 0.02
    # in units of a hundredth of the range the bonus hardly matters
    assert abs(tuning_cost(returns, pulls=100, trials=2000).mean[-1] - greedy.mean[-1]) < 0.02


def test_the_worse_is_tried_again_when_its_bonus_says_so(monkeypatch):
    seen = []

    class Told(np.random.Generator):
        """Always the first return; notes how many the pulled policy has."""

        def integers(self, high, **kwargs):
            seen.append(int(high[0]))
            return np.zeros_like(high)

    monkeypatch.setattr(np.random, "default_rng", lambda seed: Told(np.random.PCG64(seed)))
    tuning_cost([np.array([0.78, 0.0]), np.zeros(3)], pulls=6, trials=1, unit=1.0, subset=2)
    # with n pulls of the better, the worse is next if sqrt(2 ln t) > 0.78 + sqrt(2 ln t / n):
    # t = 4, n = 2: 1.665 < 1.957; t = 5, n = 3: 1.794 < 1.816; t = 6, n = 4: 1.893 > 1.727
    assert sorted(seen[:2]) == [2, 3] and seen[2:] == [2, 2, 2, 3]


def test_policies_may_have_been_evaluated_over_different_numbers_of_episodes():
    cost = tuning_cost([np.array([5.0]), np.full(300, 1.0)], pulls=5, trials=300)
    assert cost.mean[-1] == 5.0


def test_the_seed_decides_everything():
    a, b, c = (tuning_cost(noisy([0.0, 1.0], 1.0), pulls=20, trials=100, seed=s) for s in (0, 0, 1))
    assert np.array_equal(a.mean, b.mean) and np.array_equal(a.mean_low, b.mean_low)
    assert not np.array_equal(a.mean, c.mean)


def test_the_interval_of_the_mean_shrinks_with_trials_and_that_of_a_trial_does_not():
    few, many = (tuning_cost(noisy([0.0, 1.0], 1.0), pulls=3, trials=n) for n in (50, 5000))
    assert many.mean_high[0] - many.mean_low[0] < 0.25 * (few.mean_high[0] - few.mean_low[0])
    assert many.high[0] - many.low[0] > 0.85


@pytest.mark.parametrize(
    ("returns", "settings", "said"),
    [
        ([], {}, "at least one policy"),
        ([np.zeros(3), np.zeros(0)], {}, r"\[3, 0\]"),
        ([np.array([1.0, np.nan])], {}, "policy 0"),
        ([np.zeros(3)], {"pulls": 0}, "pulls=0"),
        ([np.zeros(3)], {"alpha": -1.0}, "alpha=-1.0"),
    ],
)
def test_what_cannot_be_chosen_among_is_refused(returns, settings, said):
    with pytest.raises(ValueError, match=said):
        tuning_cost(returns, **settings)


# -- the command --------------------------------------------------------------------------------------


def run_folder(root, seed, evaluations, method="ppo", references=None):
    """A saved agent with evaluations of these returns."""
    agent = make(CONSTANT, seed=seed) if method == "ppo" else None
    folder = agent.save(root / f"{method}-{seed}")
    rows = [{"step": 10 * (k + 1), "time_s": 1.0, "returns": r, "lengths": [1] * len(r)}
            for k, r in enumerate(evaluations)]  # fmt: skip
    (folder / runfolder.EVALUATIONS).write_text("".join(json.dumps(row) + "\n" for row in rows))
    if references is not None:
        config = json.loads((folder / runfolder.CONFIG).read_text())
        config["data"] = {"ref_min_score": references[0], "ref_max_score": references[1]}
        (folder / runfolder.CONFIG).write_text(json.dumps(config))
    return folder


@pytest.fixture
def command(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")

    def call(*words):
        assert tuning_cli.main([str(w) for w in words]) == 0
        return capsys.readouterr().out

    return call


def test_the_last_evaluation_is_chosen_by_and_all_of_them_are_counted(tmp_path, command):
    run_folder(tmp_path, 0, [[100.0, 100.0], [1.0, 1.0, 1.0]])
    run_folder(tmp_path, 1, [[0.0], [0.0, 0.0], [5.0, 5.0]])
    run_folder(tmp_path, 2, [])
    out = command(tmp_path, "--out", tmp_path / "found", "--pulls", 20)
    kept = json.loads((tmp_path / "found" / "tuning.json").read_text())["groups"]
    assert len(kept) == 1 and kept[0]["candidates"] == 2 and kept[0]["spent"] == 2 + 3 + 1 + 2 + 2
    assert sorted(kept[0]["returns"]) == [[1.0, 1.0, 1.0], [5.0, 5.0]]
    assert kept[0]["mean"][0] == pytest.approx(3.0, abs=0.3) and kept[0]["mean"][19] == 5.0
    assert len(kept[0]["mean"]) == 20
    assert (tmp_path / "found" / "tuning.png").read_bytes().startswith(b"\x89PNG")
    assert re.findall(r"^ *after (\d+) ", out, flags=re.MULTILINE) == ["1", "2", "5", "10", "20"]
    assert re.search(r"^ *policies +2 *$", out, flags=re.MULTILINE)
    assert re.search(r"^ *spent +10 *$", out, flags=re.MULTILINE)
    assert "1 runs without an evaluation" in out and "3 episodes" not in out and "from 2 episodes" in out


def test_scores_take_the_place_of_returns_where_the_data_has_references(tmp_path, command):
    run_folder(tmp_path, 0, [[10.0, 20.0]], references=(0.0, 40.0))
    run_folder(tmp_path, 1, [[20.0, 40.0]], references=(0.0, 40.0))
    out = command(tmp_path, "--out", tmp_path / "found")
    kept = json.loads((tmp_path / "found" / "tuning.json").read_text())["groups"][0]
    assert kept["scored"] and sorted(kept["returns"]) == [[25.0, 50.0], [50.0, 100.0]]
    assert "D4RL score" in out


def test_a_single_run_is_told_that_there_is_nothing_to_choose(tmp_path, command):
    assert "nothing to choose" in command(run_folder(tmp_path, 0, [[1.0]]))


def test_runs_without_evaluations_are_refused(tmp_path):
    run_folder(tmp_path, 0, [])
    with pytest.raises(ValueError, match="none of these runs was evaluated"):
        tuning_cli.main([str(tmp_path)])
