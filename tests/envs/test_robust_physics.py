"""Robust tasks: what a parameter does to the physics, and that many at once are as many single ones."""

import gymnasium as gym
import mujoco
import numpy as np
import pytest
from envs.robust_tasks import (
    FEET,
    actions,
    body_of,
    each,
    make,
    most,
    plain,
    same,
    vector,
)
from gymnasium.vector import AutoresetMode

from ctrlrl.engine import environments
from ctrlrl.types import EnvSpec

# -- what a parameter does ----------------------------------------------------------------------


def floor_contacts(env, steps=60, tilt=0.0):
    """Sliding friction of every contact with the floor, by the other geom, while the robot does nothing."""
    env.reset(seed=0)
    env.set_state(env.data.qpos + np.eye(env.model.nq)[2] * tilt, env.data.qvel)
    found = {}
    for _ in range(steps):
        env.step(np.zeros(env.action_space.shape, np.float32))
        for contact in env.data.contact:
            pair = {env.model.geom(int(g)).name for g in contact.geom} - {"floor"}
            if contact.geom.min() == 0:
                found.setdefault(pair.pop(), set()).add(float(contact.friction[0]))
    return found


@pytest.mark.parametrize(
    ("name", "asked", "found"),
    [
        *[("Hopper", v, 2.0) for v in (0.1, 0.7, 1.84)],
        ("Hopper", 2.13, 2.13),
        *[("Walker2d", v, 1.9) for v in (0.1, 0.88, 1.66)],
        ("Walker2d", 2.5, 2.5),
        *[("HalfCheetah", v, v) for v in (0.1, 1.3)],
    ],
)
def test_the_floors_friction_alone_is_inert_below_the_feets(name, asked, found):
    contacts = floor_contacts(plain(name, friction_mode="floor", params={"world_friction": asked}))
    assert set(contacts) >= FEET[name]
    assert {foot: contacts[foot] for foot in FEET[name]} == {foot: {found} for foot in FEET[name]}


@pytest.mark.parametrize("name", FEET)
@pytest.mark.parametrize("asked", [0.1, 1.84, 2.13])
def test_the_contact_has_the_friction_asked_for(name, asked):
    for tilt in (0.0, 1.2):
        contacts = floor_contacts(plain(name, params={"world_friction": asked}), 100 if tilt else 60, tilt)
        assert contacts and set().union(*contacts.values()) == {asked}
        # it stands, or falls on other parts than the feet
        assert set(contacts) >= FEET[name] if tilt == 0 else set(contacts) - FEET[name]


@pytest.mark.parametrize(("name", "friction"), [("Hopper", 2.0), ("Walker2d", 1.9), ("HalfCheetah", 0.4)])
def test_the_nominal_contact_is_the_nominal_value(name, friction):
    contacts = floor_contacts(plain(name))
    assert {f for foot in FEET[name] for f in contacts[foot]} == {friction} == {plain(name).nominal["world_friction"]}


def test_only_sliding_friction_changes():
    env = plain("Walker2d", params={"world_friction": 3.0})
    assert np.array_equal(env.model.geom_friction[:, 1:], gym.make("Walker2d-v5").unwrapped.model.geom_friction[:, 1:])


@each
@pytest.mark.parametrize("uncertainty", ["2d", "3d", "force"])
def test_every_parameter_changes_the_dynamics(name, uncertainty):
    if name == "InvertedPendulum" and uncertainty == "3d":
        pytest.skip("two parameters")
    env = plain(name, uncertainty=uncertainty)
    # into contact first, so that friction matters
    settle = 20 if name in FEET else 2

    def state_after(params):
        env.set_params(env.nominal)
        env.reset(seed=1)
        for action in actions(env, settle) * 0.1:
            env.step(action)
        env.set_params(params)
        for action in actions(env, 1, seed=4):
            env.step(action)
        return env.state_vector().copy()

    base = state_after({})
    assert np.array_equal(base, state_after({}))
    for parameter, box in env.parameter_space.items():
        low, high = state_after({parameter: box.low}), state_after({parameter: box.high})
        assert not np.array_equal(base, low) and not np.array_equal(base, high) and not np.array_equal(low, high)


@pytest.mark.parametrize("scale", [False, True])
def test_inertia_is_left_or_scaled_with_the_mass(scale):
    env = plain("Hopper", scale_inertia=scale)
    before = env.model.body_inertia.copy()
    env.set_params({"torso_mass": 1.5})
    env.set_params({"torso_mass": 0.5})
    wanted = before.copy()
    wanted[1] *= 0.5 / env.nominal["torso_mass"] if scale else 1.0
    np.testing.assert_allclose(env.model.body_inertia, wanted, rtol=1e-15)


