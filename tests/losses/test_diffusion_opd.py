"""DiffusionOPD: the exact KL to a teacher, for denoising steps, ODE steps and Gaussian actions."""

import math

import pytest
import torch
from losses.golden import batch_of, case_of, objective
from torch.distributions import Normal, kl_divergence

from ctrlrl.losses.diffusion_opd import DiffusionOPD
from ctrlrl.nets.heads import DiagonalGaussian


def distilled(mean, teacher, log_std, teacher_log_std=None, mask=None):
    """Student and teacher [B, T, D]."""
    mean, teacher = (torch.tensor(x, dtype=torch.float64) for x in (mean, teacher))
    mean.requires_grad_()
    log_std = torch.full_like(mean, log_std).detach().requires_grad_(math.isfinite(log_std))
    other = log_std.detach() if teacher_log_std is None else torch.full_like(teacher, teacher_log_std)
    shape = mean.shape[:2]
    batch, out = batch_of(torch.ones(shape, dtype=torch.float64), torch.zeros(shape, dtype=torch.float64), mask)
    return (
        mean,
        log_std,
        batch._replace(dist_ref={"mean": teacher, "log_std": other}),
        out._replace(dist=DiagonalGaussian(mean, log_std)),
    )


def test_golden_table():
    """s = 0.5: squared distances 0.09 + 0.16 and 1 + 0 over 2 s^2 = 1/2, means over two dimensions and two steps."""
    mean, log_std, batch, out = distilled([[[0.3, 0.4], [1.0, 2.0]]], [[[0.0, 0.0], [0.0, 2.0]]], math.log(0.5))
    value = objective(DiffusionOPD(), batch, out)
    assert value.item() == pytest.approx((0.25 + 1.0) / 0.5 / 4)
    assert objective(DiffusionOPD(reduce="sum"), batch, out).item() == pytest.approx(2 * value.item())
    on_mean, on_std = torch.autograd.grad(value, (mean, log_std))
    # (mu - mu_T) / s^2 / 4, and nothing on deviations that agree
    torch.testing.assert_close(on_mean, torch.tensor([[[0.3, 0.4], [1.0, 0.0]]], dtype=torch.float64))
    assert on_std.abs().max() == 0


def test_it_is_the_kl_also_where_the_deviations_differ():
    mean, log_std, batch, out = distilled([[[0.3]]], [[[1.0]]], -0.2, 0.4)
    expected = kl_divergence(Normal(mean, log_std.exp()), Normal(1.0, math.exp(0.4)))
    value = objective(DiffusionOPD(), batch, out)
    torch.testing.assert_close(value, expected.sum())
    assert torch.autograd.grad(value, log_std)[0].item() == pytest.approx(math.exp(-1.2) - 1.0)


def test_zero_exactly_where_the_means_match():
    mean, _, batch, out = distilled([[[0.7, -3.0]]], [[[0.7, -3.0]]], -1.0)
    value = objective(DiffusionOPD(), batch, out)
    assert value.item() == 0.0 and torch.autograd.grad(value, mean)[0].abs().max() == 0


def test_without_noise_half_the_squared_distance():
    mean, _, batch, out = distilled([[[0.3, 0.5]]], [[[0.0, 0.0]]], -math.inf)
    value = objective(DiffusionOPD(reduce="sum"), batch, out)
    assert value.item() == pytest.approx(0.5 * (0.09 + 0.25))
    torch.testing.assert_close(torch.autograd.grad(value, mean)[0], mean.detach())


def test_a_policy_gradient_of_the_same_kl_has_its_mean_and_much_variance():
    """delta = s = 1: mean delta / s^2 = 1, variance 2 delta^2 / s^4 + delta^4 / (4 s^6) = 2.25 against 0."""
    mean, _, batch, out = distilled([[[1.0]]], [[[0.0]]], 0.0)
    (exact,) = torch.autograd.grad(objective(DiffusionOPD(), batch, out), mean)
    noise = torch.randn(400_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = 1.0 + noise
    estimate = (Normal(1.0, 1.0).log_prob(x) - Normal(0.0, 1.0).log_prob(x)) * noise
    assert exact.item() == 1.0 and estimate.mean().item() == pytest.approx(1.0, abs=0.01)
    assert estimate.var().item() == pytest.approx(2.25, rel=0.02)


def test_advantages_play_no_part_and_masked_positions_are_silent():
    case = case_of(DiffusionOPD)
    mask = case.batch.mask
    mean, log_std = (
        torch.where(mask.unsqueeze(-1), x, torch.nan).requires_grad_()
        for x in (case.leaf, case.output(case.leaf).dist.log_std + 0.1)
    )
    out = case.output(case.leaf)._replace(dist=DiagonalGaussian(mean, log_std))
    values = [objective(DiffusionOPD(), case.batch._replace(advantage=a * case.batch.advantage), out) for a in (1, 100)]
    assert torch.equal(values[0], values[1])
    for gradient in torch.autograd.grad(values[0], (mean, log_std)):
        assert (gradient[~mask] == 0).all() and (gradient[mask] != 0).all()
