import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ctrlrl.core import advantage as adv

F64 = torch.float64


def recurrence_loop(a, b, reverse):
    out, x = torch.zeros_like(b), torch.zeros_like(b[0])
    for t in reversed(range(len(b))) if reverse else range(len(b)):
        x = b[t] + torch.where(a[t] == 0, 0.0, a[t] * x)
        out[t] = x
    return out


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 40), st.booleans())
def test_linear_recurrence_equals_a_loop(seed, length, reverse):
    g = torch.Generator().manual_seed(seed)
    a = torch.rand(length, 3, generator=g, dtype=F64) * 2 - 1
    a = torch.where(torch.rand(length, 3, generator=g) < 0.2, 0.0, a)
    b = torch.randn(length, 3, generator=g, dtype=F64)
    want = recurrence_loop(a, b, reverse)
    assert torch.allclose(adv.linear_recurrence(a, b, reverse=reverse), want, atol=1e-12)
    turned = adv.linear_recurrence(a.T.contiguous(), b.T.contiguous(), dim=1, reverse=reverse)
    assert torch.allclose(turned.T, want, atol=1e-12)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("coefficient", [0.99 * 0.95, 1.0, -1.0])
def test_linear_recurrence_in_float32_over_4096_steps(reverse, coefficient):
    b = torch.randn(4096, 4, generator=torch.Generator().manual_seed(0))
    a = torch.full_like(b, coefficient)
    want = recurrence_loop(a.double(), b.double(), reverse)
    got = adv.linear_recurrence(a, b, reverse=reverse).double()
    assert (got - want).abs().max() < 2e-6 * want.abs().max()


def test_linear_recurrence_gradient():
    g = torch.Generator().manual_seed(3)
    a = (torch.rand(7, 2, generator=g, dtype=F64) * 2 - 1).requires_grad_()
    b = torch.randn(7, 2, generator=g, dtype=F64, requires_grad=True)
    assert torch.autograd.gradcheck(adv.linear_recurrence, (a, b))


def test_a_zero_coefficient_stops_nan():
    a = torch.tensor([[0.9], [0.0], [0.9], [0.9]])
    b = torch.tensor([[1.0], [2.0], [math.nan], [math.inf]])
    assert adv.linear_recurrence(a, b, reverse=True)[:2, 0].tolist() == [pytest.approx(2.8), 2.0]


def gae_loop(reward, discount, cut, value, value_t, lam):
    out, carried = torch.zeros_like(reward), torch.zeros_like(reward[0])
    for t in reversed(range(len(reward))):
        delta = reward[t] + discount[t] * value_t[t] - value[t]
        carried = delta + lam * discount[t] * torch.where(cut[t], 0.0, carried)
        out[t] = carried
    return out


def test_gae_by_hand():
    """gamma .5, lam .5; a termination after step 1, a truncation after step 2, then the end of the window."""
    reward = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=F64)[:, None]
    terminated = torch.tensor([0, 1, 0, 0], dtype=torch.bool)[:, None]
    truncated = torch.tensor([0, 0, 1, 0], dtype=torch.bool)[:, None]
    value = torch.tensor([10.0, 20.0, 30.0, 40.0], dtype=F64)[:, None]
    value_t = torch.tensor([20.0, math.nan, 100.0, 8.0], dtype=F64)[:, None]
    got = adv.gae(reward, 0.5 * (~terminated), terminated | truncated, value, value_t, 0.5)
    # deltas: 1+10-10=1, 2-20=-18, 3+50-30=23, 4+4-40=-32
    assert got[:, 0].tolist() == [1 + 0.25 * -18, -18, 23, -32]


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 50), st.sampled_from([0.0, 0.5, 0.95, 1.0]))
def test_gae_equals_a_loop(seed, length, lam):
    g = torch.Generator().manual_seed(seed)
    reward, value, value_t = torch.randn(3, length, 4, generator=g, dtype=F64)
    terminated = torch.rand(length, 4, generator=g) < 0.15
    truncated = torch.rand(length, 4, generator=g) < 0.15
    discount = 0.97 * (~terminated).to(F64)
    args = (reward, discount, terminated | truncated, value, value_t, lam)
    assert torch.allclose(adv.gae(*args), gae_loop(*args), atol=1e-12)


