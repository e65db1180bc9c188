"""The engines on arrays: the lattice against the exact one, the discounted grid against long horizons."""

import gymnasium as gym
import numpy as np
import pytest
from planning.trees import LADDER, Dyadic

from ctrlrl.core.distribution import Law, wasserstein
from ctrlrl.core.functional import CVaR, ExpectedUtility, NotOptimisableError
from ctrlrl.planning.distributional_dp import cvar, evaluate, risk_neutral, solve, sweeps_for, truncation_bound
from ctrlrl.planning.model import Model

NAMES = ("mean", "shortfall", "surplus", "distance", "squared", "reached")


def ending(seed):
    """A random table whose steps now and then terminate."""
    rng = np.random.default_rng(seed)

    def outcomes():
        return [(p, int(rng.integers(4)), int(rng.integers(-2, 3)), bool(rng.random() < 0.2)) for p in (0.25, 0.75)]

    return {s: {a: outcomes() for a in range(2)} for s in range(4)}


@pytest.mark.parametrize("name", NAMES)
def test_the_lattice_has_the_values_laws_and_policies_of_the_exact_engine(name):
    for seed in (0, 3):
        table = ending(seed)
        exact = solve(table, name, 4)
        lattice = solve(table, name, 4, engine="lattice", dtype=np.float64)
        for stock in exact.stocks:
            assert lattice.value(stock) == pytest.approx(exact.value(stock), abs=1e-12)
            assert lattice.value_error(stock) == 0 and lattice.law_error(stock) == 0
            assert wasserstein(lattice.law(stock), exact.law(stock)) < 1e-12
            assert wasserstein(evaluate(table, lattice, 4, stock=stock), exact.law(stock)) < 1e-12


def remembered(table, plan, horizon, stock, window):
    """Law of the return of a policy whose memory of the stock is clipped to the window."""
    mass, ended = {(0, stock, 0): 1.0}, {}
    for t in range(horizon):
        after = {}
        for (s, c, gain), weight in mass.items():
            for p, n, r, end in table[s][plan.action(t, s, c)]:
                total = gain + r
                if end or t == horizon - 1:
                    ended[total] = ended.get(total, 0) + weight * p
                else:
                    key = (n, min(max(c + r, window[0]), window[1]), total)
                    after[key] = after.get(key, 0) + weight * p
        mass = after
    return Law.of(list(ended), list(ended.values()))


@pytest.mark.parametrize("name", NAMES)
def test_what_is_clipped_at_the_borders_is_bounded(name):
    clipped = moved = False
    for seed in (0, 1, 3):
        table, window = ending(seed), (-1, 1)
        narrow = solve(table, name, 4, stocks=window, engine="lattice", dtype=np.float64)
        exact = solve(table, name, 4, stocks=[-1, 0, 1])
        few = solve(table, name, 4, engine="lattice", atoms=(-2, 1), dtype=np.float64)
        for stock in (-1, 0, 1):
            gap = abs(narrow.value(stock) - exact.value(stock))
            assert gap <= narrow.value_error(stock) + 1e-12
            law = narrow.law(stock)
            assert wasserstein(law, remembered(table, narrow, 4, stock, window)) < 1e-12
            assert exact.functional(law.affine(1, stock)) <= exact.value(stock) + 1e-12
            apart = wasserstein(few.law(stock), exact.law(stock))
            assert apart <= few.law_error(stock) + 1e-12 and few.value(stock) == pytest.approx(exact.value(stock))
            clipped, moved = clipped or gap > 1e-9, moved or apart > 1e-9
    assert moved and (clipped or name == "mean")


def test_float32_laws_are_close_and_can_be_left_out():
    table = ending(0)
    wide, small = (solve(table, "distance", 4, engine="lattice", dtype=d) for d in (np.float64, np.float32))
    assert small.laws.dtype == np.float32 and small.values.dtype == np.float64
    assert wasserstein(small.law(0), wide.law(0)) < 1e-5
    bare = solve(table, "distance", 4, engine="lattice", keep_laws=False)
    assert (bare.values == wide.values).all() and bare.bytes_used < small.bytes_used
    with pytest.raises(ValueError, match="laws"):
        bare.law(0)


def test_rewards_may_be_multiples_of_any_unit():
    table = {0: {a: [(p, n, r / 4, end) for p, n, r, end in o] for a, o in LADDER[0].items()}}
    plan = solve(table, "shortfall", 3, engine="lattice", unit=0.25, dtype=np.float64)
    answer = cvar(plan, 0.75)
    assert answer.value == pytest.approx(11 / 300) and answer.stock == -0.25 and answer.error_bound == 0
    with pytest.raises(ValueError, match="multiple"):
        solve(table, "shortfall", 3, engine="lattice", unit=0.2)
    with pytest.raises(ValueError, match="outside"):
        plan.value(9)
    with pytest.raises(ValueError, match="multiple"):
        plan.value(0.1)


