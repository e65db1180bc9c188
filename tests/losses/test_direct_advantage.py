"""Direct advantage's golden table: action values (.8, .5, .2), a uniform reference, temperature 1/2."""

import pytest
import torch
from losses.golden import batch_of, categorical_output, column, objective, weights

from ctrlrl.losses.direct_advantage import DirectAdvantage

F64 = torch.float64


def test_golden_table():
    """A = (.3, 0, -.3), so the targets of the log-ratio are (.6, 0, -.6)."""
    batch, out = batch_of(column(1.2, 1.0, 0.9), column(0.8, 0.5, 0.2))
    loss = DirectAdvantage(kl_temp=0.5)
    expected = column(0.6 - 0.1823215568, 0.0, -0.6 + 0.1053605157)
    torch.testing.assert_close(weights(loss, batch, out), expected, atol=1e-9, rtol=0)
    torch.testing.assert_close(objective(loss, batch, out).item(), float(expected.square().sum() / 6))


def test_the_tabular_minimiser_improves_but_is_not_the_exponential_tilt():
    q = torch.tensor([0.8, 0.5, 0.2], dtype=F64)
    batch, _ = batch_of(column(1, 1, 1), q.unsqueeze(-1))
    batch = batch._replace(logp_old=torch.full((3, 1), 1 / 3, dtype=F64).log())
    action, loss = torch.arange(3).unsqueeze(-1), DirectAdvantage(kl_temp=0.5)
    logits = torch.zeros(3, dtype=F64, requires_grad=True)
    solver = torch.optim.LBFGS([logits], max_iter=100, tolerance_grad=1e-12, tolerance_change=1e-16)

    def closure():
        solver.zero_grad()
        value = objective(loss, batch, categorical_output(logits.expand(3, 1, 3), action))
        value.backward()
        return value

    for _ in range(3):
        solver.step(closure)
    p = logits.detach().softmax(0)
    assert p.tolist() == pytest.approx([0.521310, 0.304842, 0.173849], abs=2e-6)
    assert closure().item() == pytest.approx(0.005655, abs=1e-6)
    tilt = (q / 0.5).softmax(0)
    assert (p - tilt).abs().max() > 0.01
    gain, kl = (p * (q - 0.5)).sum(), (p * (3 * p).log()).sum()
    assert gain.item() == pytest.approx(0.104238, abs=2e-6) and (gain - 0.5 * kl).item() == pytest.approx(
        0.057876, abs=2e-6
    )


def test_on_policy_it_is_reinforce_with_the_centred_advantage():
    mask = torch.tensor([[True, True], [True, False]])
    batch, out = batch_of(torch.ones(2, 2, dtype=F64), torch.tensor([[1.0, 4.0], [1.0, 99.0]], dtype=F64), mask)
    expected = torch.tensor([[-1.0, 2.0], [-1.0, 0.0]], dtype=F64)
    torch.testing.assert_close(weights(DirectAdvantage(), batch, out), expected / 0.02, atol=1e-10, rtol=0)


def test_equal_advantages_give_exactly_nothing_and_an_empty_batch_is_zero():
    batch, out = batch_of(column(1, 1, 1), column(0.1, 0.1, 0.1))
    assert weights(DirectAdvantage(), batch, out).abs().max() == 0
    nothing = batch._replace(mask=torch.zeros_like(batch.mask))
    assert objective(DirectAdvantage(), nothing, out) == 0


def test_a_turn_is_one_action_with_its_first_advantage_and_the_sum_of_its_log_ratios():
    """Two turns of two positions, the first after a position that is not the policy's; 9 is looked at nowhere."""
    mask = torch.tensor([[False, True, True, True, True]])
    turn = torch.tensor([[-1, 0, 0, 1, 1]])
    advantage = torch.tensor([[9.0, 3.0, 9.0, 1.0, 9.0]], dtype=F64)
    ratios = torch.tensor([[0.2, 0.1, 0.2, -0.3, 0.0]], dtype=F64).exp()
    batch, out = batch_of(ratios, advantage, mask)
    loss = DirectAdvantage(kl_temp=1.0, level="turn")
    got = weights(loss, batch._replace(turn=turn), out)
    torch.testing.assert_close(got, torch.tensor([[0.0, 0.7, 0.7, -0.7, -0.7]], dtype=F64))
    assert loss.required() == {"values", "turns"} and DirectAdvantage().required() == {"values"}
