"""Supervised fine-tuning's golden table: three demonstrated positions in two rows."""

import torch
from losses.golden import batch_of, objective, weights

from ctrlrl.losses.sft import SFT
from ctrlrl.types import DEMONSTRATION, ON_POLICY

F64 = torch.float64


def shown():
    mask = torch.tensor([[True, True], [True, False], [True, True]])
    batch, out = batch_of(torch.full((3, 2), 1.5, dtype=F64), torch.ones(3, 2, dtype=F64), mask)
    return batch._replace(source=torch.tensor([DEMONSTRATION, DEMONSTRATION, ON_POLICY])), out


def test_golden_table():
    """Every demonstrated position counts one third, whatever the collecting policy thought of it."""
    batch, out = shown()
    expected = torch.tensor([[1, 1], [1, 0], [0, 0]], dtype=F64)
    assert torch.equal(weights(SFT(), batch, out), expected)
    mean = -(out.logp[0, 0] + out.logp[0, 1] + out.logp[1, 0]) / 3
    torch.testing.assert_close(objective(SFT(), batch, out), mean)


def test_without_demonstrations_there_is_nothing_to_learn():
    batch, out = shown()
    for source in (None, torch.full((3,), ON_POLICY)):
        alone = batch._replace(source=source)
        assert not alone.came_from(DEMONSTRATION).any()
        assert weights(SFT(), alone, out).abs().max() == 0 and objective(SFT(), alone, out) == 0


def test_positions_that_are_not_shown_may_hold_anything():
    batch, out = shown()
    learned = batch.mask & batch.came_from(DEMONSTRATION).unsqueeze(-1)
    poisoned = torch.where(learned, out.logp, torch.nan).detach().requires_grad_()
    assert torch.equal(weights(SFT(), batch, out._replace(logp=poisoned)), learned.to(F64))
