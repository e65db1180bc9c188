"""VAS: GRPO's objective, with a selector by outcome variance."""

import pytest
import torch
from losses.golden import begun, case_of, objective

from ctrlrl.core.select import VarianceSampling
from ctrlrl.losses.group import ClippedGroupLoss
from ctrlrl.losses.vas import VAS


def test_the_objective_is_grpo_without_kl():
    case = case_of(VAS)
    base = type("Base", (ClippedGroupLoss,), {"name": "base"})()
    totals = [objective(x, begun(x, case.batch), case.output(case.leaf)) for x in (VAS(), base)]
    torch.testing.assert_close(totals[0], totals[1], rtol=0, atol=0)


def test_settings_reach_the_selector():
    assert VAS(variance_share=0.25, momentum=0.5).selector() == VarianceSampling(share=0.25, momentum=0.5)
    with pytest.raises(ValueError, match="momentum=2"):
        VAS(momentum=2.0)


def test_seeds_without_variance_leave_the_weighted_half():
    """p = (0, .5, .75, 1), eight groups: four among seeds 1 and 2, four over the whole pool."""
    selector = VAS().selector()
    index = torch.arange(4).repeat_interleave(4)
    score = torch.tensor([0, 0, 0, 0, 1, 1, 0, 0, 1, 1, 1, 0, 1, 1, 1, 1]).float()
    state = selector.learn(selector.initial(4, torch.zeros(4, 1)), index, score, torch.zeros(16, 1))
    chosen = selector.select(state, 8, 4, 0.0, torch.Generator().manual_seed(0)).index
    counts = torch.bincount(chosen, minlength=4)
    assert counts[0] == counts[3] == 1 and counts[1] + counts[2] == 6
