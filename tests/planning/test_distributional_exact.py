"""Stock-augmented dynamic programming against enumeration over histories; rationals are compared exactly."""

from fractions import Fraction as F

import numpy as np
import pytest
from planning.trees import LADDER, MEAN_VARIANCE, Dyadic, lp_over_histories

from ctrlrl.core.distribution import Law
from ctrlrl.core.functional import CVaR, Entropic, ExpectedUtility, MeanVariance, NotOptimisableError
from ctrlrl.planning.distributional_dp import (
    OutcomeTable,
    cvar,
    cvar_greedy,
    evaluate,
    exceedance,
    possible_returns,
    risk_neutral,
    solve,
    target,
)

HALF = F(1, 2)
NAMES = ("mean", "shortfall", "surplus", "distance", "squared", "reached")


@pytest.mark.parametrize(
    ("gamma", "level", "expected"),
    [
        *[(gamma, level, F(0)) for gamma in (1, HALF) for level in (F(1, 10), F(1, 4), F(1, 2))],
        (1, F(3, 4), F(11, 75)), (1, F(9, 10), F(82, 225)), (1, F(1), F(3, 5)),
        (HALF, F(3, 4), F(1, 75)), (HALF, F(1), F(7, 20)),
    ],
)  # fmt: skip
def test_cvar_of_the_ladder(gamma, level, expected):
    plan = solve(LADDER, "shortfall", 3, gamma)
    answer = cvar(plan, level)
    assert answer.value == expected and isinstance(answer.value, F) and answer.error_bound == 0
    law = plan.law(answer.stock)
    assert law.cvar(level) == expected
    assert evaluate(LADDER, plan, 3, gamma, answer.stock) == law


def test_the_law_of_the_ladder_at_three_quarters():
    plan = solve(LADDER, "shortfall", 3)
    answer = cvar(plan, F(3, 4))
    assert answer.stock == -1
    assert plan.law(-1) == Law.of([-3, -1, 1], [F(8, 125), F(24, 125), F(93, 125)])
    # at +1 there is nothing to win any more, behind it the ladder is climbed
    assert plan.action(1, 0, 0) == 0 and plan.action(1, 0, -2) == 1 and plan.action(2, 0, -1) == 1


@pytest.mark.parametrize(
    ("gamma", "distances"),
    [(1, ("0.64", "1.472", "0.89", "0.738")), (HALF, ("0.74", "1.65", "0.96", "0.6"))],
)
def test_wanted_returns_on_the_ladder(gamma, distances):
    goals = [F(1), F(2), F(5, 4), F(3, 4)]
    plan = solve(LADDER, "distance", 3, gamma, stocks=[-g for g in goals])
    assert [-target(plan, g).value for g in goals] == [F(x) for x in distances]


@pytest.mark.parametrize(("gamma", "chances"), [(1, ("0.744", "0.36")), (HALF, ("0.6", "0"))])
def test_chances_to_reach_a_goal_on_the_ladder(gamma, chances):
    plan = solve(LADDER, "reached", 3, gamma, stocks=[-1, -2])
    assert [exceedance(plan, g).value for g in (1, 2)] == [F(x) for x in chances]


def test_greedy_by_cvar_at_each_step_fails_on_the_ladder():
    assert cvar_greedy(LADDER, F(3, 4), 3).value == 0
    found = cvar_greedy(LADDER, F(9, 10), 3)
    assert found.value == F(1, 3) == found.law.cvar(F(9, 10)) and found.policy.tolist() == [[1]] * 3


def test_mean_minus_variance_is_refused_and_when_allowed_fails_as_it_must():
    with pytest.raises(NotOptimisableError, match="mixtures"):
        solve(MEAN_VARIANCE, MeanVariance(), 2)
    with pytest.warns(UserWarning, match="mixtures"):
        plan = solve(MEAN_VARIANCE, MeanVariance(), 2, stocks=[0], allow=True)
    assert plan.value(0) == -8
    best = evaluate(MEAN_VARIANCE, lambda t, state, stock: int(stock == -3), 2)
    assert MeanVariance()(best) == F(-23, 4)
    with pytest.raises(NotOptimisableError, match="CVaR"):
        solve(LADDER, CVaR(F(1, 2)), 3)


def test_entropic_risk_is_taken_without_discount_only():
    plan = solve(LADDER, Entropic(-1.0), 3, stocks=[0])
    # the step is worth taking iff log E exp(-R) < 0
    worth = 0.6 * np.exp(-1) + 0.4 * np.exp(1) < 1
    assert plan.action(0, 0, 0) == int(worth) and plan.value(0) == pytest.approx(0)
    with pytest.raises(NotOptimisableError, match="gamma"):
        solve(LADDER, Entropic(-1.0), 3, HALF)


