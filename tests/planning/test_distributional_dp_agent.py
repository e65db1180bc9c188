"""The planning agent on the ladder, whose optima are known fractions: settings, acting, saving, and what is refused."""

import dataclasses
import json
import re
from fractions import Fraction as F

import gymnasium as gym
import numpy as np
import pytest

from ctrlrl import api
from ctrlrl.engine.config import ConfigError
from ctrlrl.engine.stock import PATH
from ctrlrl.planning import distributional_problem as problem
from ctrlrl.planning.distributional_dp_agent import DistributionalDPSettings
from ctrlrl.planning.distributional_problem import Objective, solve_for, table_of
from ctrlrl.types import EnvSpec

LADDER = "ctrlrl/Ladder-v0"
SAFE, RISK = 0, 1


def plan(objective, env=LADDER, **settings):
    return api.make("distributional_dp", env, objective=objective, **settings)


def seen(stock, step, state=0):
    return {
        "observation": state, "stock": np.array([stock], np.float32), "discount": np.ones(1, np.float32),
        "timestep": np.array([step]),
    }  # fmt: skip


# -- what is known ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("objective", "settings", "value"),
    [
        ("mean", {}, F(3, 5)),
        ("mean", {"gamma": 0.5}, F(7, 20)),
        ("cvar", {"tau": 0.5}, F(0)),
        ("cvar", {"tau": 0.75}, F(11, 75)),
        ("cvar", {"tau": 0.75, "gamma": 0.5}, F(1, 75)),
        ("cvar", {"tau": 0.9}, F(82, 225)),
        ("mean_cvar", {"tau": 0.75, "mean_share": 0.0}, F(11, 75)),
        ("mean_cvar", {"tau": 0.75, "mean_share": 1.0}, F(3, 5)),
        ("target", {"goal": 1.0}, F(-16, 25)),
        ("target", {"goal": 1.25}, F(-89, 100)),
        ("target", {"goal": 1.25, "gamma": 0.5}, F(-96, 100)),
        ("distance", {"goal": 2.0}, F(-1472, 1000)),
        ("exceedance", {"goal": 1.0}, F(93, 125)),
        ("exceedance", {"goal": 2.0}, F(9, 25)),
        ("surplus", {}, F(27, 25)),
        ("mean", {"horizon": 1}, F(1, 5)),
    ],
)
def test_the_ladders_values_are_the_known_fractions(objective, settings, value):
    agent = plan(objective, **settings)
    assert agent.value() == value and isinstance(agent.value(), int | F)
    # the law of the policy attains what is claimed
    assert agent.answer.objective.of(agent.law()) == value and agent.answer.scan.error_bound == 0


def test_the_laws_of_the_best_tail_and_of_the_best_mean_are_those_of_the_ladder():
    agent = plan("cvar", tau=0.75)
    found = dict(zip(agent.law().atoms.tolist(), agent.law().probabilities.tolist(), strict=True))
    assert found == {-3: F(8, 125), -1: F(24, 125), 1: F(93, 125)} and agent.answer.scan.stock == -1
    assert agent.plan.law(-1) == agent.law() and agent.plan.value(-1) == F(-4 * 8 - 2 * 24, 125)
    neutral = agent.answer.neutral
    assert neutral.atoms.tolist() == [-3, -1, 1, 3] and neutral.probabilities.tolist()[-1] == F(27, 125)


def test_the_upper_tail_is_called_a_bound():
    said = plan("upper_cvar", tau=0.25).summary()
    # published for the ladder: 2.728
    assert "upper CVaR at 0.25: " in said[1] and "2.728" in said[1] and "only a bound" in said[2]


@pytest.mark.parametrize("objective", [{"objective": "cvar", "tau": 0.75}, {"objective": "exceedance", "goal": 1.0}])
def test_the_lattice_has_the_same_values_laws_and_actions(objective):
    exact, lattice = plan(**objective), plan(**objective, engine="lattice")
    assert lattice.answer.engine == "lattice" and "exact engine in fractions" in exact.answer.words
    assert float(lattice.value()) == pytest.approx(float(exact.value()), abs=1e-12)
    assert np.allclose(lattice.law().probabilities, exact.law().probabilities.astype(float))
    for stock, step in ((-1.0, 0), (0.0, 1), (-2.0, 1), (-1.0, 2)):
        ours, theirs = (agent.predict(seen(stock, step))[0] for agent in (lattice, exact))
        assert ours == theirs


