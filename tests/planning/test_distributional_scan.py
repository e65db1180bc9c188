"""Every level from one solve, against all deterministic policies; the upper tail; what the baselines get wrong."""

from fractions import Fraction as F

import numpy as np
import pytest
from planning.trees import LADDER, laws_of_deterministic_policies, tail_mean

from ctrlrl.core.functional import ExpectedUtility
from ctrlrl.planning.distributional_dp import (
    constrained,
    cvar,
    cvar_value_iteration,
    exceedance,
    homeostasis,
    mean_cvar,
    mean_cvar_utility,
    solve,
    target,
    upper_cvar,
)

LEVELS = [F(1, 4), F(1, 2), F(3, 4)]


def two_steps(seed):
    """Two steps over three states with whole rewards and rational chances."""
    rng = np.random.default_rng(seed)

    def outcomes():
        shares = rng.multinomial(6, [1 / 3] * 3)
        return [(F(int(k), 6), n, int(rng.integers(-3, 4)), False) for n, k in enumerate(shares)]

    return {s: {a: outcomes() for a in range(2)} for s in range(3)}


TABLES = [two_steps(seed) for seed in range(25)]


def test_one_solve_has_the_best_cvar_of_every_level():
    for table in TABLES[:12]:
        laws = laws_of_deterministic_policies(table, 2)
        plan = solve(table, "shortfall", 2)
        for level in (F(1, 10), *LEVELS, F(1)):
            answer = cvar(plan, level)
            best = max(tail_mean(law, level) for law in laws)
            assert answer.value == best == plan.law(answer.stock).cvar(level)
            assert answer.value == cvar(solve(table, "shortfall", 2, stocks=[answer.stock]), level).value
            assert not answer.is_bound


def test_the_upper_tail_is_a_bound_that_deterministic_policies_need_not_reach():
    gaps = []
    for table in TABLES:
        laws = [{-x: p for x, p in law.items()} for law in laws_of_deterministic_policies(table, 2)]
        plan = solve(table, "surplus", 2)
        for level in LEVELS:
            answer = upper_cvar(plan, level)
            gaps.append(answer.value - max(-tail_mean(law, level) for law in laws))
            assert answer.is_bound and "deterministic" in answer.note
    assert min(gaps) == 0 and max(gaps) > 0


def test_upper_tail_of_the_ladder():
    plan = solve(LADDER, "surplus", 3)
    assert [upper_cvar(plan, level).value for level in LEVELS] == [F("2.728"), F("1.864"), F("1.304")]


def test_mean_cvar_is_the_best_of_all_policies_too():
    level, share = F(1, 2), F(1, 4)
    for table in TABLES[:5]:
        laws = laws_of_deterministic_policies(table, 2)
        plan = solve(table, mean_cvar_utility(level, share), 2)
        answer = mean_cvar(plan, level, share)
        assert answer.value == max(share * tail_mean(law, 1) + (1 - share) * tail_mean(law, level) for law in laws)
        law = plan.law(answer.stock)
        assert share * law.mean() + (1 - share) * law.cvar(level) == answer.value
    with pytest.raises(ValueError, match="expected"):
        mean_cvar(plan, level, F(1, 2))


def test_drives_and_budgets():
    table = {0: {0: [(F(1), 0, (0, 0), False)], 1: [(F(1, 2), 0, (3, -1), False), (F(1, 2), 0, (3, -2), False)]}}
    plan = solve(table, ExpectedUtility.penalised([F(10)]), 2, stocks=[(0, 2), (0, 4), (0, 0)])
    # a budget of 2 pays for one step surely, for a second never; of 4 for both
    assert [constrained(plan, [b]).value for b in (0, 2, 4)] == [0, 3, 6]
    drives = solve(table, ExpectedUtility.norm(2, 2), 2, stocks=[(-3, 1)])
    assert homeostasis(drives, (-3, 1)).value == F(-1, 2) == -(F(1, 2) * 0 + F(1, 2) * 1)
    with pytest.raises(ValueError, match="norm"):
        homeostasis(plan, (0, 2))
    with pytest.raises(ValueError, match="penalised"):
        constrained(drives, [1])


def test_a_scan_refuses_a_plan_for_something_else():
    plan = solve(LADDER, "mean", 3)
    for scan, name in ((cvar, "shortfall"), (upper_cvar, "surplus"), (target, "distance"), (exceedance, "reached")):
        with pytest.raises(ValueError, match=name):
            scan(plan, F(1, 2))
    plan = solve(LADDER, "shortfall", 3)
    for level in (0, F(3, 2)):
        with pytest.raises(ValueError, match="level"):
            cvar(plan, level)


def test_dynamic_programming_on_levels_claims_too_much_and_attains_too_little():
    claimed_gap, attained_gap = 0.0, 0.0
    for table in TABLES[:12]:
        levels = cvar_value_iteration(table, 2, levels=np.linspace(0, 1, 73))
        plan = solve(table, "shortfall", 2)
        for level in LEVELS:
            best = float(cvar(plan, level).value)
            claimed, attained = levels.claimed(float(level)), levels.law(float(level)).cvar(float(level))
            assert claimed >= best - 1e-9 and attained <= best + 1e-9
            claimed_gap, attained_gap = max(claimed_gap, claimed - best), max(attained_gap, best - attained)
    # far more than what is linear between 73 levels adds
    assert claimed_gap > 0.05 and attained_gap > 0.05


def test_on_a_grid_of_stocks_the_error_counts_what_lies_between_them():
    plan = solve(LADDER, "shortfall", gamma=0.5, n_stocks=42, n_atoms=41, tolerance=1e-3)
    answer = cvar(plan, 0.9)
    # three steps exactly, and all that may follow
    known = float(cvar(solve(LADDER, "shortfall", 3, F(1, 2)), F(9, 10)).value)
    assert abs(answer.value - known) <= answer.error_bound + 0.25
    assert answer.error_bound == pytest.approx((plan.error_bound + plan.spacing / 2) / 0.9)


def test_on_the_ladder_levels_happen_to_be_right():
    levels = cvar_value_iteration(LADDER, 3)
    for level, known in ((0.5, 0), (0.75, 11 / 75), (0.9, 82 / 225), (1.0, 0.6)):
        assert levels.claimed(level) == pytest.approx(known) == levels.law(level).cvar(level)


def test_with_one_action_levels_are_right():
    table = {s: {0: row[0]} for s, row in TABLES[0].items()}
    levels = cvar_value_iteration(table, 2, levels=np.linspace(0, 1, 73))
    law = laws_of_deterministic_policies(table, 2)[0]
    for level in LEVELS:
        known = float(tail_mean(law, level))
        assert levels.law(float(level)).cvar(float(level)) == pytest.approx(known)
        assert levels.claimed(float(level)) == pytest.approx(known, abs=0.02)
