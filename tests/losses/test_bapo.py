"""BAPO's golden table: the searched band, and the gradient in it."""

import math

import pytest
import torch
from losses.golden import batch_of, column, weights

from ctrlrl.core import reduce
from ctrlrl.losses.bapo import BAPO, _grid

F64 = torch.float64
EQUAL = {"probability_weighted": False}


def rollout():
    """Ratios (3, .4, .5), A = (1, -1, -2)."""
    batch, out = batch_of(column(3.0, 0.4, 0.5), column(1.0, -1.0, -2.0))
    return batch._replace(coef={"advantage": batch.advantage}), out


def full(loss, batch, out):
    """Ascent weights after the transform, times the denominator."""
    prepared = loss.prepare(batch, {})
    batch = batch._replace(coef=prepared.coef, weight=prepared.weight)

    def gradient_of(f):
        value = reduce.weighted_sum(f(batch, out), prepared.weight) / prepared.denominator
        return torch.autograd.grad(value, out.logp, retain_graph=True)[0].flatten()

    plain = gradient_of(lambda b, o: loss.per_token(b, o, {}))
    return -(loss.grad_transform(plain, gradient_of, {}) * prepared.denominator).unsqueeze(-1)


def band(loss, batch, out):
    return pytest.approx(tuple(x.item() for x in loss.band(batch, out)))


def test_golden_bands():
    batch, out = rollout()
    assert band(BAPO(**EQUAL, positive_share=0.39), batch, out) == (0.6, 1.2)  # .4 at once
    assert band(BAPO(**EQUAL, positive_share=0.499, ratio_low_max=0.6), batch, out) == (0.6, 1.8)
    # 3 / (3 + 1.8) = .625 at most, and raising c_low then only costs: both run to their ends
    assert band(BAPO(**EQUAL, positive_share=0.7), batch, out) == (0.9, 3.0)
    assert band(BAPO(**EQUAL, positive_share=0.45, first="low"), batch, out) == (0.9, 2.25)
    gradient = BAPO(**EQUAL, positive_share=0.9, contribution="gradient", ratio_low=0.31)
    assert band(gradient, batch, out) == (0.51, 3.0)


def test_the_share_is_weighted_by_the_old_probability():
    """With p = (1, 1/2, 1/2): 1.2 / (1.2 + .9) = .571 at the start; with p = (1/4, 1, 1): .3 / 2.1 = .143."""
    batch, out = rollout()
    many = batch._replace(logp_old=column(0.0, -math.log(2), -math.log(2)))
    few = batch._replace(logp_old=column(-math.log(4), 0.0, 0.0))
    shifted = [out._replace(logp=(b.logp_old + column(3.0, 0.4, 0.5).log()).requires_grad_()) for b in (many, few)]
    loss = BAPO(positive_share=0.5)
    assert band(loss, many, shifted[0]) == (0.6, 1.2)
    assert band(loss, few, shifted[1]) == (0.9, 3.0)
    # densities may be of any size
    dense = few._replace(logp_old=few.logp_old + 1000)
    assert band(loss, dense, shifted[1]._replace(logp=shifted[1].logp + 1000)) == (0.9, 3.0)


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({}, (0.9, 3.0)),
        ({"positive_share": 0.6}, (0.6, 2.7)),
        ({"positive_share": 0.6, "high_step": 0.4}, (0.6, 2.8)),
        ({"positive_share": 0.6, "ratio_high": 2.72}, (0.6, 2.72)),
        ({"positive_share": 0.6, "ratio_low": 0.3}, (0.3, 2.1)),  # 2.1 / (2.1 + .4 + 1) = .6
        ({"positive_share": 0.6, "first": "low"}, (0.9, 3.0)),
        ({"ratio_low_max": 0.8}, (0.8, 3.0)),
        ({"ratio_high_max": 2.0}, (0.9, 2.0)),
        ({"ratio_low": 0.45}, (0.9, 3.0)),
        ({"ratio_low": 0.45, "contribution": "gradient"}, (0.51, 3.0)),  # 3 / (3 + 1) until .5 is silent
        ({"ratio_low": 0.45, "contribution": "gradient", "low_step": 0.1}, (0.55, 3.0)),
    ],
)
def test_what_each_field_does_to_the_search(changed, expected):
    """N = 1.8 at c_low = .6, so a share of .6 asks for c_high = 2.7; .7 is out of reach by value."""
    batch, out = rollout()
    if "positive_share" in changed:
        changed = {**changed, "positive_share": changed["positive_share"] - 1e-9}
    assert band(BAPO(**{**EQUAL, "positive_share": 0.8} | changed), batch, out) == expected


