"""Evaluation over an uncertainty set: known returns cell by cell, the same episodes everywhere, nothing disturbed."""

import json

import ctrlrl_envs  # noqa: F401 - registers the pendulum
import gymnasium as gym
import numpy as np
import pytest
from helpers.agents import make, quiet, same

from ctrlrl.engine import robust, runfolder
from ctrlrl.engine.robust import RobustEvaluation, evaluate_grid, target
from ctrlrl.types import EnvSpec


class Analytic(gym.Env):
    """Pays 10 a - (b - 1)^2 in all, ``noise`` times a number drawn at the reset, and ``acting`` times each action.

    Episodes have 1 + 2 b steps. What is paid is fixed at the reset, and setting parameters in an episode is an error.
    """

    observation_space = gym.spaces.Box(-np.inf, np.inf, (2,), np.float32)
    action_space = gym.spaces.Box(-1.0, 1.0, (1,), np.float32)
    parameter_space = gym.spaces.Dict(
        [("b", gym.spaces.Box(0.0, 3.0, (), np.float64)), ("a", gym.spaces.Box(1.0, 2.0, (), np.float64))]
    )

    def __init__(self, noise=0.0, acting=0.0):
        self.noise, self.acting, self.running = noise, acting, False
        self.nominal = {"b": 5.0, "a": 1.5}
        self.params = dict(self.nominal)

    def set_params(self, params):
        if self.running:
            raise RuntimeError("parameters were set in the midst of an episode")
        self.params |= params

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.pays = 10 * self.params["a"] - (self.params["b"] - 1) ** 2 + self.noise * self.np_random.normal()
        self.left, self.running = 1 + int(2 * self.params["b"]), True
        return self.obs(), {}

    def obs(self):
        return self.np_random.normal(size=2).astype(np.float32)

    def step(self, action):
        self.left -= 1
        self.running = self.left > 0
        reward = self.acting * float(action[0]) + (0.0 if self.running else self.pays)
        return self.obs(), reward, not self.running, False, {}


gym.register("grid/Analytic-v0", f"{__name__}:Analytic")
ENV = f"{__name__}:grid/Analytic-v0"
PENDULUM = "ctrlrl/RobustInvertedPendulum-v0"


@pytest.fixture(scope="module")
def agent():
    return make(ENV)


class Linear:
    """Just enough of an agent: balances the nominal pendulum, without a network that rounds in batches."""

    def __init__(self, spec):
        env = gym.make(spec.id, **spec.kwargs)
        self.observation_space, self.action_space = env.observation_space, env.action_space
        self.env_spec, self.seed, self.numbers = spec, 0, []
        env.close()

    def act(self, obs):
        return np.clip(obs @ np.array([1.0, 15.0, 1.5, 3.0]), -3, 3)[:, None].astype(np.float32)

    def session(self, noise=None):
        def act(obs, number):
            self.numbers.append(number)
            return self.act(obs)

        return act


# -- known answers --------------------------------------------------------------------------------


def test_every_cell_returns_what_its_parameters_say(agent):
    result = evaluate_grid(agent, points=4, episodes=2)
    b, a = np.array([0.0, 1.0, 2.0, 3.0]), 1 + np.arange(4) / 3
    assert result.names == ("b", "a") and result.axes[0].tolist() == b.tolist()
    assert result.axes[1] == pytest.approx(a)
    assert result.grid == pytest.approx(10 * a[None, :] - (b[:, None] - 1) ** 2)
    assert result.returns.shape == result.lengths.shape == (16, 2)
    assert (result.returns[:, 0] == result.returns[:, 1]).all()
    assert result.lengths.reshape(4, 4, 2)[:, 2, 1].tolist() == [1, 3, 5, 7]
    assert [p["b"] for p in result.params] == np.repeat(b, 4).tolist()


def test_worst_mean_spread_and_nominal(agent):
    result = evaluate_grid(agent, points=4, episodes=3)
    assert result.worst == pytest.approx(6.0) and result.worst_params == {"b": 3.0, "a": 1.0}
    assert result.mean == pytest.approx(13.5)
    # variances of 10 a and of (b - 1)^2 over the grid
    assert result.std == pytest.approx(np.sqrt(100 * 1.25 / 9 + 2.25))
    assert result.nominal == {"b": 5.0, "a": 1.5} and result.nominal_returns.tolist() == [-1.0] * 3
    assert result.nominal_mean == -1.0


def test_the_other_convention_leaves_out_the_upper_ends(agent):
    result = evaluate_grid(agent, points=4, convention="rrls")
    assert result.axes[0].tolist() == [0.0, 0.75, 1.5, 2.25] and result.axes[1].tolist() == [1.0, 1.25, 1.5, 1.75]
    assert result.worst_params == {"b": 2.25, "a": 1.0} and result.worst == pytest.approx(10 - 1.25**2)


