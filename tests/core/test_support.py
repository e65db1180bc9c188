"""Nucleus sets and the policy renormalised on them."""

import math

import pytest
import torch

from ctrlrl.core import support

F64 = torch.float64


def test_the_action_that_crosses_p_is_kept():
    """.5 + .3 + .15 = .95 is the first sum to reach .9."""
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05], dtype=F64).log()
    assert support.top_p_support(logits, 0.9).tolist() == [True, True, True, False]
    assert support.top_p_support(logits[[3, 0, 2, 1]], 0.9).tolist() == [False, True, True, True]
    assert support.top_p_support(logits, 0.4).tolist() == [True, False, False, False]
    assert support.top_p_support(logits, 0.4, min_keep=3).tolist() == [True, True, True, False]


def test_p_one_keeps_whatever_exists():
    logits = torch.tensor([60.0, 0.0, -200.0, -torch.inf])
    assert support.top_p_support(logits, 1.0).tolist() == [True, True, True, False]
    assert support.top_p_support(logits, 0.9, min_keep=4).tolist() == [True, True, True, False]


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9, 0.99])
def test_the_set_is_the_smallest_that_covers_p(p):
    logits = 2 * torch.randn(50, 7, generator=torch.Generator().manual_seed(0), dtype=F64)
    kept = support.top_p_support(logits, p)
    probability = torch.where(kept, logits.softmax(-1), 0.0)
    least = torch.where(kept, probability, torch.inf).amin(-1)
    assert (probability.sum(-1) >= p - 1e-12).all()
    assert (probability.sum(-1) - least < p).all()
    # nothing outside is likelier than something inside
    assert (torch.where(kept, 0.0, logits.softmax(-1)).amax(-1) <= least).all()


def test_renormalised_probabilities_by_hand():
    """(.4, .3, .2, .1) on the first three: 4/9, 3/9, 2/9."""
    logits = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=F64).log().expand(3, 4) + 5.0
    allowed = torch.tensor([True, True, True, False]).expand(3, 4)
    logp = support.restricted_logp(logits, allowed, torch.arange(3))
    torch.testing.assert_close(logp.exp(), torch.tensor([4 / 9, 3 / 9, 2 / 9], dtype=F64))


def test_gradient_is_that_of_the_renormalised_policy():
    """d log pi~(0) / d logits = (1, 0, 0, 0) - (4/9, 3/9, 2/9, 0)."""
    logits = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=F64).log().requires_grad_()
    allowed = torch.tensor([True, True, True, False])
    (gradient,) = torch.autograd.grad(support.restricted_logp(logits, allowed, torch.tensor(0)), logits)
    torch.testing.assert_close(gradient, torch.tensor([5 / 9, -3 / 9, -2 / 9, 0.0], dtype=F64))


def test_the_chosen_action_is_always_allowed():
    logits = torch.zeros(2, 3, dtype=F64)
    nothing = torch.zeros(2, 3, dtype=torch.bool)
    assert support.restricted_logp(logits, nothing, torch.tensor([0, 2])).tolist() == [0.0, 0.0]
    other = torch.tensor([[True, False, False]])
    assert support.restricted_logp(logits[:1], other, torch.tensor([1])).item() == pytest.approx(-math.log(2))
