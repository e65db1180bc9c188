"""ADORA's golden table: a group whose successes are not longer than its failures counts a tenth."""

import math

import pytest
import torch
from losses.golden import batch_of, begun, weights

from ctrlrl.losses.adora import ADORA
from ctrlrl.losses.grpo import GRPO


def lengths(length, success, group=None):
    rows, longest = len(length), max(length)
    mask = torch.arange(longest) < torch.tensor(length).unsqueeze(-1)
    batch, out = batch_of(torch.ones(rows, longest, dtype=torch.float64), torch.zeros(rows, longest), mask)
    success = torch.tensor(success)
    return batch._replace(
        success=success,
        sequence_return=success.to(torch.float64),
        group=torch.zeros(rows, dtype=torch.long) if group is None else torch.tensor(group),
        logp_ref=out.logp,
    ), out


WIN, LOSE = True, False


def test_golden_table():
    """Successes 12, 30 against failures 20, 26: 30 > 23. Successes 12, 20: 20 < 23, so a tenth."""
    kind = [WIN, WIN, LOSE, LOSE]
    batch, out = lengths([12, 30, 20, 26, 12, 20, 20, 26], kind * 2, [0] * 4 + [1] * 4)
    loss = ADORA(std_floor=1e-12)
    a = math.sqrt(3) / 2
    want = torch.tensor([a, a, -a, -a, a / 10, a / 10, -a / 10, -a / 10], dtype=torch.float64)
    torch.testing.assert_close(weights(loss, begun(loss, batch), out).sum(-1), want)


def test_with_weight_one_it_is_grpo():
    batch, _ = lengths([3, 9, 5, 7], [LOSE, LOSE, WIN, LOSE])
    assert begun(ADORA(), batch).advantage.abs().max() < 0.2
    torch.testing.assert_close(begun(ADORA(group_weight=1.0), batch).advantage, begun(GRPO(), batch).advantage)


def helpful(batch, **settings):
    return begun(ADORA(ddof=0, std_floor=1e-12, **settings), batch).advantage.abs().amax(-1) > 0.5


def test_short_successes_may_be_favoured():
    batch, _ = lengths([3, 9, 8, 7], [WIN, WIN, LOSE, LOSE])
    assert helpful(batch).all() and helpful(batch, favour="short").all()
    batch, _ = lengths([8, 9, 8, 7], [WIN, WIN, LOSE, LOSE])
    assert helpful(batch).all() and not helpful(batch, favour="short").any()


def test_failures_that_were_cut_off_do_not_count():
    batch, _ = lengths([6, 6, 5, 20], [WIN, WIN, LOSE, LOSE])
    assert not helpful(batch).any() and helpful(batch, longest=20).all()


@pytest.mark.parametrize(("release", "no_success", "no_failure"), [("llm", 0.1, 1.0), ("vl", 1.0, 0.1)])
def test_the_releases_treat_groups_of_one_kind_oppositely(release, no_success, no_failure):
    """With dense returns such groups have an advantage: +-1 here."""
    batch, _ = lengths([4, 5, 6, 7], [LOSE, LOSE, WIN, WIN], [0, 0, 1, 1])
    batch = batch._replace(sequence_return=torch.tensor([0.0, 1.0, 2.0, 3.0], dtype=torch.float64))
    got = begun(ADORA(one_sided=release, ddof=0, std_floor=1e-12), batch).advantage[:, 0]
    want = torch.tensor([-no_success, no_success, -no_failure, no_failure], dtype=torch.float64)
    torch.testing.assert_close(got, want)


def test_a_group_that_agrees_gives_exactly_nothing():
    batch, _ = lengths([4, 5, 6], [WIN, WIN, WIN])
    assert begun(ADORA(), batch).advantage.abs().max() == 0
