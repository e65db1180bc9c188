"""The published sets of the robust tasks, and what their tests share."""

import gymnasium as gym
import numpy as np
import pytest

# last entry of a row: the model's own value in "contact" mode, read off Gymnasium's XML and to three digits
SETS = {
    "Ant": [
        ("torso_mass", 0.1, 3, 0.327),
        ("front_left_leg_mass", 0.01, 3, 0.0392),
        ("front_right_leg_mass", 0.01, 3, 0.0392),
    ],
    "HalfCheetah": [("world_friction", 0.1, 4, 0.4), ("torso_mass", 0.1, 7, 6.25), ("back_thigh_mass", 0.1, 3, 1.54)],
    "Hopper": [("world_friction", 0.1, 3, 2.0), ("torso_mass", 0.1, 3, 3.67), ("thigh_mass", 0.1, 4, 4.06)],
    "HumanoidStandup": [
        ("torso_mass", 0.1, 16, 8.91),
        ("right_foot_mass", 0.1, 8, 1.77),
        ("left_thigh_mass", 0.1, 5, 4.75),
    ],
    "InvertedPendulum": [("pole_mass", 1, 31, 5.02), ("cart_mass", 1, 11, 10.47)],
    "Walker2d": [("world_friction", 0.1, 4, 1.9), ("torso_mass", 0.1, 5, 3.67), ("thigh_mass", 0.1, 6, 4.06)],
}
# RRLS's bodies; the planar robots' second axis is z, as RARL has it
FORCES = {
    "Ant": "torso_force_x torso_force_y front_left_leg_force_x front_left_leg_force_y front_right_leg_force_x "
    "front_right_leg_force_y",
    "HalfCheetah": "torso_force_x torso_force_z back_foot_force_x back_foot_force_z front_foot_force_x "
    "front_foot_force_z",
    "Hopper": "foot_force_x foot_force_z",
    "HumanoidStandup": "torso_force_x torso_force_y right_thigh_force_x right_thigh_force_y left_foot_force_x "
    "left_foot_force_y",
    "InvertedPendulum": "pole_force_x pole_force_z",
    "Walker2d": "leg_force_x leg_force_z left_foot_force_x left_foot_force_z",
}
BODIES = {
    "Ant": {"torso": 1, "front_left_leg": 2, "front_right_leg": 5},
    "HalfCheetah": {"torso": 1, "back_thigh": 2, "back_foot": 4, "front_foot": 7},
    "Hopper": {"torso": 1, "thigh": 2, "foot": 4},
    "HumanoidStandup": {"torso": 1, "right_foot": 6, "left_thigh": 7, "right_thigh": 4, "left_foot": 9},
    "InvertedPendulum": {"pole": 2, "cart": 1},
    "Walker2d": {"torso": 1, "thigh": 2, "leg": 3, "left_foot": 7},
}
NAMES = list(SETS)
each = pytest.mark.parametrize("name", NAMES)
FEET = {"Hopper": {"foot_geom"}, "Walker2d": {"foot_geom", "foot_left_geom"}, "HalfCheetah": {"bfoot", "ffoot"}}


def make(name, **kwargs):
    return gym.make(f"ctrlrl/Robust{name}-v0", disable_env_checker=True, **kwargs)


def plain(name, **kwargs):
    return make(name, **kwargs).unwrapped


def vector(name, n, **kwargs):
    return gym.make_vec(f"ctrlrl/Robust{name}-v0", num_envs=n, vectorization_mode="vector_entry_point", **kwargs)


def most(name):
    return "2d" if name == "InvertedPendulum" else "3d"


def actions(env, n, seed=0):
    box = env.action_space
    return np.random.default_rng(seed).uniform(box.low, box.high, (n, *box.shape)).astype(np.float32)


def trajectory(env, n=25, seed=3, **options):
    """Everything ``n`` steps return, with resets after ends; the reset's own ``params`` left out."""
    obs, info = env.reset(seed=seed, options=options or None)
    found = [obs, info]
    for action in actions(env, n):
        obs, reward, terminated, truncated, info = env.step(action)
        found += [obs, reward, terminated, truncated, info]
        if terminated:
            found += env.reset()
    return [{k: v for k, v in x.items() if k != "params"} if isinstance(x, dict) else x for x in found]


def same(left, right):
    try:
        np.testing.assert_equal(left, right)
    except AssertionError:
        return False
    return True


def body_of(name, parameter):
    return BODIES[name][parameter.rpartition("_mass")[0] or parameter.rpartition("_force")[0]]
