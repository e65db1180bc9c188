"""Multimodal toys as environments: worked episodes, what stays hidden, single against vector, refusals."""

import math
import warnings

import ctrlrl_envs
import gymnasium as gym
import numpy as np
import pytest
from ctrlrl_envs.multimodal import hidden_bit, one_state_bump, two_goal_reacher
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import AutoresetMode

IDS = ["HiddenBit", "TwoGoalReacher", "OneStateBump"]
HIDDEN = IDS[:2]
OTHER = {
    "HiddenBit": {"tries": 2, "tolerance": 0.5, "bound": 1.6},
    "TwoGoalReacher": {"tries": 3, "tolerance": 0.4, "cost": 0.05, "max_episode_steps": 7},
    "OneStateBump": {"centre": -1.0, "width": 0.5, "bound": 2.0},
}
each = pytest.mark.parametrize("name", IDS)
hidden = pytest.mark.parametrize("name", HIDDEN)


def single(name, **kwargs):
    return gym.make(f"ctrlrl/{name}-v0", **kwargs)


def vector(name, n, **kwargs):
    return gym.make_vec(f"ctrlrl/{name}-v0", num_envs=n, vectorization_mode="vector_entry_point", **kwargs)


# -- worked episodes --------------------------------------------------------------------------


def test_a_hidden_bit_episode_step_by_step():
    env = single("HiddenBit", tries=3)
    _, info = env.reset(seed=0)
    bit = env.unwrapped.bit
    assert info == {} and bit in (-1, 1)
    for action in (-bit, 1.25 * bit):
        assert env.step([action])[1:] == (0.0, False, False, {})
    won = {"success": True, "is_success": True}
    assert env.step([1.15 * bit])[1:] == (1.0, True, False, won)
    # after the end nothing changes any more
    assert env.step([bit])[1:] == (0.0, True, False, won)
    env.reset(seed=0)
    env.step([0.0]), env.step([0.0])
    assert env.step([0.75 * bit])[1:] == (0.0, True, False, {"success": False, "is_success": False})
    assert env.step([bit])[1:] == (0.0, True, False, {"success": False, "is_success": False})


def test_a_two_goal_episode_step_by_step():
    env = single("TwoGoalReacher", tries=3, cost=0.01)
    obs, _ = env.reset(seed=0)
    bit = env.unwrapped.bit
    script = [
        # move, position after it, tries left
        ((0.0, 1.0), (0, 0), 2),  # between the mouths
        ((-1.1 * bit, 5.0), (-bit, 0), 2),  # into the wrong corridor, at its mouth
        ((2.0 * bit, 0.25), (-bit, 0.25), 2),  # its walls hold
        ((0.0, -3.0), (-bit, 0.25), 2),  # never backwards
        ((0.0, 3.0), (-bit, 1.25), 2),  # at most 1 forward
        ((0.0, 1.0), (0, 0), 1),  # the wrong goal: back to the fork
        ((0.9 * bit, 0.0), (bit, 0), 1),
        ((0.0, 1.0), (bit, 1), 1),
    ]
    for move, position, left in script:
        obs, reward, terminated, truncated, info = env.step(np.array(move, np.float32))
        assert obs.tolist() == list(position) and reward == -0.01 and not terminated and not truncated and info == {}
        assert env.unwrapped._left == left
    obs, reward, terminated, truncated, info = env.step(np.array([0.0, 1.0], np.float32))
    assert obs.tolist() == [bit, 2] and reward == 0.99 and terminated and not truncated
    assert info == {"success": True, "is_success": True}
    assert env.unwrapped.step([bit, 1.0])[1:3] == (0.0, True)
    env.reset(seed=0)
    for _ in range(2):
        assert not env.step([1.3, 0.0])[2]
    assert env.step([1.3, 0.0])[1:] == (-0.01, True, False, {"success": False, "is_success": False})


