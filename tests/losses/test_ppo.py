"""PPO's golden table: weight on grad log-prob = ratio x A where the clip leaves a gradient, else 0 (eps = 0.2)."""

import torch
from losses.golden import batch_of, column, weights

from ctrlrl.losses.ppo import PPO


def test_golden_table():
    #             (ratio, advantage) -> weight, worked out by hand from min(r A, clip(r) A)
    rows = [
        (0.50, +1.0, +0.50),  # below the band, A > 0: still pushed up
        (0.75, +1.0, +0.75),
        (0.85, -1.0, -0.85),  # inside the band on either side
        (1.15, +1.0, +1.15),
        (1.00, +1.0, +1.00),
        (1.10, +2.0, +2.20),
        (1.25, +1.0, +0.00),  # passed its target
        (3.00, +1.0, +0.00),
        (0.50, -1.0, -0.00),  # passed its target
        (0.75, -1.0, -0.00),
        (1.00, -1.0, -1.00),
        (1.10, -2.0, -2.20),
        (1.25, -1.0, -1.25),  # above the band, A < 0: still pushed down
        (3.00, -1.0, -3.00),
    ]
    batch, out = batch_of(column(*[r for r, _, _ in rows]), column(*[a for _, a, _ in rows]))
    expected = column(*[w for _, _, w in rows])
    torch.testing.assert_close(weights(PPO(eps=0.2, standardize_advantage=False), batch, out), expected)


def test_advantages_are_standardised_over_the_update_batch():
    # A = 1, 2, 3: mean 2, unbiased deviation 1
    batch, out = batch_of(column(1.0, 1.0, 1.0), column(1.0, 2.0, 3.0))
    torch.testing.assert_close(weights(PPO(), batch, out), column(-1.0, 0.0, 1.0), atol=1e-7, rtol=0)


def test_masked_rows_do_not_enter_the_statistics():
    mask = torch.tensor([[True], [True], [True], [False]])
    batch, out = batch_of(column(1.0, 1.0, 1.0, 1.0), column(1.0, 2.0, 3.0, 1000.0), mask)
    torch.testing.assert_close(weights(PPO(), batch, out), column(-1.0, 0.0, 1.0, 0.0), atol=1e-7, rtol=0)
