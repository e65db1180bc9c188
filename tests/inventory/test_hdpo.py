"""HDPO as an agent: what it learns, what it keeps, and that a stopped run goes on as if it had not stopped."""

import dataclasses
import itertools
import json
import math
import types

import gymnasium as gym
import hdpo_parts
import numpy as np
import pytest
import torch
from hdpo_parts import ID

import ctrlrl
from ctrlrl import api
from ctrlrl.engine import checkpoint
from ctrlrl.engine.config import ConfigError, flat
from ctrlrl.engine.errors import NonFiniteUpdateError
from ctrlrl.engine.graphs import compiler_available
from ctrlrl.engine.seeding import derive
from ctrlrl.inventory import hdpo
from ctrlrl.inventory.comparison import begin
from ctrlrl.inventory.hdpo_config import HDPOConfig, HDPOSettings
from ctrlrl.inventory.policies.base import InventoryPolicyConfig
from ctrlrl.run import cli, inventory_figures

QUIET = {"progress": False, "tensorboard": False}
SMALL = {"batch_size": 16, "dev_scenarios": 16, "iteration_steps": 2, "dev_every": 2, "eval_every": None}
RANDOM = "hdpo_parts:Random"


def agent(policy=RANDOM, env_kwargs=None, **settings):
    return ctrlrl.HDPO(ID, policy=policy, env_kwargs=env_kwargs, **{**SMALL, **settings})


class Diary:
    """Writes down every iteration, and what the weights under training are; raises or stops when asked to."""

    def __init__(self, fail_at=None, stop_at=None):
        self.rows, self.weights, self.fail_at, self.stop_at = [], {}, fail_at, stop_at

    def on_update(self, agent, step, metrics):
        self.rows.append((step, {k: v for k, v in metrics.items() if not k.startswith("time/")}))
        self.weights[step] = float(agent.descent.policy.theta.detach())
        if step == self.fail_at:
            raise OSError("the power went off")
        return step != self.stop_at


def script(monkeypatch, costs):
    """Let the dev scenarios cost this, one look after the other."""
    real, left = hdpo.total_cost, iter(costs)

    def scripted(simulator, act, state, periods, **options):
        if torch.is_grad_enabled():
            return real(simulator, act, state, periods, **options)
        return torch.full((3,), next(left) * (periods - options["ignored"]))

    monkeypatch.setattr(hdpo, "total_cost", scripted)


# -- learning ----------------------------------------------------------------------------------------


def test_base_stock_reaches_the_level_and_cost_of_the_newsvendor():
    """N(5, 1.6) at 0 or more, L=4, h=1, p=9: S* = 29.585 and 6.277 per period (25 + 3.578 z of .9)."""
    found = agent("base_stock", batch_size=128, iteration_steps=25, dev_every=20, dev_scenarios=128)
    found.learn(60, root=None, **QUIET)
    assert float(found.network_policy.levels.detach()) == pytest.approx(29.585, abs=0.35)
    figures = found.cost(scenarios=1024)
    assert figures.cost == pytest.approx(6.277, abs=4 * figures.standard_error)
    assert figures.standard_error < 0.1


def test_the_loss_counts_every_period_and_the_dev_cost_those_that_count():
    """Of a store that orders nothing: it has what has arrived, less k in every period."""
    found = agent(env_kwargs={"kind": "series"}, learning_rate=1e-9, iteration_steps=1, dev_every=1)
    with torch.no_grad():
        found.descent.policy.theta.fill_(-50.0)
    diary = Diary()
    found.learn(1, root=None, callbacks=[diary], **QUIET)
    periods, demand = torch.arange(12), torch.arange(1.0, 11.0)
    for name, start, ignored in (("train", found._fixed[1], 0), ("dev", found._dev.inventory, 6)):
        left = start[:, 0].cumsum(1)[:, periods.clamp(max=3)] - demand[:, None] * (periods + 1)
        cost = (left.relu() + 9.0 * (-left).relu())[:, ignored:].mean()
        assert diary.rows[0][1][f"{name}/cost"] == pytest.approx(float(cost), rel=1e-5)


