import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ctrlrl.core import weight

F64 = torch.float64


def problem(seed, states=6, actions=5, spread=1.0):
    g = torch.Generator().manual_seed(seed)
    q = torch.randn(states, actions, generator=g, dtype=F64) * spread
    return q, torch.softmax(torch.randn(states, actions, generator=g, dtype=F64), -1)


def test_targets_by_hand():
    x = torch.tensor([-3.0, 0.0, 2.0], dtype=F64)
    assert weight.sign_target(x, 0.2).tolist() == pytest.approx([0.8, 1.0, 1.2])
    assert weight.tanh_target(x, 0.2, 0.5).tolist() == pytest.approx(
        [1 - 0.2 * math.tanh(3), 1, 1 + 0.2 * math.tanh(2)]
    )
    # low .8, high 1.4: shift log(.2 / .4), so a gap of 0 gives .8 + .6 / 3 = 1
    assert weight.sigmoid_target(x, 0.8, 1.4, 1.0)[1].item() == pytest.approx(1.0, abs=1e-15)
    assert weight.band_target(x, 0.8, 1.4, 1.0)[1].item() == pytest.approx(1.1, abs=1e-15)
    assert weight.band_target(x, 0.8, 1.4, 1e-4).tolist() == pytest.approx([0.8, 1.1, 1.4])


@pytest.mark.parametrize(
    ("rewards", "want"),
    [
        ([1, 0, 0, 0], [1.3, 1, 1, 1]),
        ([1, 1, 1, 0], [1, 1, 1, 0.7]),
        ([1, 1, 0, 0], [1.3, 1.3, 0.7, 0.7]),
        ([1, 1, 1, 1], [1, 1, 1, 1]),
        ([0.1, 0.2, 0.4, 0.9], [0.7, 0.7, 1.3, 1.3]),
    ],
)
def test_group_targets_at_the_median(rewards, want):
    r = torch.tensor(rewards, dtype=F64)
    gap = (r - torch.quantile(r, 0.5)) / (r.std() + 1e-6)
    assert weight.band_target(gap, 0.7, 1.3, 1e-4).tolist() == pytest.approx(want)


def test_symmetric_band_is_the_tanh_target():
    gap = torch.linspace(-9, 9, 101, dtype=F64)
    for eps, lam in [(0.1, 0.3), (0.3, 2.0), (1.0, 1.0)]:
        want = weight.tanh_target(gap, eps, lam)
        assert torch.allclose(weight.sigmoid_target(gap, 1 - eps, 1 + eps, lam), want, atol=1e-14)
        assert torch.allclose(weight.band_target(gap, 1 - eps, 1 + eps, lam), want, atol=1e-14)


def test_median_dual():
    x = torch.tensor([-4.0, -1.0, 0.0, 1.0, 4.0], dtype=F64, requires_grad=True)
    g = weight.median_dual(x)
    assert torch.allclose(g, torch.nn.functional.softplus(x) - x / 2, atol=1e-14)
    assert g[2].item() == pytest.approx(math.log(2), abs=1e-15)
    (slope,) = torch.autograd.grad(g.sum(), x)
    assert torch.allclose(slope, torch.tanh(x.detach() / 2) / 2, atol=1e-15)
    huge = torch.tensor([-1e30, 1e30], requires_grad=True)
    value = weight.median_dual(huge)
    assert value.tolist() == pytest.approx([5e29, 5e29])
    value.sum().backward()
    assert huge.grad is not None and huge.grad.tolist() == [-0.5, 0.5]


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.floats(-6, 3), st.floats(-3, 3))
def test_threshold_normalises_the_target(seed, log_lam, log_spread):
    q, p = problem(seed, spread=10**log_spread)
    lam = 10**log_lam * 10**log_spread
    mu = weight.solve_threshold(q, p, lam)
    target = weight.tanh_target(q - mu[:, None], 0.3, lam)
    assert ((p * target).sum(-1) - 1).abs().max() < 1e-8
    assert (mu >= q.amin(-1)).all() and (mu <= q.amax(-1)).all()


