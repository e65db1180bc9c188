"""DPO's golden table: one pair in a group of three."""

import math

import torch
from losses.golden import batch_of, column, objective, weights

from ctrlrl.losses.dpo import DPO

F64 = torch.float64


def paired(log_ratios, preference, group=None, mask=None):
    """Log-ratios [B, T] to the reference."""
    log_ratios = torch.as_tensor(log_ratios, dtype=F64)
    batch, out = batch_of(torch.full_like(log_ratios, 1.7), torch.zeros_like(log_ratios), mask)
    batch = batch._replace(
        logp_ref=out.logp.detach() - log_ratios,
        preference=torch.tensor(preference),
        group=torch.tensor([0] * len(preference) if group is None else group),
    )
    return batch, out


def test_golden_table():
    """Margin 1.5 - .5 = 1, c = log 3: the logit is log 3, sigmoid 3/4, so the weight is log 3 / 4 on either."""
    batch, out = paired([[9.0], [0.5], [1.5]], [0, -1, 1])
    loss = DPO(kl_temp=math.log(3))
    torch.testing.assert_close(objective(loss, batch, out).item(), -math.log(0.75))
    torch.testing.assert_close(weights(loss, batch, out), column(0, -1, 1) * math.log(3) / 4)


def test_the_log_ratio_is_summed_over_the_sequence():
    mask = torch.tensor([[True, True], [True, False]])
    batch, out = paired([[0.5, 0.5], [0.25, 50.0]], [1, -1], mask=mask)
    got = weights(DPO(kl_temp=1.0), batch, out)
    w = 1 / (1 + math.exp(0.75))
    torch.testing.assert_close(got, torch.tensor([[w, w], [-w, 0]], dtype=F64))


def test_at_the_reference_it_is_reinforce_on_the_pair():
    batch, out = paired(torch.zeros(4, 1), [1, -1, -1, 1], [0, 0, 6, 6])
    torch.testing.assert_close(weights(DPO(), batch, out), column(1, -1, -1, 1) * 0.05)
    torch.testing.assert_close(objective(DPO(), batch, out).item(), math.log(2))


def test_groups_without_a_whole_pair_take_no_part():
    batch, out = paired([[0.3]] * 5, [1, -1, 0, 1, -1], [0, 0, 1, 2, 3])
    got = weights(DPO(), batch, out)
    assert (got[2:] == 0).all() and (got[:2] != 0).all()
    torch.testing.assert_close(objective(DPO(), batch, out).item(), math.log(2))
    none = batch._replace(preference=torch.zeros(5, dtype=torch.long))
    assert objective(DPO(), none, out) == 0 and weights(DPO(), none, out).abs().max() == 0
    assert DPO().together(batch) is batch.group