def test_gae_is_zero_for_a_true_value_function_and_sums_rewards_at_lam_one():
    reward = torch.ones(5, 1, dtype=F64)
    cut = torch.tensor([0, 0, 0, 0, 1], dtype=torch.bool)[:, None]
    discount = 0.9 * (~cut).to(F64)
    value = torch.tensor([sum(0.9**k for k in range(5 - t)) for t in range(5)], dtype=F64)[:, None]
    value_t = torch.cat([value[1:], torch.zeros(1, 1, dtype=F64)])
    assert adv.gae(reward, discount, cut, value, value_t, 0.7).abs().max() < 1e-14
    zero = torch.zeros_like(value)
    assert torch.allclose(adv.gae(reward, discount, cut, zero, zero, 1.0), value, atol=1e-14)


def test_truncation_and_termination_differ():
    one = torch.ones(1, 1, dtype=F64)
    yes = torch.ones(1, 1, dtype=torch.bool)
    assert adv.gae(one, 0.9 * one, yes, one, 10 * one, 0.95).item() == pytest.approx(9.0)
    assert adv.gae(one, 0.0 * one, yes, one, 10 * one, 0.95).item() == 0.0


def test_running_return_by_hand_and_across_windows():
    reward = torch.tensor([[1.0], [2.0], [4.0], [8.0]], dtype=F64)
    cut = torch.tensor([0, 1, 0, 0], dtype=torch.bool)[:, None]
    initial = torch.tensor([16.0], dtype=F64)
    whole = adv.running_return(reward, 0.5, cut, initial)
    assert whole[:, 0].tolist() == [9.0, 6.5, 4.0, 10.0]
    for split in (1, 2, 3):
        head = adv.running_return(reward[:split], 0.5, cut[:split], initial)
        carried = torch.where(cut[split - 1], 0.0, head[-1])
        tail = adv.running_return(reward[split:], 0.5, cut[split:], carried)
        assert torch.allclose(torch.cat([head, tail]), whole, atol=1e-15)


def test_standardise():
    x = torch.tensor([[1.0, 2.0, math.nan], [6.0, math.inf, -math.inf]], dtype=F64)
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]], dtype=torch.bool)
    got = adv.standardise(x, mask)
    s = math.sqrt(7)  # values 1, 2, 6: mean 3, squares 4 + 1 + 9 over 2
    assert torch.allclose(got, torch.tensor([[-2 / s, -1 / s, 0], [3 / s, 0, 0]], dtype=F64), atol=1e-8)
    y = torch.randn(50, 7, generator=torch.Generator().manual_seed(0)) * 3 + 100
    want = (y - y.mean()) / (y.std() + 1e-8)
    assert torch.allclose(adv.standardise(y, torch.ones_like(y, dtype=torch.bool)), want, atol=1e-4)


@pytest.mark.parametrize("valid", [0, 1, 5])
def test_standardise_of_nothing_of_one_and_of_equal_values_is_zero(valid):
    x = torch.full((5,), 0.1)
    assert (adv.standardise(x, torch.arange(5) < valid) == 0).all()


X = torch.tensor([1.0, 3.0, 5.0, 4.0, 8.0], dtype=F64)
GROUP = torch.tensor([9, -2, 9, 9, -2])


