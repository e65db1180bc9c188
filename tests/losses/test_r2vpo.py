"""R2VPO's golden table: the weight of a position is r (A - 2 k (r - 1))."""

import pytest
import torch
from losses.golden import batch_of, categorical_output, column, knobs_of, objective, weights

from ctrlrl.core import penalty
from ctrlrl.losses.r2vpo import R2VPO

F64 = torch.float64
PLAIN = R2VPO(standardize_advantage=False)


def knobs(dual):
    return {"dual": torch.tensor(dual, dtype=F64)}


def test_golden_table():
    #    ratio   A   k = 0   k = 1   k = 2.5
    rows = [
        (1.0, +2.0, 2.0, 2.0, 2.0),
        (1.5, +1.0, 1.5, 0.0, -2.25),
        (0.5, -1.0, -0.5, 0.0, 0.75),
        (2.0, -1.0, -2.0, -6.0, -12.0),
        (0.8, +0.0, 0.0, 0.32, 0.8),
    ]
    batch, out = batch_of(column(*[r[0] for r in rows]), column(*[r[1] for r in rows]))
    for dual, i in ((0.0, 2), (1.0, 3), (2.5, 4)):
        got = weights(PLAIN, batch, out, knobs(dual))
        torch.testing.assert_close(got, column(*[r[i] for r in rows]), atol=1e-12, rtol=0)


def test_the_optimum_of_a_softmax_table_is_one_plus_a_over_two_k():
    """pi_old = (.5, .3, .2), A = (1, -.5, -1.75), k = 1.5: r* = (4/3, 5/6, 5/12), variance .131944."""
    counts = torch.tensor([5, 3, 2])
    action = torch.repeat_interleave(torch.arange(3), counts).unsqueeze(-1)
    advantage = torch.tensor([1.0, -0.5, -1.75], dtype=F64)[action]
    logp_old = (counts / 10).double().log()
    batch, _ = batch_of(torch.ones(10, 1, dtype=F64), advantage)
    batch = batch._replace(action=action, logp_old=logp_old[action])
    theta = logp_old.clone().requires_grad_()
    optimiser = torch.optim.LBFGS([theta], max_iter=100, tolerance_grad=1e-12, line_search_fn="strong_wolfe")

    def closure():
        optimiser.zero_grad()
        value = objective(PLAIN, batch, categorical_output(theta.expand(10, 1, 3), action), knobs(1.5))
        value.backward()
        return value

    optimiser.step(closure)
    ratios = (theta.log_softmax(-1).detach() - logp_old).exp()
    torch.testing.assert_close(ratios, torch.tensor([4 / 3, 5 / 6, 5 / 12], dtype=F64), atol=1e-5, rtol=0)
    out = categorical_output(theta.detach().expand(10, 1, 3), action)
    assert PLAIN.metrics(batch, out, {})["ratio_variance"].mean().item() == pytest.approx(0.131944, abs=1e-6)


def test_the_variance_is_about_twice_the_kl():
    """Chi-squared against KL for logits moved by (.02, -.01, .03): 2.3849e-4 against 2.3932e-4."""
    old = torch.tensor([0.5, 0.3, 0.2], dtype=F64).log()
    new = (old + torch.tensor([0.02, -0.01, 0.03], dtype=F64)).log_softmax(-1)
    batch, out = batch_of((new - old).exp().unsqueeze(-1), column(0.0, 0.0, 0.0))
    variance = (old.exp() * PLAIN.metrics(batch, out, {})["ratio_variance"].squeeze(-1)).sum().item()
    assert variance == pytest.approx(2.3849e-4, abs=1e-8)
    assert 2 * penalty.categorical_kl(new, old).item() == pytest.approx(2.3932e-4, abs=1e-8)


def test_the_price_follows_the_measured_variance():
    loss = R2VPO(variance_target=0.05, dual_rate=0.5, dual_start=0.1)
    controller = loss.controllers()["dual"]
    assert knobs_of(loss)["dual"] == pytest.approx(0.1)
    state, found = controller.step(controller.initial(), {"ratio_variance": 0.25})
    assert found["dual"] == pytest.approx(0.2)
    assert controller.step(state, {"ratio_variance": 0.0})[1]["dual"] == pytest.approx(0.175)


def test_advantages_are_standardised():
    batch, out = batch_of(column(1.0, 1.0, 1.0), column(1.0, 2.0, 3.0))
    torch.testing.assert_close(weights(R2VPO(), batch, out), column(-1.0, 0.0, 1.0), atol=1e-7, rtol=0)
