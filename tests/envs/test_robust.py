"""Robust tasks: published sets, equality with Gymnasium, parameters that stay or are drawn, and grids."""

import copy
import pickle
import subprocess
import sys
import warnings

import gymnasium as gym
import numpy as np
import pytest
from ctrlrl_envs.robust import evaluation_grid
from envs.robust_tasks import (
    FORCES,
    NAMES,
    SETS,
    actions,
    body_of,
    each,
    make,
    most,
    plain,
    same,
    trajectory,
)
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import AutoresetMode, SyncVectorEnv

from ctrlrl.types import ParametricEnv

# -- the sets ---------------------------------------------------------------------------------


def test_all_are_registered_with_gymnasiums_time_limit():
    for name in NAMES:
        spec = gym.spec(f"ctrlrl/Robust{name}-v0")
        assert spec.max_episode_steps == gym.spec(f"{name}-v5").max_episode_steps == 1000


def test_the_package_does_without_ctrlrl():
    code = "import sys, ctrlrl_envs.robust; assert not any(m.partition('.')[0] == 'ctrlrl' for m in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@each
@pytest.mark.parametrize("size", [1, 2, 3])
def test_sets_and_nominal_values_are_the_published_ones(name, size):
    wanted = SETS[name][:size]
    if size > len(wanted):
        with pytest.raises(ValueError, match="no uncertainty='3d'; it has 1d, 2d and force"):
            make(name, uncertainty="3d")
        return
    env = plain(name, uncertainty=f"{size}d")
    if name == "HalfCheetah" and size == 1:
        wanted = [("world_friction", 0.1, 3, 0.4)]
    assert [(k, b.low, b.high) for k, b in env.parameter_space.items()] == [row[:3] for row in wanted]
    assert all(b.shape == () and b.dtype == np.float64 for b in env.parameter_space.values())
    assert list(env.nominal) == [row[0] for row in wanted]
    assert list(env.nominal.values()) == pytest.approx([row[3] for row in wanted], abs=0.005)
    assert env.params == env.nominal and all(type(v) is float for v in env.params.values())


@each
def test_forces_are_on_the_published_bodies(name):
    env = plain(name, uncertainty="force")
    assert list(env.parameter_space) == FORCES[name].split()
    assert all((b.low, b.high) == (-3, 3) for b in env.parameter_space.values())
    assert set(env.nominal.values()) == {0.0}
    for parameter in env.nominal:
        env.set_params({**env.nominal, parameter: 1.5})
        wanted = np.zeros((env.model.nbody, 6))
        wanted[body_of(name, parameter), "xyz".index(parameter[-1])] = 1.5
        assert np.array_equal(env.data.xfrc_applied, wanted)


@each
def test_masses_are_of_the_published_bodies(name):
    env = plain(name, uncertainty=most(name))
    for parameter in [p for p in env.nominal if p.endswith("_mass")]:
        env.set_params({parameter: 1.25})
        assert env.model.body_mass[body_of(name, parameter)] == 1.25
    assert (env.model.body_mass == 1.25).sum() == sum(p.endswith("_mass") for p in env.nominal)


def test_two_dimensions_are_the_default():
    assert list(plain("Hopper").nominal) == ["world_friction", "torso_mass"]


def test_friction_of_the_floor_is_nominal_in_floor_mode():
    found = {name: plain(name, friction_mode="floor").nominal["world_friction"] for name in ("Hopper", "Walker2d")}
    assert found == {"Hopper": 1.0, "Walker2d": 0.7}
    assert plain("HalfCheetah", friction_mode="floor").nominal["world_friction"] == 0.4


def test_m2td3_exchanges_the_humanoids_ranges_in_three_dimensions():
    tops = {"rrls": [16, 8, 5], "m2td3": [16, 5, 8]}
    for bounds, wanted in tops.items():
        env = plain("HumanoidStandup", uncertainty="3d", bounds=bounds)
        assert [b.high for b in env.parameter_space.values()] == wanted
        assert pickle.loads(pickle.dumps(env)).parameter_space == env.parameter_space
    assert plain("HumanoidStandup", bounds="m2td3").parameter_space["right_foot_mass"].high == 8
    with pytest.raises(ValueError, match="bounds='x' is unknown"):
        make("HumanoidStandup", bounds="x")


