"""D3S: which rows and steps are kept, and the schedule."""

import pytest
import torch
from losses.golden import begun, case_of, knobs_of, objective

from ctrlrl.core import advantage as adv
from ctrlrl.losses.d3s import D3S, top_steps
from ctrlrl.losses.group import ClippedGroupLoss


def test_the_steps_of_largest_advantage_times_entropy():
    advantage = torch.tensor([[1.0, 1.0, 1.0], [-2.0, -2.0, 0.0]])
    entropy = torch.tensor([[0.1, 0.9, 0.5], [0.2, 0.6, 9.0]])
    mask = torch.tensor([[True, True, True], [True, True, False]])
    # gains .1 .9 .5 / .4 1.2
    expected = torch.tensor([[False, True, False], [False, True, False]])
    assert torch.equal(top_steps(advantage, entropy, mask, 0.4), expected)
    assert torch.equal(top_steps(advantage, entropy, mask, 1.0), mask)
    assert top_steps(advantage, entropy, mask, 0.01).sum() == 1
    assert top_steps(advantage, entropy, torch.zeros_like(mask), 0.5).sum() == 0
    spoiled = torch.where(mask, entropy, torch.nan)
    assert torch.equal(top_steps(torch.where(mask, advantage, torch.nan), spoiled, mask, 0.4), expected)


def test_negative_entropies_keep_their_order():
    advantage, mask = torch.ones(1, 4), torch.ones(1, 4, dtype=torch.bool)
    chosen = top_steps(advantage, torch.tensor([[-3.0, -1.0, -2.0, -0.5]]), mask, 0.5)
    assert chosen.tolist() == [[False, True, False, True]]
    constant = top_steps(torch.tensor([[1.0, -3.0, 2.0, 0.0]]), torch.full((1, 4), -1.0), mask, 0.5)
    assert constant.tolist() == [[False, True, True, False]]


def test_everything_kept_is_the_base_loss():
    case = case_of(D3S)
    base = type("Base", (ClippedGroupLoss,), {"name": "base"})()
    whole = D3S(rows_start=1.0, steps_start=1.0, steps_end=1.0)
    totals = [objective(x, begun(x, case.batch), case.output(case.leaf)) for x in (whole, base)]
    torch.testing.assert_close(totals[0], totals[1], rtol=0, atol=0)


def test_rows_are_the_extremes_and_keep_the_advantages_of_whole_groups():
    case = case_of(D3S)
    loss = D3S(rows_start=0.25, rows_end=0.25, steps_start=1.0, steps_end=1.0)
    got = begun(loss, case.batch)
    a = adv.center_scale(case.batch.sequence_return, case.batch.group)
    kept = got.mask.any(1)
    assert kept.sum() == 3
    assert kept[a.argmax()] and kept[a.argmin()]
    torch.testing.assert_close(got.advantage[kept, 0], a[kept])


def test_the_schedule_moves_in_a_straight_line():
    loss = D3S(rows_start=0.5, rows_end=1.0, steps_start=0.1, steps_end=0.3)
    assert {k: round(v.item(), 9) for k, v in knobs_of(loss, 0.5).items()} == {"kept_rows": 0.75, "kept_steps": 0.2}
    case = case_of(D3S, rows=20, length=5)
    used = [loss.begin(case.batch, knobs_of(loss, u), {}).batch.mask.sum().item() for u in (0.0, 0.5, 1.0)]
    assert used[0] < used[1] < used[2] < case.batch.mask.sum()


def test_shares_must_be_shares():
    with pytest.raises(ValueError, match="steps_end"):
        D3S(steps_end=1.5)
