"""Multimodal toys in numbers: optimum, Gaussian ceilings proven by bounds over cells, simulation against formula."""

import math

import gymnasium as gym
import numpy as np
import pytest
from ctrlrl_envs.multimodal import hidden_bit, one_state_bump, two_goal_reacher
from scipy.optimize import minimize
from scipy.stats import norm


def returns(name, act, n=1000, rounds=20, **kwargs):
    """Returns and successes [n * rounds] of one episode each; ``act(obs, rng)`` gives the actions of all rows."""
    env = gym.make_vec(f"ctrlrl/{name}-v0", num_envs=n, vectorization_mode="vector_entry_point", **kwargs)
    rng = np.random.default_rng(0)
    totals, successes = np.zeros((rounds, n)), np.zeros((rounds, n))
    for k in range(rounds):
        (obs, _), ended = env.reset(seed=0 if k == 0 else None), np.zeros(n, dtype=bool)
        while not ended.all():
            obs, reward, terminated, truncated, infos = env.step(act(obs, rng))
            totals[k] += reward
            ended = terminated | truncated
        successes[k] = infos["success"]
    return totals.ravel(), successes.ravel()


def agrees(values, expected):
    """Within four standard errors, which must be small enough to tell."""
    error = values.std() / math.sqrt(len(values))
    assert error < 0.005 and abs(values.mean() - expected) < 4 * error + 1e-9, (values.mean(), expected, error)


# -- the exact numbers ------------------------------------------------------------------------


def test_the_hidden_bit_has_the_published_optimum_and_gaussians():
    assert hidden_bit.optimum() == 0.9375 and [hidden_bit.optimum(k) for k in (1, 2, 3)] == [0.5, 0.75, 0.875]
    hit = norm.cdf(1.2) - norm.cdf(0.8)
    moments = 1 - (1 - hit) ** 4
    assert hidden_bit.gaussian_win_rate(0.0, 1.0) == pytest.approx(moments, abs=1e-12)
    assert moments == pytest.approx(0.3345, abs=5e-5)
    assert hidden_bit.gaussian_win_rate(1.0, 0.001) == hidden_bit.gaussian_win_rate(-1.0, 0.001) == 0.5
    # half of the draws hit at the window's edge: (1 - (1/2)^4) / 2
    assert hidden_bit.gaussian_win_rate(0.8, 1e-3) == pytest.approx(15 / 32, abs=1e-12)
    assert hidden_bit.gaussian_win_rate(np.zeros(3), np.ones(3)).shape == (3,)


def test_the_win_rate_of_samples_counts_both_windows():
    assert hidden_bit.win_rate([1.0, -1.0]) == 0.9375
    assert hidden_bit.win_rate([1.0]) == hidden_bit.win_rate([[-1.1], [-0.9]]) == 0.5
    assert hidden_bit.win_rate([1.2001, -0.7999, 0.0]) == 0.0
    # a quarter at +1, half at -1: ((1 - (3/4)^2) + (1 - (1/2)^2)) / 2
    assert hidden_bit.win_rate([1.0, 0.0, -1.0, -1.0], tries=2) == pytest.approx(19 / 32)
    assert hidden_bit.win_rate([1.4, -1.4], tolerance=0.5) == 0.9375
    draws = np.random.default_rng(0).normal(0.3, 0.6, 400_000)
    assert hidden_bit.win_rate(draws) == pytest.approx(hidden_bit.gaussian_win_rate(0.3, 0.6), abs=0.004)


def test_the_gaussian_ceilings_are_those_stated():
    value, mean, std = hidden_bit.gaussian_ceiling()
    assert value == pytest.approx(0.5, abs=1e-9) and mean == 1.0 and std < 0.05
    assert hidden_bit.gaussian_ceiling(squash=3.0).value == pytest.approx(0.5, abs=1e-9)
    assert hidden_bit.gaussian_ceiling(squash=1.25).value == pytest.approx(0.6157, abs=5e-5)
    # one try wins at most half; so many that a wide Gaussian hits both; windows that touch
    assert hidden_bit.gaussian_ceiling(tries=1).value == pytest.approx(0.5)
    many = hidden_bit.gaussian_ceiling(tries=16)
    assert many.value == pytest.approx(1 - (1 - 0.0967905) ** 16, abs=1e-4) and many.mean == 0.0
    assert hidden_bit.gaussian_ceiling(tolerance=1.0).value == pytest.approx(0.9375)
    assert two_goal_reacher.gaussian_ceiling().value == pytest.approx(0.4314, abs=5e-5)
    assert two_goal_reacher.gaussian_ceiling(cost=0.0).value == pytest.approx(0.5)