def test_a_point_that_stays_in_its_corridor_is_cut_after_thirty_steps():
    env = single("TwoGoalReacher")
    env.reset(seed=0)
    for k in range(30):
        obs, _, terminated, truncated, info = env.step([1.0, 0.0])
        assert obs.tolist() == [1, 0] and not terminated and truncated == (k == 29) and info == {}


# -- what is hidden stays hidden --------------------------------------------------------------


@hidden
def test_nothing_shown_before_the_end_tells_the_bit(name):
    """Both bits, the same actions: the same observations and infos up to a reward or the end."""
    rng = np.random.default_rng(3)
    for _ in range(50):
        actions = rng.choice([-1.0, 1.0, 0.3], (12, 2)).astype(np.float32)
        shown = {}
        env = single(name, tries=3)
        seed = int(rng.integers(1000))
        while len(shown) < 2:
            obs, info = env.reset(seed=seed)
            bit, seed = env.unwrapped.bit, seed + 1
            seen = [(obs.tolist(), info)]
            for action in actions:
                obs, reward, terminated, _, info = env.step(action[: env.action_space.shape[0]])
                if reward > 0 or terminated:
                    break
                seen.append((obs.tolist(), info))
            shown[bit] = seen
        assert all(a == b for a, b in zip(shown[-1], shown[1], strict=False))


@hidden
def test_nothing_a_vector_shows_before_the_end_tells_the_bit(name):
    env = vector(name, 40, tries=6)
    obs, infos = env.reset(seed=0)
    rng = np.random.default_rng(0)
    for _ in range(5):
        for value in (obs, infos["success"], infos["is_success"]):
            assert (value == value[0]).all()
        # one action for all, missing or walking at least one more step
        action = rng.choice([0.0, 0.5]) if name == "HiddenBit" else 1.0
        obs, _, ended, _, infos = env.step(np.tile([action, 0.0][: obs.shape[1]], (40, 1)))
        assert not ended.any() and set(infos) == {"success", "is_success"}
    assert set(env.unwrapped.bit) == {-1, 1}


@hidden
def test_bits_are_fair_and_independent(name):
    env = vector(name, 64)
    bits = []
    for k in range(200):
        env.reset(seed=7 if k == 0 else None)
        bits.append(env.unwrapped.bit.copy())
    bits = np.array(bits)
    # 12,800 signs: their sums are normal to four deviations, over rows, over time and between neighbours
    assert abs(bits.sum()) < 4 * math.sqrt(bits.size)
    assert abs((bits[1:] * bits[:-1]).sum()) < 4 * math.sqrt(bits.size)
    assert abs((bits[:, 1:] * bits[:, :-1]).sum()) < 4 * math.sqrt(bits.size)


# -- the interface ----------------------------------------------------------------------------


@each
@pytest.mark.parametrize("kwargs", ["default", "other"])
def test_gymnasium_finds_no_fault(name, kwargs):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # wide on purpose: the docstrings say why; and no bound, where nothing shall squash
        warnings.filterwarnings("ignore", message=".*symmetric and normalized space.*")
        warnings.filterwarnings("ignore", message=".*action space m[a-z]+imum value is -?infinity.*")
        check_env(single(name, **(OTHER[name] if kwargs == "other" else {})).unwrapped)


def test_ids_spaces_and_limits():
    assert ctrlrl_envs.__doc__
    limits = {name: gym.spec(f"ctrlrl/{name}-v0").max_episode_steps for name in IDS}
    assert limits == {"HiddenBit": None, "OneStateBump": None, "TwoGoalReacher": 30}
    box, one = gym.spaces.Box, (1,)
    assert single("HiddenBit").action_space == box(-3, 3, one) and single("OneStateBump").action_space == box(
        -np.inf, np.inf, one
    )
    assert (
        single("HiddenBit", bound=2.0).action_space == single("OneStateBump", bound=2.0).action_space == box(-2, 2, one)
    )
    assert single("TwoGoalReacher").action_space == box(-3, 3, (2,))
    for name in IDS:
        env, rows = single(name), vector(name, 3)
        assert rows.single_observation_space == env.observation_space and rows.single_action_space == env.action_space
        assert rows.metadata["autoreset_mode"] == AutoresetMode.DISABLED and rows.num_envs == 3
        obs, _ = rows.reset(seed=0)
        assert obs in rows.observation_space and env.reset(seed=0)[0] in env.observation_space


