"""Risky tasks: worked steps, chances, single against vector, physics left alone, refusals."""

import ctrlrl_envs  # noqa: F401 - registers the ids
import gymnasium as gym
import numpy as np
import pytest
from ctrlrl_envs.risky import safe_action, straight_action
from ctrlrl_envs.risky.point_mass import inside
from gymnasium.utils.env_checker import check_env

POINT = "ctrlrl/RiskyPointMass-v0"
MUJOCO = {"RiskyHalfCheetah": "HalfCheetah-v5", "RiskyHopper": "Hopper-v5", "RiskyWalker2d": "Walker2d-v5"}


def vector(n, **kwargs):
    return gym.make_vec(POINT, num_envs=n, vectorization_mode="vector_entry_point", **kwargs)


def episodes(policy, n, **kwargs):
    """Returns, violating steps and successes of ``n`` episodes."""
    env = vector(n, **kwargs)
    obs, _ = env.reset(seed=0)
    returns, violations = np.zeros(n), np.zeros(n)
    over = np.zeros(n, bool)
    while not over.all():
        obs, reward, terminated, truncated, info = env.step(policy(obs))
        returns += reward
        violations += info["violation"] & ~over
        over = terminated | truncated
    return returns, violations, info["is_success"]


# -- the point ------------------------------------------------------------------------------------


def test_a_step_is_paid_for_where_it_begins():
    env = gym.make(POINT, risk_prob=0.0).unwrapped
    obs, _ = env.reset(seed=3)
    assert obs.shape == (4,) and (obs[:2] >= 0.8).all() and (obs[:2] <= 0.85).all()
    np.testing.assert_allclose(obs[2:], 0.1)
    env.position = np.array([0.5, 0.81])
    _, reward, over, _, info = env.step([0.0, -0.1])
    # outside: the distance is sqrt(0.4^2 + 0.71^2)
    assert reward == pytest.approx(-np.hypot(0.4, 0.71) - 0.1) and not over
    assert info == {"violation": False, "cost": 0.0, "is_success": False}
    obs, reward, over, _, info = env.step([0.0, -0.1])
    assert reward == pytest.approx(-np.hypot(0.4, 0.61) - 0.1 - 50.0)
    assert info == {"violation": True, "cost": 50.0, "is_success": False}
    np.testing.assert_allclose(obs[:2], [0.5, 0.61], atol=1e-6)
    env.position = np.array([0.13, 0.13])
    assert env.step([0.0, 0.0])[2] is True


def test_moves_are_cut_and_the_square_has_walls():
    env = gym.make(POINT).unwrapped
    env.reset(seed=0)
    env.position = np.array([0.95, 0.02])
    np.testing.assert_allclose(env.step([5.0, -5.0])[0][:2], [1.0, 0.0])


def test_penalties_fall_as_often_as_said():
    """4.1 violating steps on the straight way, of which one in ten costs 50: about -20 of its return."""
    returns, violations, reached = episodes(straight_action, 4000)
    assert reached.all() and 3.5 < violations.mean() < 4.5
    fines = violations.mean() * 0.1 * 50
    calm = episodes(straight_action, 4000, risk_prob=1.0)[0].mean()
    assert returns.mean() - calm == pytest.approx(-fines, abs=1.5)


def test_the_safe_way_is_safe_and_arrives():
    returns, violations, reached = episodes(safe_action, 500)
    assert violations.sum() == 0 and reached.all()
    # dearer than the straight way without fines, cheaper than with them
    straight = {p: episodes(straight_action, 2000, risk_prob=p)[0].mean() for p in (1.0, 0.9)}
    assert straight[1.0] > returns.mean() > straight[0.9] + 5.0
    assert episodes(safe_action, 500, start="uniform")[1].sum() == 0


def test_uniform_starts_lie_outside_of_the_disc():
    obs, _ = vector(2000, start="uniform").reset(seed=1)
    assert not inside(obs[:, :2]).any()
    assert obs[:, :2].min() >= 0.1 - 1e-6 and obs[:, :2].max() <= 0.9 + 1e-6 and obs[:, 0].std() > 0.2