@each
def test_derived_quantities_are_those_of_a_model_compiled_with_the_mass(name):
    env = plain(name, uncertainty=most(name), scale_inertia=True)
    env.set_params({k: b.low + 0.7 * (b.high - b.low) for k, b in env.parameter_space.items() if k.endswith("_mass")})
    spec = mujoco.MjSpec.from_file(env.fullpath)
    spec.compiler.inertiafromgeom = mujoco.mjtInertiaFromGeom.mjINERTIAFROMGEOM_FALSE
    spec.compiler.settotalmass = -1
    for i, body in enumerate(spec.bodies[1:], start=1):
        body.explicitinertial = True
        body.mass, body.inertia = env.model.body_mass[i], env.model.body_inertia[i]
        body.ipos, body.iquat = env.model.body_ipos[i], env.model.body_iquat[i]
    compiled = spec.compile()
    for field in ("body_subtreemass", "body_invweight0", "dof_invweight0", "dof_M0", "tendon_invweight0"):
        np.testing.assert_allclose(getattr(env.model, field), getattr(compiled, field), rtol=1e-9, err_msg=field)
    assert env.model.stat.meaninertia == pytest.approx(compiled.stat.meaninertia, rel=1e-9)


@each
def test_setting_parameters_leaves_the_running_state_alone(name):
    env = plain(name, uncertainty=most(name))
    env.reset(seed=0)
    for action in actions(env, 10):
        env.step(action)
    kind = mujoco.mjtState.mjSTATE_INTEGRATION
    before, after = (np.zeros(mujoco.mj_stateSize(env.model, kind)) for _ in range(2))
    mujoco.mj_getState(env.model, env.data, before, kind)
    env.set_params({k: b.high for k, b in env.parameter_space.items()})
    mujoco.mj_getState(env.model, env.data, after, kind)
    assert np.array_equal(before, after)


@pytest.mark.parametrize("name", ["Hopper", "HumanoidStandup"])
def test_a_force_acts_on_the_joints_as_the_jacobian_says(name):
    env = plain(name, uncertainty="force")
    for parameter in env.nominal:
        env.set_params(env.nominal)
        env.reset(seed=0)
        without = env.data.qfrc_smooth.copy()
        jacobian = np.zeros((3, env.model.nv))
        mujoco.mj_jacBodyCom(env.model, env.data, jacobian, None, body_of(name, parameter))
        env.set_params({parameter: -2.0})
        env.reset(seed=0)
        wanted = -2.0 * jacobian["xyz".index(parameter[-1])]
        np.testing.assert_allclose(env.data.qfrc_smooth - without, wanted, atol=1e-9)
        assert np.abs(wanted).max() > 0.1


@pytest.mark.parametrize("name", ["HalfCheetah", "Hopper", "InvertedPendulum", "Walker2d"])
def test_planar_robots_cannot_feel_a_force_across_their_plane(name):
    env = plain(name)
    env.reset(seed=0)
    wanted = [env.step(action)[0] for action in actions(env, 20)]
    env.reset(seed=0)
    env.data.xfrc_applied[1:, 1] = 3.0
    assert same([env.step(action)[0] for action in actions(env, 20)], wanted)


# -- many at once -----------------------------------------------------------------------------------


@each
def test_vector_and_single_environments_agree_bit_for_bit(name):
    n, steps, limit = 3, 25, 9
    env = vector(name, n, max_episode_steps=limit)
    singles = [make(name, max_episode_steps=limit) for _ in range(n)]
    rows = np.random.default_rng(1).uniform(0.2, 0.9, (n, 2))
    low, high = (np.array([getattr(b, end) for b in env.parameter_space.values()]) for end in ("low", "high"))
    env.set_params(low + rows * (high - low))
    for single, params in zip(singles, env.params, strict=True):
        single.unwrapped.set_params(params)
    obs, infos = env.reset(seed=7)
    starts = [single.reset(seed=7 + i) for i, single in enumerate(singles)]
    assert same(obs, np.stack([s[0] for s in starts]))
    assert infos["params"]["torso_mass" if name != "InvertedPendulum" else "pole_mass"].shape == (n,)
    ends = 0
    for action in actions(env, steps):
        obs, reward, terminated, truncated, infos = env.step(action)
        assert ("final_obs" in infos) == (terminated | truncated).any()
        for i, single in enumerate(singles):
            wanted = single.step(action[i])
            assert (reward[i], terminated[i], truncated[i]) == wanted[1:4]
            last = wanted[0]
            if wanted[2] or wanted[3]:
                ends += 1
                assert infos["_final_obs"][i] and same(infos["final_obs"][i], wanted[0])
                assert all(same(infos["final_info"][k][i], v) for k, v in wanted[4].items())
                last = single.reset()[0]
            assert same(obs[i], last)
    assert ends >= 2 * n
    env.close()