def test_group_statistics_by_hand():
    assert adv.group_mean(X, GROUP).tolist() == pytest.approx([10 / 3, 5.5, 10 / 3, 10 / 3, 5.5])
    assert adv.leave_one_out_mean(X, GROUP).tolist() == pytest.approx([4.5, 8, 2.5, 3, 3])
    # group 9: (49 + 25 + 4) / 9 = 26 / 3; group -2: 2 x 6.25
    for ddof, a, b in [(1, 26 / 6, 12.5), (0, 26 / 9, 6.25)]:
        want = [math.sqrt(v) for v in (a, b, a, a, b)]
        assert adv.group_std(X, GROUP, ddof).tolist() == pytest.approx(want)


def test_group_of_one():
    one, group = torch.tensor([3.0, 7.0]), torch.tensor([0, 1])
    assert adv.group_std(one, group).tolist() == [0, 0]
    assert adv.leave_one_out_mean(one, group).tolist() == [3, 7]
    assert adv.center_scale(one, group).tolist() == [0, 0]


def test_center_scale_by_hand():
    m, s = X.mean(), X.std()
    gm, gs = adv.group_mean(X, GROUP), adv.group_std(X, GROUP)
    cases = {
        ("none", "none"): X,
        ("group", "none"): X - gm,
        ("group", "group"): (X - gm) / (gs + 1e-6),
        ("group", "batch"): (X - gm) / (s + 1e-6),
        ("batch", "batch"): (X - m) / (s + 1e-6),
        ("leave_one_out", "none"): X - adv.leave_one_out_mean(X, GROUP),
        ("none", "group"): X / (gs + 1e-6),
    }
    for (center, scale), want in cases.items():
        got = adv.center_scale(X, GROUP, center, scale)  # type: ignore[arg-type]
        assert torch.allclose(got, want, atol=1e-14), (center, scale)
    assert torch.allclose(adv.center_scale(X, None, "batch", "batch"), (X - m) / (s + 1e-6), atol=1e-14)
    pair = adv.center_scale(torch.tensor([0.0, 1.0], dtype=F64), torch.tensor([0, 0]), eps=0.0)
    assert pair.tolist() == pytest.approx([-math.sqrt(0.5), math.sqrt(0.5)])
    with pytest.raises(ValueError, match="need group"):
        adv.center_scale(X)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.floats(0.1, 50), st.floats(-100, 100))
def test_group_advantages_ignore_scale_shift_and_order(seed, scale, shift):
    g = torch.Generator().manual_seed(seed)
    x, group = torch.randn(12, generator=g, dtype=F64), torch.randint(0, 4, (12,), generator=g)
    want = adv.center_scale(x, group, eps=0.0)
    keep = adv.group_std(x, group) > 0.05
    got = adv.center_scale(x * scale + shift, group, eps=0.0)
    assert torch.allclose(got[keep], want[keep], atol=1e-7)
    order = torch.randperm(12, generator=g)
    again = adv.center_scale(x[order], group[order], eps=0.0)
    assert torch.allclose(again[keep[order]], want[order][keep[order]], atol=1e-9)
    n = adv.reduce.segment_sum(torch.ones_like(x), group)
    left, centred = x - adv.leave_one_out_mean(x, group), x - adv.group_mean(x, group)
    assert torch.allclose((n - 1) * left, n * centred, atol=1e-10)  # RLOO = n / (n - 1) x centring


def test_equal_outcomes_are_exactly_zero_even_with_a_tiny_eps():
    """Sums of equal floats need not divide back: the naive mean misses by a rounding, which 1 / eps would blow up."""
    x = torch.linspace(0.1, 9.7, 23).repeat_interleave(7)
    group = torch.arange(23).repeat_interleave(7)
    assert (x - adv.group_mean(x, group)).abs().max() > 0
    assert (adv.center_scale(x, group, eps=1e-12) == 0).all()
    assert (adv.center_scale(x, group, "leave_one_out", "none") == 0).all()
    for row in x.view(23, 7):
        assert (adv.standardise(row, torch.ones(7, dtype=torch.bool), eps=1e-12) == 0).all()