def test_the_dev_cost_is_that_of_cost_on_the_dev_split():
    found = agent("base_stock", env_kwargs={"kind": "poisson"}).learn(4, root=None, **QUIET)
    assert found.cost("dev", scenarios=16).cost == pytest.approx(found.best_cost, rel=1e-5)


def test_orders_are_whole_units_where_demand_is():
    found = agent("base_stock", env_kwargs={"kind": "poisson"})
    obs = np.float32([[1.0, 2.0, 3.0, 4.0], [9.0, 9.0, 9.0, 9.0]])
    order = found.network_policy.levels.detach().numpy() - obs.sum(1, keepdims=True)
    assert np.array_equal(found.predict(obs)[0], np.maximum(np.round(order), 0.0))
    plain = agent("base_stock")
    with torch.no_grad():
        plain.network_policy.theta.add_(0.3)
    assert plain.predict(obs[0])[0] == pytest.approx(25.3 - 10.0, abs=1e-4)


def test_it_evaluates_by_episodes_and_only_its_best_weights_act():
    found = agent(eval_every=4, eval_episodes=1).learn(8, root=None, **QUIET)
    result = found.evaluate(3)
    assert result.lengths.tolist() == [12, 12, 12] and (result.returns < 0).all()
    with torch.no_grad():
        found.descent.policy.theta.fill_(100.0)
    assert found.evaluate(3).returns.tolist() == result.returns.tolist()


# -- what is kept ------------------------------------------------------------------------------------


def test_patience_ends_training_and_the_best_weights_act(tmp_path, monkeypatch):
    script(monkeypatch, [5.0, 4.0, 4.5, 4.25, 1.0])
    diary = Diary()
    found = agent(patience=4).learn(100, run_dir=tmp_path, callbacks=[diary], **QUIET)
    assert found.steps == 8 and found.best_cost == 4.0
    assert len(set(diary.weights.values())) == 4
    assert float(found.network_policy.theta.detach()) == diary.weights[4]
    assert [round(m["dev/best"], 3) for _, m in diary.rows] == [5.0, 4.0, 4.0, 4.0]
    for name in ("best", "last"):
        loaded = ctrlrl.load(tmp_path, name)
        assert loaded.predict(np.zeros(4))[0] == found.predict(np.zeros(4))[0]
    assert loaded.resume(tmp_path, **QUIET).steps == 8
    assert ctrlrl.load(tmp_path, "best").steps == 4


def test_improving_in_time_goes_on(monkeypatch):
    script(monkeypatch, [5.0, 5.5, 4.0, 4.5, 3.0, 9.0, 9.0])
    assert agent(patience=4).learn(100, root=None, **QUIET).steps == 14


def test_restarts_share_the_updates_begin_afresh_and_the_best_of_all_acts(monkeypatch):
    script(monkeypatch, [5.0, 4.0, 3.0, 3.5, 6.0, 3.1])
    diary = Diary()
    found = agent(restarts=3, schedule="cosine", learning_rate=0.1).learn(12, root=None, callbacks=[diary], **QUIET)
    assert [m["train/restart"] for _, m in diary.rows] == [0, 0, 1, 1, 2, 2]
    # each training's rate falls by itself; logged is that of the iteration's last update, the 2nd and 4th of 4
    wanted = [0.1 * 0.5 * (1 + math.cos(math.pi * k / 4)) for k in (1, 3)] * 3
    assert [m["train/learning_rate"] for _, m in diary.rows] == pytest.approx(wanted)
    assert found.best_cost == 3.0 and float(found.network_policy.theta.detach()) == diary.weights[6]