def test_without_a_horizon_the_value_is_within_its_bound():
    agent = plan("mean", gamma=0.5, engine="grid")
    # a fifth per step, for ever
    assert abs(agent.value() - 0.4) <= agent.answer.scan.error_bound < 0.1
    assert abs(float(agent.law().mean()) - 0.4) <= agent.answer.law_error + agent.answer.scan.error_bound
    assert agent.horizon is None and dict(agent.env_spec.wrappers)[PATH]["finite_horizon"] is False
    assert agent.predict(seen(0.0, 40))[0] == RISK


def test_large_problems_take_the_lattice_by_themselves(monkeypatch):
    monkeypatch.setattr(problem, "SMALL", 3)
    answer = plan("cvar", tau=0.75).answer
    assert answer.engine == "lattice" and answer.scan.value == pytest.approx(11 / 75)
    # rewards of no common unit have none
    answer = plan("cvar", tau=0.75, env_kwargs={"gain": 3.14159265358, "loss": 2.7182818284}).answer
    assert answer.engine == "exact" and not answer.table.exact


# -- acting -----------------------------------------------------------------------------------------


def test_it_gambles_until_it_has_one_and_then_stops():
    agent = plan("cvar", tau=0.75)
    for stock, step, action in ((-1, 0, RISK), (0, 1, SAFE), (-2, 1, RISK), (0, 2, SAFE), (-1, 2, RISK)):
        assert agent.predict(seen(stock, step))[0] == action, (stock, step)
    # float32 is near enough, and a batch is a row each
    batch = {k: np.stack([np.asarray(seen(s, 1)[k]) for s in (0.0000001, -1.9999999)]) for k in seen(0, 1)}
    assert agent.predict(batch)[0].tolist() == [SAFE, RISK]
    with pytest.raises(ValueError, match=r"timestep 3; the plan has the steps 0 to 2"):
        agent.predict(seen(0, 3))


def test_episodes_follow_the_exact_law():
    agent = plan("cvar", tau=0.75)
    returns = agent.evaluate(400).returns
    assert set(returns) == {-3.0, -1.0, 1.0}
    assert abs((returns == 1).mean() - 0.744) < 0.07 and abs((returns == -3).mean() - 0.064) < 0.04


def test_a_discounted_stock_is_told_in_the_money_of_the_first_step():
    agent = plan("exceedance", goal=0.5, gamma=0.5)
    # the first gain reaches it; 1/2 + 1/4 would not pay for its loss
    assert agent.value() == F(3, 5)
    # 1/2 above what is wanted it can lose 1/2 in the second step, with nothing left it loses no 1/4 in the third
    for stock, step, action in ((0.5, 1, RISK), (0.0, 2, SAFE), (1.0, 2, RISK)):
        assert agent.predict(seen(stock, step))[0] == action, (stock, step)
    assert set(agent.evaluate(40).lengths) == {3}


def test_a_horizon_of_ones_own_ends_the_episodes():
    agent = plan("mean", horizon=2)
    assert agent.env_spec.kwargs == {"max_episode_steps": 2} and agent.value() == F(2, 5)
    assert set(agent.evaluate(5).lengths) == {2}


def test_gymnasiums_tables_are_planned_on():
    agent = plan("exceedance", "FrozenLake-v1", goal=1.0, env_kwargs={"is_slippery": False}, horizon=6)
    assert agent.value() == pytest.approx(1.0) and agent.evaluate(2).returns.tolist() == [1.0, 1.0]
    assert plan("mean", "FrozenLake-v1", env_kwargs={"is_slippery": False}, horizon=5).value() == pytest.approx(0.0)


# -- the run ----------------------------------------------------------------------------------------


def test_a_run_is_saved_without_a_plan_and_acts_alike_when_loaded(tmp_path):
    agent = plan("cvar", tau=0.75).learn(run_dir=tmp_path / "run", progress=False, tensorboard=False)
    document = json.loads((tmp_path / "run/config.json").read_text())
    (wrapper,) = document["env"]["wrappers"]
    assert wrapper == [
        PATH, {"initial": -1.0, "gamma": 1.0, "timestep": True, "finite_horizon": True}
    ]  # fmt: skip
    assert {p.suffix for p in (tmp_path / "run").rglob("*") if p.is_file()} <= {".json", ".jsonl", ".safetensors"}
    again = api.load(tmp_path / "run")
    assert "answer" not in vars(again) and again.steps == 1
    assert again.evaluate(30).returns.tolist() == agent.evaluate(30).returns.tolist()
    assert again.value() == F(11, 75)
    assert again.resume(tmp_path / "run", progress=False) is again