def test_a_given_policy_is_evaluated():
    table = ending(1)
    neutral = risk_neutral(table, 4)
    plan = solve(table, "shortfall", 4, engine="lattice", policy=neutral, dtype=np.float64)
    law = evaluate(table, neutral, 4)
    assert wasserstein(plan.law(0), law) < 1e-12
    assert plan.value(-1) == pytest.approx(law.expect(lambda x: np.minimum(x - 1, 0)))
    climb = solve(LADDER, "shortfall", 3, engine="lattice", policy=[[1]] * 3)
    # -3 with chance 8/125, -1 with 36/125
    assert climb.value(0) == pytest.approx(-60 / 125) and climb.action(0, 0, 0) == 1


def test_memory_is_reckoned_before_and_refused_with_the_numbers():
    with pytest.raises(ValueError, match=r"4 states x \d+ stocks x \d+ atoms.*laws .* MiB.*allowed are 0"):
        solve(ending(0), "mean", 4, engine="lattice", max_bytes=1000)
    with pytest.raises(ValueError, match="MiB"):
        solve(ending(0), "mean", gamma=0.9, max_bytes=1000)


def test_frozen_lake_reaches_the_goal_as_often_as_classic_value_iteration_says():
    env = gym.make("FrozenLake-v1")
    model, values = Model.of_table(env.unwrapped.P), np.zeros(17)
    for _ in range(20):
        values = model.backup(values, 1.0).max(-1)
    assert values[0] > 0.1
    for engine in ("exact", "lattice"):
        plan = solve(env, "reached", 20, stocks=[-1, 0], engine=engine)
        assert plan.value(-1) == pytest.approx(values[0], rel=1e-9)
        assert plan.law(-1).mean() == pytest.approx(values[0], rel=1e-5)


GRID = {"n_stocks": 81, "n_atoms": 81, "tolerance": 0.02}


@pytest.mark.parametrize("name", ["shortfall", "distance"])
def test_the_discounted_grid_is_within_its_bounds_and_contracts(name):
    table, gamma = Dyadic(0).table(), 0.5
    grid = solve(table, name, gamma=gamma, **GRID)
    ratios = np.array(grid.differences[1:]) / np.array(grid.differences[:-1])
    assert len(ratios) > 4 and ratios.max() <= gamma + 1e-9
    horizon = 4
    left = truncation_bound(1.0, gamma, horizon, 2.0)
    exact = solve(table, name, horizon, gamma, stocks=[-1.0, 0.0, 1.5])
    for stock in exact.stocks:
        best = exact.value(stock)
        assert abs(grid.value(stock) - best) <= grid.value_error(stock) + left
        assert grid.achieved(stock) <= best + left + grid.law_error
        assert grid.achieved(stock) >= grid.value(stock) - 2 * (grid.error_bound + grid.law_error)
    assert grid.error_bound < 0.1 and grid.law_error < 0.15


def test_the_grid_knows_the_ladder_at_its_fixed_point():
    """One step decides: safe for the stock 0, risk where the debt cannot be met otherwise."""
    plan = solve(LADDER, "mean", gamma=0.5, n_stocks=41, n_atoms=41, tolerance=1e-4)
    assert plan.value(0.0) == pytest.approx(0.4, abs=1e-3) and plan.value(-7.0) == pytest.approx(-6.6, abs=1e-3)
    assert plan.law(0.0).mean() == pytest.approx(0.4, abs=1e-3)
    short = solve(LADDER, "shortfall", gamma=0.5, n_stocks=41, n_atoms=41, tolerance=1e-4)
    # risking everything loses 2 at most and gains nothing for who is not in debt
    assert short.value(2.0) == pytest.approx(0) and short.value(0.0) == pytest.approx(0)
    assert short.action(0, 0, -2.0) == 1 and short.value(-2.0) == pytest.approx(-1.6, abs=1e-3)
    assert short.value(-9.0) == pytest.approx(-8.6, abs=1e-3)


def test_sweeps_for_a_tolerance_are_just_enough():
    for gamma in (0.3, 0.9, 0.99):
        n = sweeps_for(1e-3, 2.0, gamma, 3.0)
        assert truncation_bound(2.0, gamma, n, 3.0) <= 1e-3 < truncation_bound(2.0, gamma, n - 1, 3.0)
    assert sweeps_for(100.0, 1.0, 0.5, 1.0) == 1
    with pytest.raises(ValueError, match="gamma"):
        sweeps_for(1e-3, 1.0, 1.0, 1.0)


def test_what_the_arrays_cannot_do_is_refused():
    with pytest.raises(NotOptimisableError, match="lattice"), pytest.warns(UserWarning):
        solve(LADDER, CVaR(0.5), 3, engine="lattice", allow=True)
    with pytest.raises(NotOptimisableError, match="Lipschitz"):
        solve(LADDER, "squared", gamma=0.5)
    with pytest.raises(ValueError, match="gamma = 1"):
        solve(LADDER, "mean", 3, 0.5, engine="lattice")
    with pytest.raises(ValueError, match="policy iteration"):
        solve(LADDER, "mean", 3, engine="lattice", method="policy_iteration")
    with pytest.raises(ValueError, match="vectors"):
        table = {0: {0: [(1, 0, (1, 0), False)]}}
        solve(table, ExpectedUtility.norm(), 3, stocks=[(0, 0)], engine="lattice")