def test_the_worst_cell_is_by_its_mean_and_not_by_its_worst_episode():
    returns = np.array([[1.0, 9.0], [3.0, 4.0], [6.0, 6.0]])
    axes = (np.array([0.0, 1.0, 2.0]),)
    found = RobustEvaluation(("x",), axes, returns, returns, np.arange(2), {"x": 9.0}, np.zeros(2))
    assert found.worst == 3.5 and found.worst_params == {"x": 1.0} and found.mean == pytest.approx(14.5 / 3)
    assert found.std == pytest.approx(np.std([5.0, 3.5, 6.0]))


# -- episodes -------------------------------------------------------------------------------------


def test_every_cell_has_the_same_draws_as_a_plain_evaluation(agent):
    noisy = make(ENV, env_kwargs={"noise": 1.0})
    result = evaluate_grid(noisy, points=3, episodes=4, seed=7)
    b, a = (np.array([p[k] for p in result.params]) for k in "ba")
    draws = result.returns - (10 * a - (b - 1) ** 2)[:, None]
    assert draws == pytest.approx(np.broadcast_to(draws[0], (9, 4))) and len(set(draws[0])) == 4
    plain = noisy.evaluate(4, seed=7)
    assert result.seeds.tolist() == plain.seeds.tolist() and result.nominal_returns == pytest.approx(plain.returns)
    other = evaluate_grid(noisy, points=3, episodes=4, seed=8)
    assert not set(other.seeds) & set(result.seeds)
    assert evaluate_grid(noisy, points=3).seeds[0] == noisy.evaluate(1).seeds[0]


def test_the_result_does_not_depend_on_how_many_run_side_by_side():
    agent = make(ENV, env_kwargs={"noise": 3.0, "acting": 1.0})
    reference = evaluate_grid(agent, points=4, episodes=3, width=1)
    assert len(np.unique(reference.returns)) == 48
    for width in (2, 7, 16, 51, 1000):
        result = evaluate_grid(agent, points=4, episodes=3, width=width)
        assert np.array_equal(result.lengths, reference.lengths)
        np.testing.assert_allclose(result.returns, reference.returns, atol=1e-5)
        np.testing.assert_allclose(result.nominal_returns, reference.nominal_returns, atol=1e-5)


@pytest.mark.parametrize("width", [1, 4, 40])
def test_the_grid_is_the_plain_loop_over_single_environments_to_the_last_bit(width):
    agent = Linear(EnvSpec(PENDULUM))
    result = evaluate_grid(agent, points=2, episodes=2, width=width)
    env = gym.make(PENDULUM)
    for cell, params in enumerate([*result.params, result.nominal]):
        for k, seed in enumerate(result.seeds):
            env.unwrapped.set_params(params)
            obs, _ = env.reset(seed=int(seed))
            total, ended = 0.0, False
            while not ended:
                obs, reward, terminated, truncated, _ = env.step(agent.act(obs[None])[0])
                total, ended = total + reward, terminated or truncated
            expected = result.nominal_returns[k] if cell == 4 else result.returns[cell, k]
            assert total == expected, (params, seed)
    env.close()
    assert result.nominal_mean > 200 > 50 > result.worst  # tuned for the nominal pendulum alone


@pytest.mark.parametrize("width", [3, 100])
def test_every_episode_has_a_number_of_its_own_and_stays_in_its_place(width):
    agent = Linear(EnvSpec(ENV))
    agent.act = lambda obs: np.zeros((len(obs), 1), np.float32)
    result = evaluate_grid(agent, points=3, episodes=2, width=width)
    steps = {}
    for numbers in agent.numbers:
        assert len(set(numbers)) == len(numbers)
    for place in np.array(agent.numbers).T:
        changes = np.flatnonzero(np.diff(place)) + 1
        for run in np.split(place, changes):
            assert run[0] not in steps
            steps[run[0]] = len(run)
    assert sorted(steps) == list(range(20))
    lengths = [*result.lengths.ravel(), 11, 11]  # the nominal episodes come last
    assert all(steps[k] >= n for k, n in enumerate(lengths))
    if width == 3:  # only the last ones wait for others
        assert [steps[k] for k in range(17)] == lengths[:17]


@pytest.mark.parametrize("kwargs", [{"randomize": True}, {"params": {"pole_mass": 31.0, "cart_mass": 1.0}}])
def test_the_environments_own_parameters_do_not_interfere(kwargs):
    plain, given = (evaluate_grid(Linear(EnvSpec(PENDULUM, k)), points=2, episodes=2) for k in ({}, kwargs))
    assert np.array_equal(plain.returns, given.returns) and np.array_equal(plain.nominal_returns, given.nominal_returns)


def test_sampled_actions_are_drawn_from_the_seed():
    agent = make(ENV, env_kwargs={"acting": 1.0})
    first, again = (evaluate_grid(agent, points=2, seed=3, deterministic=False).returns for _ in range(2))
    assert np.array_equal(first, again)
    assert not np.allclose(first, evaluate_grid(agent, points=2, seed=3).returns)


