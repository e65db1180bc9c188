"""C3PO: the budget's gate, its constant weight, and the limit of the token mean."""

import pytest
import torch
from losses.golden import begun, case_of, objective, weights

from ctrlrl.losses.c3po import C3PO
from ctrlrl.losses.group import AGGREGATIONS


def lengths_mask(*lengths):
    return torch.arange(max(lengths)) < torch.tensor(lengths).unsqueeze(1)


def test_rows_are_taken_in_order_and_the_last_is_cut():
    """Lengths (5, 3, 4) and a budget of 10: kept (5, 3, 2), each position weighs .1."""
    case = case_of(C3PO, rows=3, length=5)
    batch = case.batch._replace(mask=lengths_mask(5, 3, 4))
    prepared = C3PO(budget=10).prepare(batch, {})
    assert prepared.weight.sum(1).tolist() == [5, 3, 2] and prepared.weight.max() == 1
    assert (prepared.weight / prepared.denominator).max().item() == pytest.approx(0.1)
    assert prepared.weight[2].tolist() == [1, 1, 0, 0, 0]


def test_the_weight_does_not_follow_the_length():
    case = case_of(C3PO, rows=4, length=5)
    for lengths in ((5, 5, 5, 5), (1, 2, 1, 1), (0, 0, 0, 0)):
        prepared = C3PO(budget=12).prepare(case.batch._replace(mask=lengths_mask(*lengths, 5)[:4]), {})
        assert prepared.denominator == 12 and prepared.weight.sum() == min(12, sum(lengths))


def test_a_budget_of_all_positions_is_the_token_mean():
    case = case_of(C3PO)
    total = int(case.batch.mask.sum())
    loss = C3PO(budget=total)
    batch, out = begun(loss, case.batch), case.output(case.leaf.clone().requires_grad_())
    weight, denominator = AGGREGATIONS["token_mean"](batch.mask, torch.float64)
    prepared = loss.prepare(batch, {})
    torch.testing.assert_close((prepared.weight, prepared.denominator), (weight, denominator))
    assert objective(loss, batch, out).isfinite()


def test_advantages_are_taken_before_the_cut():
    """Only the first of a group's two rows is within the budget; its advantage is still against the other."""
    case = case_of(C3PO, rows=2, length=2, spread=0.0)
    batch = case.batch._replace(mask=lengths_mask(2, 2), sequence_return=torch.tensor([1.0, 0.0]).double())
    loss = C3PO(budget=2, ref_kl_coef=0.0, std_floor=0.0)
    got = weights(loss, begun(loss, batch), case.output(case.leaf.clone().requires_grad_()))
    torch.testing.assert_close(got, torch.tensor([[0.5**0.5] * 2, [0.0] * 2]).double())


def test_the_budget_is_positive():
    with pytest.raises(ValueError, match="budget=0"):
        C3PO(budget=0)
