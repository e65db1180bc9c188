"""GRPO-Guard: a log-ratio with mean zero and the same deviation at every denoising step."""

import math

import pytest
import torch
from losses.golden import batch_of, begun, case_of, column, objective

from ctrlrl.losses.flow_grpo import FlowGRPO
from ctrlrl.losses.grpo_guard import GRPOGuard
from ctrlrl.nets.heads import DiagonalGaussian


def guard(**settings):
    """The loss with PPO's band and steps as they are, unless a test says otherwise."""
    return GRPOGuard(**{"eps_low": 0.2, "eps_high": 0.2, "equal_steps": False} | settings)



def moved(delta, s, noise):
    """A batch [B, 1] of steps with deviation ``s`` and the given noise [B, D], whose mean moved by ``delta`` [D]."""
    batch, out = batch_of(torch.ones(len(noise), 1, dtype=torch.float64), torch.zeros(len(noise), 1).double())
    noise = noise.unsqueeze(1)
    mean = torch.zeros_like(noise)
    old = DiagonalGaussian(mean, torch.full_like(mean, math.log(s)))
    new = DiagonalGaussian((mean + delta).requires_grad_(), old.log_std)
    action = s * noise
    batch = batch._replace(action=action, dist_old=old.params(), dist_ref=old.params(), logp_old=old.log_prob(action))
    return batch, out._replace(logp=new.log_prob(action), dist=new)


def draws(n, size=4):
    """[2 n, D] normal noise with its mirror image, so that odd moments are exact."""
    half = torch.randn(n, size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return torch.cat([half, -half])


@pytest.mark.parametrize(("s", "mean", "std"), [(0.05, -0.5, 0.5), (0.1, -0.125, 0.25), (0.4, -0.0078, 0.0625)])
def test_the_raw_ratio_depends_on_the_noise_of_the_step_and_the_guarded_one_does_not(s, mean, std):
    """D = 4, Delta = 0.05 in each dimension, so |Delta| = 0.1."""
    batch, out = moved(torch.full((4,), 0.05).double(), s, draws(100_000))
    raw = (out.logp - batch.logp_old) / 4
    assert raw.mean().item() == pytest.approx(mean, abs=1e-4) and raw.std().item() == pytest.approx(std, rel=0.01)
    for reduce, expected in (("mean", 0.025), ("sum", 0.1)):
        guarded = guard(reduce=reduce).log_ratio(batch, out)
        assert guarded.mean().item() == pytest.approx(0.0, abs=1e-12)
        assert guarded.std().item() == pytest.approx(expected, rel=0.01)


def test_only_an_averaged_ratio_has_a_mean_below_one():
    """s = 0.1: E exp(mean over dimensions) = exp(-0.125 + 0.25^2 / 2) = 0.9104, and exactly 1 for the sum."""
    batch, out = moved(torch.full((4,), 0.05).double(), 0.1, draws(200_000))
    raw = out.logp - batch.logp_old
    assert (raw / 4).exp().mean().item() == pytest.approx(0.9104, abs=1e-3)
    assert raw.exp().mean().item() == pytest.approx(1.0, abs=0.01)


@pytest.mark.parametrize("reduce", ["sum", "mean"])
def test_it_is_the_papers_formula(reduce):
    """s (logp - logp_old) + |Delta|^2 / (2 s), with sums or means over dimensions throughout."""
    delta, s = torch.tensor([0.3, -0.1, 0.2, 0.0], dtype=torch.float64), 0.7
    batch, out = moved(delta, s, draws(3))
    share = 4 if reduce == "mean" else 1
    expected = s * (out.logp - batch.logp_old) / share + delta.square().sum() / share / (2 * s)
    torch.testing.assert_close(guard(reduce=reduce).log_ratio(batch, out), expected)


def test_golden_table():
    """One dimension, s = 0.5, noise 1 and Delta = (0.1, 0.3, -0.3, -0.1): r~ = exp(Delta), clipped at 0.2.

    A = (1, 1, -1, -1). The weight on Delta is r~ A, nothing past the target; per row 1/4.
    """
    delta = column(0.1, 0.3, -0.3, -0.1).unsqueeze(-1)
    batch, _ = moved(torch.zeros(1).double(), 0.5, torch.ones(4, 1, dtype=torch.float64))
    mean = delta.clone().requires_grad_()
    new = DiagonalGaussian(mean, batch.dist_old["log_std"])
    _, out = batch_of(torch.ones(4, 1).double(), torch.zeros(4, 1).double())
    batch = batch._replace(
        sequence_return=torch.tensor([1.0, 1.0, 0.0, 0.0], dtype=torch.float64), group=torch.zeros(4, dtype=torch.long)
    )
    out = out._replace(logp=new.log_prob(batch.action), dist=new)
    loss = guard(ref_kl_coef=0.0, std_floor=0.0)
    (gradient,) = torch.autograd.grad(objective(loss, begun(loss, batch), out), mean)
    expected = column(math.exp(0.1), 0.0, 0.0, -math.exp(-0.1)).unsqueeze(-1) / 4
    torch.testing.assert_close(-gradient, expected)


def test_equal_steps_divides_by_the_gain_and_keeps_the_mean():
    case = case_of(GRPOGuard, rows=4, length=2)
    gain = torch.tensor([0.1, 0.3], dtype=torch.float64).expand(4, 2)
    batch = case.batch._replace(coef={"velocity_gain": gain}, mask=torch.ones(4, 2, dtype=torch.bool))
    loss = guard(equal_steps=True)
    batch = begun(loss, batch)
    plain, scaled = (x.prepare(batch, {}).coef["advantage"] for x in (guard(), loss))
    # 1/gain = (10, 10/3), with mean 20/3
    torch.testing.assert_close(scaled, plain * torch.tensor([1.5, 0.5], dtype=torch.float64))
    with pytest.raises(ValueError, match="velocity_gain"):
        loss.prepare(batch._replace(coef=None), {})


def test_at_the_old_parameters_it_is_flow_grpo_with_each_step_times_its_deviation():
    """The gradient of log r~ is s times that of the log-probability."""
    case = case_of(GRPOGuard, spread=0.0)
    leaf = case.leaf.requires_grad_()
    losses = guard(ref_kl_coef=0.0), FlowGRPO(ref_kl_coef=0.0)
    guarded, plain = (
        torch.autograd.grad(objective(loss, begun(loss, case.batch), case.output(leaf)), leaf)[0] for loss in losses
    )
    torch.testing.assert_close(guarded, plain * math.exp(-0.5))


def test_masked_steps_are_silent_even_where_they_hold_nan():
    case = case_of(GRPOGuard)
    mask = case.batch.mask.unsqueeze(-1)
    leaf = torch.where(mask, case.leaf, torch.nan).requires_grad_()
    batch = case.batch._replace(action=torch.where(mask, case.batch.action, torch.nan))
    assert (guard().log_ratio(batch, case.output(leaf))[~batch.mask] == 0).all()
    objective(guard(), begun(guard(), batch), case.output(leaf)).backward()
    assert (leaf.grad[~batch.mask] == 0).all() and (leaf.grad[batch.mask] != 0).any()


def test_the_clip_fraction_is_that_of_the_guarded_ratio():
    batch, out = moved(torch.full((4,), 0.05).double(), 0.05, draws(1000))
    found = guard().metrics(batch, out, {})["clip_fraction"]
    raw = FlowGRPO().metrics(batch, out, {})["clip_fraction"]
    # |log r~| > 0.2 is two deviations, while almost every raw ratio is beyond
    assert 0.02 < found.mean() < 0.08 and raw.mean() > 0.8