@pytest.mark.parametrize(("low", "high"), [(0.8, 1.3), (0.0, 4.0), (0.9, 1.1), (0.5, 1.05)])
def test_threshold_of_an_asymmetric_band(low, high):
    q, p = problem(5)
    mu = weight.solve_threshold(q, p, 0.2, low, high)
    assert ((p * weight.sigmoid_target(q - mu[:, None], low, high, 0.2)).sum(-1) - 1).abs().max() < 1e-12


def test_threshold_limits():
    q, p = problem(1)
    assert torch.allclose(weight.solve_threshold(q, p, 1e6), (p * q).sum(-1), atol=1e-6)
    uniform = torch.full((1, 5), 0.2, dtype=F64)
    median = weight.solve_threshold(q[:1], uniform, 1e-5)
    assert median.item() == pytest.approx(q[0].median().item(), abs=1e-3)


def test_threshold_ignores_absent_actions_and_takes_lam_per_state():
    q, p = torch.tensor([[1.0, 2.0, math.inf]], dtype=F64), torch.tensor([[0.5, 0.5, 0.0]], dtype=F64)
    assert weight.solve_threshold(q, p, 0.1).item() == pytest.approx(1.5)
    q, p = problem(2)
    lam = torch.logspace(-2, 1, 6, dtype=F64)[:, None]
    want = [weight.solve_threshold(q[i : i + 1], p[i : i + 1], lam[i].item()).item() for i in range(6)]
    assert weight.solve_threshold(q, p, lam).tolist() == pytest.approx(want, abs=1e-12)


def test_elite_selection_limit():
    """c_l = 0, c_h = 1 / p: only the best tenth survives, with weight ten."""
    q = torch.randn(1, 10_000, generator=torch.Generator().manual_seed(0), dtype=F64)
    p = torch.full_like(q, 1e-4)
    mu = weight.solve_threshold(q, p, 1e-3, 0.0, 10.0)
    assert mu.item() == pytest.approx(torch.quantile(q, 0.9).item(), abs=0.01)
    r = weight.sigmoid_target(q - mu[:, None], 0.0, 10.0, 1e-3)
    assert (p * r).sum().item() == pytest.approx(1.0, abs=1e-9)
    assert ((r > 9.9) | (r < 0.1)).double().mean() > 0.99


def test_lp_ratio_by_hand():
    q = torch.tensor([[1.0, 2.0, 3.0], [1.0, 1.0, 2.0], [5.0, 5.0, 5.0]], dtype=F64)
    p = torch.tensor([[0.2, 0.5, 0.3], [0.5, 0.2, 0.3], [0.2, 0.5, 0.3]], dtype=F64)
    want = [[0.9, 1 - 0.1 * 0.1 / 0.5, 1.1], [1 - 0.1 * 0.3 / 0.7] * 2 + [1.1], [1.0] * 3]
    assert torch.allclose(weight.lp_ratio(q, p, 0.1), torch.tensor(want, dtype=F64), atol=1e-15)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 8), st.booleans())
def test_lp_ratio_is_a_policy_inside_the_band(seed, actions, ties):
    q, p = problem(seed, states=8, actions=actions)
    q = q.round() if ties else q
    for r in (weight.lp_ratio(q, p, 0.3), weight.mean_ratio(q, p, 0.3)):
        assert ((p * r).sum(-1) - 1).abs().max() < 1e-12
        assert ((p * r * q).sum(-1) - (p * q).sum(-1)).min() > -1e-12
    assert (weight.lp_ratio(q, p, 0.3) - 1).abs().max() <= 0.3 + 1e-15


def test_small_temperature_tends_to_the_lp():
    q, p = problem(7)
    mu = weight.solve_threshold(q, p, 1e-4)
    assert torch.allclose(weight.tanh_target(q - mu[:, None], 0.2, 1e-4), weight.lp_ratio(q, p, 0.2), atol=1e-6)


def test_mean_ratio_by_hand_and_when_concentrated():
    q, p = torch.tensor([[0.0, 1.0]], dtype=F64), torch.tensor([[0.5, 0.5]], dtype=F64)
    assert weight.mean_ratio(q, p, 0.2).tolist() == [[pytest.approx(0.8), pytest.approx(1.2)]]
    p = torch.tensor([[1e-15, 1.0 - 1e-15]], dtype=F64)  # the mean is the best value up to rounding
    assert weight.mean_ratio(q, p, 0.2)[0, 0].item() == pytest.approx(0.8 / 1.2)
