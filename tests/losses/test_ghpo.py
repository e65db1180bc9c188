"""GHPO: advantages of groups redrawn with hints, and which groups are to be redrawn."""

import torch
from losses.golden import begun, case_of, objective, weights

from ctrlrl.losses.ghpo import GHPO
from ctrlrl.losses.group import ClippedGroupLoss


def test_golden_table():
    """R = (1, 0, 0, 0), unbiased deviation .5 plus 1e-4: A = (1.4997, -.4999, -.4999, -.4999)."""
    case = case_of(GHPO, rows=4, length=1, spread=0.0)
    batch = case.batch._replace(sequence_return=torch.tensor([1.0, 0, 0, 0]).double())
    got = weights(GHPO(), begun(GHPO(), batch), case.output(case.leaf.clone().requires_grad_())).flatten()
    torch.testing.assert_close(got, torch.tensor([1.4997, -0.4999, -0.4999, -0.4999]).double(), atol=5e-5, rtol=0)


def test_hints_receive_no_gradient_and_do_not_count():
    case = case_of(GHPO, rows=4, length=4, spread=0.0)
    mask = torch.ones(4, 4, dtype=torch.bool)
    mask[:2, :2] = False
    batch = begun(GHPO(), case.batch._replace(mask=mask))
    prepared = GHPO().prepare(batch, {})
    assert prepared.denominator == 12 and (prepared.weight == mask).all()
    got = weights(GHPO(), batch, case.output(case.leaf.clone().requires_grad_()))
    assert (got[:2, :2] == 0).all() and (got[:2, 2:] != 0).all()


def test_a_group_is_hard_when_nobody_scored():
    score = torch.tensor([0.0, 0.0, 0.0, 0.2, -1.0, 0.0, 1.0])
    group = torch.tensor([7, 7, 3, 3, 5, 5, 9])
    assert GHPO().hard(score, group).tolist() == [True, True, False, False, True, True, False]


def cascade(solved_from):
    """How often a group is sampled when it succeeds from a hint of this size on."""
    calls, score, group = 1, torch.zeros(4), torch.zeros(4, dtype=torch.long)
    if solved_from <= 0:
        score[0] = 1.0
    for ratio in GHPO.hint_ratios:
        if not GHPO().hard(score, group).any():
            break
        calls += 1
        score[0] = float(ratio >= solved_from)
    return calls


def test_the_hints_grow_until_the_group_succeeds():
    """Success from half the solution on takes three samplings: 0, .25, .5."""
    assert [cascade(x) for x in (0.0, 0.2, 0.5, 0.75, 2.0)] == [1, 2, 3, 4, 4]


def test_a_group_that_keeps_failing_gives_exactly_nothing():
    case = case_of(GHPO)
    failed = case.batch._replace(sequence_return=torch.zeros(12).double())
    got = weights(GHPO(), begun(GHPO(), failed), case.output(case.leaf.clone().requires_grad_()))
    assert got.abs().max() == 0


def test_apart_from_the_floor_it_is_grpo():
    case = case_of(GHPO)
    base = type("Base", (ClippedGroupLoss,), {"aggregation": "token_mean", "name": "base"})()
    loss = GHPO(std_floor=1e-6)
    totals = [objective(x, begun(x, case.batch), case.output(case.leaf)) for x in (loss, base)]
    torch.testing.assert_close(totals[0], totals[1], rtol=0, atol=0)