FUNCTIONS = {
    "shortfall": lambda x: np.minimum(x, 0), "surplus": lambda x: np.maximum(x, 0), "distance": lambda x: -np.abs(x),
    "squared": lambda x: -(x**2), "reached": lambda x: 1.0 * (x >= 0),
}  # fmt: skip


def mismatches(problems):
    """Cases of 2 gammas x 5 utilities x 3 stocks in which the result is not exactly that of all histories."""
    found = cases = 0
    for seed in range(problems):
        problem = Dyadic(seed)
        for gamma in (1.0, 0.5):
            stocks = [0.0, -1.5, 2.0]
            known = problem.best(FUNCTIONS.values(), stocks, gamma, 4)
            for row, name in zip(known, FUNCTIONS, strict=True):
                plan = solve(problem.table(), name, 4, gamma, stocks)
                found += sum(plan.value(c) != value for c, value in zip(stocks, row, strict=True))
                cases += len(stocks)
    return found, cases


def test_it_is_the_best_over_histories():
    assert mismatches(4) == (0, 120)


@pytest.mark.slow
def test_it_is_the_best_over_histories_in_1800_cases():
    assert mismatches(60) == (0, 1800)


def test_utilities_that_are_not_homogeneous_fail_with_a_discount_and_only_then():
    """Someone who forgets the stock's division by gamma never sees this fail."""
    odd = {
        "-|x| + x^2 / 4": lambda x: -np.abs(x) + x * x / 4,
        "x - max(x - 1, 0) / 2": lambda x: x - np.maximum(x - 1, 0) / 2,
    }
    worse, stocks = 0, [0.0, -1.0, 2.0]
    for seed in range(4):
        problem = Dyadic(seed)
        for gamma in (1.0, 0.5):
            known = problem.best(odd.values(), stocks, gamma, 4)
            for row, (label, f) in zip(known, odd.items(), strict=True):
                utility = ExpectedUtility(f, label, None)
                if gamma == 1.0:
                    plan = solve(problem.table(), utility, 4, gamma, stocks)
                    assert [plan.value(c) for c in stocks] == row.tolist()
                    continue
                with pytest.raises(NotOptimisableError, match="gamma"):
                    solve(problem.table(), utility, 4, gamma, stocks)
                with pytest.warns(UserWarning, match="gamma"):
                    plan = solve(problem.table(), utility, 4, gamma, stocks, allow=True)
                values = np.array([plan.value(c) for c in stocks])
                assert (values <= row + 1e-9).all()
                worse += int((values < row - 1e-9).sum())
    assert worse > 0


@pytest.mark.parametrize("name", ["shortfall", "distance", "reached"])
def test_policy_iteration_never_falls_and_ends_where_value_iteration_does(name):
    rose = False
    for seed in range(3):
        table, stocks = Dyadic(seed).table(), [-1.0, 0.0, 1.0]
        plan = solve(table, name, 3, stocks=stocks, method="policy_iteration")
        values = solve(table, name, 3, stocks=stocks)
        history = np.array(plan.history)
        assert (np.diff(history, axis=0) >= 0).all()
        assert history[-1].tolist() == [plan.value(c) for c in stocks] == [values.value(c) for c in stocks]
        rose |= bool((history[-1] > history[0]).any())
    assert rose


def test_a_linear_programme_over_histories_agrees():
    table = Dyadic(5).table()
    plan = solve(table, "shortfall", 3)
    for stock in (-3.0, -1.0, 0.0, 2.0):
        best = lp_over_histories(table, 3, lambda x, c=stock: min(c + x, 0))
        assert solve(table, "shortfall", 3, stocks=[stock]).value(stock) == pytest.approx(best, abs=1e-9)
        if stock in plan.stocks:
            assert plan.value(stock) == pytest.approx(best, abs=1e-9)


def test_the_stock_does_not_change_what_is_best_for_the_mean():
    table = Dyadic(1).table()
    plan = solve(table, "mean", 4, stocks=[-3.0, 0.0, 5.0])
    law = evaluate(table, risk_neutral(table, 4), 4)
    assert [plan.value(c) - c for c in (-3.0, 0.0, 5.0)] == [law.mean()] * 3


