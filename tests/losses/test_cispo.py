"""CISPO's golden table: the weight of a position is clip(r) A, and no position is silent."""

import torch
from losses.golden import batch_of, column, weights

from ctrlrl.losses.cispo import CISPO


def test_golden_table():
    #    ratio   A    [.8, 1.2]  paper: no lower bound, at most 5
    rows = [
        (0.5, +1.0, +0.80, +0.50),
        (1.1, +1.0, +1.10, +1.10),
        (1.5, +1.0, +1.20, +1.50),  # PPO: 0
        (3.0, -1.0, -1.20, -3.00),
        (0.5, -1.0, -0.80, -0.50),  # PPO: 0
        (1.0, -2.0, -2.00, -2.00),
        (9.0, +1.0, +1.20, +5.00),
    ]
    batch, out = batch_of(column(*[r[0] for r in rows]), column(*[r[1] for r in rows]))
    both = weights(CISPO(eps_low=0.2, eps_high=0.2), batch, out)
    torch.testing.assert_close(both, column(*[r[2] for r in rows]), atol=1e-12, rtol=0)
    torch.testing.assert_close(weights(CISPO(), batch, out), column(*[r[3] for r in rows]), atol=1e-12, rtol=0)


def test_every_position_of_the_batch_counts_the_same():
    mask = torch.tensor([[True, True, True], [True, False, False]])
    batch, out = batch_of(torch.ones(2, 3, dtype=torch.float64), torch.ones(2, 3, dtype=torch.float64), mask)
    prepared = CISPO().prepare(batch, {})
    assert prepared.denominator == 4 and (prepared.weight == mask).all()


def test_masked_nan_is_harmless():
    mask = torch.tensor([[True], [False]])
    batch, out = batch_of(column(1.0, 1.0), column(1.0, 1.0), mask)
    out = out._replace(logp=torch.where(mask, out.logp, torch.nan).detach().requires_grad_())
    torch.testing.assert_close(weights(CISPO(), batch, out), column(1.0, 0.0))
