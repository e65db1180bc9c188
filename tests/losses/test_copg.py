"""CoPG's golden table: three sequences; and its two theorems, the gradient's and the fixed point's."""

import torch
from losses.golden import batch_of, categorical_output, column, objective, weights

from ctrlrl.core import advantage as adv
from ctrlrl.losses.copg import CoPG

F64 = torch.float64


def against_reference(log_ratios, returns, group=None, mask=None):
    """Log-ratios [B, T] to the reference; the collecting policy is elsewhere, as it plays no part."""
    log_ratios = torch.as_tensor(log_ratios, dtype=F64)
    batch, out = batch_of(torch.full_like(log_ratios, 1.7), torch.zeros_like(log_ratios), mask)
    batch = batch._replace(
        logp_ref=out.logp.detach() - log_ratios,
        sequence_return=torch.tensor(returns, dtype=F64),
        group=torch.tensor([0] * len(returns) if group is None else group),
    )
    return batch, out


def test_golden_table():
    """x = (1 - .5, 0 + .5, 2) with c = 1/2: pairs 0, 9/4, 9/4 over k - 1 = 2, then over k = 3 sequences."""
    batch, out = against_reference([[1.0], [-1.0], [0.0]], [1.0, 0.0, 2.0])
    loss = CoPG(kl_temp=0.5)
    torch.testing.assert_close(objective(loss, batch, out).item(), 4.5 / 2 / 3)
    # 2 c (x - mean of the others) = x - mean of the others = (-.75, -.75, 1.5)
    torch.testing.assert_close(weights(loss, batch, out), column(-0.75, -0.75, 1.5))


def test_the_gradient_is_that_of_leave_one_out_on_the_regularised_return():
    g = torch.Generator().manual_seed(0)
    group = [0, 0, 0, 4, 4, 4, 4, 9]
    mask = torch.rand(8, 3, generator=g) < 0.7
    mask[:, 0] = True
    log_ratios = torch.randn(8, 3, generator=g, dtype=F64)
    batch, out = against_reference(log_ratios, torch.randn(8, generator=g).tolist(), group, mask)
    x = batch.sequence_return - 0.3 * torch.where(mask, log_ratios, 0.0).sum(-1)
    rloo = 2 * 0.3 * adv.center_scale(x, batch.group, "leave_one_out", "none")
    got = weights(CoPG(kl_temp=0.3), batch, out)
    torch.testing.assert_close(got, torch.where(mask, rloo.unsqueeze(-1), 0.0), atol=1e-12, rtol=0)
    # a constant on a group's returns changes nothing; a group of one is silent
    shifted = batch._replace(sequence_return=batch.sequence_return + 7.0 * batch.group)
    torch.testing.assert_close(weights(CoPG(kl_temp=0.3), shifted, out), got, atol=1e-12, rtol=0)
    assert (got[7] == 0).all()


def test_the_fixed_point_is_the_tilted_reference_from_any_data():
    """Three arms in shares that are nobody's policy; the exact solution is pi_ref exp(R / c) / Z."""
    ref = torch.tensor([0.5, 0.0, -0.5], dtype=F64).softmax(0)
    returns = torch.tensor([1.0, 0.0, 2.0], dtype=F64)
    arms = torch.tensor([0, 0, 0, 1, 1, 2])
    batch, _ = against_reference(torch.zeros(6, 1), returns[arms].tolist())
    batch = batch._replace(logp_ref=ref[arms].log().unsqueeze(-1))
    loss, logits = CoPG(kl_temp=1.0), torch.zeros(3, dtype=F64, requires_grad=True)
    solver = torch.optim.LBFGS([logits], max_iter=100, tolerance_grad=1e-12, tolerance_change=1e-16)

    def closure():
        solver.zero_grad()
        value = objective(loss, batch, categorical_output(logits.expand(6, 1, 3), arms.unsqueeze(-1)))
        value.backward()
        return value

    solver.step(closure)
    expected = torch.tensor([0.449816, 0.100368, 0.449816], dtype=F64)
    torch.testing.assert_close(logits.detach().softmax(0), expected, atol=2e-6, rtol=0)
    torch.testing.assert_close(expected, (ref.log() + returns).softmax(0), atol=1e-6, rtol=0)


def test_nothing_to_learn_is_exactly_nothing():
    batch, out = against_reference(torch.zeros(3, 1), [0.1, 0.1, 0.1])
    assert weights(CoPG(), batch, out).abs().max() == 0
    assert objective(CoPG(), batch._replace(mask=torch.zeros_like(batch.mask)), out) == 0
    assert CoPG().together(batch) is batch.group
