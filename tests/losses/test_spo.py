"""SPO's golden table: d/d log r of r A - |A| (r - 1)^2 / (2 eps) = r (A - |A| (r - 1) / eps), eps = 0.2."""

import torch
from losses.golden import batch_of, column, weights

from ctrlrl.losses.spo import SPO


def test_golden_table():
    rows = [
        (1.0, +1.0, +1.0),
        (1.1, +1.0, +0.55),  # 1.1 (1 - 0.5)
        (1.2, +1.0, +0.0),  # at the edge: balance
        (1.4, +1.0, -1.4),  # past the edge: pulled back, where PPO is silent
        (0.5, +1.0, +1.75),  # 0.5 (1 + 2.5)
        (1.0, -2.0, -2.0),
        (0.8, -2.0, -0.0),
        (0.5, -1.0, +0.75),  # 0.5 (-1 + 2.5)
        (1.2, -1.0, -2.4),  # 1.2 (-1 - 1)
    ]
    batch, out = batch_of(column(*[r for r, _, _ in rows]), column(*[a for _, a, _ in rows]))
    expected = column(*[w for _, _, w in rows])
    got = weights(SPO(eps=0.2, standardize_advantage=False), batch, out)
    torch.testing.assert_close(got, expected, atol=1e-12, rtol=0)


def test_ratio_one_is_reinforce_with_standardised_advantages():
    batch, out = batch_of(column(1.0, 1.0, 1.0), column(1.0, 2.0, 3.0))
    torch.testing.assert_close(weights(SPO(), batch, out), column(-1.0, 0.0, 1.0), atol=1e-7, rtol=0)
