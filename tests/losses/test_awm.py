"""AWM: the flow-matching loss as a likelihood, weighted by a bounded advantage."""

import math

import pytest
import torch
from losses.golden import batch_of, begun, case_of, column, objective, weights

from ctrlrl.losses.awm import AWM
from ctrlrl.nets.flow_policy import Matching
from ctrlrl.nets.heads import DiagonalGaussian


def matched(returns, group, velocity, velocity_old=None, mask=None):
    """A batch [B, K] of 1-D matching targets -1.5, as of x0 = 2 and eps = 0.5, with the given velocities [B, K]."""
    leaf = velocity.double().unsqueeze(-1).requires_grad_()
    old = leaf.detach() if velocity_old is None else velocity_old.double().unsqueeze(-1)
    time = torch.full(velocity.shape, 0.3, dtype=torch.float64)
    action = torch.full_like(old, -1.5)
    batch, out = batch_of(torch.ones_like(time), torch.zeros_like(time), mask)
    dist, dist_old = Matching(leaf, time), Matching(old, time)
    batch = batch._replace(
        action=action,
        logp_old=dist_old.log_prob(action),
        dist_old=dist_old.params(),
        sequence_return=torch.tensor(returns, dtype=torch.float64),
        group=torch.tensor(group),
    )
    return leaf, batch, out._replace(logp=dist.log_prob(action), dist=dist)


def test_golden_advantage():
    """Group means 1/2 and 1, deviation of all five returns (0, 1, 1, 1, 1) 0.4: (-1.25, 1.25, 0, 0, 0) / 5."""
    _, batch, _ = matched([0, 1, 1, 1, 1], [7, 7, 3, 3, 3], torch.zeros(5, 2))
    got = begun(AWM(std_floor=0.0), batch).advantage
    expected = torch.tensor([-0.25, 0.25, 0.0, 0.0, 0.0], dtype=torch.float64).unsqueeze(1).expand(5, 2)
    torch.testing.assert_close(got, expected)
    # bounded, then brought to [-1, 1]
    bounded = begun(AWM(std_floor=0.0, advantage_max=0.5), batch).advantage
    torch.testing.assert_close(bounded, torch.tensor([-1.0, 1, 0, 0, 0]).double().unsqueeze(1).expand(5, 2))


def test_golden_table():
    """Ratios and advantages (0.5, -0.5) / std 0.5 / 5 = (0.2, -0.2): PPO's weights on grad l."""
    ratios = torch.tensor([[1.1, 1.3, 0.7], [1.1, 1.3, 0.7]], dtype=torch.float64)
    batch, out = batch_of(ratios, torch.zeros_like(ratios))
    batch = batch._replace(sequence_return=torch.tensor([1.0, 0.0]).double(), group=torch.tensor([0, 0]))
    loss = AWM(ref_kl_coef=0.0, std_floor=0.0)
    expected = torch.tensor([[1.1, 0.0, 0.7], [-1.1, -1.3, 0.0]], dtype=torch.float64) * 0.2 / 3
    torch.testing.assert_close(weights(loss, begun(loss, batch), out), expected)


@pytest.mark.parametrize("advantage", [1.0, -1.0])
def test_with_advantage_one_it_is_the_loss_a_flow_is_trained_with(advantage):
    """And with minus one that loss turned round. v = 0 against a target of -1.5: the gradient on v is 3."""
    leaf, batch, out = matched([0, 0], [0, 0], torch.tensor([[0.0, 1.0], [2.0, -1.5]]))
    loss = AWM(ref_kl_coef=0.0)
    batch = batch._replace(advantage=torch.full_like(batch.advantage, advantage))
    (gradient,) = torch.autograd.grad(objective(loss, batch, out), leaf)
    (plain,) = torch.autograd.grad((leaf - batch.action).square().mean(), leaf)
    torch.testing.assert_close(gradient, advantage * plain)
    assert gradient[0, 0].item() == pytest.approx(advantage * 3.0 / 4)


def test_the_ratio_is_of_the_losses_at_the_same_noise():
    """Squared errors 2.25 now and 2.35 before: r = exp(0.1)."""
    leaf, batch, out = matched([1, 0], [0, 0], torch.zeros(2, 1), torch.full((2, 1), math.sqrt(2.35) - 1.5))
    loss = AWM(ref_kl_coef=0.0, std_floor=0.0)
    (gradient,) = torch.autograd.grad(objective(loss, begun(loss, batch), out), leaf)
    expected = column(1.0, -1.0).unsqueeze(-1) * 0.2 * math.exp(0.1) * 3.0 / 2
    torch.testing.assert_close(gradient, expected)


def test_the_penalty_is_the_squared_distance_of_the_velocities():
    leaf, batch, out = matched([0, 0], [0, 0], torch.tensor([[0.5, 0.0], [0.0, 0.0]]))
    batch = batch._replace(dist_ref={"mean": torch.zeros_like(leaf).detach()})
    loss = AWM(ref_kl_coef=0.8)
    assert objective(loss, begun(loss, batch), out).item() == pytest.approx(0.8 * 0.25 / 4)
    assert "logp_ref" in loss.required() and "logp_ref" not in AWM(ref_kl_coef=0.0).required()


def test_masked_positions_are_silent_even_where_they_hold_nan():
    case = case_of(AWM)
    mask, out = case.batch.mask, case.output(case.leaf)
    mean = torch.where(mask.unsqueeze(-1), case.leaf, torch.nan).requires_grad_()
    logp = torch.where(mask, out.logp, torch.nan).requires_grad_()
    out = out._replace(logp=logp, dist=DiagonalGaussian(mean, out.dist.log_std))
    objective(AWM(), begun(AWM(), case.batch), out).backward()
    for leaf in (mean, logp):
        assert (leaf.grad[~mask] == 0).all() and (leaf.grad[mask] != 0).any()


def test_equal_outcomes_are_silent_and_the_bound_is_checked():
    leaf, batch, out = matched([0.1, 0.1, 0.1], [0, 0, 0], torch.randn(3, 2), torch.randn(3, 2))
    loss = AWM(ref_kl_coef=0.0)
    (gradient,) = torch.autograd.grad(objective(loss, begun(loss, batch), out), leaf)
    assert gradient.abs().max() == 0
    with pytest.raises(ValueError, match="advantage_max"):
        AWM(advantage_max=0.0)