@pytest.mark.parametrize("tries", [3, 4, 12])
@pytest.mark.parametrize("squash", [None, 1.5])
def test_an_optimiser_from_many_starts_finds_no_better_gaussian(tries, squash):
    def worth(x):
        return hidden_bit.gaussian_win_rate(x[0], math.exp(x[1]), tries, 0.3, squash)

    found = [
        minimize(lambda x: -worth(x), (mean, math.log(std)), method="Nelder-Mead").fun
        for mean in (-1.2, 0.05, 0.5, 1.0)
        for std in (0.1, 0.5, 1.0)
    ]
    ceiling = hidden_bit.gaussian_ceiling(tries, 0.3, squash)
    assert ceiling.value == pytest.approx(-min(found), abs=1e-6)
    assert ceiling.value == hidden_bit.gaussian_win_rate(ceiling.mean, ceiling.std, tries, 0.3, squash)


def cells(means, stds, n):
    """Bounds (p, q from below, p, q from above) of the hit rates over each cell of a grid of means and stds.

    (edge - m) / s is monotone in m and in s, so that its extremes over a cell are at its corners.
    """
    mean, std = np.linspace(*means, n), np.geomspace(*stds, n)
    corners = [(mean[i : n - 1 + i, None], std[None, j : n - 1 + j]) for i in (0, 1) for j in (0, 1)]

    def extremes(edge):
        z = [np.broadcast_to((edge - m) / s, (n - 1, n - 1)) for m, s in corners]
        return norm.cdf(np.min(z, axis=0)), norm.cdf(np.max(z, axis=0))

    low, high = [], []
    for a, b in ((0.8, 1.2), (-1.2, -0.8)):
        (a_low, a_high), (b_low, b_high) = extremes(a), extremes(b)
        low.append(np.maximum(b_low - a_high, 0))
        high.append(np.minimum(b_high - a_low, 1))
    return *low, *high


def test_no_gaussian_beats_the_hidden_bits_ceiling():
    # m < 0 mirrors m > 0; both chances grow as m falls to 1 and as s falls to 2.2, the largest distance to a window
    *_, p, q = cells((0.0, 1.0), (0.2, 2.2), 500)
    assert (1 - ((1 - p) ** 4 + (1 - q) ** 4) / 2).max() < 0.5 + 2e-3
    # s below .2: the far window is four deviations away, and the near one is hit at most always
    far = norm.cdf(-0.8 / 0.2)
    assert 1 - (1 - far) ** 4 / 2 < 0.5 + 2e-4


def test_no_gaussian_beats_the_two_goals_ceiling():
    ceiling, cost, tries = two_goal_reacher.gaussian_ceiling().value, 0.01, np.arange(4)

    def bound(p_low, q_low, p, q):
        steps = 1 + 2 * (p_low + q_low)
        parts = [1 - (1 - one) ** 4 - cost * steps * ((1 - one)[..., None] ** tries).sum(-1) for one in (p, q)]
        return (parts[0] + parts[1]) / 2

    assert bound(*cells((0.0, 2.0), (0.2, 5.0), 700)).max() < ceiling + 2e-3
    # outside, by the chance of winning alone: for s > 5 a window is hit with less than its width times .4 / s, for
    # m > 2 with less than its width times the largest density .8 away over all s, which is .8^-1 (2 pi e)^-1/2
    for hit in (0.4 * 0.4 / 5, 0.4 / (0.8 * math.sqrt(2 * math.pi * math.e))):
        assert ceiling > 1 - (1 - hit) ** 4
    # s below .2: the far goal with less than Phi(-4), and the best chance of the near one is a matter of one number
    p = np.linspace(0, 1, 20_001)
    assert bound(p, 0 * p, p, 0 * p).max() + 2 * norm.cdf(-4) < ceiling + 1e-3


