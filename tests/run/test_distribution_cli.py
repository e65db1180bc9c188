"""``ctrlrl train distributional_dp`` and ``ctrlrl eval`` as a user types them: lines, files, and what is refused."""

import json

import gymnasium as gym
import matplotlib.image
import numpy as np
import pytest
from helpers.agents import NOISY, make

from ctrlrl import api
from ctrlrl.run import cli, distribution_cli, distribution_figures
from ctrlrl.types import EnvSpec

LADDER = "ctrlrl/Ladder-v0"


@pytest.fixture
def run(capsys):
    def call(*words):
        status = cli.main([str(w) for w in words])
        out, err = capsys.readouterr()
        assert "Traceback" not in out + err
        return status, out, err

    return call


@pytest.fixture
def no_picture(monkeypatch):
    """Pictures take a second each; what would be drawn."""
    asked = []
    monkeypatch.setattr(distribution_figures, "picture", lambda *arguments: asked.append(arguments) or b"png")
    return asked


def planned(tmp_path, **settings):
    return api.make("distributional_dp", LADDER, **settings).save(tmp_path / "run")


def test_the_ladder_is_planned_evaluated_and_drawn(run, tmp_path):
    words = ("--objective", "cvar", "--tau", "0.75", "--root", tmp_path / "runs", "--quiet")
    status, out, err = run("train", "distributional_dp", "--env", LADDER, *words)
    assert status == 0, err
    assert "exact engine in fractions: 1 state, 3 steps, gamma 1" in out
    assert "CVaR at 0.75: 11/75 = 0.146667, error at most 0; initial stock -1" in out
    (folder,) = (p.parent for p in (tmp_path / "runs").rglob("config.json"))
    status, out, err = run("eval", folder, "--episodes", 50, "--out", tmp_path / "r.json")
    assert status == 0, err
    rows = {line[4:18].strip(): line[18:].split() for line in out.splitlines() if line.startswith("    ")}
    # of (-3, -1, 1) with (8, 24, 93)/125, and of (-3, -1, 1, 3) with (8, 36, 54, 27)/125
    assert rows["exact"] == ["0.14667", "0.36", "-3", "-1", "1", "1", "1"]
    assert rows["risk-neutral"] == ["-0.10933", "0.6", "-3", "-1", "1", "1", "3"]
    assert len(rows["simulated"]) == 7
    assert "  value: CVaR at 0.75 = 11/75 = 0.146667, without error; initial stock -1" in out.splitlines()
    assert out.splitlines()[-1] == f"Picture: {folder / 'law.png'}"
    assert matplotlib.image.imread(folder / "law.png").std() > 0.05
    data = json.loads((tmp_path / "r.json").read_text())
    assert data["law"]["fraction"] == "11/75" and data["law"]["laws"]["exact"]["returns"] == [-3.0, -1.0, 1.0]
    assert sorted(set(data["returns"])) == data["law"]["laws"]["simulated"]["returns"]
    assert run("train", "--resume", folder)[1].startswith(f"{folder} is finished: 1 of 1 steps")


def test_discounted_laws_are_compared_with_discounted_episodes(run, tmp_path, no_picture):
    folder = planned(tmp_path, gamma=0.5)
    status, _, err = run("eval", folder, "--episodes", 30, "--out", tmp_path / "r.json", "--plot", tmp_path / "p.png")
    assert status == 0, err
    laws = json.loads((tmp_path / "r.json").read_text())["law"]["laws"]
    # 1, 1/2 and 1/4, each gained or lost
    assert laws["exact"]["returns"] == [k / 4 for k in range(-7, 8, 2)]
    assert set(laws["simulated"]["returns"]) <= set(laws["exact"]["returns"]) and laws["exact"]["mean"] == 0.35
    assert (tmp_path / "p.png").read_bytes() == b"png" and not (folder / "law.png").exists()


def test_any_other_run_is_shown_beside_the_exact_optimum(run, tmp_path, no_picture):
    folder = make(LADDER).save(tmp_path / "run")
    status, out, err = run("eval", folder, "--episodes", 5, "--law", "--risk", "0.75")
    assert status == 0, err
    assert "best possible: CVaR at 0.75 = 11/75" in out and "\n    ppo " in out and "\n    optimum " in out
    status, out, _ = run("eval", folder, "--episodes", 5, "--law")
    assert status == 0 and "best possible: mean = 3/5 = 0.6" in out
    (_, _, chart, goal) = no_picture.pop()
    assert chart is None and goal is None
    # without --law it is as ever
    status, out, _ = run("eval", folder, "--episodes", 5)
    assert status == 0 and "law of the return" not in out


def test_a_learner_with_a_stock_begins_with_the_one_it_chooses(run, tmp_path, no_picture):
    small = {"critic_hidden": (8,), "device": "cpu", "threads": 1, "finite_horizon": True, "gamma": 1.0}
    agent = api.make("d_eta_n", LADDER, objective="cvar", level=0.75, stock_low=-3.0, stock_high=3.0, **small)
    status, out, err = run("eval", agent.save(tmp_path / "run"), "--episodes", 5, "--law")
    assert status == 0, err
    assert f"d_eta_n was given the initial stock {agent.choose_stock(0.75):.4g}" in out
    assert "best possible: CVaR at 0.75 = 11/75" in out


def test_what_has_no_law_is_refused(run, tmp_path, capsys):
    folder = make(NOISY).save(tmp_path / "run")
    status, _, err = run("eval", folder, "--law")
    assert status == 1 and "needs the transition table" in err
    assert run("eval", folder, "--law", "--robust")[0] == 2
    folder = planned(tmp_path / "planned")
    assert "--scenarios is for runs on inventory" in run("eval", folder, "--scenarios", 3)[2]
    status, _, err = run("eval", folder, "--plot", "no/such/p.png")
    assert status == 1 and "no/such does not exist" in err
    for words, message in (
        (("--objective", "cvar", "--tau", "2"), "tau=2 must lie in (0, 1]"),
        (("--objective", "target"), "needs a goal"),
        (("--objective", "luck"), "invalid choice 'luck'"),
    ):
        with pytest.raises(SystemExit):
            run("train", "distributional_dp", "--env", LADDER, "--root", tmp_path / "runs", *words)
        assert message in " ".join(capsys.readouterr().err.split())
    status, _, err = run("train", "distributional_dp", "--env", "CartPole-v1", "--root", tmp_path / "runs")
    assert status == 1 and "CartPole-v1 has none" in err and not (tmp_path / "runs").exists()


def test_a_goal_that_a_run_does_not_tell_is_asked_for():
    class Learner:
        objective = "target"

    with pytest.raises(ValueError, match="needs a goal, which this run draws anew"):
        distribution_cli._wanted(Learner, EnvSpec(LADDER))


def test_rewards_are_discounted_from_the_first_step_of_each_episode():
    env = distribution_cli.Discounted(gym.make(f"ctrlrl_envs:{LADDER}", chance=1.0), 0.5)
    for _ in range(2):
        env.reset(seed=0)
        assert np.allclose([env.step(1)[1] for _ in range(3)], [1.0, 0.5, 0.25])
