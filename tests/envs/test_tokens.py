"""Token tasks: worked cases, optimum and random scores, seeds, and that the two kinds of environment agree."""

import pickle
import warnings

import ctrlrl_envs
import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import AutoresetMode

RANDOM = {"Sort": 1 / 12, "Copy": 1 / 12, "Arithmetic": 1 / 14, "Format": 0.153, "Ladder": 0.0152, "Pattern": 1 / 4}
SMALL = {
    "Sort": {"digits": 3, "size": 3},
    "Copy": {"digits": 3, "size": 2, "binary": True},
    "Arithmetic": {"digits": 4, "turns": 2},
    "Format": {"digits": 3, "room": 5, "weights": [1, 2, 3]},
    "Ladder": {"rungs": 3, "binary": False},
    "Pattern": {"size": 3, "pattern": [3, 3, 0], "binary": True},
}
NAMES = list(RANDOM)
each = pytest.mark.parametrize("name", NAMES)


def single(name, **kwargs):
    return gym.make(f"ctrlrl/Token{name}-v0", **kwargs)


def vector(name, n, **kwargs):
    return gym.make_vec(
        f"ctrlrl/Token{name}-v0", num_envs=n, vectorization_mode="vector_entry_point", vector_kwargs={}, **kwargs
    )


def play(env, actions, seed=None, options=None):
    """Reset, take ``actions`` until the end, and return the last step's results with the reset's info."""
    _, start = env.reset(seed=seed, options=options)
    for action in actions:
        obs, reward, terminated, truncated, info = env.step(action)
        assert not truncated and 0.0 <= reward <= 1.0
        if terminated:
            return obs, reward, info, start
        assert reward == 0.0 and set(info) == {"turn", "task"}
    raise AssertionError("the episode did not end")


def start_of(env, wanted):
    """A seed whose prompt, in words, begins with ``wanted``."""
    words, prompt = env.unwrapped.task.words, env.metadata["tokens"]["prompt"]
    for seed in range(20_000):
        obs, _ = env.reset(seed=seed)
        said = [words[token - 1] for token in obs[:prompt]]
        if said[: len(wanted)] == wanted:
            return seed
    raise AssertionError(wanted)


def say(env, text):
    return [env.unwrapped.task.words.index(word) for word in text.split()]


# -- all tasks ------------------------------------------------------------------------------


def test_all_are_registered():
    assert ctrlrl_envs.__doc__
    assert {f"ctrlrl/Token{name}-v0" for name in NAMES} <= set(gym.registry)
    assert all(gym.spec(f"ctrlrl/Token{name}-v0").max_episode_steps is None for name in NAMES)


@each
@pytest.mark.parametrize("sizes", ["default", "small"])
def test_gymnasium_finds_no_fault(name, sizes):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_env(single(name, **(SMALL[name] if sizes == "small" else {})).unwrapped)


@each
def test_spaces_and_sizes(name):
    env = single(name)
    tokens = env.metadata["tokens"]
    assert set(tokens) == {"vocabulary", "prompt", "length"}
    assert 4 <= tokens["vocabulary"] <= 16 and tokens["prompt"] <= 8 and tokens["length"] <= 18
    assert env.action_space == gym.spaces.Discrete(tokens["vocabulary"])
    assert env.observation_space == gym.spaces.MultiDiscrete([tokens["vocabulary"] + 1] * tokens["length"])
    rows = vector(name, 3)
    assert rows.metadata["tokens"] == tokens and rows.metadata["autoreset_mode"] == AutoresetMode.DISABLED
    assert rows.single_observation_space == env.observation_space and rows.single_action_space == env.action_space
    assert rows.unwrapped.spec.id == env.spec.id


@each
@pytest.mark.parametrize("sizes", ["default", "small"])
def test_the_solution_scores_one_and_nothing_else_is_appended(name, sizes):
    env = single(name, **(SMALL[name] if sizes == "small" else {}))
    tokens = env.metadata["tokens"]
    for seed in range(30):
        obs, info = env.reset(seed=seed)
        assert obs.dtype == np.int64 and (obs[: tokens["prompt"]] > 0).all() and (obs[tokens["prompt"] :] == 0).all()
        solution = info["solution"]
        assert solution.shape == (tokens["length"] - tokens["prompt"],)
        for t, action in enumerate(solution):
            # where there is nothing to choose the action does not matter
            assert (info["turn"] >= 0) == (action >= 0)
            before = obs
            obs, reward, terminated, truncated, info = env.step(max(action, 0))
            changed = np.flatnonzero(obs != before)
            assert changed.tolist() == [tokens["prompt"] + t] and before[changed] == 0
            assert action < 0 or obs[tokens["prompt"] + t] == action + 1
            if terminated:
                break
        assert terminated and not truncated and reward == 1.0
        assert info["success"] is True and info["is_success"] is True and info["turn"] == -1
        assert (info["rewards"] == 1.0).all()
        assert (solution[t + 1 :] == -1).all()