def test_the_two_goals_optimum_is_the_best_of_all_memoryless_choices():
    assert two_goal_reacher.optimum() == pytest.approx(0.88125) and two_goal_reacher.optimum(cost=0.0) == 0.9375
    assert two_goal_reacher.expected_return(0.5, 0.5) == pytest.approx(two_goal_reacher.optimum())
    # always right: half the time one walk of three steps, else four in vain
    assert two_goal_reacher.expected_return(1.0, 0.0) == pytest.approx(0.5 * (1 - 0.03) - 0.5 * 0.12)
    assert two_goal_reacher.expected_return(0.0, 0.0) == pytest.approx(-0.04)
    for tries, cost in ((4, 0.01), (2, 0.1), (7, 0.16)):
        p, q = np.meshgrid(np.linspace(0, 1, 201), np.linspace(0, 1, 201))
        allowed = p + q <= 1
        found = two_goal_reacher.expected_return(p[allowed], q[allowed], tries, cost)
        assert found.max() == pytest.approx(two_goal_reacher.optimum(tries, cost), abs=1e-12)


def test_the_bumps_expected_return_is_the_integral():
    assert one_state_bump.expected_return(0.0, 1.0) == pytest.approx(0.0163, abs=5e-5)
    assert one_state_bump.expected_return(2.5, 0.0) == 1.0
    assert one_state_bump.expected_return(2.8, 0.0) == pytest.approx(math.exp(-0.5))
    a, step = np.linspace(-12, 12, 400_001, retstep=True)
    for mean, std, centre, width in ((0.0, 1.0, 2.5, 0.3), (2.0, 0.4, 2.5, 0.3), (1.0, 0.2, -0.5, 0.9)):
        reward = np.exp(-((a - centre) ** 2) / (2 * width**2))
        integral = (reward * norm.pdf(a, mean, std)).sum() * step
        assert one_state_bump.expected_return(mean, std, centre, width) == pytest.approx(integral, rel=1e-6)


# -- simulation against formula ---------------------------------------------------------------


def bimodal(rng, n):
    return rng.choice([-1.0, 1.0], n)


def test_the_hidden_bit_pays_what_the_formulas_say():
    def playing(draw, squash=None, **kwargs):
        def act(obs, rng):
            u = draw(rng, len(obs))
            return (u if squash is None else squash * np.tanh(u))[:, None].astype(np.float32)

        total, success = returns("HiddenBit", act, **kwargs)
        assert (total == success).all()
        return total

    agrees(playing(bimodal), hidden_bit.optimum())
    agrees(playing(bimodal, tries=2), hidden_bit.optimum(2))
    agrees(playing(lambda rng, n: np.ones(n)), 0.5)
    for mean, std in ((0.0, 1.0), (0.5, 0.6), (-0.9, 0.3)):
        agrees(playing(lambda rng, n, m=mean, s=std: rng.normal(m, s, n)), hidden_bit.gaussian_win_rate(mean, std))
    wide = hidden_bit.gaussian_ceiling(squash=1.25)
    squashed = playing(lambda rng, n: rng.normal(wide.mean, wide.std, n), squash=1.25, bound=1.25)
    agrees(squashed, wide.value)


def test_the_two_goals_pay_what_the_formulas_say():
    def playing(draw, **kwargs):
        def act(obs, rng):
            # random moves where they must not matter: across the corridor, and forward at the fork
            move = rng.uniform(-3, 3, (len(obs), 2))
            fork = obs[:, 0] == 0
            move[fork, 0], move[~fork, 1] = draw(rng, int(fork.sum())), 2.5
            return move.astype(np.float32)

        return returns("TwoGoalReacher", act, **kwargs)

    total, success = playing(bimodal)
    agrees(total, two_goal_reacher.optimum())
    agrees(success, 0.9375)
    agrees(playing(bimodal, tries=2, cost=0.1)[0], two_goal_reacher.optimum(2, 0.1))
    best = two_goal_reacher.gaussian_ceiling()
    agrees(playing(lambda rng, n: rng.normal(best.mean, best.std, n))[0], best.value)
    total, success = playing(lambda rng, n: rng.normal(0.0, 1.0, n))
    hit = norm.cdf(1.2) - norm.cdf(0.8)
    agrees(total, two_goal_reacher.expected_return(hit, hit))
    agrees(success, hidden_bit.gaussian_win_rate(0.0, 1.0))


def test_the_bump_pays_what_the_formula_says():
    total, success = returns("OneStateBump", lambda obs, rng: rng.normal(2.2, 0.5, (len(obs), 1)))
    agrees(total, one_state_bump.expected_return(2.2, 0.5))
    assert not success.any()