def test_every_training_begins_from_weights_of_its_own():
    diary = Diary()
    agent(restarts=3, learning_rate=0.1, iteration_steps=1).learn(6, root=None, callbacks=[diary], **QUIET)
    for restart, step in enumerate((1, 3, 5)):
        torch.manual_seed(derive(0, "network", restart))
        # Adam's first step is the rate
        assert abs(diary.weights[step] - 5.0 - float(torch.randn(1))) == pytest.approx(0.1, rel=1e-3)


def test_what_an_ended_training_leaves_goes_to_the_next(monkeypatch):
    script(monkeypatch, itertools.chain([5.0, 6.0, 6.0], itertools.repeat(5.5)))
    diary = Diary()
    agent(restarts=2, patience=4, iteration_steps=1).learn(20, root=None, callbacks=[diary], **QUIET)
    assert [step for step, m in diary.rows if m["train/restart"] == 0] == [1, 2, 3, 4, 5, 6]
    # 14 are left to the second, which finds nothing lower than its first look, at 8: its own, not the other's
    assert diary.rows[-1][0] == 12 and diary.rows[6][1]["train/learning_rate"] == pytest.approx(0.05)


def test_learning_again_goes_on_from_the_latest_weights():
    found, twice = agent(restarts=2), Diary()
    found.learn(8, root=None, **QUIET)
    latest = float(found.descent.policy.theta.detach())
    found.learn(4, root=None, callbacks=[twice], **QUIET)
    assert found.steps == 12 and {m["train/restart"] for _, m in twice.rows} == {1}
    assert abs(twice.weights[10] - latest) < 0.11  # two steps of Adam at a rate of .05


def test_learning_again_has_patience_anew(monkeypatch):
    script(monkeypatch, itertools.chain([5.0], itertools.repeat(6.0)))
    found = agent(patience=4).learn(20, root=None, **QUIET)
    assert found.steps == 6
    assert found.learn(20, root=None, **QUIET).steps == 10 and found.best_cost == 5.0


def test_what_is_fitted_beforehand_is_fitted_once_and_stays(tmp_path):
    hdpo_parts.Forecasting.calls = 0
    found = agent("hdpo_parts:Forecasting", restarts=2).learn(8, run_dir=tmp_path, **QUIET)
    found.cost(scenarios=4)
    for policy in (found.network_policy, found.descent.policy):
        assert policy.extra == 7.0
    loaded = ctrlrl.load(tmp_path)
    loaded.learn(2, root=None, **QUIET)
    assert hdpo_parts.Forecasting.calls == 1 and loaded.network_policy.extra == 7.0


# -- resuming ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        {"restarts": 2},
        {"restarts": 3, "scenarios": 40, "patience": 6, "max_grad_norm": None},
        {"env_kwargs": {"kind": "series"}, "batch_size": 4, "schedule": "constant"},
    ],
    ids=["fresh demand", "a fixed set, early stopping", "recorded series"],
)
def test_a_killed_and_resumed_run_equals_an_uninterrupted_one(settings, tmp_path):
    settings = {"iteration_steps": 1, "checkpoint_every": 1, "dev_every": 3, **settings}
    whole, parts, resumed = Diary(), Diary(fail_at=26), Diary()
    agent(**settings).learn(34, run_dir=tmp_path / "whole", callbacks=[whole], **QUIET)
    with pytest.raises(OSError, match="power"):
        agent(**settings).learn(34, run_dir=tmp_path / "parts", callbacks=[parts], **QUIET)
    again = ctrlrl.load(tmp_path / "parts")
    assert again.steps == 20
    again.resume(tmp_path / "parts", callbacks=[resumed], **QUIET)
    assert parts.rows[:20] + resumed.rows == whole.rows and len(whole.rows) > 26
    for name in ("last", "best"):
        (one, counters), (other, counters_too) = (
            checkpoint.read(tmp_path / run / "checkpoints" / f"{name}.safetensors") for run in ("whole", "parts")
        )
        assert counters == counters_too and one.keys() == other.keys()
        assert all(torch.equal(one[k], other[k]) for k in one)
    assert any(k.startswith("descent/moments/") for k in one)