@each
def test_the_docstring_names_every_parameter(name):
    doc = type(plain(name)).__doc__
    assert all(f"``{row[0]}``" in doc for row in SETS[name])


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"uncertainty": "4d"}, "no uncertainty='4d'; it has 1d, 2d, 3d and force"),
        ({"friction_mode": "both"}, "friction_mode='both' is unknown"),
        ({"params": {"torso_mass": 1.0}, "randomize": True}, "give one of the two"),
        ({"params": {"torso_mass": 99.0}}, r"outside \[0.1, 3.0\]"),
    ],
)
def test_arguments_that_cannot_be_are_refused(kwargs, message):
    with pytest.raises(ValueError, match=message):
        make("Hopper", **kwargs)


# -- the nominal environment --------------------------------------------------------------------


@each
@pytest.mark.parametrize("uncertainty", ["2d", "force"])
def test_nominal_is_gymnasiums_environment_bit_for_bit(name, uncertainty):
    theirs, ours = gym.make(f"{name}-v5", disable_env_checker=True), make(name, uncertainty=uncertainty)
    assert ours.observation_space == theirs.observation_space and ours.action_space == theirs.action_space
    assert ours.metadata == theirs.metadata
    assert same(trajectory(ours, 40), trajectory(theirs, 40))


@each
@pytest.mark.parametrize("kwargs", [{}, {"scale_inertia": True}, {"friction_mode": "floor"}, {"uncertainty": "force"}])
def test_setting_the_nominal_values_brings_gymnasiums_environment_back(name, kwargs):
    env = plain(name, **{"uncertainty": most(name), **kwargs})
    env.set_params({k: b.low + (b.high - b.low) / 3 for k, b in env.parameter_space.items()})
    theirs = gym.make(f"{name}-v5", disable_env_checker=True)
    wanted = trajectory(theirs, 12)
    assert not same(trajectory(env, 12), wanted)
    env.set_params(env.nominal)
    assert same(trajectory(env, 12), wanted)
    for field in ("body_mass", "body_inertia", "body_invweight0", "geom_friction"):
        assert np.array_equal(getattr(env.model, field), getattr(theirs.unwrapped.model, field)), field


def test_gymnasiums_own_arguments_pass_through():
    env = plain("Hopper", ctrl_cost_weight=7.0, frame_skip=2, render_mode="rgb_array")
    assert (env._ctrl_cost_weight, env.frame_skip, env.render_mode) == (7.0, 2, "rgb_array")
    again = pickle.loads(pickle.dumps(env))
    assert (again._ctrl_cost_weight, again.frame_skip) == (7.0, 2)


# -- setting parameters ---------------------------------------------------------------------------


def test_it_is_a_parametric_environment():
    assert isinstance(plain("Hopper"), ParametricEnv)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"gravity": 1.0}, r"unknown parameter 'gravity'; RobustHopper \(3d\) has world_friction, torso_mass, thigh"),
        ({"foot_force_x": 1.0}, "unknown parameter"),
        ({"torso_mass": 3.1}, r"torso_mass=3.1 is outside \[0.1, 3.0\] and not the nominal 3.66"),
        ({"torso_mass": 0.0}, "outside"),
        ({"torso_mass": -1.0}, "outside"),
        ({"torso_mass": float("nan")}, "outside"),
        ({"torso_mass": float("inf")}, "outside"),
        ({"torso_mass": "1"}, r"torso_mass='1' is not a number; expected one in \[0.1, 3.0\]"),
        ({"torso_mass": True}, "not a number"),
        ({"torso_mass": None}, "not a number"),
        ({"torso_mass": [1.0]}, "not a number"),
        ([1.0, 2.0], "must be a mapping"),
    ],
)
def test_what_cannot_be_set_is_refused_and_nothing_changes(params, message):
    env = plain("Hopper", uncertainty="3d", randomize=True)
    before = env.model.geom_friction.copy()
    with pytest.raises(ValueError, match=message):
        env.set_params({"world_friction": 1.0, **params} if isinstance(params, dict) else params)
    assert env.params == env.nominal and env.randomize
    assert np.array_equal(env.model.geom_friction, before)
    with pytest.raises(ValueError, match=message):
        env.reset(options={"params": params})