@each
def test_the_random_policy_scores_what_the_docstring_says(name):
    n = 8000
    env = vector(name, n)
    rng = np.random.default_rng(0)
    env.reset(seed=0)
    total, ended = np.zeros(n), np.zeros(n, dtype=bool)
    while not ended.all():
        _, reward, ended, _, _ = env.step(rng.integers(env.metadata["tokens"]["vocabulary"], size=n))
        total += reward
    error = total.std() / np.sqrt(n)
    assert error < 0.003 and abs(total.mean() - RANDOM[name]) < 3.5 * error + 0.0005


@each
def test_a_seed_fixes_the_prompt_and_all_that_follows(name):
    a, b = single(name), single(name)
    starts = set()
    for seed in range(20):
        (x, i), (y, j) = a.reset(seed=seed), b.reset(seed=seed)
        assert (x == y).all() and (i["solution"] == j["solution"]).all() and i["task"] == j["task"]
        starts.add(tuple(x))
    assert len(starts) > 15 or name == "Pattern"
    assert (a.reset()[0] == b.reset()[0]).all()
    for action in range(4):
        if name != "Format":
            assert all((p == q).all() for p, q in [(a.step(action)[0], b.step(action)[0])])


@each
@pytest.mark.parametrize("sizes", ["default", "small"])
def test_vector_and_single_agree_exactly(name, sizes):
    kwargs = SMALL[name] if sizes == "small" else {}
    n = 7
    rows, ones = vector(name, n, **kwargs), [single(name, **kwargs) for _ in range(n)]
    rng = np.random.default_rng(1)
    seeds = [3, 3, 5, 8, 13, 21, 34]
    obs, infos = rows.reset(seed=seeds)
    solution = infos["solution"]
    starts = [one.reset(seed=s) for one, s in zip(ones, seeds, strict=True)]
    ended = np.zeros(n, dtype=bool)
    for step in range(40):
        if step == 0 or ended.any():
            if step:
                # reset what ended, twice with seeds of their own and once going on with the row's stream
                again = [100 + step + i if step % 3 else None for i in range(n)]
                obs, infos = rows.reset(seed=again, options={"reset_mask": ended})
                for i in np.flatnonzero(ended):
                    starts[i] = ones[i].reset(seed=again[i])
                    assert (infos["solution"][i] == starts[i][1]["solution"]).all()
                    assert (obs[i] == starts[i][0]).all()
                    assert not infos["success"][i] and infos["answer"][i] == -1 and not infos["rewards"][i].any()
                solution = infos["solution"]
            for key in ("turn", "task"):
                assert infos[key].shape == (n,)
        # mostly the best action, so that successes are seen too
        t = (obs > 0).sum(1) - rows.metadata["tokens"]["prompt"]
        best = solution[np.arange(n), t]
        wild = rng.integers(rows.metadata["tokens"]["vocabulary"], size=n)
        action = np.where((rng.random(n) < 0.8) & (best >= 0), best, wild)
        obs, reward, ended, truncated, infos = rows.step(action)
        assert not truncated.any() and reward.shape == (n,)
        for i, one in enumerate(ones):
            o, r, end, _, info = one.step(action[i])
            assert (o == obs[i]).all() and r == reward[i] and end == ended[i]
            for key, value in info.items():
                assert np.array_equal(infos[key][i], value), key
            assert ("answer" in info) == end and ("void" in info) == (end and name == "Arithmetic")
            if not end:
                assert infos["answer"][i] == -1 and not infos["success"][i] and not infos["rewards"][i].any()


@each
def test_ended_rows_stay_as_they_are(name):
    env = vector(name, 2)
    _, start = env.reset(seed=[1, 2])
    for action in start["solution"].T:
        obs, _, ended, _, infos = env.step(np.maximum(action, 0))
        if ended.all():
            break
    later, reward, still, _, after = env.step(np.zeros(2, dtype=np.int64))
    assert ended.all() and (later == obs).all() and not reward.any() and still.all() and after["success"].all()
    assert (after["answer"] == infos["answer"]).all() and (after["turn"] == -1).all()
    obs[:] = 0
    assert (later > 0).any() and (env.step([0, 0])[0] == later).all()


@each
@pytest.mark.parametrize("make", [single, lambda name: vector(name, 1)], ids=["single", "vector"])
def test_pickling_keeps_the_state(name, make):
    env = make(name)
    many = isinstance(env, gym.vector.VectorEnv)
    env.reset(seed=4)
    env.step([1] if many else 1)
    copy = pickle.loads(pickle.dumps(env))
    for action in (0, 1, 0):
        a, b = ([action], [action]) if many else (action, action)
        x, y = env.step(a), copy.step(b)
        assert all(np.array_equal(p, q) for p, q in zip(x[:4], y[:4], strict=True))
    assert np.array_equal(env.reset()[0], copy.reset()[0])