def test_ctrl_c_saves_and_resuming_ends_as_if_it_had_not_been(tmp_path, monkeypatch):
    settings = {"iteration_steps": 3, "checkpoint_every": 1}
    straight = agent(**settings).learn(40, root=None, **QUIET)
    update, count = hdpo.HDPO._update, itertools.count(1)

    def pressed(self, number):
        if next(count) == 35:
            self.interrupted["asked"] = True
        return update(self, number)

    monkeypatch.setattr(hdpo.HDPO, "_update", pressed)
    with pytest.raises(KeyboardInterrupt):
        agent(**settings).learn(40, run_dir=tmp_path, **QUIET)
    assert ctrlrl.load(tmp_path, "interrupted").steps == 35 and ctrlrl.load(tmp_path).steps == 30
    monkeypatch.setattr(hdpo.HDPO, "_update", update)
    found = ctrlrl.load(tmp_path).resume(tmp_path, **QUIET)
    assert found.steps == 40 and torch.equal(found.descent.policy.theta, straight.descent.policy.theta)
    assert torch.equal(found.network_policy.theta, straight.network_policy.theta)


# -- scenarios ---------------------------------------------------------------------------------------


def test_each_scenario_of_a_fixed_set_is_seen_once_in_an_epoch():
    found = agent(env_kwargs={"kind": "series"}, batch_size=5).learn(1, root=None, **QUIET)

    def products(step):
        found.steps = step
        return found._batch().drawn.demand[:, 0, 0].tolist()

    first, second = (sorted(products(k) + products(k + 1)) for k in (0, 2))
    assert first == second == [float(k) for k in range(1, 11)]
    assert products(0) == products(0) != products(2)
    # the stock at the start belongs to the scenario
    stock = {}
    for step in range(6):
        found.steps = step
        state = found._batch()
        for row, demand in enumerate(state.drawn.demand[:, 0, 0].tolist()):
            assert torch.equal(stock.setdefault(demand, state.inventory[row]), state.inventory[row])
    assert state.drawn.time.shape == (12, 1) and state.drawn.past.shape == (5, 3, 1)


def test_a_number_of_recorded_scenarios_takes_that_many_different_ones():
    found = agent(env_kwargs={"kind": "series"}, scenarios=4).learn(1, root=None, **QUIET)
    chosen = found._batch().drawn.demand[:, 0, 0].tolist()
    assert len(set(chosen)) == 4
    other = agent(env_kwargs={"kind": "series"}, scenarios=4, seed=1).learn(1, root=None, **QUIET)
    assert other._batch().drawn.demand[:, 0, 0].tolist() != chosen


def test_demand_is_fresh_at_every_update_and_the_same_for_the_same_one():
    found = agent().learn(1, root=None, **QUIET)
    demands = []
    for found.steps in (3, 4, 3):
        demands.append(found._batch().drawn.demand)
    assert torch.equal(demands[0], demands[2]) and not torch.equal(demands[0], demands[1])
    assert demands[0].shape == (16, 12, 1)


# -- what is refused ---------------------------------------------------------------------------------


def test_what_has_nothing_to_train_is_refused_before_anything_is_written(tmp_path):
    found = agent("hdpo_parts:Fixed")
    with pytest.raises(ConfigError, match=r"nothing to train.*agent.cost\(\).*base_stock"):
        found.learn(10, root=tmp_path, **QUIET)
    assert list(tmp_path.iterdir()) == []


def test_an_oracle_costs_what_it_must_but_cannot_act():
    """Its orders cancel demand from period 4 on; the stock at the start less that of the periods before stays."""
    found = agent("hdpo_parts:Prophet", env_kwargs={"kind": "series"})
    left = begin(found.simulator, "test", None, 0).inventory.sum((1, 2)) - 4.0 * torch.arange(1.0, 11.0)
    assert found.cost().cost == pytest.approx(float((left.relu() + 9.0 * (-left).relu()).mean()), rel=1e-5)
    with pytest.raises(ValueError, match="no observation holds"):
        found.predict(np.zeros(4, np.float32))