def test_the_gradient_is_that_of_the_searched_band():
    batch, out = batch_of(column(1.5, 1.9, 0.5, 0.7), column(1.0, 1.0, -1.0, -2.0))
    # P = min(1.5, c) + min(1.9, c), N = .6 + 1.4 = 2: a share of .6 asks for P >= 3, first at c = 1.5
    loss = BAPO(**EQUAL, positive_share=0.6)
    torch.testing.assert_close(weights(loss, batch, out), column(0.0, 0.0, 0.0, -1.4))
    torch.testing.assert_close(full(loss, batch, out), column(1.5, 0.0, 0.0, -1.4), atol=1e-9, rtol=0)
    # out of reach: everything positive is let through, and c_low = .9 silences both negatives
    loss = BAPO(**EQUAL, positive_share=0.9)
    torch.testing.assert_close(full(loss, batch, out), column(1.5, 1.9, 0.0, 0.0), atol=1e-9, rtol=0)


def test_a_degenerate_range_is_a_fixed_clip():
    loss = BAPO(ratio_low=0.8, ratio_low_max=0.8, ratio_high=1.28, ratio_high_max=1.28, positive_share=1.0)
    ratios, advantage = column(1.27, 1.29, 0.81, 0.79, 0.5, 2.0), column(1.0, 1.0, -1.0, -1.0, 1.0, -1.0)
    batch, out = batch_of(ratios, advantage)
    expected = column(1.27, 0.0, -0.81, 0.0, 0.5, -2.0)
    torch.testing.assert_close(weights(loss, batch, out), expected, atol=1e-9, rtol=0)
    torch.testing.assert_close(full(loss, batch, out), expected, atol=1e-9, rtol=0)


def test_masked_positions_do_not_enter_the_search():
    mask = torch.tensor([[True], [True], [True], [False]])
    batch, out = batch_of(column(3.0, 0.4, 0.5, 1.0), column(1.0, -1.0, -2.0, 0.0), mask)
    batch = batch._replace(coef={"advantage": batch.advantage}, logp_old=torch.where(mask, batch.logp_old, torch.nan))
    out = out._replace(logp=torch.where(mask, out.logp, torch.nan).detach().requires_grad_())
    assert band(BAPO(**EQUAL, positive_share=0.499, ratio_low_max=0.6), batch, out) == (0.6, 1.8)
    got = full(BAPO(positive_share=0.6), batch, out)
    assert got.isfinite().all() and got[3] == 0


def test_the_grid_ends_at_its_end():
    like = torch.zeros((), dtype=F64)
    assert len(_grid(0.6, 0.9, 0.02, like)) == 16 and len(_grid(1.2, 3.0, 0.05, like)) == 37
    assert _grid(1.0, 1.25, 0.1, like).tolist() == pytest.approx([1.0, 1.1, 1.2, 1.25])
    assert _grid(0.8, 0.8, 0.1, like).tolist() == [0.8]


@pytest.mark.parametrize("wrong", [{"first": "both"}, {"contribution": "all"}, {"ratio_low": 0.95}, {"high_step": 0.0}])
def test_fields_are_checked(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        BAPO(**wrong)