def test_a_subset_is_set_and_numbers_of_any_kind_are_taken():
    env = plain("Hopper", uncertainty="3d")
    env.set_params({"torso_mass": np.float32(0.5)})
    env.set_params({"thigh_mass": 2, "world_friction": np.array(0.25)})
    assert env.params == {"world_friction": 0.25, "torso_mass": 0.5, "thigh_mass": 2.0}
    env.set_params(env.parameter_space.sample())
    env.params["torso_mass"] = 1.0
    assert env.params["torso_mass"] == env.model.body_mass[1]
    # both lie outside the published set
    env.set_params({k: env.nominal[k] for k in ("torso_mass", "thigh_mass")})
    assert env.params["torso_mass"] == env.nominal["torso_mass"] == pytest.approx(3.665, abs=1e-3)


@pytest.mark.parametrize("uncertainty", ["2d", "force"])
def test_parameters_stay_over_resets_within_a_step(uncertainty):
    env = SyncVectorEnv([lambda: make("Hopper", uncertainty=uncertainty)] * 2, autoreset_mode=AutoresetMode.SAME_STEP)
    env.reset(seed=0)
    inner = env.envs[0].unwrapped
    wanted = {k: b.low.item() + 0.4 for k, b in inner.parameter_space.items()}
    env.call("set_params", wanted)
    state = [inner.model.body_mass.copy(), inner.model.geom_friction.copy(), inner.data.xfrc_applied.copy()]
    ends = 0
    for action in np.random.default_rng(0).uniform(-1, 1, (200, 2, 3)).astype(np.float32):
        ends += env.step(action)[2].sum()
        assert env.call("params") == (wanted, wanted)
        assert same(state, [inner.model.body_mass, inner.model.geom_friction, inner.data.xfrc_applied])
    assert ends >= 2 and (uncertainty == "2d" or np.abs(state[2]).sum() > 1)


def test_reset_takes_parameters_tells_them_and_ignores_other_options():
    env = make("Hopper")
    _, info = env.reset(seed=0, options={"params": {"torso_mass": 1.0}, "other": 3})
    assert info["params"] == {"world_friction": 2.0, "torso_mass": 1.0}
    assert env.reset(options={"other": 3})[1]["params"]["torso_mass"] == 1.0
    # as if they had been set before: the humanoid's observation holds inertias
    first, second = plain("HumanoidStandup"), plain("HumanoidStandup", params={"torso_mass": 1.0})
    assert same(trajectory(first, 5, params={"torso_mass": 1.0}), trajectory(second, 5))


@each
@pytest.mark.parametrize("kwargs", [{"params": {}}, {"randomize": True}, {"scale_inertia": True}])
def test_copies_have_the_same_arguments_and_parameters(name, kwargs):
    env = plain(name, uncertainty="1d", **kwargs)
    if "randomize" not in kwargs:
        env.set_params({k: b.high - 0.5 for k, b in env.parameter_space.items()})
    for other in (copy.deepcopy(env), pickle.loads(pickle.dumps(env))):
        assert (other.randomize, other.uncertainty) == (env.randomize, "1d") and other.model is not env.model
        assert env.randomize or other.params == env.params
        assert same(trajectory(other, 5), trajectory(env, 5)) and other.params == env.params


@each
@pytest.mark.parametrize("kwargs", [{}, {"uncertainty": "force", "randomize": True}])
def test_gymnasium_finds_no_fault(name, kwargs):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # what Gymnasium says of its own tasks too
        warnings.filterwarnings("ignore", message=".*A Box observation space m.* value is")
        warnings.filterwarnings("ignore", message=".*For Box action spaces, we recommend")
        check_env(plain(name, **kwargs), skip_render_check=True)


@pytest.mark.filterwarnings("ignore")  # GLFW without a display
def test_the_model_that_is_set_is_rendered():
    env = make("Hopper", render_mode="rgb_array", width=64, height=48, params={"torso_mass": 1.0})
    env.reset(seed=0)
    try:
        frame = env.render()
    except Exception as error:  # what is raised depends on the platform's OpenGL
        pytest.skip(f"no OpenGL: {error}")
    assert frame.shape == (48, 64, 3)
    env.close()


