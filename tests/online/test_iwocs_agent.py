"""The phases of IWOCS, its searches, and how it ends."""

import copy
import itertools
import sys
import types

import numpy as np
import pytest
import torch
from helpers.agents import NOISY, assert_same_tensors
from test_iwocs import LENGTH, STEPS, Ledge, Watch, make, move, never_repeats, quiet

import ctrlrl
from ctrlrl import api
from ctrlrl.engine import worst_case
from ctrlrl.engine.config import ConfigError
from ctrlrl.engine.seeding import derive
from ctrlrl.online.iwocs import Model
from ctrlrl.online.iwocs_agent import Outcome

# -- phases ---------------------------------------------------------------------------------------


class Scripted(torch.nn.Module):
    """An actor that always does the same; with ``value`` and ``error`` a whole model of which it is the actor."""

    def __init__(self, action, value=0.0, error=0.0):
        super().__init__()
        self.register_buffer("numbers", torch.tensor([action, value, error]))
        self.action, self.mean, self.error = action, value, error

    @property
    def actor(self):
        return self

    def mode(self, obs):
        return torch.full((obs.shape[0], 1), self.action)

    def value(self, obs, action):
        return torch.full((2, obs.shape[0]), self.mean)

    def predictor(self, obs, action, following):
        return torch.full((2, obs.shape[0]), self.error)


def constant_worst(agent, actions):
    """The worst mean return over the grid of the policy that does ``actions[0]`` first and then ``actions[1]``."""
    found = []
    for wind, grip in itertools.product((0.0, 0.5, 1.0), (0.5, 0.75, 1.0)):
        total = 0.0
        for k in range(2):
            env = Ledge()
            env.reset(seed=derive(agent.seed, "search", k))
            x = env.x
            for t in range(LENGTH):
                x, reward = move(x, 2.0 * actions[min(t, 1)], {"wind": wind, "grip": grip})
                total += reward / 2
                if reward < -1.0:
                    break
        found.append((total, {"wind": wind, "grip": grip}))
    return min(found, key=lambda item: item[0])


@pytest.mark.parametrize(
    ("models", "earlier", "actions", "threshold"),
    [
        # the first model expects less than the second, and acts; the second alone would fall
        ([(-0.6, 1.0, 0.0), (0.9, 2.0, 0.0)], [1.0], (-0.6, -0.6), 0.5),
        ([(0.9, 2.0, 0.0), (-0.6, 1.0, 0.0)], [1.0], (-0.6, -0.6), 0.5),
        # the first explains no step with the threshold that it was given earlier, and acts only first
        ([(-0.9, 1.0, 1.5), (-0.6, 2.0, 0.0)], [1.0], (-0.9, -0.6), 0.5),
        ([(-0.9, 1.0, 1.5), (-0.6, 2.0, 0.0)], [2.0], (-0.9, -0.9), 0.5),
        # the larger threshold makes the last model valid, which is better than the default policy; or worse
        ([(-0.5, 1.0, 1.5)], [], (-0.5, -0.5), 2.0),
        ([(0.9, 1.0, 1.5)], [], (0.9, -0.7), 0.5),
    ],
)
def test_a_search_plays_all_models_and_keeps_the_better_threshold(models, earlier, actions, threshold):
    agent = make()
    made = [Scripted(*numbers) for numbers in models]
    agent.rows = [{"worst": {"wind": 0.0, "grip": 1.0}, "threshold": rho} for rho in [None, *earlier]]
    outcome = agent._search(Scripted(-0.7), made)
    worst, params = constant_worst(agent, actions)
    assert outcome.found.value == pytest.approx(worst, abs=1e-4) and outcome.threshold == threshold
    assert agent.uncertainty.from_unit(outcome.found.point) == [params]


@pytest.fixture(scope="module")
def watched():
    """A run with an update per step, and what was seen after each of its iterations."""
    cls, seen = api.get_method("iwocs"), []
    original = cls._begin

    def begin(self):
        before = self.learner
        original(self)
        fresh = self._networks(derive(self.seed, "network", self.phase))
        assert self.learner is not before and self.learner.updates == 0
        assert self.learner.modules["actor"] is self.policy is self.explorer.policy is self.collector.policy.policy
        for name, module in {"actor": fresh.actor, **fresh.trained}.items():
            assert_same_tensors(dict(module.state_dict()), dict(self.learner.modules[name].state_dict()))
        for name, source in fresh.copies.items():
            assert_same_tensors(*(dict(self.learner.modules[k].state_dict()) for k in (name, source)))
        assert all((v == 0).all() for k, v in self.learner.tensors().items() if k.endswith(("/m", "/v", "/clock")))
        assert self.replay is None and self.segments == [] and self.debt == 0.0

    def note(agent, metrics):
        predictor, replay = agent.learner.modules["predictor"], agent.replay
        frozen = [*([agent.default] if agent.default else []), *agent.models]
        seen.append(types.SimpleNamespace(
            metrics=dict(metrics), phase=agent.phase, steps=agent.steps, updates=agent.learner.updates,
            digests=[worst_case.digest([module]) for module in frozen], rows=replay and rows_of(agent),
            scaling=(predictor.shift.numpy().copy(), predictor.scale.numpy().copy()),
        ))  # fmt: skip

    def forget(self):
        if self.phase > 1:  # a phase on a model has just ended
            data.append((self.rows[-1]["model"], rows_of(self)))
        forgets(self)

    forgets, data = cls._drop_replay, []
    with pytest.MonkeyPatch.context() as patch:
        never_repeats(patch)
        patch.setattr(cls, "_begin", begin)
        patch.setattr(cls, "_drop_replay", forget)
        agent = quiet(make(replay_size=1000, replay_ratio=1.0, learning_starts=10), callbacks=[Watch(note)])
    return agent, seen, data