def test_vector_rewards_keep_drives_near_zero():
    """One drive rises by itself; eating lowers it and raises the other."""
    table = {0: {0: [(F(1), 0, (1, 0), False)], 1: [(F(1), 0, (-1, 1), False)]}}
    squared = ExpectedUtility.norm(2, 2)
    plan = solve(table, squared, 4, stocks=[(0, 0), (2, 0), (0, -4)])
    # eating k times of 4 leaves (4 - 2k, k) more
    for drives in plan.stocks:
        best = max(-((drives[0] + 4 - 2 * k) ** 2) - (drives[1] + k) ** 2 for k in range(5))
        assert plan.value(drives) == best == squared(plan.law(drives).affine(1, drives))
    assert evaluate(table, plan, 4, stock=(2, 0)) == plan.law((2, 0))
    with pytest.raises(ValueError, match="2 numbers"):
        plan.value(0)


def test_evaluate_takes_every_form_of_policy():
    table = Dyadic(2).table()
    fixed = risk_neutral(table, 3)
    wanted = evaluate(table, lambda t, state, stock: fixed[t, state], 3)
    assert evaluate(table, fixed, 3) == wanted
    assert evaluate(table, np.eye(2)[fixed], 3) == wanted
    even = evaluate(LADDER, np.full((1, 2), 0.5), 2)
    assert even.mean() == pytest.approx(0.2) and even.atoms.tolist() == [-2, -1, 0, 1, 2]
    with pytest.raises(ValueError, match="policy"):
        evaluate(table, np.zeros((7, 3), dtype=int), 3)
    with pytest.raises(ValueError, match="chose action 5"):
        evaluate(table, lambda t, state, stock: 5, 3)


def test_episodes_may_end_early_and_start_anywhere():
    table = {
        0: {0: [(HALF, 1, 4, False), (HALF, 0, 2, True)]},
        1: {0: [(1, 0, -1, True)]},
    }
    plan = solve(table, "mean", 5, HALF, start=[HALF, HALF])
    assert plan.law(plan.stocks[0]) == Law.of([F(7, 2), 2, -1], [F(1, 4), F(1, 4), HALF])
    assert possible_returns(table, 5, HALF, start=[HALF, HALF]) == [-1, 2, F(7, 2)]
    assert plan.law(-2, state=0) == Law.of([F(7, 2), 2], [HALF, HALF])
    assert evaluate(table, plan, 5, HALF, -2, start=[HALF, HALF]) == plan.law(-2)


def test_without_a_horizon_the_error_of_stopping_is_bounded():
    plan = solve(LADDER, "shortfall", gamma=HALF, stocks=[-1], engine="exact", tolerance=0.2)
    assert plan.horizon == 4 and plan.error_bound == 0.5**4 * 1 / 0.5
    longer = solve(LADDER, "shortfall", 7, HALF, stocks=[-1])
    assert 0 < abs(plan.value(-1) - longer.value(-1)) <= plan.error_bound


@pytest.mark.parametrize(
    ("table", "match"),
    [
        ({0: {0: [(0.5, 0, 1, False)]}}, "sum to 0.5"),
        ({0: {0: [(1.0, 3, 1, False)]}}, "state 3"),
        ({0: {0: [(1.0, 0, float("nan"), False)]}}, "finite"),
        ({1: {0: [(1.0, 0, 1, False)]}}, "states"),
        ({0: {0: [(1.5, 0, 1, False), (-0.5, 0, 2, False)]}}, "-0.5"),
        ({0: {0: [(1.0, 0, 1, False)], 1: [(1.0, 0, (1, 2), False)]}}, "components"),
    ],
)
def test_tables_that_are_wrong_are_refused(table, match):
    with pytest.raises(ValueError, match=match):
        OutcomeTable.of(table)


def test_settings_that_do_not_fit_are_refused():
    for wrong, match in (
        ({"gamma": 1, "horizon": None}, "horizon"), ({"gamma": 1.5, "horizon": 3}, "gamma"),
        ({"horizon": 3, "engine": "fast"}, "engine"), ({"horizon": 3, "method": "both"}, "method"),
        ({"horizon": 3, "tolerance": 0.1}, "tolerance"), ({"horizon": 3, "stocks": [(1, 2)]}, "stock"),
        ({"horizon": 12, "gamma": 0.9, "stocks": [0.0], "max_nodes": 50}, "max_nodes"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=match):
            solve(LADDER, "shortfall", **wrong)
    with pytest.raises(ValueError, match="numbers"):
        solve(LADDER, ExpectedUtility.norm(), 3)
    with pytest.raises(TypeError, match="table"):
        solve(7, "mean", 3)
    plan = solve(LADDER, "shortfall", 3, stocks=[0])
    for call in (lambda: plan.law(5), lambda: plan.action(0, 0, 5), lambda: plan.action(3, 0, 0)):
        with pytest.raises(ValueError, match=r"5|time 3"):
            call()
