import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ctrlrl.core.ratio import LOG_RATIO_CLAMP, Level, log_ratio, ratio, ratio_minus_one, sequence_log_ratio

LEVELS: list[Level] = ["token", "turn", "sequence", "sequence_sum"]
F64 = torch.float64


def example():
    """Two sequences of four; log-ratios 1, 2, 3, 4 and 5, 6, 7, 8."""
    logp = torch.tensor([[1.0, 2.0, 3.0, 4.0], [5.0, 6.0, 7.0, 8.0]], dtype=F64) - 10
    mask = torch.tensor([[1, 1, 1, 0], [1, 0, 1, 1]], dtype=torch.bool)
    turn = torch.tensor([[7, 7, 3, 3], [0, 0, 0, -1]])
    return logp, torch.full_like(logp, -10.0), mask, turn


@pytest.mark.parametrize(
    ("level", "want"),
    [
        ("token", [[1, 2, 3, 0], [5, 0, 7, 8]]),
        ("turn", [[1.5, 1.5, 3, 0], [6, 0, 6, 0]]),
        ("sequence", [[2, 2, 2, 0], [20 / 3, 0, 20 / 3, 20 / 3]]),
        ("sequence_sum", [[6, 6, 6, 0], [20, 0, 20, 20]]),
    ],
)
def test_levels_by_hand(level, want):
    logp, old, mask, turn = example()
    got = log_ratio(logp, old, mask, level, turn)
    assert torch.allclose(got, torch.tensor(want, dtype=F64), rtol=0, atol=1e-14)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_masked_positions_are_zero_and_without_gradient(level, bad):
    logp, old, mask, turn = example()
    logp, old = torch.where(mask, logp, bad), torch.where(mask, old, bad)
    logp.requires_grad_()
    out = log_ratio(logp, old, mask, level, turn)
    assert out.isfinite().all() and (out[~mask] == 0).all()
    ratio(out).sum().backward()
    assert logp.grad is not None and logp.grad.isfinite().all() and (logp.grad[~mask] == 0).all()
    off = (turn < 0) if level == "turn" else ~mask
    assert (logp.grad[mask & ~off] != 0).all()


@pytest.mark.parametrize("level", LEVELS)
def test_fully_masked_sequence_is_zero(level):
    logp, old, _, turn = example()
    assert (log_ratio(logp, old, torch.zeros(2, 4, dtype=torch.bool), level, turn) == 0).all()


def test_levels_agree_for_sequences_of_one():
    logp, old = torch.randn(6, 1, dtype=F64), torch.randn(6, 1, dtype=F64)
    mask, turn = torch.ones(6, 1, dtype=torch.bool), torch.full((6, 1), 41)
    outs = [log_ratio(logp, old, mask, level, turn) for level in LEVELS]
    assert all(torch.equal(o, outs[0]) for o in outs)


def test_gradient_of_the_sequence_mean_is_shared_equally():
    logp, old, mask, _ = example()
    logp.requires_grad_()
    log_ratio(logp, old, mask, "sequence")[0, 0].backward()
    third = 1 / 3
    assert logp.grad is not None
    assert torch.allclose(logp.grad, torch.tensor([[third, third, third, 0], [0, 0, 0, 0]], dtype=F64))


def test_ratio_is_clamped_in_the_exponential_only():
    x = torch.tensor([-200.0, -20.5, 0.0, 1.0, 200.0], requires_grad=True)
    r = ratio(x)
    assert r.isfinite().all() and r[2] == 1
    edge = LOG_RATIO_CLAMP
    assert r[4].item() == pytest.approx(math.exp(edge)) and r[0].item() == pytest.approx(math.exp(-edge))
    r.sum().backward()
    assert x.grad is not None and x.grad.tolist() == [0, 0, 1, pytest.approx(math.e), 0]
    logp = torch.full((1, 3), 200.0, requires_grad=True)
    summed = log_ratio(logp, torch.zeros(1, 3), torch.ones(1, 3, dtype=torch.bool), "sequence_sum")
    assert summed[0, 0] == 600
    summed[0, 0].backward()
    assert logp.grad is not None and logp.grad.tolist() == [[1, 1, 1]]


def test_ratio_minus_one_keeps_small_values_in_float32():
    assert ratio_minus_one(torch.tensor([1e-9])).item() == pytest.approx(1e-9, rel=1e-6)
    assert (ratio(torch.tensor([1e-9])) - 1).item() == 0
    assert ratio_minus_one(torch.tensor([200.0])).isfinite().all()


def test_wrong_arguments_raise():
    logp, old, mask, _ = example()
    with pytest.raises(ValueError, match="needs turn"):
        log_ratio(logp, old, mask, "turn")
    with pytest.raises(ValueError, match="level must be"):
        log_ratio(logp, old, mask, "word")  # type: ignore[arg-type]


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 5), st.integers(1, 9))
def test_turn_level_equals_a_loop(seed, rows, length):
    g = torch.Generator().manual_seed(seed)
    logp = torch.randn(rows, length, generator=g, dtype=F64)
    old = torch.randn(rows, length, generator=g, dtype=F64)
    mask = torch.rand(rows, length, generator=g) < 0.7
    turn = torch.randint(-1, 3, (rows, length), generator=g) * 1000
    turn = torch.where(turn < 0, -1, turn)
    got = log_ratio(logp, old, mask, "turn", turn)
    for b in range(rows):
        for t in range(length):
            if not mask[b, t] or turn[b, t] < 0:
                assert got[b, t] == 0
                continue
            same = mask[b] & (turn[b] == turn[b, t])
            assert got[b, t].item() == pytest.approx((logp - old)[b][same].mean().item(), abs=1e-12)


def test_one_number_per_sequence_is_the_sequence_level():
    logp, old, mask, _ = example()
    mask[1] = False
    got = sequence_log_ratio(torch.where(mask, logp, math.nan), old, mask, mask.sum(-1, keepdim=True).clamp(min=1))
    assert got.tolist() == [[2.0], [0.0]]
    assert torch.equal(torch.where(mask, got, 0.0), log_ratio(logp, old, mask, "sequence"))


def test_the_gradient_passes_at_the_clamp_and_stops_beyond():
    edge = torch.tensor([-LOG_RATIO_CLAMP, LOG_RATIO_CLAMP], dtype=F64)
    beyond = torch.nextafter(edge, 2 * edge)
    for f in (ratio, ratio_minus_one):
        x = torch.cat([edge, beyond]).requires_grad_()
        kept = x.detach().clone()
        f(x).sum().backward()
        assert x.grad is not None and (x.grad[:2] != 0).all() and (x.grad[2:] == 0).all()
        assert torch.equal(x.detach(), kept)
