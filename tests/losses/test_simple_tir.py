"""SimpleTIR: which sequences are left out, after their part in the group's statistics."""

import math

import torch
from losses.golden import begun, case_of, objective, weights

from ctrlrl.losses.group import ClippedGroupLoss
from ctrlrl.losses.simple_tir import SimpleTIR


def test_golden_table():
    """R = (1, 0, 1, 0): A ~ (1, -1, 1, -1). Without the second row (1, 0, 1, -1): the sum is 1, not centred again."""
    case = case_of(SimpleTIR, rows=4, length=1, spread=0.0)
    void = torch.tensor([[False], [True], [False], [False]])
    batch = case.batch._replace(sequence_return=torch.tensor([1.0, 0, 1, 0]).double(), void=void)
    loss = SimpleTIR()
    got = weights(loss, begun(loss, batch), case.output(case.leaf.clone().requires_grad_())).flatten()
    expected = math.sqrt(3) / 2 * torch.tensor([1.0, 0.0, 1.0, -1.0]).double()
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)


def test_one_void_turn_leaves_out_the_whole_sequence():
    case = case_of(SimpleTIR)
    void = ~case.batch.mask  # padding says nothing
    void[0, 1] = True
    start = SimpleTIR().begin(case.batch._replace(void=void), {}, {})
    expected = case.batch.mask.clone()
    expected[0] = False
    assert void[1:].any() and torch.equal(start.batch.mask, expected)
    assert math.isclose(start.stats["void_sequences"].item(), 1 / 12)


def test_without_void_turns_it_is_grpo_and_all_void_is_zero():
    case = case_of(SimpleTIR)
    base = type("Base", (ClippedGroupLoss,), {"aggregation": "token_mean", "name": "base"})()
    fine = case.batch._replace(void=torch.zeros_like(case.batch.mask))
    totals = [objective(x, begun(x, fine), case.output(case.leaf)) for x in (SimpleTIR(), base)]
    torch.testing.assert_close(totals[0], totals[1], rtol=0, atol=0)
    void = case.batch._replace(void=torch.ones_like(case.batch.mask))
    assert objective(SimpleTIR(), begun(SimpleTIR(), void), case.output(case.leaf)) == 0
