"""GRPO's golden table: DeepSeekMath eq. 3 with the outcome advantages of its section 4.1.2."""

import math

import torch
from losses.golden import batch_of, begun, column, objective, weights

from ctrlrl.losses.grpo import GRPO


def grouped(ratios, returns, group, mask=None, logp_ref=None):
    """A batch [B, T] with one return per row."""
    batch, out = batch_of(ratios, torch.zeros_like(ratios), mask)
    batch = batch._replace(
        sequence_return=torch.tensor(returns, dtype=torch.float64),
        group=torch.tensor(group),
        logp_ref=out.logp.detach() if logp_ref is None else logp_ref,
    )
    return batch, out


def test_golden_table():
    """R = (1, 0, 0, 0): mean 1/4, unbiased deviation 1/2, so A = (1.5, -.5, -.5, -.5)."""
    ratios = column(1.1, 1.3, 0.7, 0.9)
    batch, out = grouped(ratios, [1, 0, 0, 0], [0, 0, 0, 0])
    loss = GRPO(ref_kl_coef=0.0, std_floor=0.0)
    # negative advantages: 1.3 counts in full, 0.7 is below the band and silent
    expected = column(1.65, -0.65, 0.0, -0.45)
    torch.testing.assert_close(weights(loss, begun(loss, batch), out), expected, atol=1e-12, rtol=0)


def test_ddof_zero_is_the_population_deviation():
    batch, _ = grouped(column(1, 1, 1, 1), [1, 0, 0, 0], [0, 0, 0, 0])
    population = begun(GRPO(ddof=0, std_floor=0.0), batch).advantage[:, 0]
    expected = torch.tensor([math.sqrt(3), *[-1 / math.sqrt(3)] * 3], dtype=torch.float64)
    torch.testing.assert_close(population, expected)
    # the floor of TRL and verl gives the figure that their logs show
    floor = begun(GRPO(std_floor=1e-4), batch).advantage[:, 0]
    torch.testing.assert_close(floor[0].item(), 1.4997, atol=1e-4, rtol=0)


def test_a_group_that_agrees_gives_exactly_nothing():
    batch, out = grouped(column(1, 1.1, 0.9), [0.1, 0.1, 0.1], [5, 5, 5])
    loss = GRPO(ref_kl_coef=0.0)
    assert weights(loss, begun(loss, batch), out).abs().max() == 0


def test_every_sequence_counts_the_same_whatever_its_length():
    mask = torch.tensor([[True, True, True, True], [True, False, False, False]])
    batch, out = grouped(torch.ones(2, 4, dtype=torch.float64), [1, 0], [0, 0], mask)
    loss = GRPO(ref_kl_coef=0.0, std_floor=0.0)
    a = 1 / math.sqrt(2)
    got = weights(loss, begun(loss, batch), out)
    torch.testing.assert_close(got.sum(-1), torch.tensor([a, -a], dtype=torch.float64))
    torch.testing.assert_close(got[0], torch.full((4,), a / 4, dtype=torch.float64))


def test_the_penalty_is_k3_towards_the_reference():
    """d/dlogp of exp(q - p) - 1 - (q - p) is 1 - exp(q - p): at q - p = log 2 it pushes the policy up by one."""
    ratios = column(1.0, 1.0)
    batch, out = grouped(ratios, [0, 0], [0, 0])
    batch = batch._replace(logp_ref=out.logp.detach() + math.log(2.0))
    loss = GRPO(ref_kl_coef=0.5)
    batch = begun(loss, batch)
    torch.testing.assert_close(weights(loss, batch, out), column(0.5, 0.5))
    torch.testing.assert_close(objective(loss, batch, out).item(), 0.5 * (2 - 1 - math.log(2)))