def test_nothing_of_the_agent_changes():
    seen = []

    class Evaluate:
        def on_update(self, agent, step, metrics):
            before = {k: v.clone() for k, v in agent.tensors().items()}
            seen.append(agent.evaluate_robust(points=2, deterministic=False))
            assert same(before, agent.tensors())

    plain, watched = quiet(make(ENV), 96), quiet(make(ENV), 96, callbacks=[Evaluate()])
    assert len(seen) == 3 and same(plain.tensors(), watched.tensors())


# -- where ----------------------------------------------------------------------------------------


def test_a_run_on_the_plain_task_is_evaluated_on_the_robust_one():
    agent = make("InvertedPendulum-v5")
    result = agent.evaluate_robust(points=2, episodes=3, seed=1, env=PENDULUM)
    assert result.names == ("pole_mass", "cart_mass") and result.grid.shape == (2, 2)
    assert result.nominal_returns == pytest.approx(agent.evaluate(3, seed=1).returns)
    one = agent.evaluate_robust(points=3, env=PENDULUM, env_kwargs={"uncertainty": "1d"}, convention="rrls")
    assert one.names == ("pole_mass",) and one.axes[0].tolist() == [1.0, 11.0, 21.0]
    assert agent.env_spec.id == "InvertedPendulum-v5"


def test_the_wrappers_of_the_run_come_along(agent):
    wrapped = EnvSpec(ENV, {"acting": 2.0}, (("helpers.envs:AddOne", {"amount": 100.0}),))
    result = make(wrapped).evaluate_robust(points=2, env=ENV)
    assert result.returns[:, 0] == pytest.approx(
        evaluate_grid(agent, points=2).returns[:, 0] + 100 * result.lengths[:, 0]
    )
    assert target(make(wrapped)) == make(wrapped).env_spec
    assert target(make(wrapped), env_kwargs={"noise": 1.0}).kwargs == {"acting": 2.0, "noise": 1.0}
    assert target(make(wrapped), ENV).kwargs == {}
    assert target(make(wrapped), EnvSpec(ENV)) == EnvSpec(ENV)


def test_what_cannot_be_evaluated_says_why(agent):
    plain = make("InvertedPendulum-v5")
    with pytest.raises(ValueError, match=r"InvertedPendulum-v5 has no uncertainty set.*ctrlrl/RobustHopper-v0"):
        plain.evaluate_robust()
    with pytest.raises(ValueError, match=r"RobustHopper-v0 has observations in .*\(11,\).*trained with .*\(4,\)"):
        plain.evaluate_robust(env="ctrlrl/RobustHopper-v0")
    switched = make("helpers.envs:test/Choice-v0")
    with pytest.raises(ValueError, match="has observations in"):
        switched.evaluate_robust(env=ENV)
    live = make(Analytic())
    assert live.env_spec is None
    with pytest.raises(ValueError, match=r"live environment without an id.*pass env="):
        live.evaluate_robust()
    assert live.evaluate_robust(points=2, env=ENV).worst == pytest.approx(6.0)


def test_other_actions_are_refused():
    class Two(Analytic):
        action_space = gym.spaces.Box(-1.0, 1.0, (2,), np.float32)

    with pytest.raises(ValueError, match=r"has actions in .*\(1,\).*trained with .*\(2,\)"):
        make(Two()).evaluate_robust(env=ENV)


@pytest.mark.parametrize("arguments, message", [
    ({"episodes": 0}, "episodes=0 must be at least 1"), ({"width": 0}, "width=0 must be at least 1"),
    ({"points": 1}, "points=1 must be"), ({"convention": "rlls"}, "convention='rlls' is unknown"),
])  # fmt: skip
def test_arguments_out_of_range(agent, arguments, message):
    with pytest.raises(ValueError, match=message):
        evaluate_grid(agent, **arguments)


def test_an_episode_without_end_is_an_error(agent, monkeypatch):
    monkeypatch.setattr(robust, "MAX_STEPS", 7)
    with pytest.raises(RuntimeError, match="has not ended after 7 steps"):
        evaluate_grid(agent, points=2)


def test_it_is_read_back_from_json_as_it_was(agent, tmp_path):
    result = evaluate_grid(agent, points=3, episodes=2)
    runfolder.write_json(tmp_path / "r.json", result.document())
    document = json.loads((tmp_path / "r.json").read_text())
    back = RobustEvaluation.from_document(document)
    for name, value in result._asdict().items():
        found = getattr(back, name)
        if name == "axes":
            assert all(np.array_equal(x, y) for x, y in zip(found, value, strict=True))
        else:
            assert np.array_equal(found, value) and type(found) is type(value)
    assert document["worst"] == result.worst and document["worst_params"] == {"b": 3.0, "a": 1.0}
    assert document["nominal_mean"] == -1.0
