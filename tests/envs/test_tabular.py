"""Finite worlds: tables, steps drawn from them, horizons, worked cells, exact optima, single against vector."""

import itertools
from collections import Counter, defaultdict
from fractions import Fraction

import ctrlrl_envs  # noqa: F401 - registers the ids
import gymnasium as gym
import numpy as np
import pytest
from ctrlrl_envs.tabular import rational
from gymnasium.utils.env_checker import check_env

HORIZONS = {"Ladder": 3, "TargetGrid": 20, "RiskyGrid": 50, "Homeostasis": 20, "WindyCliff": 100}
VARIANTS = [
    *((name, {}) for name in HORIZONS),
    ("Ladder", {"chance": 1, "gain": "1/2", "loss": 3}),
    ("TargetGrid", {"slip": 1.0, "layout": ["S#", "iG"]}),
    ("RiskyGrid", {"width": 3, "height": 5, "slip": "1/3", "risk": 1}),
    ("Homeostasis", {"length": 2, "luck": 0.3}),
    ("WindyCliff", {"width": 5, "height": 2, "wind": 0.25}),
]
UP, RIGHT, DOWN, LEFT = range(4)
F = Fraction


def world(name, **kwargs):
    return gym.make(f"ctrlrl/{name}-v0", **kwargs).unwrapped


def row(env, state, action):
    """The exact row as {(next, reward, terminated): probability}."""
    return {tuple(outcome[1:]): outcome[0] for outcome in env.exact()[state][action]}


# -- all of them ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name, kwargs", VARIANTS)
def test_every_row_is_a_distribution_over_states_that_exist(name, kwargs):
    env = world(name, **kwargs)
    exact = env.exact()
    states, actions = env.observation_space.n, env.action_space.n
    assert list(env.P) == list(exact) == list(range(states))
    assert env.initial_state_distrib.shape == (states,) and env.initial_state_distrib.sum() == 1
    for s, a in itertools.product(range(states), range(actions)):
        assert sum(p for p, *_ in exact[s][a]) == 1 and all(0 < p <= 1 for p, *_ in exact[s][a])
        assert sum(p for p, *_ in env.P[s][a]) == pytest.approx(1, abs=1e-12)
        for (p, to, reward, over), (q, *rest) in zip(env.P[s][a], exact[s][a], strict=True):
            assert [type(x) for x in (p, to, reward, over)] == [float, int, float, bool] and 0 <= to < states
            assert p == float(q) and [to, reward, over] == rest


