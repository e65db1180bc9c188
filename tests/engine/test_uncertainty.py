"""The unit cube and the grids of an uncertainty set, against the published ones; and where a set is found."""

import ctrlrl_envs.robust as suites
import gymnasium as gym
import numpy as np
import pytest
from helpers.envs import env_id

from ctrlrl.engine import environments, uncertainty
from ctrlrl.engine.uncertainty import UncertaintySet
from ctrlrl.types import EnvSpec

HOPPER = "ctrlrl/RobustHopper-v0"
TASKS = ("Ant", "HalfCheetah", "Hopper", "HumanoidStandup", "InvertedPendulum", "Walker2d")
NAMES = ("world_friction", "torso_mass")


@pytest.fixture(scope="module")
def hopper():
    return uncertainty.of(HOPPER)


def box(*ranges):
    low, high = np.array(ranges, dtype=float).T
    names = tuple(f"p{k}" for k in range(len(ranges)))
    return UncertaintySet(names, low, high, dict(zip(names, low.tolist(), strict=True)))


# -- grids ----------------------------------------------------------------------------------------


def test_m2td3_includes_both_ends_and_rrls_leaves_out_the_upper(hopper):
    rrls, m2td3 = hopper.axes(10, "rrls"), hopper.axes()
    assert rrls[0] == pytest.approx([0.1, 0.39, 0.68, 0.97, 1.26, 1.55, 1.84, 2.13, 2.42, 2.71])
    assert m2td3[0][[0, -1]].tolist() == [0.1, 3.0] and len(m2td3[0]) == 10
    assert np.diff(m2td3[0]) == pytest.approx([2.9 / 9] * 9)


@pytest.mark.parametrize("task, name, value", [
    ("HalfCheetah", "world_friction", 3.61), ("HumanoidStandup", "torso_mass", 14.41), ("Hopper", "torso_mass", 2.71),
    ("Hopper", "world_friction", 2.13),
])  # fmt: skip
def test_the_worst_cells_that_iwocs_reports_lie_on_the_rrls_grid(task, name, value):
    found = uncertainty.of(f"ctrlrl/Robust{task}-v0")
    on = {c: np.abs(found.axes(10, c)[found.names.index(name)] - value).min() < 1e-9 for c in ("rrls", "m2td3")}
    assert on == {"rrls": True, "m2td3": False}


def test_the_first_parameter_changes_slowest():
    found = box((0, 1), (10, 12)).grid(3)
    assert [tuple(p.values()) for p in found] == [
        (0, 10), (0, 11), (0, 12), (0.5, 10), (0.5, 11), (0.5, 12), (1, 10), (1, 11), (1, 12),
    ]  # fmt: skip
    assert all(list(p) == ["p0", "p1"] and type(p["p0"]) is float for p in found)


@pytest.mark.parametrize("convention", ["m2td3", "rrls"])
@pytest.mark.parametrize("task", TASKS)
def test_the_grid_is_that_of_the_suite(task, convention):
    one = gym.make(f"ctrlrl/Robust{task}-v0")
    space = one.unwrapped.parameter_space
    assert uncertainty.of(one).grid(4, convention) == suites.evaluation_grid(space, 4, convention)
    one.close()


@pytest.mark.parametrize("points, convention, message", [
    (1, "m2td3", "points=1 must be an integer of at least 2"),
    (2.5, "m2td3", "points=2.5 must be an integer"),
    (10, "both", "convention='both' is unknown; expected one of m2td3, rrls"),
])  # fmt: skip
def test_a_grid_that_is_none_is_refused(hopper, points, convention, message):
    with pytest.raises(ValueError, match=message):
        hopper.grid(points, convention)


# -- the unit cube --------------------------------------------------------------------------------


def test_corners_and_the_middle_of_the_unit_cube():
    found = box((-1, 3), (10, 20)).from_unit([[[0, 0], [1, 0]], [[0, 1], [0.5, 0.25]]])
    assert found == [{"p0": -1, "p1": 10}, {"p0": 3, "p1": 10}, {"p0": -1, "p1": 20}, {"p0": 1, "p1": 12.5}]
    assert box((-1, 3), (10, 20)).from_unit([1.0, 1.0]) == [{"p0": 3, "p1": 20}]


def test_from_unit_never_leaves_the_box_by_rounding():
    rng = np.random.default_rng(0)
    low = rng.uniform(0, 1, 500)
    high = rng.uniform(1, 10, 500)
    assert (low + (high - low) > high).any()  # otherwise this shows nothing
    found = box(*zip(low, high, strict=True)).from_unit(np.stack([np.zeros(500), np.ones(500)]))
    assert list(found[0].values()) == low.tolist() and (np.array(list(found[1].values())) <= high).all()


def test_to_unit_undoes_from_unit_whatever_the_order_of_the_names(hopper):
    u = np.random.default_rng(1).random((5, 2))
    assert hopper.to_unit(hopper.from_unit(u)) == pytest.approx(u)
    shuffled = {"torso_mass": 3.0, "world_friction": 0.1}
    assert hopper.to_unit(shuffled).tolist() == [0.0, 1.0]
    assert hopper.to_unit([shuffled]).shape == (1, 2) and hopper.to_unit([]).shape == (0, 2)


def test_the_nominal_hopper_lies_outside_its_own_set(hopper):
    unit = hopper.to_unit(hopper.nominal)
    assert unit[0] == pytest.approx(1.9 / 2.9) and unit[1] > 1.2


