"""Knapsack RL: GRPO's objective, with budgets by pass rate."""

import pytest
import torch
from losses.golden import begun, case_of, objective

from ctrlrl.core.select import PassRateBudget
from ctrlrl.losses.group import ClippedGroupLoss
from ctrlrl.losses.knapsack import Knapsack


def test_the_objective_is_grpo_without_kl_for_groups_of_any_size():
    case = case_of(Knapsack)
    batch = case.batch._replace(group=torch.tensor([0] * 2 + [1] * 3 + [2] * 7))
    base = type("Base", (ClippedGroupLoss,), {"name": "base"})()
    totals = [objective(x, begun(x, batch), case.output(case.leaf)) for x in (Knapsack(), base)]
    torch.testing.assert_close(totals[0], totals[1], rtol=0, atol=0)


def test_settings_reach_the_selector():
    loss = Knapsack(size_min=3, size_max=9, prior=2.0, decay=0.9)
    assert loss.selector() == PassRateBudget(low=3, high=9, prior=2.0, decay=0.9)


def test_the_budget_goes_where_a_group_can_tell_something():
    """Sixteen episodes each at p = (15, 8, 4, 1) / 16: smoothed, hard seeds get most and the easy one the least."""
    selector = Knapsack().selector()
    index = torch.arange(4).repeat_interleave(16)
    score = torch.cat([(torch.arange(16) < k).float() for k in (15, 8, 4, 1)])
    state = selector.learn(selector.initial(4, torch.zeros(4, 1)), index, score, torch.zeros(64, 1))
    choice = selector.select(state, 4, 8, 0.0, torch.Generator().manual_seed(0))
    size = choice.size[choice.index.argsort()]
    assert size.sum() == 32 and size[0] == 2 and size.argmax() in (2, 3)


@pytest.mark.parametrize("wrong", [{"size_min": 1}, {"size_min": 9, "size_max": 8}, {"prior": 0.0}, {"decay": 1.5}])
def test_impossible_settings_are_refused(wrong):
    with pytest.raises(ValueError, match="|".join(wrong)):
        Knapsack(**wrong)