# -- drawn parameters -----------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "uncertainty"), [("Hopper", "3d"), ("Ant", "force")])
def test_draws_fill_the_set_differ_and_come_again_with_the_seed(name, uncertainty):
    env = plain(name, uncertainty=uncertainty, randomize=True)
    assert env.params == env.nominal
    draws = [list(env.reset(seed=5 if i == 0 else None)[1]["params"].values()) for i in range(60)]
    again = [list(env.reset(seed=5 if i == 0 else None)[1]["params"].values()) for i in range(3)]
    assert again == draws[:3] and list(env.reset(seed=6)[1]["params"].values()) != draws[0]
    low, high = (np.array([getattr(b, end) for b in env.parameter_space.values()]) for end in ("low", "high"))
    unit = (np.array(draws) - low) / (high - low)
    assert (unit >= 0).all() and (unit <= 1).all() and len(np.unique(unit)) == unit.size
    # uniform: mean within four standard errors, and both ends are reached
    assert np.abs(unit.mean(0) - 0.5).max() < 4 * np.sqrt(1 / 12 / 60)
    assert unit.min(0).max() < 0.15 and unit.max(0).min() > 0.85


def test_drawn_parameters_are_in_force():
    env = plain("Hopper", randomize=True)
    drawn = env.reset(seed=5)[1]["params"]
    assert env.params == drawn and env.model.body_mass[1] == drawn["torso_mass"]
    fixed = plain("Hopper", params=drawn)
    fixed.reset(seed=5)
    fixed.set_state(env.data.qpos.copy(), env.data.qvel.copy())
    assert same(*[[e.step(a)[0] for a in actions(e, 10)] for e in (env, fixed)])


@pytest.mark.parametrize("how", ["method", "option"])
def test_setting_ends_the_drawing(how):
    env = plain("Hopper", randomize=True)
    env.reset(seed=0)
    if how == "method":
        env.set_params({"torso_mass": 1.0})
    else:
        env.reset(options={"params": {"torso_mass": 1.0}})
    now = env.params
    env.reset()
    assert env.params == now and now["torso_mass"] == 1.0 and now["world_friction"] != 2.0
    env.randomize = True
    env.reset()
    assert env.params != now


# -- the grid -------------------------------------------------------------------------------------


def test_grids_have_the_published_corners_and_order():
    space = plain("InvertedPendulum").parameter_space
    full, open_ended = evaluation_grid(space), evaluation_grid(space, convention="rrls")
    assert len(full) == len(open_ended) == 100
    assert full[0] == open_ended[0] == {"pole_mass": 1.0, "cart_mass": 1.0}
    assert full[-1] == {"pole_mass": 31.0, "cart_mass": 11.0}
    # steps of 30/9 and 10/9 with the end, of 3 and 1 without it
    assert open_ended[-1] == {"pole_mass": 28.0, "cart_mass": 10.0}
    assert full[1] == {"pole_mass": 1.0, "cart_mass": pytest.approx(1 + 10 / 9)}
    assert open_ended[10] == {"pole_mass": 4.0, "cart_mass": 1.0}
    assert full[10]["pole_mass"] == pytest.approx(1 + 30 / 9)


def test_iwocs_worst_cells_lie_on_the_grid_without_end():
    # Walker2d's 3.61 and HumanoidStandup's 14.41 (IWOCS); 0.1 + 9 * 3.9 / 10 and 0.1 + 9 * 15.9 / 10
    for name, value in (("Walker2d", 3.61), ("HumanoidStandup", 14.41)):
        grid = evaluation_grid(plain(name, uncertainty="1d").parameter_space, convention="rrls")
        assert next(iter(grid[-1].values())) == pytest.approx(value)


def test_every_cell_of_a_grid_can_be_set():
    env = plain("Hopper", uncertainty="3d")
    grid = evaluation_grid(env.parameter_space, 3)
    assert len(grid) == 27
    for cell in grid:
        env.set_params(cell)
        assert env.params == cell
    with pytest.raises(ValueError, match="convention='x' is unknown"):
        evaluation_grid(env.parameter_space, convention="x")
    for points in (1, 2.0):
        with pytest.raises(ValueError, match="must be an integer of at least 2"):
            evaluation_grid(env.parameter_space, points)
