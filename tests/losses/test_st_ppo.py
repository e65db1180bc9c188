"""ST-PPO and S-PPO: the gradient of the policy divided by the norm of the clipping bias."""

import math

import pytest
import torch
from losses.golden import batch_of, column

from ctrlrl.core import reduce
from ctrlrl.losses.ppo import PPO
from ctrlrl.losses.s_ppo import SPPO
from ctrlrl.losses.st_ppo import STPPO
from ctrlrl.losses.turn_ppo import TurnPPO

F64 = torch.float64


def gradients(loss, batch, out, other=None):
    """The gradient wrt log-probabilities before and after the transform; ``other`` is some critic's gradient."""
    prepared = loss.prepare(batch, {})
    batch = batch._replace(coef=prepared.coef, weight=prepared.weight)

    def gradient_of(f):
        value = reduce.weighted_sum(f(batch, out), prepared.weight) / prepared.denominator
        return torch.autograd.grad(value, out.logp)[0].flatten()

    plain = gradient_of(lambda b, o: loss.per_token(b, o, {}))
    other = torch.zeros_like(plain) if other is None else other
    return plain, loss.grad_transform(plain + other, gradient_of, {})


def rollout(scale=1.0):
    """Ratios 1.5 (clipped), 1.0 and 0.5 (clipped) with advantages 4, 1 and -6 in single positions."""
    batch, out = batch_of(column(1.5, 1.0, 0.5), scale * column(4.0, 1.0, -6.0))
    return batch._replace(turn=torch.zeros(3, 1, dtype=torch.long)), out


@pytest.mark.parametrize("cls", [SPPO, STPPO])
def test_golden_table(cls):
    """C = (1.5 x 4, 0, -.5 x 6) / 3 = (2, 0, -1): its norm is sqrt 5. J keeps the middle one alone: 1 / 3."""
    plain, divided = gradients(cls(standardize_advantage=False), *rollout())
    torch.testing.assert_close(plain, -torch.tensor([0, 1 / 3, 0], dtype=F64))
    torch.testing.assert_close(divided, plain / math.sqrt(5))


def test_the_gradient_of_anything_else_is_left_alone():
    other = torch.tensor([7.0, -3.0, 2.0], dtype=F64)
    plain, got = gradients(STPPO(standardize_advantage=False), *rollout(), other)
    torch.testing.assert_close(got, plain / math.sqrt(5) + other)


def test_beyond_the_floor_the_scale_of_the_advantage_cancels():
    loss = SPPO(standardize_advantage=False)
    once, ten = gradients(loss, *rollout())[1], gradients(loss, *rollout(10.0))[1]
    torch.testing.assert_close(once, ten)
    # below it the step is PPO's
    plain, got = gradients(loss, *rollout(0.1))
    torch.testing.assert_close(got, plain)
    plain, got = gradients(SPPO(standardize_advantage=False, norm_floor=0.1), *rollout(0.1))
    torch.testing.assert_close(got, plain / (0.1 * math.sqrt(5)))


@pytest.mark.parametrize("cls", [SPPO, STPPO])
def test_nothing_clipped_nothing_changed(cls):
    batch, out = batch_of(column(1.1, 0.9), column(5.0, 5.0))
    plain, got = gradients(cls(standardize_advantage=False), batch._replace(turn=torch.zeros(2, 1).long()), out)
    assert torch.equal(plain, got) and plain.abs().max() > 0


def test_levels():
    """Log-ratios (.5, 0) in one turn: the turn's e^.25 is clipped for both; by position only the first is."""
    ratios = torch.tensor([[math.exp(0.5), 1.0]], dtype=F64)
    batch, out = batch_of(ratios, torch.full((1, 2), 4.0, dtype=F64))
    batch = batch._replace(turn=torch.zeros(1, 2, dtype=torch.long))
    token, turn = SPPO(standardize_advantage=False), STPPO(standardize_advantage=False)
    plain, got = gradients(token, batch, out)
    torch.testing.assert_close(got, plain / (4 * math.exp(0.5) / 2))
    # by turn: w A / 2 at both positions, and J is silent
    prepared = turn.prepare(batch, {})
    bias = turn.clipping_bias(batch._replace(coef=prepared.coef), out)
    (gradient,) = torch.autograd.grad(bias.sum(), out.logp)
    torch.testing.assert_close(gradient, torch.full((1, 2), 4 * math.exp(0.25), dtype=F64))
    assert gradients(turn, batch, out)[0].abs().max() == 0


def test_they_differ_from_their_bases_in_the_division_alone():
    batch, out = rollout()
    for cls, base in ((SPPO, PPO), (STPPO, TurnPPO)):
        mine, theirs = (
            c(standardize_advantage=False).per_token(batch._replace(coef={"advantage": batch.advantage}), out, {})
            for c in (cls, base)
        )
        assert torch.equal(mine, theirs)
    assert "turns" not in SPPO.needs and "turns" in STPPO.needs


def test_masked_nan_does_not_reach_the_bias():
    mask = torch.tensor([[True], [True], [False]])
    batch, out = batch_of(column(1.5, 1.0, 1.0), column(4.0, 1.0, 1.0), mask)
    out = out._replace(logp=torch.where(mask, out.logp, torch.nan).detach().requires_grad_())
    plain, got = gradients(SPPO(standardize_advantage=False), batch, out)
    torch.testing.assert_close(got, plain / 3)
    assert got[2] == 0


def test_the_floor_is_checked():
    with pytest.raises(ValueError, match="norm_floor=0"):
        STPPO(norm_floor=0.0)
