"""HPT's golden table: one group that was never solved and one that was, each with a demonstration."""

import dataclasses

import pytest
import torch
from losses.golden import batch_of, begun, objective, weights

from ctrlrl.core import advantage as adv
from ctrlrl.losses.hpt import HPT
from ctrlrl.losses.sft import SFT
from ctrlrl.types import DEMONSTRATION, ON_POLICY

F64 = torch.float64
ROWS = [0, 0, 1, 1, 0, 1]
SHOWN = torch.tensor([False] * 4 + [True] * 2)


def two_groups(ratios=None):
    """Rows 0, 1 fail; row 2 of 2, 3 succeeds; 4 and 5 are demonstrations. The last row has one position of two."""
    ratios = torch.ones(6, 2, dtype=F64) if ratios is None else ratios
    mask = torch.ones(6, 2, dtype=torch.bool)
    mask[5, 1] = False
    batch, out = batch_of(ratios, torch.zeros(6, 2, dtype=F64), mask)
    batch = batch._replace(
        source=torch.where(SHOWN, DEMONSTRATION, ON_POLICY),
        group=torch.tensor(ROWS),
        sequence_return=torch.tensor([0.0, 0.2, 1.0, 0.0, 1.0, 1.0], dtype=F64),
        success=torch.tensor([False, False, True, False, True, True]),
    )
    return batch, out


def test_golden_table():
    """Group 0 is shown how: two positions at 1/2. Group 1 acts: A = +-1/2 over two rows of length two."""
    batch, out = two_groups()
    got = weights(HPT(sft_coef=0.3), begun(HPT(sft_coef=0.3), batch), out)
    e = 0.5 / (2 * 2)
    expected = torch.tensor([[0, 0], [0, 0], [e, e], [-e, -e], [0.15, 0.15], [0, 0]], dtype=F64)
    torch.testing.assert_close(got, expected)
    assert HPT().begin(batch, {}, {}).stats["demonstrated_share"] == 0.5


def test_ratios_weigh_own_sequences_only_and_are_not_clipped():
    batch, out = two_groups(torch.full((6, 2), 2.0, dtype=F64))
    batch = begun(HPT(), batch)
    got = weights(HPT(), batch, out)
    assert got[2].tolist() == pytest.approx([0.25, 0.25]) and got[4].tolist() == pytest.approx([0.5, 0.5])


def test_a_gate_below_nothing_is_pure_reinforcement():
    batch, out = two_groups()
    got = weights(HPT(gate=-1), begun(HPT(gate=-1), batch), out)
    centred = adv.center_scale(batch.sequence_return[:4], batch.group[:4], scale="none")
    torch.testing.assert_close(got[:4], centred.unsqueeze(-1).expand(4, 2) / 8)
    assert (got[4:] == 0).all()


def test_a_gate_at_the_group_size_is_pure_supervision():
    batch, out = two_groups()
    batch = begun(HPT(gate=2), batch)
    got, total = weights(HPT(gate=2), batch, out), objective(HPT(gate=2), batch, out)
    assert torch.allclose(got, weights(SFT(), batch, out) / 3, atol=1e-15)
    assert torch.allclose(total, objective(SFT(), batch, out), atol=1e-15)


def test_demonstrations_are_not_counted_as_solved_nor_in_the_mean():
    batch, _ = two_groups()
    started = begun(HPT(gate=0), batch)
    assert started.coef["share"][:, 0].tolist() == [0, 0, 1, 1, 1, 0]
    assert started.advantage[:, 0].tolist() == pytest.approx([-0.1, 0.1, 0.5, -0.5, 0, 0])


def test_the_soft_table():
    """One of two solved is the entry of four eighths; none solved counts as one."""
    batch, _ = two_groups()
    share = begun(HPT(mix="soft"), batch).coef["share"][:, 0]
    assert share.tolist() == [0, 0, 0.5, 0.5, 1.0, 0.125]
    eight = torch.arange(8)
    rows = dataclasses.replace(HPT(), mix="soft")
    for solved, rl in enumerate((0.0, 0.0, 0.125, 0.25, 0.5, 1.0, 1.0, 1.0, 1.0)):
        group = batch._replace(success=eight < solved, group=torch.zeros(8, dtype=torch.long))
        assert rows.share(group, torch.zeros(8, dtype=torch.bool)).tolist() == [rl] * 8


def test_without_demonstrations_and_without_anything():
    batch, out = two_groups()
    batch = batch._replace(source=None)
    assert weights(HPT(), begun(HPT(), batch), out).isfinite().all()
    assert HPT().begin(batch, {}, {}).stats["demonstrated_share"] == 0
    empty = begun(HPT(), batch._replace(mask=torch.zeros_like(batch.mask)))
    assert objective(HPT(), empty, out) == 0