@each
@pytest.mark.parametrize("kwargs", ["default", "other"])
def test_vector_and_single_agree_exactly(name, kwargs):
    kwargs = OTHER[name] if kwargs == "other" else {}
    n, rng = 6, np.random.default_rng(1)
    rows, ones = vector(name, n, **kwargs), [single(name, **kwargs) for _ in range(n)]
    size = rows.single_action_space.shape[0]
    seeds = [3, 3, 5, 8, 13, 21]
    obs, _ = rows.reset(seed=seeds)
    for i, one in enumerate(ones):
        assert (one.reset(seed=seeds[i])[0] == obs[i]).all()
    seen = {"success": 0, "failure": 0, "truncated": 0}
    for step in range(600):
        action = (rng.choice([-1.0, 1.0], (n, size)) * rng.uniform(0.5, 1.5, (n, size))).astype(np.float32)
        action[:, -1:] *= rng.random() < 0.8 or size == 1
        obs, reward, terminated, truncated, infos = rows.step(action)
        assert obs.dtype == np.float32 and reward.dtype == np.float64
        for i, one in enumerate(ones):
            o, r, end, cut, info = one.step(action[i])
            assert (o == obs[i]).all() and (r, end, cut) == (reward[i], terminated[i], truncated[i])
            assert info.get("success", False) == infos["success"][i] == infos["is_success"][i]
            seen["success"] += info.get("success", False)
            seen["failure"] += end and not info.get("success", False)
            seen["truncated"] += cut
        ended = terminated | truncated
        if ended.any():
            # mostly going on with each row's stream, past the block of numbers that is drawn ahead
            again = [None if step % 7 or i == 0 else 100 + step + i for i in range(n)]
            shown, kept = infos["success"], infos["success"].copy()
            obs, infos = rows.reset(seed=again, options={"reset_mask": ended})
            assert (shown == kept).all()
            for i in np.flatnonzero(ended):
                assert (ones[i].reset(seed=again[i])[0] == obs[i]).all() and not infos["success"][i]
            if name in HIDDEN:
                assert rows.unwrapped.bit.tolist() == [one.unwrapped.bit for one in ones]
    assert seen["failure"] > 10 and (seen["success"] > 100) == (name in HIDDEN)
    assert (seen["truncated"] > 20) == (name == "TwoGoalReacher" and bool(kwargs))


@each
def test_ended_rows_stay_as_they_are(name):
    env = vector(name, 3, **({"max_episode_steps": 3} if name == "TwoGoalReacher" else {}))
    env.reset(seed=0)
    size = env.single_action_space.shape[0]
    for _ in range(4):
        before = env.step(np.full((3, size), 1.0))
    assert (before[2] | before[3]).all()
    for value in (1.0, -1.0):
        after = env.step(np.full((3, size), value))
        assert (after[0] == before[0]).all() and not after[1].any()
        assert all((x == y).all() for x, y in zip(after[2:4], before[2:4], strict=True))
        assert (after[4]["success"] == before[4]["success"]).all()
    # only the row that is reset begins again, and what was handed out does not change with it
    _, infos = env.reset(options={"reset_mask": np.array([False, True, False])})
    assert not infos["success"][1] and (infos["success"] == after[4]["success"])[[0, 2]].all()
    _, reward, terminated, truncated, _ = env.step(np.full((3, size), 0.0))
    assert not reward[[0, 2]].any() and (terminated | truncated)[[0, 2]].all()
    assert name == "OneStateBump" or not (terminated | truncated)[1]


@hidden
def test_a_seed_fixes_the_bits(name):
    env, rows = single(name), vector(name, 20)

    def bits(seed):
        env.reset(seed=seed)
        found = [env.unwrapped.bit]
        for _ in range(15):
            env.reset()
            found.append(env.unwrapped.bit)
        return found

    assert bits(4) == bits(4) != bits(5)
    rows.reset(seed=100)
    assert rows.unwrapped.bit.tolist() == [bits(100 + i)[0] for i in range(20)]


