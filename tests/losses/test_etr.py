"""ETR's golden table: the band of each sequence, from the size of its advantage and its group's pass rate."""

import pytest
import torch
from losses.golden import batch_of, begun, case_of, column, weights

from ctrlrl.losses.dr_grpo import DrGRPO
from ctrlrl.losses.etr import ETR
from ctrlrl.losses.group import ClippedGroupLoss

F64 = torch.float64
POPULATION = ETR(ddof=0, std_floor=0.0)


def graded(ratios, passed, group):
    batch, out = batch_of(ratios, torch.zeros_like(ratios))
    score = torch.tensor(passed, dtype=F64)
    return batch._replace(sequence_return=score, score=score, group=torch.tensor(group)), out


def test_golden_widths():
    """eps (1 + .5 min(|A|, 2) / 2) (1 + .25 x 4 p (1 - p)); A = +-1 for p = 1/2, sqrt 7 and -1 / sqrt 7 for 1/8."""
    passed = [1, 1, 0, 0] + [1] + 7 * [0]
    batch, _ = graded(torch.ones(12, 1, dtype=F64), passed, 4 * [0] + 8 * [1])
    width = 0.2 * begun(POPULATION, batch).coef["width"][:, 0]
    expected = [0.3125] * 4 + [0.332813] + [0.242840] * 7
    assert width.tolist() == pytest.approx(expected, abs=1e-6)


def test_golden_table():
    """Half passes: the band is [.6875, 1.3125]. Inside it the weight is r A."""
    batch, out = graded(column(1.31, 1.32, 0.69, 0.68), [1, 1, 0, 0], [0, 0, 0, 0])
    expected = column(1.31, 0.0, -0.69, 0.0)
    torch.testing.assert_close(weights(POPULATION, begun(POPULATION, batch), out), expected, atol=1e-12, rtol=0)
    # each side has its own width: eps_high .4 makes it 1.625, eps_low .1 .84375
    loss = ETR(ddof=0, std_floor=0.0, eps_low=0.1, eps_high=0.4)
    batch, out = graded(column(1.62, 1.63, 0.85, 0.84), [1, 1, 0, 0], [0, 0, 0, 0])
    expected = column(1.62, 0.0, -0.85, 0.0)
    torch.testing.assert_close(weights(loss, begun(loss, batch), out), expected, atol=1e-12, rtol=0)
    fraction = loss.metrics(begun(loss, batch), out, {})["clip_fraction"]
    assert fraction.flatten().tolist() == [0, 1, 0, 1]


def test_scores_between_pass_and_fail_enter_by_their_variance():
    # (0, .5, 1): variance 1/6
    batch, _ = graded(torch.ones(3, 1, dtype=F64), [0.0, 0.5, 1.0], [0, 0, 0])
    width = begun(ETR(advantage_coef=0.0), batch).coef["width"]
    torch.testing.assert_close(width, torch.full((3, 1), 1 + 0.25 * 4 / 6, dtype=F64))


def test_without_elasticity_it_is_the_fixed_clip_bit_for_bit():
    case = case_of(ETR, spread=0.6)
    out = case.output(case.leaf)._replace()
    out = out._replace(logp=out.logp.detach().requires_grad_())
    loss = ETR(advantage_coef=0.0, variance_coef=0.0)
    fixed = ClippedGroupLoss()
    batch = begun(loss, case.batch)
    assert torch.equal(batch.advantage, begun(fixed, case.batch).advantage)
    mine = loss.per_token(batch._replace(coef={**batch.coef, "advantage": batch.advantage}), out, {})
    theirs = fixed.per_token(batch._replace(coef={"advantage": batch.advantage}), out, {})
    assert torch.equal(mine, theirs)
    assert loss.prepare(batch, {}).denominator == case.batch.mask.sum() != DrGRPO().prepare(batch, {}).denominator


def test_a_more_even_group_never_clips_more():
    """One to four of eight pass: the share 4 p (1 - p) of the variance rises, and the band with it."""
    widths = []
    for passed in range(5):
        batch, _ = graded(torch.ones(8, 1, dtype=F64), passed * [1] + (8 - passed) * [0], 8 * [0])
        widths.append(begun(ETR(advantage_coef=0.0), batch).coef["width"][0, 0].item())
    assert widths == pytest.approx([1 + p / 8 * (1 - p / 8) for p in range(5)])


def test_a_larger_advantage_widens_up_to_its_bound():
    # returns (x, -1, ..., -1) of 14: the winner's advantage is sqrt 13, beyond every bound here
    batch, _ = graded(torch.ones(14, 1, dtype=F64), [1] + 13 * [0], 14 * [0])
    for bound in (0.5, 2.0, 3.0):
        loss = ETR(advantage_max=bound, variance_coef=0.0, ddof=0, std_floor=0.0)
        width = begun(loss, batch).coef["width"][:, 0]
        rest = 1 + 0.5 * min(1.0, 13**-0.5 / bound)
        assert width.tolist() == pytest.approx([1.5] + 13 * [rest])


def test_a_group_that_agrees_gives_exactly_nothing():
    batch, out = graded(column(1, 1.1, 0.9), [1, 1, 1], [5, 5, 5])
    assert weights(ETR(), begun(ETR(), batch), out).abs().max() == 0


def test_fields_are_checked():
    with pytest.raises(ValueError, match="advantage_max=0"):
        ETR(advantage_max=0.0)
