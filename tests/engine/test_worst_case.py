"""The worst-case search against brute force, and what it promises about seeds, records and ties."""

import json
import sys

import gymnasium as gym
import numpy as np
import pytest

from ctrlrl.engine import environments, uncertainty, worst_case
from ctrlrl.engine.worst_case import CMASearch, GridSearch, Record, Trials, find
from ctrlrl.types import EnvSpec

UNIT = gym.spaces.Box(0.0, 1.0, (), np.float64)


class Slope(gym.Env):
    """x moves by its parameters; the reward is -(x - 1)^2; the start is drawn at reset; ends after a drawn length."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (1,), np.float32)
    action_space = gym.spaces.Box(-1.0, 1.0, (1,), np.float32)
    parameter_space = gym.spaces.Dict([("push", gym.spaces.Box(-2.0, 2.0, (), np.float64)), ("drag", UNIT)])
    nominal = {"push": 0.5, "drag": 0.0}  # noqa: RUF012

    def __init__(self, blow_up: bool = False) -> None:
        self.blow_up = blow_up
        self.set_params(self.nominal)

    def set_params(self, params):
        self.push, self.drag = params["push"], params["drag"]

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.x, self.t, self.length = self.np_random.uniform(-1.0, 1.0), 0, self.np_random.integers(2, 6)
        return np.array([self.x], np.float32), {}

    def step(self, action):
        self.x = (1.0 - 0.5 * self.drag) * self.x + self.push * float(action[0])
        self.t += 1
        reward = np.nan if self.blow_up and self.push > 1.0 else -((self.x - 1.0) ** 2)
        return np.array([self.x], np.float32), reward, self.t == self.length, False, {}


gym.register("test/Slope-v0", Slope)
SLOPE = EnvSpec("test/Slope-v0")


def steer(obs, episodes):
    """A policy that wants to stand at one."""
    return np.clip(1.0 - obs, -1.0, 1.0)


def alone(params, seed):
    """Return and length of one episode of :func:`steer`, by hand."""
    env = gym.make("test/Slope-v0", disable_env_checker=True)
    env.unwrapped.set_params(params)
    obs, _ = env.reset(seed=seed)
    total, steps, over = 0.0, 0, False
    while not over:
        obs, reward, over, _, _ = env.step(steer(obs, None))
        total, steps = total + reward, steps + 1
    return total, steps


def pendulum(points):
    """Return of a fixed controller on pendulums of mass in [0.5, 1.5] and length in [0.7, 1.3], from hanging."""
    mass, length = 0.5 + points[:, 0], 0.7 + 0.6 * points[:, 1]
    angle, speed, total = np.full(len(points), np.pi - 0.05), np.zeros(len(points)), np.zeros(len(points))
    for _ in range(80):
        torque = np.clip(-12.0 * angle - 3.0 * speed, -12.0, 12.0)
        total -= angle**2 + 0.1 * speed**2 + 0.001 * torque**2
        speed = speed + 0.05 * (15.0 / length * np.sin(angle) + 3.0 * torque / (mass * length**2))
        angle = angle + 0.05 * speed
    return total


def corner(points):
    """Lowest, -3, at (1, 0)."""
    return -2.0 * points[:, 0] - 1.0 + points[:, 1]


def valley(points):
    """Lowest, 0, at (0.37, 0.61), in a valley that is not along an axis."""
    a, b = points[:, 0] - 0.37, points[:, 1] - 0.61
    return (a + b) ** 2 + 20.0 * (a - b) ** 2


def run(search, function):
    while (points := search.ask()) is not None:
        search.tell(function(points))
    return search


def brute(function, points=41):
    values = function(np.stack(np.meshgrid(*[np.linspace(0, 1, points)] * 2), -1).reshape(-1, 2))
    return values.min(), values.max() - values.min()


# -- CMA-ES ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("function", [pendulum, corner, valley])
@pytest.mark.parametrize("seed", range(3))
def test_cma_comes_within_a_hundredth_of_brute_force_in_two_hundred_evaluations(function, seed):
    lowest, spread = brute(function)
    search = run(CMASearch(2, 12, 16, seed), function)
    assert search.evaluations == 192
    assert search.value <= lowest + 0.01 * min(spread, abs(lowest) or spread)
    assert function(search.point[None])[0] == search.value


def test_cma_meets_the_grid_on_an_environment_with_parameters():
    trials = Trials(SLOPE, [3, 4, 5], 16)
    box = uncertainty.of(SLOPE)

    def evaluate(points):
        return trials.run(steer, box.from_unit(points))

    exact = find(GridSearch(2, 21), evaluate, Record(None), "grid")
    found = find(CMASearch(2, 12, 16, 0), evaluate, Record(None), "cma")
    trials.close()
    middle = evaluate(np.array([[0.5, 0.5]]))[0][0]
    assert found.evaluations <= 200 and found.value <= exact.value + 0.01 * (middle - exact.value)
    assert found.value < middle - 1.0


@pytest.mark.parametrize("dim", [1, 3])
def test_cma_runs_in_other_dimensions_and_stays_inside(dim):
    search, seen = CMASearch(dim, 8, 10, 0), []

    def function(points):
        seen.append(points)
        return ((points - 0.9) ** 2).sum(1)

    run(search, function)
    points = np.concatenate(seen)
    assert points.shape == (80, dim) and points.min() == 0.0 and points.max() == 1.0
    assert search.value < 0.05 and abs(search.point - 0.9).max() < 0.2


def test_cma_neither_reads_nor_moves_the_global_generator():
    found = []
    for k in range(2):
        np.random.seed(k)
        before = np.random.get_state()[1].copy()
        found.append(run(CMASearch(2, 4, 8, 7), valley).point)
        assert (np.random.get_state()[1] == before).all()
    assert (found[0] == found[1]).all()
    assert (run(CMASearch(2, 4, 8, 8), valley).point != found[0]).any()


def test_cma_survives_a_function_without_slope():
    search = run(CMASearch(2, 6, 8, 0), lambda points: np.full(len(points), 1000.0))
    assert search.value == 1000.0 and search.point is not None


@pytest.mark.parametrize("done", [0, 1, 5])
def test_a_search_told_the_same_asks_the_same(done):
    known = np.array([[0.2, 0.3]])
    whole, again = CMASearch(2, 6, 8, 1, known), CMASearch(2, 6, 8, 1, known)
    history = []
    while (points := whole.ask()) is not None:
        history.append((points, valley(points)))
        whole.tell(history[-1][1])
    for _, values in history[:done]:
        again.ask()
        again.tell(json.loads(json.dumps(values.tolist())))
    for points, values in history[done:]:
        assert (again.ask() == points).all()
        again.tell(values)
    assert again.ask() is None
    assert (again.point == whole.point).all() and (again.value, again.evaluations) == (whole.value, 49)


def test_without_cma_the_message_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "cma", None)
    with pytest.raises(ImportError, match=r"pip install 'ctrlrl\[robust\]'.*search='grid'"):
        CMASearch(2, 6, 8, 0)


# -- grid, known points, ties ---------------------------------------------------------------------


def test_a_grid_has_every_combination_with_both_ends():
    search, seen = GridSearch(3, 5), []
    while (points := search.ask()) is not None:
        assert len(points) <= worst_case.CHUNK
        seen.append(points)
        search.tell(points.sum(1))
    axis = [0.0, 0.25, 0.5, 0.75, 1.0]
    assert np.concatenate(seen).tolist() == [[a, b, c] for a in axis for b in axis for c in axis]
    assert search.evaluations == 125 and search.value == 0.0


def test_known_points_come_first_and_win_ties():
    known = np.array([[0.3, 0.3], [0.6, 0.6]])
    search = GridSearch(2, 3, known)
    assert (search.ask() == known).all()
    search.tell([5.0, 4.0])
    assert search.known_value == 4.0
    assert len(search.ask()) == 9
    search.tell([4.0] * 9)
    assert search.ask() is None
    assert search.point.tolist() == [0.6, 0.6] and search.evaluations == 11


def test_what_is_worse_than_the_known_points_replaces_them_and_leaves_their_value():
    search = run(GridSearch(2, 3, np.array([[0.5, 0.25]])), corner)
    assert search.point.tolist() == [1.0, 0.0] and search.value == -3.0
    assert search.known_value == corner(np.array([[0.5, 0.25]]))[0]
    assert run(GridSearch(2, 3), corner).known_value == np.inf


@pytest.mark.parametrize("values", [[1.0] * 3, [1.0, np.nan, 1.0, 1.0], [np.inf] * 4])
def test_values_that_fit_no_question_are_refused(values):
    search = GridSearch(2, 2)
    with pytest.raises(ValueError, match="ask first"):
        search.tell([1.0] * 4)
    search.ask()
    with pytest.raises(ValueError, match="expected 4 finite ones"):
        search.tell(values)


# -- the record -----------------------------------------------------------------------------------


def test_a_killed_search_loses_the_generation_in_hand_only(tmp_path):
    path = tmp_path / "searches.json"
    calls = []

    def evaluate(points):
        calls.append(points)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return valley(points), 10 * len(calls)

    with pytest.raises(KeyboardInterrupt):
        find(CMASearch(2, 6, 8, 1), evaluate, Record(path), "mine")
    found = find(CMASearch(2, 6, 8, 1), evaluate, Record(path), "mine")
    assert len(calls) == 7  # three, the killed one again, and the last two
    assert (calls[4] == calls[3]).all()
    whole = find(CMASearch(2, 6, 8, 1), lambda points: (valley(points), 1), Record(None), "mine")
    assert (found.point == whole.point).all() and found.value == whole.value and found.evaluations == 48
    assert found.steps == 10 + 20 + 30 + 50 + 60 + 70
    assert [len(entry["values"]) for entry in json.loads(path.read_text())["mine"]] == [8] * 6


def test_another_key_finds_nothing_of_this_search(tmp_path):
    calls = []

    def evaluate(points):
        calls.append(points)
        return valley(points), 1

    record = Record(tmp_path / "searches.json")
    for key in ("a", "b", "a"):
        find(CMASearch(2, 3, 8, 1), evaluate, record, key)
    assert len(calls) == 6
    find(CMASearch(2, 3, 8, 1), evaluate, Record(tmp_path / "searches.json"), "b")
    assert len(calls) == 6


# -- episodes -------------------------------------------------------------------------------------

PARAMS = [{"push": p, "drag": d} for p, d in ((-2.0, 0.0), (0.3, 1.0), (1.7, 0.4), (0.0, 0.9), (2.0, 1.0))]


@pytest.mark.parametrize("width", [1, 4, 15, 100])
def test_every_candidate_plays_the_same_seeds_with_its_own_parameters(width):
    seeds = [11, 12, 13]
    trials = Trials(SLOPE, seeds, width)
    expected = [[alone(p, s) for s in seeds] for p in PARAMS]
    for order in (slice(None), slice(None, None, -1), slice(1, 3)):
        means, steps = trials.run(steer, PARAMS[order])
        np.testing.assert_allclose(means, [np.mean([r for r, _ in row]) for row in expected[order]], rtol=1e-12)
        assert steps == sum(n for row in expected[order] for _, n in row)
    trials.close()


def test_environments_are_built_once(monkeypatch):
    built = []
    original = environments.make_vector
    monkeypatch.setattr(environments, "make_vector", lambda spec, **k: built.append(spec.n_envs) or original(spec, **k))
    trials = Trials(SLOPE, [1, 2], 4)
    for _ in range(3):
        trials.run(steer, PARAMS)
    trials.run(steer, PARAMS[:1])
    trials.close()
    assert built == [4, 2]


def test_a_simulation_that_blows_up_is_named():
    trials = Trials(EnvSpec("test/Slope-v0", {"blow_up": True}), [1], 8)
    with pytest.raises(FloatingPointError, match=r"'push': 1.7, 'drag': 0.4.*nan"):
        trials.run(steer, PARAMS)
    trials.close()