@pytest.mark.parametrize("points", [[0.5], [[0.1, 0.2, 0.3]], 0.5])
def test_points_of_another_dimension_are_refused(hopper, points):
    with pytest.raises(ValueError, match=r"expected \(\.\.\., 2\) for world_friction, torso_mass"):
        hopper.from_unit(points)


@pytest.mark.parametrize("value", [-0.01, 1.01, np.nan])
def test_points_outside_the_cube_are_refused(hopper, value):
    with pytest.raises(ValueError, match=r"must lie in \[0, 1\]"):
        hopper.from_unit([0.5, value])


@pytest.mark.parametrize("params", [{"world_friction": 1.0}, {"world_friction": 1.0, "torso_mass": 1.0, "x": 0.0}, {}])
def test_to_unit_refuses_other_names(hopper, params):
    with pytest.raises(ValueError, match="expected world_friction, torso_mass"):
        hopper.to_unit(params)


# -- where it is found ----------------------------------------------------------------------------


class Bare(gym.Env):
    """What an author may have written; not in alphabetical order."""

    observation_space = action_space = gym.spaces.Box(-1, 1, (1,), np.float32)

    def __init__(self, space=None, nominal=None):
        boxes = [("z", gym.spaces.Box(1, 2, (), np.float64)), ("a", gym.spaces.Box(0, 5, (), np.float32))]
        self.parameter_space = gym.spaces.Dict(boxes) if space is None else space
        self.nominal = {"a": 4, "z": 7} if nominal is None else nominal

    def set_params(self, params):
        raise AssertionError("asking for the set does not set anything")


SOURCES = {
    "id": lambda: HOPPER,
    "id without version": lambda: "ctrlrl/RobustHopper",
    "spec": lambda: EnvSpec(HOPPER, n_envs=7, backend="async"),
    "spec with a wrapper": lambda: EnvSpec(HOPPER, wrappers=(("helpers.envs:AddOne", {"amount": 1.0}),)),
    "live": lambda: gym.make(HOPPER),
    "bare": lambda: gym.make(HOPPER).unwrapped,
    "vector": lambda: environments.make_vector(EnvSpec(HOPPER, n_envs=2, backend="sync")),
    "gymnasium's vector": lambda: gym.make_vec(HOPPER, 2, vectorization_mode="sync"),
    "native vector": lambda: gym.make_vec(HOPPER, 2, vectorization_mode="vector_entry_point"),
}


@pytest.mark.parametrize("source", SOURCES)
def test_the_set_is_found_through_whatever_holds_it(source, hopper):
    env = SOURCES[source]()
    found = uncertainty.of(env)
    assert found.names == NAMES == hopper.names and found.dim == 2
    assert found.low.tolist() == [0.1, 0.1] and found.high.tolist() == [3.0, 3.0]
    assert found.nominal == hopper.nominal and found.nominal["world_friction"] == 2.0
    if isinstance(env, gym.Env | gym.vector.VectorEnv):
        env.close()


def test_arguments_choose_the_set():
    assert uncertainty.of(EnvSpec(HOPPER, {"uncertainty": "3d"})).names == (*NAMES, "thigh_mass")


def test_the_order_is_that_of_the_space_and_nothing_is_set():
    found = uncertainty.of(gym.wrappers.TimeLimit(Bare(), 5))
    assert found.names == ("z", "a") and found.low.tolist() == [1, 0] and found.high.tolist() == [2, 5]
    assert list(found.nominal.items()) == [("z", 7.0), ("a", 4.0)]
    vector = environments.wrap_live(Bare())
    assert uncertainty.of(vector).names == ("z", "a")


def test_an_environment_without_a_set_is_told_what_it_lacks():
    lacking = (
        r"Hopper-v5 has no uncertainty set: it lacks parameter_space, nominal, set_params .*ctrlrl/RobustHopper-v0"
    )
    with pytest.raises(ValueError, match=lacking):
        uncertainty.of("Hopper-v5")
    with pytest.raises(ValueError, match=lacking):
        uncertainty.of(gym.make("Hopper-v5"))
    half = Bare()
    del half.nominal
    with pytest.raises(ValueError, match="Bare has no uncertainty set: it lacks nominal "):
        uncertainty.of(half)


@pytest.mark.parametrize("space", [
    gym.spaces.Box(0, 1, (2,), np.float64),
    gym.spaces.Dict({}),
    gym.spaces.Dict({"a": gym.spaces.Box(0, 1, (1,), np.float64)}),
    gym.spaces.Dict({"a": gym.spaces.Box(0, np.inf, (), np.float64)}),
    gym.spaces.Dict({"a": gym.spaces.Box(1, 1, (), np.float64)}),
    gym.spaces.Dict({"a": gym.spaces.Box(0, 1, (), np.float64), "b": gym.spaces.Discrete(3)}),
])  # fmt: skip
def test_another_space_than_scalar_boxes_is_refused(space):
    with pytest.raises(ValueError, match="expected a gymnasium Dict of scalar Boxes"):
        uncertainty.of(Bare(space, {"a": 0.5}))


def test_the_helpers_toy_has_no_dict():
    with pytest.raises(ValueError, match=r"ParametricToy-v0: parameter_space is Box.*expected a gymnasium Dict"):
        uncertainty.of(env_id("ParametricToy"))


@pytest.mark.parametrize("nominal", [{"z": 1.0}, {"z": 1.0, "a": 1.0, "b": 0.0}])
def test_nominal_values_of_other_names_are_refused(nominal):
    with pytest.raises(ValueError, match=r"nominal has .*; expected z, a as parameter_space"):
        uncertainty.of(Bare(nominal=nominal))