def test_what_the_user_can_get_wrong_is_said():
    with pytest.raises(ValueError, match=r"size=0 must be an integer"):
        single("Sort", size=0)
    with pytest.raises(ValueError, match="too many to number"):
        single("Sort", size=20)
    with pytest.raises(ValueError, match="three digits in base 2"):
        single("Arithmetic", digits=2, turns=3)
    with pytest.raises(ValueError, match="room=4"):
        single("Format", room=4)
    with pytest.raises(ValueError, match="weights"):
        single("Format", weights=[1, 1])
    with pytest.raises(ValueError, match="pattern"):
        single("Pattern", pattern=[1, 2])
    with pytest.raises(ValueError, match="rung=7"):
        single("Ladder").reset(options={"rung": 7})
    with pytest.raises(ValueError, match=r"\['level'\]; this environment knows: rung"):
        single("Ladder").reset(options={"level": 1})
    env = vector("Sort", 2)
    with pytest.raises(gym.error.ResetNeeded):
        env.step([0, 0])
    with pytest.raises(ValueError, match="reset_mask"):
        env.reset(options={"reset_mask": np.array([1, 0])})
    with pytest.raises(ValueError, match="3 seeds for 2"):
        env.reset(seed=[1, 2, 3])
    env.reset(seed=0)
    with pytest.raises(ValueError, match="from 0 to 11"):
        env.step([0, 12])


# -- worked cases ---------------------------------------------------------------------------


def test_sort():
    env = single("Sort", size=3)
    seed = start_of(env, ["sort", "3", "1", "4"])
    for text, reward in (("1 3 4", 1.0), ("1 3 3", 2 / 3), ("3 1 4", 1 / 3), ("= sort 0", 0.0)):
        _, found, info, start = play(env, say(env, text), seed)
        assert found == pytest.approx(reward) and info["success"] == (reward == 1.0)
        assert info["rewards"].tolist() == [found] and start["turn"] == 0 and start["task"] == 0
    strict = single("Sort", size=3, binary=True)
    assert [play(strict, say(env, text), seed)[1] for text in ("1 3 4", "1 3 3")] == [1.0, 0.0]


def test_copy_and_the_words_shown():
    env = single("Copy", size=2, render_mode="ansi")
    seed = start_of(env, ["copy", "7", "2"])
    assert play(env, say(env, "7 2"), seed)[1] == 1.0
    assert env.render() == "copy 7 2 = | 7 2"
    assert play(env, say(env, "2 2"), seed)[1] == 0.5


def test_equal_answers_have_equal_ids():
    env = single("Copy", size=2)
    answers = {
        (seed, text): play(env, say(env, text), seed)[2]["answer"]
        for seed in (0, 1)
        for text in ("0 1", "1 0", "0 0", "= =")
    }
    assert len(set(answers.values())) == 4
    assert all(answers[0, text] == answers[1, text] for _, text in answers)


def test_arithmetic():
    env = single("Arithmetic", render_mode="ansi")
    seed = start_of(env, ["7", "+", "5"])
    obs, info = env.reset(seed=seed)
    numbers = []
    turns = [info["turn"]]
    # right, wrong, unreadable
    for action in say(env, "1 2 0 0 0 0") + say(env, "0 0 0 0 0 0") + say(env, "+ 0"):
        obs, reward, terminated, _, info = env.step(action)
        turns.append(info["turn"])
    said = env.render().split()
    assert said[:5] == ["7", "+", "5", "=", "|"] and said[5:7] == ["1", "2"]
    c, d = int(said[9]), int(said[15])
    assert said[7:11] == ["right", "+", str(c), "="] and said[13:17] == ["wrong", "+", str(d), "="]
    assert turns == [0, 0, -1, -1, -1, -1, 1, 1, -1, -1, -1, -1, 2, 2, -1]
    second, third = divmod(12 + c, 10), divmod(12 + c + d, 10)
    shares = [1.0, (0 in second[:1]) / 2 + (second[1] == 0) / 2, (third[1] == 0) / 2]
    assert terminated and info["rewards"].tolist() == shares and reward == pytest.approx(np.mean(shares))
    assert not info["success"] and info["void"].tolist() == [False] * 12 + [True] * 2
    assert numbers == []


def test_arithmetic_asks_for_the_true_sum_after_a_wrong_answer():
    env = single("Arithmetic", turns=2)
    for seed in range(30):
        obs, info = env.reset(seed=seed)
        a, b = int(obs[0]) - 1, int(obs[2]) - 1
        wrong = [9, (int(info["solution"][1]) + 1) % 10]
        for action in [*wrong, 0, 0, 0, 0]:
            obs, *_ = env.step(action)
        c = int(obs[8]) - 1
        assert env.unwrapped.task.words[obs[6] - 1] == "wrong"
        for action in divmod(a + b + c, 10):
            _, reward, terminated, _, info = env.step(action)
        assert terminated and reward == 0.5 and info["rewards"].tolist() == [0.0, 1.0] and not info["void"].any()