def rows_of(agent):
    """The transitions in the replay as arrays."""
    columns = agent.replay.columns
    names = ("obs", "action", "next_obs", "reward", "terminated")
    return {k: columns[k][: len(agent.replay)].numpy().copy() for k in names}


def test_searches_are_counted_apart_and_logged(watched):
    agent, seen, _ = watched
    assert agent.steps == STEPS == seen[-1].steps
    logged = [{k: v for k, v in one.metrics.items() if k.startswith("search/")} for one in seen]
    assert [one.steps for one, found in zip(seen, logged, strict=True) if found] == [40, 64, 88, 112]
    logged = [found for found in logged if found]
    assert [row["steps"] for row in agent.iterations_table] == [40, 64, 88, 112]
    for found, row in zip(logged, agent.iterations_table, strict=True):
        assert found["search/worst"] == row["worst_case"] and found.get("search/threshold") == row["threshold"]
        assert {k: found[f"search/{k}"] for k in ("wind", "grip")} == row["worst"]
    # 9 points of the grid; then 2 thresholds, and the models trained on
    assert [found["search/episodes"] for found in logged] == [18, 18 + 40, 58 + 44, 102 + 48]
    counted = [found["search/steps"] for found in logged]
    assert counted == sorted(counted) and counted[-1] == agent.search_steps
    assert all(n <= LENGTH * found["search/episodes"] for n, found in zip(counted, logged, strict=True))
    table = agent.iterations_table
    table[0]["worst"]["wind"] = 99.0
    assert agent.iterations_table[0]["worst"]["wind"] != 99.0


def test_what_is_trained_begins_afresh_in_every_phase(watched):
    """The networks in the fixture; here the warm-up and the replay, which is given up with the phase."""
    found = [(one.phase, one.updates, 0 if one.rows is None else len(one.rows["reward"])) for one in watched[1]]
    assert found == [
        (0, 0, 8), (0, 6, 16), (0, 14, 24), (0, 22, 32), (1, 30, 0),
        (1, 0, 8), (1, 6, 16), (2, 14, 0), (2, 0, 8), (2, 6, 16), (3, 14, 0), (3, 0, 8), (3, 6, 16), (4, 14, 0),
    ]  # fmt: skip


def test_the_default_policy_is_trained_as_sac_without_the_rest(watched):
    found = [("train/critic_loss" in one.metrics, "train/value_loss" in one.metrics) for one in watched[1]]
    nothing, sac, whole = (False, False), (True, False), (True, True)
    assert found == [nothing, *[sac] * 4, *[nothing, whole, whole] * 3]


def test_frozen_policies_do_not_change_when_training_goes_on(watched):
    agent, seen, _ = watched
    for earlier, later in itertools.pairwise(seen):
        assert later.digests[: len(earlier.digests)] == earlier.digests
    assert len(set(seen[-1].digests)) == 4 and isinstance(agent.models[-1], Model)


def test_a_model_phase_trains_under_its_parameters_on_true_next_observations(watched):
    """Terminal observations included, which the next episode's first would replace."""
    agent, _, data = watched
    models = [row["worst"] for row in agent.rows[:3]]
    assert [params for params, _ in data] == models and models[1] != models[0]
    ends = 0
    for params, rows in data:
        assert len(rows["reward"]) == 24
        columns = (rows[k] for k in ("obs", "action", "next_obs", "reward"))
        for obs, action, following, reward in zip(*columns, strict=True):
            x, expected = move(obs[0], 2.0 * action[0], params)
            assert following == pytest.approx([x, obs[1] + 0.1], abs=1e-5)
            assert reward == pytest.approx(expected, abs=1e-5)
        ends += rows["terminated"].sum()
    assert ends > 0


