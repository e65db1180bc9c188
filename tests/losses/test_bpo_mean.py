"""BPO with the mean: weight = -r sign(r - t) |R - V|, t = 1 + eps tanh((R - V) / (2 lam)), eps = 0.3."""

import torch
from losses.golden import batch_of, column, weights

from ctrlrl.losses.bpo import BPO
from ctrlrl.losses.bpo_mean import BPOMean


def test_golden_table():
    rows = [
        (1.0, +2.0, +2.0),
        (1.4, +2.0, -2.8),
        (1.0, -2.0, -2.0),
        (0.6, -2.0, +1.2),
        (0.8, -1.0, -0.8),
        (1.0, +0.0, +0.0),
    ]
    batch, out = batch_of(column(*[r for r, _, _ in rows]), column(*[a for _, a, _ in rows]))
    got = weights(BPOMean(eps=0.3, lam=1e-3), batch, out)
    torch.testing.assert_close(got, column(*[w for _, _, w in rows]), atol=1e-12, rtol=0)


def test_needs_no_median_critic():
    assert BPOMean.critics == ("value",) and BPO.critics == ("value", "median")
