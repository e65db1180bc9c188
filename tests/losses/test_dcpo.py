"""DCPO: the blend towards a tempered policy, its size, and the cases without successes or without a gap."""

import math

import pytest
import torch
from losses.golden import begun, case_of, categorical_output, objective, weights

from ctrlrl.core import advantage as adv
from ctrlrl.data.rows import rows
from ctrlrl.losses.dcpo import DCPO


def everyone(p, target, score=None):
    """One row for every action of p, in proportion: sampling without noise. All rows agree, so GRPO is silent."""
    action = torch.cat([torch.full((round(10 * x),), k) for k, x in enumerate(p)]).unsqueeze(1)
    size = len(action)
    logits = torch.tensor(p, dtype=torch.float64).log()
    leaf = logits.clone().requires_grad_()
    out = categorical_output(leaf.expand(size, 1, -1), action)
    batch = rows(case_of(DCPO, rows=2, length=1).batch, torch.zeros(size, dtype=torch.long))._replace(
        action=action,
        mask=torch.ones(size, 1, dtype=torch.bool),
        logp_old=out.logp.detach(),
        sequence_return=torch.ones(size).double(),
        score=torch.ones(size).double() if score is None else score,
        group=torch.zeros(size, dtype=torch.long),
        dist_old={"logits": logits.expand(size, 1, -1)},
    )
    loss = DCPO(entropy_target=target)
    return loss, begun(loss, batch), out, leaf


@pytest.mark.parametrize(
    "target, direction", [(1.5, (-0.02815, 0.00827, 0.01988)), (0.5, (0.04166, -0.01397, -0.02769))]
)
def test_the_added_direction_is_the_tempered_policy_minus_the_policy(target, direction):
    """p = (.5, .3, .2), H = 1.0297; every row a success, gap .1: a = 1/11."""
    loss, batch, out, leaf = everyone((0.5, 0.3, 0.2), target)
    (gradient,) = torch.autograd.grad(objective(loss, batch, out), leaf)
    torch.testing.assert_close(-11 * gradient, torch.tensor(direction).double(), atol=1e-5, rtol=0)


def test_size_of_the_blend():
    """|target - H| = .05 and a quarter of successes: c = .2, a = 1/6."""
    score = torch.zeros(10).double()
    score[:5] = 1.0
    p = (0.5, 0.3, 0.2)
    entropy = -sum(x * math.log(x) for x in p)
    loss, batch, _, _ = everyone(p, entropy - 0.05, score * 0.5)
    tempered = torch.tensor(p).double() ** 1.25
    cool = tempered[0] / tempered.sum() / 0.5
    blend = 0.05 / (0.05 + 0.5)
    torch.testing.assert_close(batch.advantage.flatten(), blend * cool * score)
    case = case_of(DCPO, rows=4)
    entropy = -case.batch.logp_old[case.batch.mask].mean().item()
    batch = case.batch._replace(score=torch.tensor([1.0, 0, 0, 0]).double())
    stats = DCPO(entropy_target=entropy + 0.05).begin(batch, {}, {}).stats
    assert stats["tempered_blend"].item() == pytest.approx(1 / 6)
    assert stats["sampled_entropy"].item() == pytest.approx(entropy)


def test_grpo_keeps_the_rest_of_the_weight():
    """Rows that failed have (1 - a) A: with a gap of .05 and a quarter of successes, 5/6 of GRPO's."""
    case = case_of(DCPO, rows=4)
    entropy = -case.batch.logp_old[case.batch.mask].mean().item()
    returns = torch.tensor([1.0, 0, 0, 0]).double()
    batch = case.batch._replace(score=returns, sequence_return=returns)
    got = begun(DCPO(entropy_target=entropy + 0.05), batch).advantage[1:, 0]
    torch.testing.assert_close(got, torch.full((3,), -5 / 12).double(), atol=1e-5, rtol=0)


def test_at_the_target_it_is_grpo():
    case = case_of(DCPO)
    entropy = -case.batch.logp_old[case.batch.mask].mean().item()
    got = begun(DCPO(entropy_target=entropy), case.batch).advantage
    plain = adv.center_scale(case.batch.sequence_return, case.batch.group).unsqueeze(1).expand(got.shape)
    torch.testing.assert_close(got, torch.where(case.batch.mask, plain, 0.0), atol=1e-12, rtol=0)


def test_without_successes_nothing_is_added():
    case = case_of(DCPO)
    got = begun(DCPO(), case.batch._replace(score=torch.zeros(12).double())).advantage
    plain = adv.center_scale(case.batch.sequence_return, case.batch.group).unsqueeze(1).expand(got.shape)
    torch.testing.assert_close(got, torch.where(case.batch.mask, plain, 0.0))


def test_ratio_of_a_gaussian_is_bounded():
    """sigma sqrt(T): the ratio is T^(-1/2) exp(z^2 (1 - 1/T) / 2), about e^(8.3) at z = 10."""
    case = case_of(DCPO, rows=2, length=1)
    z = torch.tensor([1.0, 10.0]).double().reshape(2, 1, 1)
    batch = case.batch._replace(
        mask=torch.ones(2, 1).bool(),
        action=z,
        dist_old={"mean": torch.zeros_like(z), "log_std": torch.zeros_like(z)},
        score=torch.ones(2).double(),
        sequence_return=torch.ones(2).double(),
        logp_old=torch.full((2, 1), -1.0).double(),
    )
    got = begun(DCPO(entropy_target=2.0), batch).advantage.flatten()
    free = 1.2**-0.5 * math.exp(0.5 * (1 - 1 / 1.2))
    torch.testing.assert_close(got, torch.tensor([free, 10.0]).double() / 11)


def test_masked_positions_are_not_looked_at():
    case = case_of(DCPO)
    spoiled = case.batch._replace(
        logp_old=torch.where(case.batch.mask, case.batch.logp_old, torch.nan),
        dist_old={"logits": torch.where(case.batch.mask.unsqueeze(-1), case.batch.dist_old["logits"], torch.nan)},
    )
    torch.testing.assert_close(begun(DCPO(), spoiled).advantage, begun(DCPO(), case.batch).advantage)


def test_clip_and_dual_clip():
    case = case_of(DCPO, rows=4, length=1)
    ratios = torch.tensor([1.27, 1.29, 9.0, 11.0]).double().unsqueeze(1)
    out = case.output(case.leaf.clone().requires_grad_())
    batch = case.batch._replace(
        logp_old=(out.logp - ratios.log()).detach(), advantage=torch.tensor([[1.0], [1], [-1], [-1]]).double()
    )
    assert weights(DCPO(), batch, out).flatten().tolist() == pytest.approx([1.27, 0.0, -9.0, 0.0])
