"""The golden table of shaped cross-entropy: three actions (.5, .3, .2), the first demonstrated."""

import pytest
import torch
from losses.golden import batch_of, categorical_output, objective

from ctrlrl.losses.precision_diversity import PrecisionDiversity
from ctrlrl.losses.sft import SFT
from ctrlrl.types import DEMONSTRATION

F64 = torch.float64


def shown(p, action=0):
    """Batch [1, 1] and logits with gradient."""
    one = torch.ones(1, 1, dtype=F64)
    batch, _ = batch_of(one, one)
    batch = batch._replace(action=torch.tensor([[action]]), source=torch.tensor([DEMONSTRATION]))
    return batch, torch.tensor([[p]], dtype=F64).log().requires_grad_()


def ascent(loss, batch, logits):
    objective(loss, batch, categorical_output(logits, batch.action)).backward()
    return -logits.grad[0, 0]


@pytest.mark.parametrize(("exponent", "factor"), [(0.0, 1.0), (-0.25, 1.18921), (1.0, 0.5)])
def test_golden_table(exponent, factor):
    batch, logits = shown([0.5, 0.3, 0.2])
    got = ascent(PrecisionDiversity(exponent=exponent), batch, logits)
    torch.testing.assert_close(got, factor * torch.tensor([0.5, -0.3, -0.2], dtype=F64), atol=2e-6, rtol=0)


def test_precision_keeps_pushing_what_is_nearly_certain():
    batch, logits = shown([0.9, 0.1])
    assert ascent(PrecisionDiversity(), batch, logits)[0].item() == pytest.approx(0.1 * 1.77828, abs=1e-6)
    batch, logits = shown([1.0, 1e-20])
    assert ascent(PrecisionDiversity(), batch, logits).isfinite().all()


def test_exponent_zero_is_cross_entropy():
    batch, logits = shown([0.5, 0.3, 0.2], action=2)
    out = categorical_output(logits, batch.action)
    assert torch.equal(objective(PrecisionDiversity(exponent=0.0), batch, out), objective(SFT(), batch, out))


def test_rewards_of_other_actions_by_rank():
    """pi (r - E[r]) with r = (2, .5, -1): the likelier other action is rewarded, the tail punished."""
    batch, logits = shown([0.5, 0.3, 0.2])
    loss = PrecisionDiversity(exponent=0.0, top_reward=0.5, tail_reward=-1.0, top_k=2)
    p, r = torch.tensor([0.5, 0.3, 0.2], dtype=F64), torch.tensor([2.0, 0.5, -1.0], dtype=F64)
    got = ascent(loss, batch, logits)
    torch.testing.assert_close(got, p * (r - (p * r).sum()))
    assert got.sum().abs() < 1e-15


def test_actions_that_do_not_exist_and_rows_that_are_not_shown():
    batch, logits = shown([0.5, 0.5, 0.0])
    loss = PrecisionDiversity(exponent=0.0, tail_reward=-1.0, top_k=1)
    assert objective(loss, batch, categorical_output(logits, batch.action)).isfinite()
    got = ascent(loss, batch, logits)
    assert got[:2].tolist() == pytest.approx([0.5 * (2 - 0.5), 0.5 * (-1 - 0.5)]) and got[2] == 0
    batch, logits = shown([0.5, 0.5])
    assert (ascent(loss, batch._replace(source=None), logits) == 0).all()
    assert objective(loss, batch._replace(source=None), categorical_output(logits, batch.action)) == 0
