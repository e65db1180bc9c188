import pytest
import torch

from ctrlrl.core import head

F64 = torch.float64


def grid():
    r = torch.linspace(0.0, 2.0, 2001, dtype=F64) + 1.23e-5  # off the kinks
    return r.repeat(2), torch.cat([torch.full_like(r, 1.7), torch.full_like(r, -0.6)])


def test_values_by_hand():
    r = torch.tensor([1.25, 1.25, 0.75, 0.75], dtype=F64)
    a = torch.tensor([2.0, -2.0, 2.0, -2.0], dtype=F64)
    assert head.clipped_surrogate(r, a, 0.2, 0.2).tolist() == pytest.approx([2.4, -2.5, 1.5, -1.6])
    assert head.clipped_surrogate(r, a, 0.3, 0.1).tolist() == pytest.approx([2.2, -2.5, 1.5, -1.5])
    assert head.ratio_advantage(r, a).tolist() == [2.5, -2.5, 1.5, -1.5]
    assert head.logp_advantage(r, a).tolist() == [2.5, -2.5, 1.5, -1.5]
    target = torch.tensor([1.0, 1.5, 1.0, 0.75], dtype=F64)
    assert head.ratio_target(r, target, a.abs()).tolist() == [0.5, 0.5, 0.5, 0.0]
    assert head.ratio_target(r, target, a.abs(), "l2").tolist() == [0.125, 0.125, 0.125, 0.0]
    assert head.regression(target, r).tolist() == [0.0625, 0.0625, 0.0625, 0.0]
    with pytest.raises(ValueError, match="l1 or l2"):
        head.ratio_target(r, target, a, "l3")  # type: ignore[arg-type]


def test_gradient_reaches_the_first_argument_only():
    def leaf():
        return (torch.rand(5, dtype=F64) + 0.5).requires_grad_()

    for call in (
        lambda x, y: head.ratio_advantage(x, y),
        lambda x, y: head.logp_advantage(x, y),
        lambda x, y: head.clipped_surrogate(x, y, 0.2, 0.2),
        lambda x, y: head.ratio_target(x, y, y, "l1"),
        lambda x, y: head.ratio_target(x, y, y, "l2", gate=y),
        lambda x, y: head.regression(y, x),
    ):
        x, y = leaf(), leaf()
        call(x, y).sum().backward()
        assert x.grad is not None and y.grad is None


def test_a_closed_gate_keeps_the_value_and_cuts_the_gradient():
    r = torch.tensor([1.5, 1.5], dtype=F64, requires_grad=True)
    loss = head.ratio_target(r, torch.ones(2, dtype=F64), torch.ones(2, dtype=F64), gate=torch.tensor([1.0, 0.0]))
    assert loss.tolist() == [0.5, 0.5]
    loss.sum().backward()
    assert r.grad is not None and r.grad.tolist() == [1.0, 0.0]


def test_log_probability_and_ratio_heads_agree_at_ratio_one():
    logp = torch.randn(6, dtype=F64, requires_grad=True)
    a = torch.randn(6, dtype=F64)
    (one,) = torch.autograd.grad(head.ratio_advantage((logp - logp.detach()).exp(), a).sum(), logp)
    (two,) = torch.autograd.grad(head.logp_advantage(logp, a).sum(), logp)
    assert torch.equal(one, a) and torch.equal(two, a)


def test_asymmetric_band_and_tensor_bounds():
    r, a = grid()
    low, high = torch.tensor(0.1, dtype=F64), torch.tensor(0.4, dtype=F64)
    want = torch.min(r * a, r.clamp(0.9, 1.4) * a)
    assert torch.allclose(head.clipped_surrogate(r, a, low, high), want, atol=1e-15)