def test_predictions_are_scaled_by_the_phases_own_observations(watched):
    checked = set()
    for one in watched[1]:
        if one.phase > 0 and one.rows is not None:
            np.testing.assert_allclose(one.scaling[0], one.rows["obs"].mean(0), atol=1e-5)
            np.testing.assert_allclose(one.scaling[1], 1 / one.rows["obs"].std(0), rtol=1e-4)
            checked.add(one.phase)
    assert checked == {1, 2, 3}
    raw = quiet(make(normalize_error=False))
    assert raw.models and all((m.predictor.scale == 1).all() and (m.predictor.shift == 0).all() for m in raw.models)


def test_phases_do_not_depend_on_where_checkpoints_fall(monkeypatch):
    never_repeats(monkeypatch)
    for every in (1, 10_000):
        agent = quiet(make(checkpoint_every=every, iteration_steps=4))
        assert (agent.iteration == 28) and [row["steps"] for row in agent.rows] == [40, 64, 88, 112]


def test_phases_end_on_iterations_and_their_rounding_does_not_add_up(monkeypatch):
    never_repeats(monkeypatch)
    agent = quiet(make(default_steps=None, model_steps=None, learning_starts=2), 103)  # 41, 20, 20, 20 steps
    assert [row["steps"] for row in agent.rows] == [48, 64, 88, 104]


def test_two_seeds_and_two_phases_have_other_networks():
    a, b = make(seed=0), make(seed=1)
    weights = [one._networks(derive(one.seed, "network", k)).actor.mean.weight for one in (a, b) for k in (1, 2)]
    assert len({tuple(w.flatten().tolist()) for w in weights}) == 4


def test_the_default_policy_meets_new_parameters_in_every_episode():
    agent = make(n_envs=2, default_steps=400, model_steps=24, learning_starts=390, replay_size=1000)
    set_params, sets = agent.collector.set_params, []
    agent.collector.set_params = lambda params: (sets.append(copy.deepcopy(params)), set_params(params))[1]
    seen = []

    def check(self, metrics):
        rows = rows_of(self) if self.replay is not None else None
        seen.append(rows)

    quiet(agent, 400, callbacks=[Watch(check)])
    drawn = [one for params in sets if isinstance(params, list) for one in params]
    wind = np.array(sorted({p["wind"] for p in drawn}))
    grip = np.array(sorted({p["grip"] for p in drawn}))
    assert len(wind) > 50 and wind.min() < 0.1 and wind.max() > 0.9 and abs(wind.mean() - 0.5) < 0.12
    assert grip.min() < 0.55 and grip.max() > 0.95 and abs(grip.mean() - 0.75) < 0.06
    # one place at a time, unless at a border
    changes = [sum(a != b for a, b in zip(x, y, strict=True)) for x, y in itertools.pairwise(sets)]
    assert changes.count(1) > len(changes) / 2
    # within an episode the parameters are the same: three unknowns, solved from steps of one place
    rows = seen[-2]
    place = {k: v[0::2] for k, v in rows.items()}
    winds = []
    for i in range(len(place["reward"]) - 1):
        same = place["next_obs"][i] == pytest.approx(place["obs"][i + 1], abs=1e-6)
        a = np.array([[place["action"][j, 0], 1.0] for j in (i, i + 1)])
        b = [place["next_obs"][j, 0] - 0.3 * place["obs"][j, 0] for j in (i, i + 1)]
        if same and abs(np.linalg.det(a)) > 0.2:
            grip_, wind_ = np.linalg.solve(a, b)
            winds.append((grip_, wind_))
    assert len(winds) > 30
    assert all(0.499 < g < 1.001 and -0.001 < w < 1.001 for g, w in winds)
    assert all(abs(g - 1.0) + abs(w) > 1e-3 for g, w in winds)  # never the nominal ones, not even to begin with


# -- how it ends ----------------------------------------------------------------------------------


def scripted(monkeypatch, script):
    """Searches that find what ``script`` says: (unit point, worst case, value at the known points)."""
    left = list(script)

    def search(self, default, models):
        point, value, known = left.pop(0)
        found = worst_case.Found(np.array(point), value, known, 1, 1)
        return Outcome(found, 0.5 if models else None, 1, 1)

    monkeypatch.setattr(api.get_method("iwocs"), "_search", search)


FIRST = ((1, 1), 0.0, np.inf)
NEAR = {"repeat_tolerance": 0.01}
GAP = {"gap_tolerance": 1.0}