@pytest.mark.parametrize(
    ("name", "kwargs", "message"),
    [
        ("HiddenBit", {"tries": 0}, "tries=0 must be an integer of at least 1"),
        ("HiddenBit", {"tries": 2.5}, "tries=2.5 must be an integer"),
        ("HiddenBit", {"tries": True}, "tries=True must be an integer"),
        ("HiddenBit", {"tolerance": 0.0}, "tolerance=0.0 must be a number above 0 and at most 1"),
        ("HiddenBit", {"tolerance": 1.5}, "tolerance=1.5 must be a number above 0 and at most 1"),
        ("HiddenBit", {"tolerance": "wide"}, "tolerance='wide' must be a number"),
        ("HiddenBit", {"bound": 1.2}, "bound=1.2 must be a number above 1 . tolerance = 1.2"),
        ("TwoGoalReacher", {"bound": math.nan}, "bound=nan must be"),
        ("TwoGoalReacher", {"tries": -1}, "tries=-1 must be"),
        ("TwoGoalReacher", {"cost": -0.1}, "cost=-0.1 must be a number of at least 0 and below 1/6"),
        ("TwoGoalReacher", {"cost": 0.17}, "cost=0.17 must be"),
        ("OneStateBump", {"width": 0}, "width=0 must be a finite number above 0"),
        ("OneStateBump", {"centre": math.inf}, "centre=inf must be a finite number"),
        ("OneStateBump", {"bound": 0.0}, "bound=0.0 must be a number above 0"),
    ],
)
def test_wrong_arguments_are_refused_by_both_forms(name, kwargs, message):
    for make in (single, lambda name, **kwargs: vector(name, 2, **kwargs)):
        with pytest.raises(ValueError, match=message):
            make(name, **kwargs)


def test_wrong_calls_say_what_was_expected():
    env = vector("HiddenBit", 2)
    for begin in (env, single("TwoGoalReacher").unwrapped, single("HiddenBit").unwrapped):
        with pytest.raises(gym.error.ResetNeeded):
            begin.step([[0.0], [0.0]])
    env.reset(seed=0)
    for options, message in (
        ({"reset_mask": np.array([1, 0])}, "reset_mask must be bool"),
        ({"reset_mask": np.zeros(2, dtype=bool)}, "reset_mask must be bool"),
        ({"bit": 1}, r"\['bit'\]; this environment knows: reset_mask"),
    ):
        with pytest.raises(ValueError, match=message):
            env.reset(options=options)
    with pytest.raises(ValueError, match="3 seeds for 2"):
        env.reset(seed=[1, 2, 3])
    with pytest.raises(ValueError, match=r"shape \(2,\); expected \(2, 1\)"):
        env.step(np.zeros(2))
    with pytest.raises(ValueError, match="num_envs=0"):
        hidden_bit.HiddenBitVector(0)
    for call, message in (
        (lambda: hidden_bit.optimum(0), "tries=0"),
        (lambda: hidden_bit.gaussian_win_rate(0.0, 0.0), "std=0.0 must be above 0"),
        (lambda: hidden_bit.gaussian_ceiling(squash=1.1), "squash=1.1 must be a number above 1 . tolerance"),
        (lambda: hidden_bit.win_rate(np.zeros((2, 2))), r"shape \(2, 2\)"),
        (lambda: hidden_bit.win_rate([]), r"shape \(0,\)"),
        (lambda: two_goal_reacher.expected_return(0.7, 0.7), "at most 1 together"),
        (lambda: two_goal_reacher.gaussian_ceiling(cost=1.0), "cost=1.0"),
        (lambda: one_state_bump.expected_return(0.0, -1.0), "std=-1.0 must be at least 0"),
        (lambda: one_state_bump.expected_return(0.0, 1.0, width=0.0), "width=0.0"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