def test_arithmetic_with_one_all_or_nothing_reward():
    env = single("Arithmetic", turns=2, binary=True)
    _, info = env.reset(seed=0)
    solution = np.maximum(info["solution"], 0)
    assert play(env, solution, 0)[1] == 1.0
    solution[0] = 5
    _, reward, info, _ = play(env, solution, 0)
    assert reward == 0.0 and info["rewards"].tolist() == [0.5, 1.0]


@pytest.mark.parametrize(
    ("text", "correct", "form", "brief"),
    [
        ("answer 1 5 stop", 1.0, 1.0, 1.0),
        ("stop", 0.0, 0.5, 1.0),
        ("answer 1 5 stop", 1.0, 1.0, 1.0),
        ("3 1 answer 1 5 stop", 1.0, 1.0, 0.5),
        ("answer 5 1 stop", 0.0, 1.0, 1.0),
        ("answer 1 stop", 0.5, 1.0, 1.0),
        ("answer 1 5 5 5 stop", 0.5, 1.0, 0.5),
        ("answer answer 1 5 stop", 0.0, 0.5, 0.75),
        ("1 5 stop", 0.0, 0.5, 1.0),
        ("3 1 4 1 5 answer 1 5", 1.0, 0.5, 0.0),
        ("3 1 4 1 5 9 2 answer", 0.0, 0.5, 0.0),
        ("3 1 4 1 5 9 2 6", 0.0, 0.0, 0.0),
    ],
)
def test_format(text, correct, form, brief):
    env = single("Format", size=3)
    seed = start_of(env, ["3", "1", "5"])
    _, reward, info, _ = play(env, say(env, text), seed)
    assert info["rewards"].tolist() == [correct, form, brief]
    assert reward == pytest.approx(0.6 * correct + 0.2 * form + 0.2 * brief)
    assert info["success"] == (correct == form == 1.0)


def test_scratch_does_not_change_the_answer_but_its_place_is_paid_for():
    env = single("Format")
    short, long = (play(env, say(env, text), 0) for text in ("answer 1 5 stop", "2 2 answer 1 5 stop"))
    assert short[2]["answer"] == long[2]["answer"] and short[1] > long[1]
    assert short[2]["answer"] != play(env, say(env, "answer 5 1 stop"), 0)[2]["answer"]
    only_correct = single("Format", weights=[1, 0, 0])
    assert play(only_correct, say(env, "0 0 stop"), 0)[1] == 0.0


def test_ladder():
    env = single("Ladder")
    for rung in (1, 3, 6):
        obs, info = env.reset(seed=9, options={"rung": rung})
        digits = sorted(int(t) - 1 for t in obs[:rung])
        assert info["task"] == rung - 1 and (obs[rung:6] == 11).all() and obs[6] == 12
        assert info["solution"].tolist() == digits + [-1] * (6 - rung)
        assert play(env, digits, 9, {"rung": rung})[1] == 1.0
        assert play(env, [11, *digits[1:]], 9, {"rung": rung})[1] == 0.0
    partial = single("Ladder", binary=False)
    wrong = [11, *sorted(int(t) - 1 for t in partial.reset(seed=9, options={"rung": 3})[0][:3])[1:]]
    assert play(partial, wrong, 9, {"rung": 3})[1] == pytest.approx(2 / 3)
    rungs = [env.reset(seed=s)[1]["task"] for s in range(600)]
    assert np.bincount(rungs).min() > 70 and len(np.bincount(rungs)) == 6
    rows = vector("Ladder", 3)
    assert rows.reset(seed=0, options={"rung": [1, 4, 6]})[1]["task"].tolist() == [0, 3, 5]
    assert rows.reset(seed=0, options={"rung": 2})[1]["task"].tolist() == [1, 1, 1]


def test_pattern():
    env = single("Pattern")
    assert env.metadata["tokens"] == {"vocabulary": 4, "prompt": 1, "length": 5}
    assert env.reset(seed=1)[0].tolist() == env.reset(seed=2)[0].tolist() == [1, 0, 0, 0, 0]
    assert [play(env, answer)[1] for answer in ([1, 2, 3, 0], [1, 2, 3, 3], [0, 0, 0, 0])] == [1.0, 0.75, 0.25]
    other = single("Pattern", pattern=[3, 3, 3, 3], binary=True)
    assert [play(other, answer)[1] for answer in ([3, 3, 3, 3], [3, 3, 3, 0])] == [1.0, 0.0]