@pytest.mark.parametrize(
    ("script", "settings", "reason", "steps"),
    [
        ([FIRST, ((0, 0), 1, 5), ((0.995, 1), 1, 5)], NEAR, "repeated", 88),
        ([FIRST, ((1, 0.98), 1, 5), ((0.5, 0), 1, 5), ((0.7, 0), 1, 5)], NEAR, "max_models", 112),
        ([FIRST, ((0, 0), 1, 1.9)], GAP, "gap", 64),
        ([FIRST, ((0, 0), 1, 2.1), ((0.5, 0), 1, 2.1)], GAP | {"max_models": 2}, "max_models", 88),
        ([FIRST, ((0, 0), 1, 5), ((0.5, 0), 1, 5)], {"max_models": 9, "model_steps": 40}, "steps", 112),
    ],
)
def test_training_ends_for_the_reason_given(monkeypatch, tmp_path, script, settings, reason, steps):
    scripted(monkeypatch, script)
    agent = quiet(make(**settings), run_dir=tmp_path / "run")
    assert [row["stopped"] for row in agent.rows] == [None] * (len(script) - 1) + [reason]
    assert agent.steps == steps
    # such a run is over: resuming it does nothing
    resumed = api.load(tmp_path / "run")
    assert resumed.resume(tmp_path / "run", progress=False).steps == steps
    assert resumed.rows == agent.rows


def test_learning_on_adds_models(monkeypatch):
    never_repeats(monkeypatch)
    agent = quiet(make())
    quiet(agent, 48)
    assert [row["steps"] for row in agent.rows] == [40, 64, 88, 112, 136, 160]
    assert agent.rows[4]["model"] == agent.rows[3]["worst"]


def test_a_stopped_phase_goes_on_where_it_was():
    class Stop:
        def on_update(self, agent, step, metrics):
            return step != 16

    agent = make(default_steps=40)
    quiet(agent, callbacks=[Stop()])
    assert agent.steps == 16 and agent.rows == []
    quiet(agent)
    assert agent.rows[0]["steps"] == 40


@pytest.mark.parametrize(
    ("settings", "steps", "begun", "expected"),
    [
        ({}, 4_000_000, False, (1_600_000, 800_000)),
        ({"max_models": 4}, 600, False, (200, 100)),
        ({"default_steps": 100}, 400, False, (100, 100)),
        ({"model_steps": 100}, 400, False, (100, 100)),
        ({"default_steps": 70, "model_steps": 30}, 400, False, (70, 30)),
        ({}, 300, True, (100, 100)),
        ({"model_steps": 50}, 300, True, (50, 50)),
    ],
)
def test_the_steps_are_shared_out_as_in_the_paper(settings, steps, begun, expected):
    own = type(make().algorithm)(**settings)
    assert own.plan(steps, begun, 10) == expected


def test_phases_no_longer_than_their_warm_up_are_refused():
    with pytest.raises(ConfigError, match=r"model_steps would be 6,000 of 30,000 steps.*learning_starts=10,000"):
        api.make("iwocs", "test/Ledge-v0").learn(30_000, root=None)
    with pytest.raises(ConfigError, match="default_steps would be 8 of 112 steps"):
        quiet(make(default_steps=8))


# -- what is refused ------------------------------------------------------------------------------


def test_an_environment_without_parameters_is_refused_with_an_example():
    with pytest.raises(ValueError, match=r"parameter_space, nominal, set_params.*ctrlrl/Robust\w+-v0"):
        api.make("iwocs", NOISY)


def test_a_live_environment_that_cannot_be_built_again_is_refused():
    with pytest.raises(ValueError, match="pass its id or an EnvSpec"):
        ctrlrl.IWOCS(Ledge())


@pytest.mark.slow
def test_compiled_updates_are_those_of_eager(monkeypatch):
    """Also where the scaling of the predictions moves between updates, as it does outside of the compiled function."""
    never_repeats(monkeypatch)
    eager, compiled = (quiet(make(compile=compile, learning_rate=1e-3), 64) for compile in (False, True))
    assert eager.learner.updates > 0 and eager.phase == 2
    for name, value in eager.tensors().items():
        torch.testing.assert_close(compiled.tensors()[name], value, rtol=1e-3, atol=1e-4, msg=name)


def test_without_cma_training_does_not_even_begin(monkeypatch):
    monkeypatch.setitem(sys.modules, "cma", None)
    agent = make(search="cma")
    with pytest.raises(ImportError, match=r"pip install 'ctrlrl\[robust\]'"):
        quiet(agent)
    assert agent.steps == 0
    assert quiet(make(search="grid"), 40).steps == 40


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"thresholds": ()}, "one or more numbers above 0"),
        ({"thresholds": (0.1, 0.0)}, "one or more numbers above 0"),
        ({"max_models": 0}, "max_models=0 must be at least 1"),
        ({"population": 2}, "population=2 must be at least 3"),
        ({"grid_points": 1}, "grid_points=1 must be at least 2"),
        ({"search": "random"}, "'random' is unknown"),
        ({"repeat_tolerance": -1.0}, "must not be negative"),
        ({"entropy_temp": -1.0}, "must not be negative"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        make(**settings)