def test_with_autoreset_disabled_rows_are_reset_by_mask():
    env = vector("Hopper", 3, autoreset_mode="disabled", max_episode_steps=4)
    assert env.metadata["autoreset_mode"] == AutoresetMode.DISABLED
    env.set_params({"torso_mass": 1.0})
    first, _ = env.reset(seed=[1, 2, 3])
    for action in actions(env, 4):
        before, _, _, truncated, infos = env.step(action)
        assert "final_obs" not in infos
    assert truncated.all()
    options = {"reset_mask": np.array([True, False, True]), "params": {"world_friction": 1.5}}
    after, _ = env.reset(seed=[1, None, 9], options=options)
    assert "reset_mask" in options
    assert same(after[0], first[0]) and same(after[1], before[1]) and not same(after[2], first[2])
    wanted = [{"world_friction": f, "torso_mass": 1.0} for f in (1.5, 2.0, 1.5)]
    assert env.params == wanted


def test_parameters_of_many_are_set_in_three_ways():
    env = vector("Hopper", 2)
    env.set_params({"torso_mass": 1.0})
    assert env.params == [{"world_friction": 2.0, "torso_mass": 1.0}] * 2
    env.set_params([{"torso_mass": 2.0}, {"world_friction": 0.5}])
    assert env.params == [{"world_friction": 2.0, "torso_mass": 2.0}, {"world_friction": 0.5, "torso_mass": 1.0}]
    env.set_params(np.array([[0.5, 0.25], [1.5, 0.75]]))
    assert env.params == [{"world_friction": 0.5, "torso_mass": 0.25}, {"world_friction": 1.5, "torso_mass": 0.75}]
    assert [e.unwrapped.model.body_mass[1] for e in env.envs] == [0.25, 0.75]


def test_what_cannot_be_set_for_many_is_refused_and_nothing_changes():
    env = vector("Hopper", 2)
    for params, message in (
        ([{"torso_mass": 1.0}], "found 1 parameter mappings for 2 environments"),
        (np.ones((2, 3)), r"shape \(2, 3\); expected \(2, 2\) for world_friction, torso_mass"),
        (np.ones(2), r"shape \(2,\)"),
        ([{"torso_mass": 1.0}, {"torso_mass": 9.0}], "outside"),
        ({"torso_mass": 9.0}, "outside"),
    ):
        with pytest.raises(ValueError, match=message):
            env.set_params(params)
        assert env.params == [env.nominal] * 2
    for kwargs, message in (({"autoreset_mode": "never"}, "unknown; expected one of next_step, same"),):
        with pytest.raises(ValueError, match=message):
            vector("Hopper", 1, **kwargs)
    with pytest.raises(ValueError, match="num_envs=0"):
        vector("Hopper", 0)


def test_many_draw_their_own_parameters_with_same_step_reset_by_default():
    env = vector("Hopper", 2, randomize=True, friction_mode="floor")
    assert env.metadata["autoreset_mode"] == AutoresetMode.SAME_STEP
    assert env.envs[0].get_wrapper_attr("_max_episode_steps") == 1000
    env.reset(seed=0)
    first = env.params
    assert first[0] != first[1]
    assert first[1] == make("Hopper", randomize=True, friction_mode="floor").reset(seed=1)[1]["params"]
    ended = np.zeros(2, bool)
    for action in actions(env, 200):
        _, _, terminated, _, _ = env.step(action)
        ended |= terminated
        assert [now != then for now, then in zip(env.params, first, strict=True)] == ended.tolist()
    assert ended.all()


def test_the_engine_sets_them_one_by_one():
    env = environments.make_vector(EnvSpec("ctrlrl/RobustHopper-v0", {"uncertainty": "1d"}, n_envs=2, backend="sync"))
    environments.set_params(env, [{"world_friction": 0.5}, {"world_friction": 1.0}])
    assert env.call("params") == ({"world_friction": 0.5}, {"world_friction": 1.0})


@pytest.mark.parametrize("autoreset", ["same_step", "disabled"])
def test_the_native_form_gives_what_the_engines_own_gives(autoreset):
    kwargs = {"uncertainty": "force", "randomize": True, "max_episode_steps": 6}
    spec = EnvSpec("ctrlrl/RobustAnt-v0", kwargs, n_envs=3, backend="sync")
    theirs, ours = (
        environments.make_vector(spec, autoreset=autoreset),
        vector("Ant", 3, autoreset_mode=autoreset, **kwargs),
    )
    seeds = [4, 9, 2]
    assert same(ours.reset(seed=seeds)[0], theirs.reset(seed=seeds)[0])
    for action in actions(ours, 15):
        mine, other = ours.step(action), theirs.step(action)
        assert same(mine[:4], other[:4]) and same(*(list(x[4].get("final_obs", [])) for x in (mine, other)))
        ended = mine[2] | mine[3]
        if autoreset == "disabled" and ended.any():
            options = {"reset_mask": ended}
            again = [env.reset(seed=[None, 5, None], options=options)[0] for env in (ours, theirs)]
            assert same(*again) and "reset_mask" in options
