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


def by_autograd(ratio, advantage, low, high):
    """The definition, clip by clip: what lies on the border keeps its gradient."""
    up, down = ratio.clamp(max=1 + high) * advantage.clamp(min=0), ratio.clamp(min=1 - low) * advantage.clamp(max=0)
    return up + down


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_the_clip_has_the_value_and_gradient_of_its_definition(dtype):
    border = torch.tensor([0.8, 1.25, 1.0, 0.0, 4e8, 2e-9], dtype=dtype)  # exactly on both borders, far off, and one
    r = torch.cat([torch.linspace(0, 2, 999, dtype=dtype), border]).repeat(3)
    a = torch.cat([torch.full((len(r) // 3,), x, dtype=dtype) for x in (1.7, -0.6, 0.0)])
    low, high = 1 - border[0].item(), 0.25
    r1, r2 = r.clone().requires_grad_(), r.clone().requires_grad_()
    got, want = head.clipped_surrogate(r1, a, low, high), by_autograd(r2, a, low, high)
    assert torch.equal(got, want) and torch.equal(got, torch.minimum(r * a, r.clamp(1 - low, 1 + high) * a))
    got.sum().backward()
    want.sum().backward()
    assert torch.equal(r1.grad, r2.grad)
    assert (r1.grad == 0).any() and (r1.grad > 0).any() and (r1.grad < 0).any()


def test_the_clip_overwrites_none_of_its_arguments():
    r, a = grid()
    low, high = torch.full_like(r, 0.1), torch.full_like(r, 0.4)
    kept = [x.clone() for x in (r, a, low, high)]
    head.clipped_surrogate(r.requires_grad_(), a, low, high).sum().backward()
    assert all(torch.equal(x, y) for x, y in zip((r, a, low, high), kept, strict=True))


def test_one_ratio_per_sequence_meets_an_advantage_per_position():
    r = torch.tensor([[1.5], [0.5]], dtype=F64, requires_grad=True)
    a = torch.tensor([[1.0, -2.0, 3.0], [1.0, -2.0, 3.0]], dtype=F64)
    got = head.clipped_surrogate(r, a, 0.2, 0.2)
    torch.testing.assert_close(got, head.clipped_surrogate(r.expand(2, 3), a, 0.2, 0.2), rtol=0, atol=0)
    got.sum().backward()
    assert r.grad is not None and r.grad.tolist() == [[-2.0], [4.0]]


def test_a_tangent_has_its_value_and_slope_under_every_way_of_differentiating():
    x, value, slope = torch.randn(3, 7, dtype=F64)

    def total(x):
        return head.tangent(value, slope, x).sum()

    assert torch.equal(head.tangent(value, slope, x), value)
    assert torch.equal(torch.func.grad(total)(x), slope)
    compiled = torch.compile(torch.func.grad(total), fullgraph=True, backend="eager")
    assert torch.equal(compiled(x), slope)
    r = (torch.rand(9, dtype=F64) + 0.5).requires_grad_()
    a = torch.linspace(-1, 1, 9, dtype=F64)
    assert torch.autograd.gradcheck(lambda r: head.clipped_surrogate(r, a, 0.2, 0.2), r)
