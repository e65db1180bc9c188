"""BPO's golden table: weight = -r sign(r - t) |R - V|, t = 1 + eps tanh((R - mu) / (2 lam)), eps = 0.3."""

import math

import pytest
import torch
from losses.golden import batch_of, column, weights

from ctrlrl.losses.bpo import BPO


def test_golden_table_where_lam_is_small():
    # lam -> 0: the target is 1.3 above the median and 0.7 below it, whatever the value says
    #    ratio  R - V  R - mu   weight
    rows = [
        (1.0, +2.0, +1.0, +2.0),
        (1.2, +2.0, +1.0, +2.4),
        (1.4, +2.0, +1.0, -2.8),  # past the target: pulled back at full strength
        (0.5, +2.0, +1.0, +1.0),
        (1.0, -2.0, -1.0, -2.0),
        (0.6, -2.0, -1.0, +1.2),
        (1.5, -2.0, -1.0, -3.0),
        (1.0, -1.0, +1.0, +1.0),  # below the mean but above the median: pushed up, where PPO pushes down
        (1.0, +1.0, -1.0, -1.0),
    ]
    gap_value, gap_median = column(*[r[1] for r in rows]), column(*[r[2] for r in rows])
    batch, out = batch_of(column(*[r[0] for r in rows]), gap_value, median=gap_value - gap_median)
    got = weights(BPO(eps=0.3, lam=1e-3), batch, out)
    torch.testing.assert_close(got, column(*[r[3] for r in rows]), atol=1e-12, rtol=0)


def test_target_at_finite_lam():
    # (R - mu) / (2 lam) = atanh(0.5): the target is 1 + 0.3 / 2, half-way to the edge
    gap = 2 * 0.25 * math.atanh(0.5)
    batch, out = batch_of(column(1.149, 1.151), column(gap, gap), median=column(0.0, 0.0))
    loss = BPO(eps=0.3, lam=0.25)
    torch.testing.assert_close(loss.target(batch, out), column(1.15, 1.15), atol=1e-12, rtol=0)
    got = weights(loss, batch, out)
    torch.testing.assert_close(got, column(1.149 * gap, -1.151 * gap), atol=1e-12, rtol=0)


def test_current_value_and_median_carry_no_policy_gradient():
    value = column(0.5, -0.5).requires_grad_()
    median = column(0.1, 0.2).requires_grad_()
    batch, out = batch_of(column(1.0, 1.1), column(1.0, -1.0))
    out = out._replace(values={"value": value, "median": median})
    prepared = BPO().prepare(batch, {})
    total = BPO().loss(batch._replace(weight=prepared.weight, coef=prepared.coef), out, {}).policy
    assert all(g is None for g in torch.autograd.grad(total, (value, median), allow_unused=True))


@pytest.mark.parametrize(("temp", "expected"), [(None, 0.5), (1.0, 0.5 * math.tanh(0.25))])
def test_median_gradient_has_the_temperature_of_the_theorem(temp, expected):
    # d/dmu of T g((R - mu) / T) = -tanh((R - mu) / (2 T)) / 2; gap 0.5, lam 1e-3 -> -1/2; T = 1 -> -tanh(1/4)/2
    median = column(0.0).requires_grad_()
    batch, out = batch_of(column(1.0), column(0.5))
    out = out._replace(values={"value": column(0.0), "median": median})
    loss = BPO(median_temp=temp, median_coef=1.0)
    (gradient,) = torch.autograd.grad(loss.critic_terms(batch, out, {})["median"].sum(), median)
    torch.testing.assert_close(gradient, column(-expected), atol=1e-9, rtol=0)


def test_learned_median_normalises_the_target():
    # exponential returns, as skewed as they come: with T = lam the trained mu makes E[t] = 1; T = 1 does not
    returns = torch.distributions.Exponential(10.0).icdf((torch.arange(4000.0, dtype=torch.float64) + 0.5) / 4000)
    returns = returns.unsqueeze(-1)
    excess = {}
    for temp in (None, 1.0):
        loss = BPO(eps=0.3, lam=1e-2, median_temp=temp)
        mu = torch.zeros((), dtype=torch.float64, requires_grad=True)
        optimiser = torch.optim.LBFGS([mu], max_iter=200, tolerance_grad=1e-12, line_search_fn="strong_wolfe")
        batch, out = batch_of(torch.ones_like(returns), returns)

        def closure(loss=loss, mu=mu, batch=batch, out=out, optimiser=optimiser):
            optimiser.zero_grad()
            value = loss.critic_terms(batch, out._replace(values={"median": mu.expand_as(returns)}), {})["median"].sum()
            value.backward()
            return value

        optimiser.step(closure)
        target = loss.target(batch, out._replace(values={"median": mu.detach().expand_as(returns)}))
        excess[temp] = float(target.mean() - 1.0)
    assert abs(excess[None]) < 1e-6
    assert excess[1.0] < -0.03