def test_an_environment_without_a_simulator_is_refused():
    with pytest.raises(TypeError, match=r"DifferentiableSimulator.*Pendulum-v1 has none.*OneStoreLost"):
        ctrlrl.HDPO("Pendulum-v1")


def test_a_simulator_that_lacks_something_or_is_wrapped_is_refused():
    env = gym.make(ID)
    env.unwrapped.simulator = object()
    with pytest.raises(TypeError, match="a object without network, observe"):
        ctrlrl.HDPO(env)
    with pytest.raises(TypeError, match="wrappers must leave them"):
        ctrlrl.HDPO(gym.wrappers.TransformObservation(gym.make(ID), lambda o: o[:2], gym.spaces.Box(-1, 1, (2,))))


@pytest.mark.parametrize(
    "wrap",
    [
        lambda env: gym.wrappers.RescaleAction(env, -1.0, 1.0),
        gym.wrappers.ClipAction,
        gym.wrappers.NormalizeObservation,
        lambda env: gym.wrappers.TransformObservation(env, lambda obs: -obs, env.observation_space),
        lambda env: gym.wrappers.RecordEpisodeStatistics(gym.wrappers.NormalizeObservation(env)),
    ],
    ids=["rescaled actions", "clipped actions", "normalised observations", "other observations", "further inside"],
)
def test_wrappers_that_change_what_is_sent_or_seen_are_refused(wrap):
    """They keep shapes, and what hdpo would order is not what the environment would be told."""
    with pytest.raises(TypeError, match=r"changes actions or observations.*leave it out"):
        ctrlrl.HDPO(wrap(gym.make("ctrlrl/OneStoreLost-v0")))


def test_actions_that_are_no_amounts_are_refused_and_harmless_wrappers_are_not():
    env = gym.wrappers.RecordEpisodeStatistics(gym.make(ID))
    assert ctrlrl.HDPO(env, policy=RANDOM).simulator is env.unwrapped.simulator
    env.unwrapped.scale_actions = True
    with pytest.raises(TypeError, match="leave scale_actions out"):
        ctrlrl.HDPO(env, policy=RANDOM)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"policy": "base_stok"}, "base_stock"),
        ({"n_envs": 4}, "n_envs"),
        ({"batch_size": 0}, "batch_size=0 must be positive"),
        ({"restarts": 0}, "restarts=0 must be above 0"),
        ({"learning_rate": -1.0}, "learning_rate=-1.0 must be above 0"),
        ({"schedule": "linear"}, "'constant', 'cosine'"),
        ({"cudagraphs": True}, "CUDA graph"),
        ({"preset": "papr"}, "no preset"),
    ],
)
def test_wrong_settings_are_named(settings, message):
    with pytest.raises((ConfigError, KeyError), match=message):
        ctrlrl.make("hdpo", ID, **settings)


def test_a_gradient_that_is_not_finite_ends_training_and_spoils_nothing(monkeypatch):
    found = agent(iteration_steps=10)
    real, count = hdpo.total_cost, itertools.count()
    # two looks at the dev scenarios among them: the seventh is the fifth update
    spoilt = {6: math.nan}
    monkeypatch.setattr(hdpo, "total_cost", lambda *a, **k: real(*a, **k) * spoilt.get(next(count), 1.0))
    with pytest.raises(NonFiniteUpdateError, match="non-finite cost at optimiser step 4"):
        found.learn(10, root=None, **QUIET)
    assert found.descent.policy.theta.isfinite().all() and found.steps == 4


# -- its place in the library ------------------------------------------------------------------------


