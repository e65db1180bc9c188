"""Flow-GRPO's golden table: GRPO's minimum at every denoising step, and the exact KL between two of them."""

import math

import pytest
import torch
from losses.golden import batch_of, begun, case_of, column, objective, weights

from ctrlrl.losses.flow_grpo import FlowGRPO
from ctrlrl.nets.heads import DiagonalGaussian


def grouped(ratios, returns, mask=None):
    batch, out = batch_of(ratios, torch.zeros_like(ratios), mask)
    returns = torch.tensor(returns, dtype=torch.float64)
    return batch._replace(sequence_return=returns, group=torch.zeros(len(returns), dtype=torch.long)), out


def test_golden_table():
    """R = (1, 0, 0, 0): mean 1/4, population deviation sqrt(3)/4, so A = sqrt(3) (1, -1/3, -1/3, -1/3)."""
    ratios = torch.tensor([[1.1, 1.3], [1.3, 1.0], [0.7, 1.1], [0.9, 0.9]], dtype=torch.float64)
    batch, out = grouped(ratios, [1, 0, 0, 0])
    loss = FlowGRPO(ref_kl_coef=0.0, std_floor=0.0)
    a = math.sqrt(3.0)
    # each step is clipped by itself; two steps share the weight of their row
    expected = torch.tensor([[1.1 * a, 0.0], [-1.3 * a / 3, -a / 3], [0.0, -1.1 * a / 3], [-0.3 * a, -0.3 * a]]) / 2
    torch.testing.assert_close(weights(loss, begun(loss, batch), out), expected.double(), atol=1e-7, rtol=0)


def test_the_unbiased_deviation_is_an_option_and_equal_outcomes_are_silent():
    batch, out = grouped(column(1, 1, 1, 1), [1, 0, 0, 0])
    unbiased = begun(FlowGRPO(ddof=1, std_floor=0.0), batch).advantage[:, 0]
    torch.testing.assert_close(unbiased, torch.tensor([1.5, -0.5, -0.5, -0.5], dtype=torch.float64))
    batch, out = grouped(column(1.1, 0.9), [0.3, 0.3])
    loss = FlowGRPO(ref_kl_coef=0.0)
    assert weights(loss, begun(loss, batch), out).abs().max() == 0


def test_the_penalty_is_the_exact_kl_of_two_steps():
    """(mu - mu_ref)^2 / (2 s^2), summed over dimensions: (0.3^2 + 0.4^2) / (2 * 0.25) = 0.5."""
    batch, out = grouped(column(1.0, 1.0), [0, 0])
    mean = torch.tensor([[[0.3, 0.4]], [[0.0, 0.0]]], dtype=torch.float64, requires_grad=True)
    log_std = torch.full_like(mean, math.log(0.5)).detach()
    out = out._replace(dist=DiagonalGaussian(mean, log_std))
    batch = batch._replace(dist_ref={"mean": torch.zeros_like(mean).detach(), "log_std": log_std})
    loss = FlowGRPO(ref_kl_coef=0.1)
    value = objective(loss, begun(loss, batch), out)
    assert value.item() == pytest.approx(0.1 * 0.5 / 2)
    (gradient,) = torch.autograd.grad(value, mean)
    # c (mu - mu_ref) / s^2, and two rows share the mean
    torch.testing.assert_close(gradient[0, 0], torch.tensor([0.3, 0.4], dtype=torch.float64) * 0.1 / 0.25 / 2)


def test_without_a_penalty_no_reference_is_needed():
    assert "logp_ref" in FlowGRPO().required() and "logp_ref" not in FlowGRPO(ref_kl_coef=0.0).required()
    case = case_of(FlowGRPO)
    leaf = case.leaf.requires_grad_()
    loss = FlowGRPO(ref_kl_coef=0.0)
    objective(loss, begun(loss, case.batch._replace(dist_ref=None, logp_ref=None)), case.output(leaf)).backward()
    assert leaf.grad.abs().sum() > 0


def test_masked_steps_are_silent_even_where_they_hold_nan():
    case = case_of(FlowGRPO)
    mask, out = case.batch.mask, case.output(case.leaf)
    mean = torch.where(mask.unsqueeze(-1), case.leaf, torch.nan).requires_grad_()
    logp = torch.where(mask, out.logp, torch.nan).requires_grad_()
    out = out._replace(logp=logp, dist=DiagonalGaussian(mean, out.dist.log_std))
    objective(FlowGRPO(), begun(FlowGRPO(), case.batch), out).backward()
    for leaf in (mean, logp):
        assert (leaf.grad[~mask] == 0).all() and (leaf.grad[mask] != 0).any()