def test_a_table_that_has_changed_is_noticed(tmp_path, caplog):
    folder = plan("mean").save(tmp_path / "run")
    assert api.load(folder).value() == F(3, 5) and not caplog.records
    # a gain three times in five becomes one four times in five
    assert api.load(folder, env=EnvSpec(LADDER, {"chance": "4/5"})).value() == F(9, 5)
    assert "had the value 0.6, planning again gives 1.8" in caplog.text


def test_every_objective_can_be_asked_for():
    (kind,) = (f.type for f in dataclasses.fields(DistributionalDPSettings) if f.name == "objective")
    assert re.findall(r"\w+", kind)[1:] == list(problem.OBJECTIVES)
    with pytest.raises(ValueError, match="objective='luck' is unknown; expected one of mean, cvar"):
        Objective("luck")


def test_the_methods_table_knows_it():
    method = api.methods()["distributional_dp"]
    assert method.family == "planning" and "2501.13028" in method.paper


# -- what is refused --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"objective": "luck"}, "objective='luck' is unknown; expected one of 'mean', 'cvar'"),
        ({"objective": "cvar", "tau": 0.0}, r"tau=0 must lie in \(0, 1\]"),
        ({"objective": "cvar", "tau": 1.5}, r"tau=1.5 must lie in \(0, 1\]"),
        ({"objective": "target"}, "objective='target' needs a goal"),
        ({"objective": "exceedance"}, "objective='exceedance' needs a goal"),
        ({"objective": "cvar", "goal": 1.0}, "goal=1 has no part in objective='cvar'"),
        ({"objective": "target", "goal": float("inf")}, "found inf; expected a finite number"),
        ({"objective": "mean_cvar", "mean_share": 2.0}, r"mean_share=2 must lie in \[0, 1\]"),
        ({"gamma": 0.0}, "gamma=0.0 must be above 0"),
        ({"horizon": 0}, "horizon=0 must be at least 1"),
        ({"horizon": 3, "engine": "grid"}, "horizon=3 has no part in engine='grid'"),
        ({"engine": "grid"}, "planned for without a limit of steps: its laws need gamma < 1"),
        ({"engine": "magic"}, "engine='magic' is unknown"),
        ({"device": "cuda"}, "plans on the CPU"),
        ({"n_steps": 3}, "no setting 'n_steps'"),
    ],
)
def test_settings_that_do_not_fit_are_refused_in_words(settings, message):
    with pytest.raises(ConfigError, match=message):
        api.make("distributional_dp", LADDER, **settings)


def test_environments_without_a_table_or_with_another_one_are_refused():
    with pytest.raises(TypeError, match=r"needs the transition table env\.unwrapped\.P.*CartPole-v1 has none"):
        plan("mean", "CartPole-v1")
    clipped = EnvSpec(LADDER, {}, (("gymnasium.wrappers:ClipReward", {"min_reward": 0.0, "max_reward": 1.0}),))
    with pytest.raises(TypeError, match="ClipReward changes actions, observations or rewards"):
        plan("mean", clipped)
    with pytest.raises(ConfigError, match="without a limit of steps: set horizon, or gamma below 1"):
        plan("mean", "CliffWalking-v1")
    vector = EnvSpec("ctrlrl/Homeostasis-v0", {}, ((PATH, {"initial": [0.0, 0.0], "key": "reward_vector"}),))
    with pytest.raises(ConfigError, match="collects a vector reward"):
        plan("mean", vector)


def test_what_does_not_fit_into_memory_is_refused_with_its_size():
    # gains of 100003 in steps of 1/1024
    agent = plan("cvar", engine="lattice", env_kwargs={"gain": 100003, "loss": "1/1024"})
    with pytest.raises(ValueError, match=r"1 states x [\d]+ stocks x .* takes [\d,]+ MiB .* allowed are 8,192"):
        agent.value()
    with pytest.raises(ValueError, match="the lattice needs gamma = 1"):
        plan("cvar", engine="lattice", gamma=0.5).value()


def test_exact_tables_stay_exact_with_their_start():
    env = gym.make(f"ctrlrl_envs:{LADDER}")
    table = table_of(env, LADDER)
    assert table.exact and table.start == ((1, 0),)
    assert solve_for(table, Objective("exceedance", goal=F(1)), 3).scan.value == F(93, 125)
