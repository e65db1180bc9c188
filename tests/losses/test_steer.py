"""STEER: the three estimates of an entropy change, the weights they give, and its limits."""

import math

import pytest
import torch
from losses.golden import begun, case_of, categorical_output, objective, weights

from ctrlrl.losses.group import ClippedGroupLoss
from ctrlrl.losses.steer import STEER
from ctrlrl.nets.heads import DiagonalGaussian


def two_actions(form, advantage=1.0, ratio=1.0):
    """Both actions of p = (.9, .1), with equal advantages."""
    logits = torch.tensor([[[0.9, 0.1]], [[0.9, 0.1]]], dtype=torch.float64).log().requires_grad_()
    action = torch.tensor([[0], [1]])
    out = categorical_output(logits, action)
    batch = case_of(STEER, rows=2, length=1).batch._replace(
        action=action,
        mask=torch.ones(2, 1, dtype=torch.bool),
        logp_old=out.logp.detach() - math.log(ratio),
        advantage=torch.full((2, 1), advantage, dtype=torch.float64),
        dist_old={"logits": logits.detach()},
    )
    return weights(STEER(form=form), batch, out).flatten()


def test_golden_table():
    """H = .325083. Released |W| = (.021972, 1.779752), k = .125379; exact (.039550, .355950), k = .626897."""
    table = {"released": [0.997249, 0.8], "exact": [math.exp(-0.626897 * 0.039550), 0.8]}
    table["single_logit"] = table["exact"]  # half of each for two actions
    for form, expected in table.items():
        torch.testing.assert_close(two_actions(form), torch.tensor(expected).double(), atol=1e-5, rtol=0)


def test_larger_changes_than_the_batch_had_at_collection_stay_within_the_bounds():
    assert two_actions("exact", ratio=1.2).tolist() == pytest.approx([1.2 * 0.9707, 1.2 * 0.8], abs=1e-3)


def test_small_changes_are_not_magnified():
    """The largest |W| is .0356 of .02 at A = .1 and .0036 at A = .01, below which the rate stays log(1/.8) / .02."""
    rate = -math.log(0.8) / 0.02
    expected = [0.01 * math.exp(-rate * 0.01 * w) for w in (0.039550, 0.355950)]
    torch.testing.assert_close(two_actions("exact", 0.01), torch.tensor(expected).double(), atol=1e-8, rtol=0)


def test_equal_weights_are_the_base_loss():
    case = case_of(STEER)
    base = type("Base", (ClippedGroupLoss,), {"aggregation": "token_mean", "name": "base"})(eps_high=0.28)
    totals = [objective(x, begun(x, case.batch), case.output(case.leaf)) for x in (STEER(weight_min=1.0), base)]
    torch.testing.assert_close(totals[0], totals[1], rtol=0, atol=0)
    totals = [objective(x, begun(x, case.batch), case.output(case.leaf)) for x in (STEER(), base)]
    assert totals[0] != totals[1]


def test_a_negative_advantage_stops_at_the_dual_clip():
    got = two_actions("exact", advantage=-1.0, ratio=9.0)
    assert (got < 0).all()
    assert two_actions("exact", advantage=-1.0, ratio=11.0).abs().max() == 0


def test_gaussians_change_by_log_sigma():
    """z = (0, 1, 2): z^2 - 1 = (-1, 0, 3), so the weights are (.8^(1/3), 1, .8)."""
    mean = torch.zeros(3, 1, 1, dtype=torch.float64, requires_grad=True)
    dist = DiagonalGaussian(mean, torch.full((3, 1, 1), math.log(2.0), dtype=torch.float64))
    action = torch.tensor([0.0, 2.0, 4.0]).double().reshape(3, 1, 1)
    out = case_of(STEER, rows=3, length=1).output(case_of(STEER, rows=3, length=1).leaf)
    out = out._replace(logp=dist.log_prob(action), dist=dist)
    batch = case_of(STEER, rows=3, length=1).batch._replace(
        action=action,
        mask=torch.ones(3, 1, dtype=torch.bool),
        logp_old=out.logp.detach(),
        advantage=torch.ones(3, 1, dtype=torch.float64),
        dist_old={k: v.detach() for k, v in dist.params().items()},
    )
    expected = torch.tensor([0.8 ** (1 / 3), 1.0, 0.8]).double()
    torch.testing.assert_close(weights(STEER(), batch, out).flatten(), expected)


def test_weights_carry_no_gradient():
    """The gradient by the logits is the weight times that of log pi."""
    case = case_of(STEER, spread=0.0)
    leaf = case.leaf.clone().requires_grad_()
    out, loss = case.output(leaf), STEER()
    batch = begun(loss, case.batch)
    w = weights(loss, batch, out)
    out = case.output(leaf)
    (whole,) = torch.autograd.grad(objective(loss, batch, out), leaf)
    (product,) = torch.autograd.grad(-(w.detach() * case.output(leaf).logp).sum() / batch.mask.sum(), leaf)
    torch.testing.assert_close(whole, product)


def test_weight_min_must_be_a_weight():
    with pytest.raises(ValueError, match="weight_min=0"):
        STEER(weight_min=0.0)
