"""MiniRL's golden table: gated by pi / pi_old, weighted by pi / mu."""

import math

import pytest
import torch
from losses.golden import batch_of, begun, column, weights

from ctrlrl.losses.mini_rl import MiniRL

F64 = torch.float64


def rollout(logp, logp_old, logp_behaviour, advantage):
    batch, out = batch_of(torch.ones_like(logp), advantage)
    batch = batch._replace(logp_old=logp_old, logp_behaviour=logp_behaviour)
    return batch, out._replace(logp=logp.clone().requires_grad_())


def test_golden_table():
    """lp -1, old -1.3, mu -1.1: r = 1.349859 is beyond 1.27; the weight is 1.105171, not 1.349859."""
    lp = torch.full((2, 1), -1.0, dtype=F64)
    batch, out = rollout(lp, lp - 0.3, lp - 0.1, column(1.0, -1.0))
    expected = column(0.0, -1.105171)
    torch.testing.assert_close(weights(MiniRL(), batch, out), expected, atol=1e-6, rtol=0)


def test_the_sampler_scales_and_never_gates():
    #    log pi/old  log pi/mu   A     weight
    rows = [
        (0.00, +1.00, +2.0, 2 * math.e),
        (0.00, +3.00, +1.0, 5.0),  # e^3 = 20, capped
        (0.00, -3.00, +1.0, math.exp(-3)),
        (-0.30, 0.00, -1.0, 0.0),  # e^-.3 = .74, below .8
        (-0.30, 0.00, +1.0, 1.0),
        (+0.23, 0.00, +1.0, 1.0),  # e^.23 = 1.259
        (+0.25, 0.00, +1.0, 0.0),  # e^.25 = 1.284
        (+0.25, 0.00, -1.0, -1.0),
    ]
    lp = torch.full((len(rows), 1), -1.0, dtype=F64)
    old, mu, advantage = (column(*[r[i] for r in rows]) for i in range(3))
    batch, out = rollout(lp, lp - old, lp - mu, advantage)
    torch.testing.assert_close(weights(MiniRL(), batch, out), column(*[r[3] for r in rows]), atol=1e-12, rtol=0)


def test_on_policy_it_is_reinforce_with_the_groups_mean():
    mask = torch.tensor([[True, True, True], [True, False, False]])
    batch, out = batch_of(torch.ones(2, 3, dtype=F64), torch.zeros(2, 3, dtype=F64), mask)
    returns = torch.tensor([5.0, 1.0], dtype=F64)
    batch = batch._replace(logp_behaviour=batch.logp_old, sequence_return=returns, group=torch.tensor([0, 0]))
    batch = begun(MiniRL(), batch)
    expected = torch.tensor([[2.0, 2.0, 2.0], [-2.0, 0.0, 0.0]], dtype=F64)
    torch.testing.assert_close(weights(MiniRL(), batch, out), expected)
    # no division by a length: mean over the two sequences of sums
    assert MiniRL().prepare(batch, {}).denominator == 2


def test_the_surrogate_is_the_first_order_expansion():
    """(1.05)(.97) = 1.0185 against 1 + .05 - .03 = 1.02: the error is .05 x .03."""
    logp_behaviour = torch.tensor([[-1.0, -2.0]], dtype=F64)
    logp = logp_behaviour + torch.tensor([[1.05, 0.97]], dtype=F64).log()
    batch, out = rollout(logp_behaviour, logp_behaviour, logp_behaviour, torch.ones(1, 2, dtype=F64))
    gradient = weights(MiniRL(), batch, out)
    # weights are on log-probabilities at ratio one, so the change of the ratios themselves is what they multiply
    change = (gradient * ((logp - logp_behaviour).exp() - 1)).sum().item()
    product = (logp - logp_behaviour).sum().exp().item()
    assert (1 + change, product) == pytest.approx((1.02, 1.0185))


def test_the_cap_is_checked():
    with pytest.raises(ValueError, match="ratio_max=-1"):
        MiniRL(ratio_max=-1.0)