def test_it_is_listed_and_made_by_name():
    method = api.methods()["hdpo"]
    assert method.family == "inventory" and "arXiv:2306.11246" in method.paper and method.presets == ("paper", "real")
    assert ctrlrl.HDPO is method.agent is api.get_method("hdpo") and "HDPO" in dir(ctrlrl)
    made = ctrlrl.make("hdpo", ID, policy="base_stock", preset="paper", restarts=2)
    assert made.own.learning_rate == 0.5 and made.own.restarts == 2 and made.config.scenarios == 32768
    assert made.config.batch_size == 8192 and made.own.patience == 2000 and made.own.schedule == "constant"


def test_the_settings_for_recorded_sales():
    config, own = hdpo.HDPO.blueprint("real")
    assert (config.batch_size, config.network.hidden, config.network.graph_width) == (72, (64, 64), 64)
    assert config.network.order_bound == 10.0 and own.learning_rate is own.patience is None


@pytest.mark.parametrize(
    ("objective", "line"),
    [("cost", "Lowest cost on the dev scenarios: -5.2500"), ("profit", "Highest profit on the dev scenarios: 5.2500")],
)
def test_a_run_ends_with_its_lowest_cost_or_its_highest_profit(objective, line, tmp_path, capsys):
    network = types.SimpleNamespace(objective=objective)
    cli._finish(
        types.SimpleNamespace(run_dir=tmp_path, best_cost=-5.25, simulator=types.SimpleNamespace(network=network))
    )
    assert line in capsys.readouterr().out


def test_the_paper_waits_for_500_epochs():
    config, own = hdpo.HDPO.blueprint("paper")
    assert own.patience == 500 * config.scenarios / config.batch_size
    assert config.dev_every == 10 * config.scenarios / config.batch_size


def test_every_setting_has_one_meaning():
    groups = (cli.Train, cli.TrainSimulated, HDPOConfig, InventoryPolicyConfig, HDPOSettings)
    names = [[f.name for f in dataclasses.fields(group)] for group in groups]
    own = [*itertools.chain(*names[2:])]
    assert len(own) == len(set(own)) and not set(own) & {*names[0], *names[1]}
    for group in groups:
        assert group.__dataclass_params__.frozen


def test_the_command_line_trains_shows_settings_and_resumes(tmp_path, capsys, monkeypatch):
    words = ["train", "hdpo", "--env", ID, "--policy", "base_stock", "--steps", "4", "--root", str(tmp_path), "--quiet"]
    small = ["--batch-size", "8", "--dev-scenarios", "8", "--dev-every", "2", "--hidden", "8", "8"]
    assert cli.main([*words, *small]) == 0
    assert "Lowest cost on the dev scenarios" in capsys.readouterr().out
    (run,) = (p.parent for p in tmp_path.rglob("config.json"))
    config = json.loads((run / "config.json").read_text())
    assert config["hdpo"]["policy"] == "base_stock" and config["config"]["network"]["hidden"] == [8, 8]
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert {"train/cost", "train/grad_norm", "dev/cost", "dev/best"} <= metrics[0].keys()
    assert cli.main(["train", "--resume", str(run)]) == 0 and "is finished" in capsys.readouterr().out
    monkeypatch.setattr(inventory_figures, "picture", lambda *_: b"png")
    assert cli.main(["eval", str(run), "--episodes", "2", "--scenarios", "2"]) == 0
    assert "2 deterministic episodes of the train split" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        cli.main(["train", "hdpo", "--help"])
    shown = capsys.readouterr().out
    flags = {f"--{k.replace('_', '-')}" for k in (*flat(HDPOConfig()), *flat(HDPOSettings()))}
    assert all(flag in shown for flag in flags) and "--n-envs" not in shown


@pytest.mark.slow
@pytest.mark.skipif(not compiler_available(), reason="torch.compile needs a C++ compiler")
def test_a_compiled_policy_learns_the_same():
    eager, fast = (agent("vanilla", compile=compile).learn(6, root=None, **QUIET) for compile in (False, True))
    for one, other in zip(eager.descent.policy.parameters(), fast.descent.policy.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)
