"""RPO's golden table: five chosen positions."""

import math

import pytest
import torch
from losses.golden import objective, weights
from losses.test_dpo import paired

from ctrlrl.losses.dpo import DPO
from ctrlrl.losses.rpo import RPO

F64 = torch.float64


def five():
    """Chosen: log-probability -10 in five steps, reference -11. Rejected: -12 in four, reference -11.5."""
    mask = torch.tensor([[True] * 5, [True] * 4 + [False]])
    batch, out = paired(torch.zeros(2, 5), [1, -1], mask=mask)
    logp = torch.tensor([[-2.0] * 5, [-3.0] * 4 + [math.nan]], dtype=F64).requires_grad_()
    ref = torch.tensor([[-2.2] * 5, [-2.875] * 4 + [math.nan]], dtype=F64)
    return batch._replace(logp_ref=ref), out._replace(logp=logp)


def test_golden_table():
    """h = .01 (1 + .5), -log sigmoid(h) = .685675, and .005 x 2 on top."""
    batch, out = five()
    assert objective(RPO(), batch, out).item() == pytest.approx(0.695675, abs=5e-7)
    sigma = 0.01 / (1 + math.exp(0.015))
    expected = torch.tensor([[sigma + 0.001] * 5, [-sigma] * 4 + [0]], dtype=F64)
    torch.testing.assert_close(weights(RPO(), batch, out), expected, atol=1e-12, rtol=0)


def test_limits():
    batch, out = five()
    torch.testing.assert_close(weights(RPO(kl_temp=0.1, sft_coef=0.0), batch, out), weights(DPO(), batch, out))
    small = objective(RPO(kl_temp=1e-9, sft_coef=0.5), batch, out).item()
    assert small == pytest.approx(math.log(2) + 0.5 * 2.0)