@pytest.mark.parametrize("start", ["corner", "uniform"])
def test_the_vector_is_as_many_single_ones(start):
    many = vector(5, start=start)
    ones = [gym.make(POINT, start=start) for _ in range(5)]
    obs, _ = many.reset(seed=7)
    singles = np.stack([one.reset(seed=7 + i)[0] for i, one in enumerate(ones)])
    assert np.array_equal(obs, singles)
    rng, over = np.random.default_rng(0), np.zeros(5, bool)
    for _ in range(60):
        action = straight_action(obs) + rng.normal(size=(5, 2)).astype(np.float32) * 0.05
        obs, reward, terminated, truncated, info = many.step(action)
        for i, one in enumerate(ones):
            if over[i]:
                continue
            o, r, te, tr, inf = one.step(action[i])
            assert np.array_equal(o, obs[i]) and r == reward[i] and (te, tr) == (terminated[i], truncated[i])
            assert (inf["violation"], inf["cost"]) == (info["violation"][i], info["cost"][i])
        over = terminated | truncated
    assert over.all()


@pytest.mark.parametrize(
    "kwargs, word", [({"risk_prob": 1.5}, "risk_prob"), ({"penalty": -1}, "penalty"), ({"start": "middle"}, "start")]
)
def test_impossible_arguments_are_refused(kwargs, word):
    with pytest.raises(ValueError, match=word):
        gym.make(POINT, **kwargs)


# -- MuJoCo ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["RiskyPointMass", *MUJOCO])
def test_gymnasiums_checker_is_content(name):
    check_env(gym.make(f"ctrlrl/{name}-v0").unwrapped, skip_render_check=True)


@pytest.mark.parametrize("name", MUJOCO)
def test_without_penalty_it_is_the_task_itself(name):
    risky, plain = gym.make(f"ctrlrl/{name}-v0", penalty=0.0), gym.make(MUJOCO[name])
    assert np.array_equal(risky.reset(seed=5)[0], plain.reset(seed=5)[0])
    plain.action_space.seed(0)
    for _ in range(30):
        action = plain.action_space.sample()
        mine, theirs = risky.step(action), plain.step(action)
        assert np.array_equal(mine[0], theirs[0]) and mine[1:3] == theirs[1:3]
        if mine[2]:
            break


@pytest.mark.parametrize("name", MUJOCO)
def test_every_risky_step_costs_the_penalty_where_that_is_certain(name):
    """With chance 1 the difference to the plain reward is the penalty, in risky states and nowhere else."""
    limit = {"max_velocity": 0.05} if "Cheetah" in name else {"max_angle": 0.01}
    env = gym.make(f"ctrlrl/{name}-v0", chance=1.0, **limit)
    plain = gym.make(MUJOCO[name])
    env.reset(seed=5), plain.reset(seed=5)
    env.action_space.seed(0)
    penalty = {"RiskyHalfCheetah": 70.0, "RiskyHopper": 50.0, "RiskyWalker2d": 30.0}[name]
    seen = set()
    for _ in range(60):
        action = env.action_space.sample()
        _, reward, over, _, info = env.step(action)
        _, expected, _, _, theirs = plain.step(action)
        risky = theirs["x_velocity"] > 0.05 if "Cheetah" in name else abs(plain.unwrapped.data.qpos[2]) >= 0.01
        assert info["violation"] == risky and info["cost"] == (penalty if risky else 0.0)
        assert reward == pytest.approx(expected - info["cost"])
        seen.add(bool(risky))
        if over:
            break
    assert seen == {True, False}


def test_the_chance_is_that_of_the_argument_and_the_seed_decides():
    def costs(seed):
        env = gym.make("ctrlrl/RiskyHalfCheetah-v0", max_velocity=1e-9, chance=0.25)
        env.reset(seed=seed)
        found = [env.step(np.zeros(6, np.float32))[4] for _ in range(200)]
        return [i["cost"] > 0 for i in found if i["violation"]]

    first = costs(1)
    assert first == costs(1) and first != costs(2)
    many = [c for s in range(6) for c in costs(s)]
    assert np.mean(many) == pytest.approx(0.25, abs=0.06)


@pytest.mark.parametrize("name, limit", [("RiskyHalfCheetah", 200), ("RiskyHopper", 500), ("RiskyWalker2d", 500)])
def test_episodes_are_as_long_as_in_the_paper(name, limit):
    assert gym.spec(f"ctrlrl/{name}-v0").max_episode_steps == limit
