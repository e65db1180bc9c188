"""DaGRPO's golden table: two members that are nearly the same do not push against each other."""

import math

import torch
from losses.golden import batch_of, begun, column, objective, weights

from ctrlrl.losses.dagrpo import DaGRPO
from ctrlrl.types import DEMONSTRATION, ON_POLICY


def scored(returns, score, success, ratios=None, source=None, group=None):
    rows = len(returns)
    batch, out = batch_of(torch.ones(rows, 1, dtype=torch.float64) if ratios is None else ratios, torch.zeros(rows, 1))
    return batch._replace(
        sequence_return=torch.tensor(returns, dtype=torch.float64),
        score=torch.tensor(score, dtype=torch.float64),
        success=torch.tensor(success),
        source=None if source is None else torch.tensor(source),
        group=torch.zeros(rows, dtype=torch.long) if group is None else torch.tensor(group),
    ), out


TABLE = ([1, 1, 0, 0], [0.9, 0.55, 0.5, 0.1], [True, True, False, False])


def test_golden_table():
    batch, out = scored(*TABLE, ratios=column(1.1, 1.3, 0.7, 0.9))
    loss = DaGRPO(score_gap=0.2)
    got = weights(loss, begun(loss, batch), out)
    torch.testing.assert_close(got, column(0.55, 0.0, 0.0, -0.45))
    torch.testing.assert_close(begun(loss, batch).advantage, column(0.5, 0.25, -0.25, -0.5))


def test_without_a_gap_it_is_grpos_numerator_and_a_wide_one_silences():
    batch, _ = scored(*TABLE)
    torch.testing.assert_close(begun(DaGRPO(score_gap=0.0), batch).advantage, column(0.5, 0.5, -0.5, -0.5))
    assert begun(DaGRPO(score_gap=0.9), batch).advantage.abs().max() == 0
    by_std = begun(DaGRPO(score_gap=0.2, divide_by_std=True), batch).advantage
    want = column(0.5, 0.25, -0.25, -0.5) * math.sqrt(3)
    torch.testing.assert_close(by_std, want, atol=1e-5, rtol=0)


def test_a_demonstration_joins_a_group_without_success_with_ratio_one():
    source = [ON_POLICY, ON_POLICY, DEMONSTRATION]
    batch, out = scored([0, 0, 1], [0, 0, 1], [False, False, True], column(1.0, 0.7, 5.0), source)
    loss = DaGRPO()
    batch = begun(loss, batch)
    # the second is below the band, the third counts in full though its probability is five times the stored one
    torch.testing.assert_close(weights(loss, batch, out), column(-1 / 3, 0.0, 2 / 3))


def test_a_demonstration_is_left_out_where_a_member_succeeded():
    source = [ON_POLICY, ON_POLICY, DEMONSTRATION] * 2
    batch, out = scored(
        [1, 0, 1, 0, 0, 1], [1, 0, 1, 0, 0, 1], [True, False, True, False, False, True],
        source=source, group=[0, 0, 0, 1, 1, 1],
    )  # fmt: skip
    for loss in (DaGRPO(), DaGRPO(divide_by_std=True)):
        got = weights(loss, begun(loss, batch), out)
        alone, alone_out = scored([1, 0], [1, 0], [True, False])
        torch.testing.assert_close(got[:2], weights(loss, begun(loss, alone), alone_out), atol=1e-9, rtol=0)
        assert got[2] == 0 and got[5] > 0
    # it does not count in the mean either: five rows are left
    assert loss.prepare(begun(loss, batch), {}).denominator == 5
    assert objective(loss, begun(loss, batch), out).isfinite()