@pytest.mark.parametrize("name", HORIZONS)
def test_steps_are_drawn_from_the_table(name):
    env = world(name)
    env.reset(seed=4)
    rows = [(s, a) for s in env.P for a in env.P[s] if len(env.P[s][a]) > 1][:: max(1, len(env.P) // 6)]
    n = 1500
    for s, a in rows[:6]:
        expected = defaultdict(float)
        for p, *outcome in env.P[s][a]:
            expected[tuple(outcome)] += p
        found = Counter()
        for _ in range(n):
            env.s = s
            to, reward, over, truncated, info = env.step(a)
            assert not truncated and info["prob"] in [o[0] for o in env.P[s][a]]
            found[to, reward, over] += 1
        assert set(found) <= set(expected)
        for outcome, p in expected.items():
            assert found[outcome] / n == pytest.approx(p, abs=4.5 * np.sqrt(p * (1 - p) / n))


@pytest.mark.parametrize("name, horizon", HORIZONS.items())
def test_episodes_last_as_long_as_registered_unless_another_limit_is_given(name, horizon):
    # actions that lead to no end: away from every goal, against the edge
    still = {"Ladder": 1, "TargetGrid": UP, "RiskyGrid": LEFT, "Homeostasis": 0, "WindyCliff": LEFT}[name]
    quiet = {"TargetGrid": {"slip": 0}, "RiskyGrid": {"slip": 0}}.get(name, {})
    for limit, env in (
        (horizon, gym.make(f"ctrlrl/{name}-v0", **quiet)),
        (5, gym.make(f"ctrlrl/{name}-v0", max_episode_steps=5, **quiet)),
    ):
        env.reset(seed=0)
        for t in range(1, limit + 1):
            _, _, terminated, truncated, _ = env.step(still)
            assert (terminated, truncated) == (False, t == limit)


@pytest.mark.parametrize("name", HORIZONS)
def test_gymnasiums_checker_accepts_them(name):
    check_env(world(name), skip_render_check=True)


@pytest.mark.parametrize("name, kwargs", VARIANTS)
def test_one_vector_environment_is_as_many_single_ones(name, kwargs):
    n, limit = 5, 70  # more draws than a block of the vector's stream has
    many = gym.make_vec(f"ctrlrl/{name}-v0", num_envs=n, vectorization_mode="vector_entry_point",
                        max_episode_steps=limit, **kwargs)  # fmt: skip
    ones = [gym.make(f"ctrlrl/{name}-v0", max_episode_steps=limit, **kwargs) for _ in range(n)]
    rng = np.random.default_rng(1)
    obs, infos = many.reset(seed=7)
    told = [one.reset(seed=7 + i) for i, one in enumerate(ones)]
    assert obs.tolist() == [o for o, _ in told] and infos["prob"].tolist() == [i["prob"] for _, i in told]
    over = np.zeros(n, dtype=bool)
    for _ in range(limit):
        action = rng.integers(many.single_action_space.n, size=n)
        obs, reward, terminated, truncated, infos = many.step(action)
        for i, one in enumerate(ones):
            if over[i]:
                assert reward[i] == 0.0 and infos["prob"][i] == 0.0
                continue
            o, r, te, tr, info = one.step(action[i])
            assert (o, r, te, tr) == (obs[i], reward[i], terminated[i], truncated[i])
            assert set(info) == set(infos)
            assert all(np.array_equal(infos[key][i], value) for key, value in info.items())
        over = terminated | truncated
    mask = np.arange(n) == 2
    again, infos = many.reset(seed=[None, None, 11, None, None], options={"reset_mask": mask})
    assert again[2] == ones[2].reset(seed=11)[0] and (again[~mask] == obs[~mask]).all()


def test_numbers_are_exactly_those_that_were_written():
    assert world("RiskyGrid", slip=0.1).slip == F(1, 10)
    assert world("Ladder", chance="2/7").chance == F(2, 7)
    assert rational("x", np.float32(0.3), "any", lambda _: True) == F(3, 10)


@pytest.mark.parametrize(
    "name, kwargs, message",
    [
        ("Ladder", {"chance": 1.5}, r"chance=1.5 must be a number in \[0, 1\]"),
        ("Ladder", {"chance": "half"}, "chance='half'"),
        ("Ladder", {"chance": True}, "chance=True"),
        ("Ladder", {"loss": -1}, "loss=-1 must be a number of at least 0"),
        ("Ladder", {"gain": float("nan")}, "gain=nan"),
        ("RiskyGrid", {"width": 101}, "width=101 must be an integer between 3 and 100"),
        ("RiskyGrid", {"height": 1}, "height=1"),
        ("RiskyGrid", {"width": 4.5}, "width=4.5"),
        ("WindyCliff", {"wind": -0.1}, "wind=-0.1"),
        ("Homeostasis", {"meal": 1}, "meal=1 must be a number above 1"),
        ("TargetGrid", {"layout": ["S.", "G"]}, "rows of equal length"),
        ("TargetGrid", {"layout": ["..", ".G"]}, "one S"),
        ("TargetGrid", {"layout": ["S.", ".."]}, "at least one G"),
        ("TargetGrid", {"layout": []}, "rows of equal length"),
        ("TargetGrid", {"layout": ["Sz", ".G"]}, r"the cells \['z'\]"),
    ],
)
def test_arguments_out_of_range_are_refused(name, kwargs, message):
    with pytest.raises(ValueError, match=message):
        world(name, **kwargs)


def test_actions_that_do_not_exist_and_steps_before_the_reset_are_refused():
    env = world("Ladder")
    with pytest.raises(gym.error.ResetNeeded):
        env.step(0)
    env.reset(seed=0)
    with pytest.raises(ValueError, match="found action 2; expected one of 0 to 1"):
        env.step(2)
    many = gym.make_vec("ctrlrl/Ladder-v0", num_envs=2, vectorization_mode="vector_entry_point")
    many.reset(seed=0)
    with pytest.raises(ValueError, match="integers between 0 and 1"):
        many.step([0, 2])


# -- the ladder -----------------------------------------------------------------------------------


def ladder_laws(gamma):
    """The laws of the return of all policies that look at what they collected, over the three steps."""
    env, laws = world("Ladder"), [{F(0): F(1)}]
    for _ in range(HORIZONS["Ladder"]):
        grown = []
        for outcomes in env.exact()[0].values():
            for then in itertools.product(laws, repeat=len(outcomes)):
                law = defaultdict(F)
                for (p, _, reward, _), rest in zip(outcomes, then, strict=True):
                    for g, q in rest.items():
                        law[reward + gamma * g] += p * q
                grown.append(dict(law))
        laws = grown
    return laws


def cvar(law, tau):
    """The mean of the worst share ``tau``."""
    left, total = tau, 0
    for g, p in sorted(law.items()):
        total += g * min(p, left)
        left -= min(p, left)
    return total / tau


def mean(law):
    return sum(p * g for g, p in law.items())


def test_the_ladders_optima_are_the_known_fractions():
    """Enumeration of all 42 policies; the numbers are independent of this library."""
    whole, half = ladder_laws(F(1)), ladder_laws(F(1, 2))
    assert len(whole) == 42 and len({tuple(sorted(law.items())) for law in whole}) == 22
    for tau, expected in (("1/10", 0), ("1/4", 0), ("1/2", 0), ("3/4", "11/75"), ("9/10", "82/225"), (1, "3/5")):
        assert max(cvar(law, F(tau)) for law in whole) == F(expected)
    for tau, expected in (("1/10", 0), ("1/2", 0), ("3/4", "1/75"), (1, "7/20")):
        assert max(cvar(law, F(tau)) for law in half) == F(expected)
    for target, one, other in ((1, ".64", ".74"), (2, "1.472", "1.65"), ("1.25", ".89", ".96"), (".75", ".738", ".6")):
        for laws, expected in ((whole, one), (half, other)):
            assert min(sum(p * abs(g - F(target)) for g, p in law.items()) for law in laws) == F(expected)
    for least, one, other in ((1, ".744", ".6"), (2, ".36", 0)):
        for laws, expected in ((whole, one), (half, other)):
            assert max(sum(p for g, p in law.items() if g >= least) for law in laws) == F(expected)


# -- grids ----------------------------------------------------------------------------------------


def best(env, horizon):
    """Values [steps left][state] and greedy actions of the mean, by backward induction over ``P``."""
    values, actions = [np.zeros(len(env.P))], [None]
    for _ in range(horizon):
        q = np.array([[sum(p * (r + (not o) * values[-1][to]) for p, to, r, o in outcomes)
                       for outcomes in rows.values()] for rows in env.P.values()])  # fmt: skip
        values.append(q.max(1))
        actions.append(q.argmax(1))
    return values, actions


def law_of(env, start, actions):
    """The law of the return under ``actions[steps left][state]``, over as many steps."""
    now, law = {(start, 0.0): 1.0}, defaultdict(float)
    for choice in reversed(actions[1:]):
        after = defaultdict(float)
        for (s, g), weight in now.items():
            for p, to, r, over in env.P[s][int(choice[s])]:
                if over:
                    law[g + r] += weight * p
                else:
                    after[to, g + r] += weight * p
        now = after
    for (_, g), weight in now.items():
        law[g] += weight
    return law


def test_a_slip_goes_to_the_two_sides_and_edges_stop_it():
    env = world("WindyCliff", wind=0)
    assert row(env, 0, RIGHT) == {(1, -1, False): 1} and row(env, 0, UP) == {(0, -1, False): 1}
    assert row(env, 14, DOWN) == {(26, -1, False): 1} and row(env, 14, LEFT) == {(13, -1, False): 1}
    env = world("RiskyGrid", slip="1/5")
    # from the start: the cell above, the edge below (stay), the risky cell with its fine of 20
    assert row(env, 18, RIGHT) == {
        (19, -1, False): F(4, 5) * F(39, 40), (19, -21, False): F(4, 5) * F(1, 40),
        (12, -1, False): F(1, 10), (18, -1, False): F(1, 10),
    }  # fmt: skip
    # into the goal from above, or aside: one risky cell, one edge
    assert row(env, 17, DOWN) == {
        (23, -1, True): F(4, 5), (17, -1, False): F(1, 10),
        (16, -1, False): F(1, 10) * F(39, 40), (16, -21, False): F(1, 10) * F(1, 40),
    }  # fmt: skip
    assert row(env, 23, LEFT) == {(23, 0, True): 1}


def test_the_target_grid_pays_on_entering_and_has_walls():
    env = world("TargetGrid", slip=0)
    assert row(env, 1, RIGHT) == {(2, 2, False): 1} and row(env, 2, UP) == {(2, 0, False): 1}
    assert row(env, 1, DOWN) == {(1, 0, False): 1}  # the wall
    assert row(env, 3, DOWN) == {(7, -1, False): 1} and row(env, 12, RIGHT) == {(13, -1, False): 1}
    assert row(env, 7, DOWN) == {(11, 5, False): 1} and row(env, 4, DOWN) == {(8, 1, False): 1}
    assert row(env, 11, DOWN) == {(15, 0, True): 1}
    assert world("TargetGrid", layout=["S9", "iG"], slip=0).rewards == [0, 9, -9, 0]


def test_every_return_that_the_target_grid_promises_can_be_reached_and_no_other():
    env = world("TargetGrid", slip=0)
    now, ended = {(0, 0.0)}, set()
    for _ in range(HORIZONS["TargetGrid"]):
        steps = [(g + r, to, over) for s, g in now for ((_, to, r, over),) in env.P[s].values()]
        ended |= {g for g, _, over in steps if over}
        now = {(to, g) for g, to, over in steps if not over}
    # at most 2 on the way, then the 5 in each second step from the fifth on; at least 1, then -1 from the fourth on
    assert ended | {g for _, g in now} == set(range(1 - 9, 2 + 8 * 5 + 1))


def test_the_mean_takes_the_risky_short_cut_and_cvar_prefers_the_safe_way():
    """Without slip in closed form: 4 fines of 20 with chance 1/40 each on 5 steps, against 9 steps."""
    calm = world("RiskyGrid", slip=0)
    straight = [np.full(24, RIGHT)] * (HORIZONS["RiskyGrid"] + 1)
    law = law_of(calm, 18, straight)
    binomial = {-5.0 - 20 * k: c * 0.025**k * 0.975 ** (4 - k) for k, c in enumerate((1, 4, 6, 4, 1))}
    assert dict(law) == pytest.approx(binomial) and mean(law) == pytest.approx(-7)
    values, actions = best(calm, HORIZONS["RiskyGrid"])
    assert values[-1][18] == pytest.approx(-7) and actions[-1][18] == RIGHT
    assert best(world("RiskyGrid", slip=0, penalty=1000), 50)[0][-1][18] == -9

    env = world("RiskyGrid")
    neutral = best(env, HORIZONS["RiskyGrid"])[1]
    careful = best(world("RiskyGrid", penalty=200), HORIZONS["RiskyGrid"])[1]
    assert neutral[-1][18] == RIGHT and careful[-1][18] == UP
    bold, safe = law_of(env, 18, neutral), law_of(env, 18, careful)
    assert sum(bold.values()) == pytest.approx(1) and sum(safe.values()) == pytest.approx(1)
    assert mean(bold) > mean(safe) + 1 and cvar(bold, 0.1) < cvar(safe, 0.1) - 5


def test_the_grid_is_as_large_as_asked():
    env = world("RiskyGrid", width=20, height=7)
    assert len(env.P) == 140 and env.initial_state_distrib.argmax() == 120
    risky = np.array([env.risky(s) for s in range(140)]).reshape(7, 20)
    assert risky[4:, 1:-1].all() and risky.sum() == 3 * 18


@pytest.mark.slow
def test_ten_thousand_states():
    env = world("RiskyGrid", width=100, height=100)
    assert len(env.P) == 10_000 and env.observation_space.n == 10_000


def test_the_cliff_without_wind_is_the_books_and_with_it_pushes_down():
    calm = world("WindyCliff", wind=0)
    assert best(calm, 20)[0][-1][36] == -13
    env = world("WindyCliff", wind="1/4")
    assert row(env, 25, RIGHT) == {(26, -1, False): F(3, 4), (36, -100, False): F(1, 4)}
    assert row(env, 13, UP) == {(1, -1, False): F(3, 4), (13, -1, False): F(1, 4)}
    assert row(env, 36, RIGHT) == row(env, 25, DOWN) == {(36, -100, False): 1}  # over the edge by themselves
    assert row(env, 36, UP) == {(24, -1, False): F(3, 4), (36, -1, False): F(1, 4)}
    assert row(env, 35, DOWN) == {(47, -1, True): 1}  # at the goal before the gust
    assert row(env, 34, RIGHT) == {(35, -1, False): F(3, 4), (47, -1, True): F(1, 4)}
    # strong wind: away from the edge
    actions = best(world("WindyCliff"), 100)[1][-1]
    assert actions[24] == UP and best(calm, 100)[1][-1][24] == RIGHT


# -- drives ---------------------------------------------------------------------------------------


def test_meals_feed_one_drive_while_the_other_falls():
    env = world("Homeostasis")
    assert env.P_vector[0][0] == [(0.75, 0, (3.0, -1.0), False), (0.25, 0, (-1.0, -1.0), False)]
    assert env.P_vector[2][0] == [(0.75, 2, (-1.0, 3.0), False), (0.25, 2, (-1.0, -1.0), False)]
    assert env.P_vector[1] == {a: [(1.0, to, (-1.0, -1.0), False)] for a, to in ((0, 1), (1, 0), (2, 2))}
    assert env.P_vector[0][1] == [(1.0, 0, (-1.0, -1.0), False)]  # bumps, and finds nothing


@pytest.mark.parametrize("kwargs", [{}, {"length": 5, "luck": 1}, {"luck": 0}])
def test_the_scalar_reward_is_the_sum_of_the_drives(kwargs):
    env = world("Homeostasis", **kwargs)
    for s, a in itertools.product(env.P, range(3)):
        assert env.P[s][a] == [(p, to, sum(r), over) for p, to, r, over in env.P_vector[s][a]]
    env.reset(seed=2)
    seen = set()
    for action in [1, 1, *[0] * 30, 2, 2, 2, 2, *[0] * 30]:
        _, reward, _, _, info = env.step(action)
        assert info["reward_vector"].shape == (2,) and info["reward_vector"].sum() == reward
        seen.add(tuple(info["reward_vector"].tolist()))
    assert ((3.0, -1.0) in seen and (-1.0, 3.0) in seen) == (kwargs != {"luck": 0})
