import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ctrlrl.core import reduce

F64 = torch.float64
MASK = torch.tensor([[1, 1, 1, 1], [1, 0, 0, 0], [0, 0, 0, 0]], dtype=torch.bool)
X = torch.tensor([[1.0, 2.0, 3.0, 4.0], [10.0, math.nan, math.inf, -math.inf], [math.nan] * 4], dtype=F64)
NORMALISERS = {
    "token_mean": reduce.token_mean,
    "sequence_mean_token_mean": reduce.sequence_mean_token_mean,
    "sequence_mean_token_sum": reduce.sequence_mean_token_sum,
    "constant": lambda mask, dtype=None: reduce.constant(mask, 4, dtype),
}


def test_sums_by_hand():
    assert reduce.masked_sum(X, MASK) == 20
    assert reduce.masked_mean(X, MASK) == 4
    weight = torch.tensor([[0.5, 0, 0, 2], [1, 0, 0, 0], [0, 0, 0, 0]], dtype=F64)
    assert reduce.weighted_sum(X, weight) == 18.5


@pytest.mark.parametrize(
    ("name", "want"),
    # sums: 10 over 4 positions, 10 over 1, nothing
    [
        ("token_mean", 20 / 5),
        ("sequence_mean_token_mean", (2.5 + 10) / 2),
        ("sequence_mean_token_sum", 20 / 2),
        ("constant", 20 / 12),
    ],
)
def test_normalisers_by_hand(name, want):
    weight, denominator = NORMALISERS[name](MASK, dtype=F64)
    assert weight.shape == MASK.shape and denominator.shape == () and denominator.dtype == F64
    assert (weight[~MASK] == 0).all() and (weight[MASK] > 0).all()
    assert (reduce.weighted_sum(X, weight) / denominator).item() == pytest.approx(want, abs=1e-14)


@pytest.mark.parametrize("name", NORMALISERS)
def test_nothing_valid_gives_zero(name):
    mask = torch.zeros(2, 3, dtype=torch.bool)
    x = torch.full((2, 3), math.nan, requires_grad=True)
    weight, denominator = NORMALISERS[name](mask)
    assert denominator >= 1
    total = reduce.weighted_sum(x, weight) / denominator
    total.backward()
    assert total == 0 and reduce.masked_mean(x.detach(), mask) == 0
    assert x.grad is not None and (x.grad == 0).all()


@pytest.mark.parametrize("name", NORMALISERS)
def test_rows_split_over_micro_batches_add_up(name):
    g = torch.Generator().manual_seed(1)
    mask, x = torch.rand(8, 5, generator=g) < 0.6, torch.randn(8, 5, generator=g, dtype=F64)
    weight, _ = NORMALISERS[name](mask, dtype=F64)
    parts = torch.stack([reduce.weighted_sum(x[i : i + 3], weight[i : i + 3]) for i in (0, 3, 6)])
    assert torch.allclose(parts.sum(), reduce.weighted_sum(x, weight), atol=1e-13)


def test_gradient_of_masked_sums():
    x = X.clone().requires_grad_()
    torch.add(reduce.masked_sum(x, MASK), reduce.weighted_sum(x, MASK.to(F64) * 3)).backward()
    assert x.grad is not None and torch.equal(x.grad, MASK.to(F64) * 4)


def test_dtype_follows_torch_unless_given():
    assert reduce.token_mean(MASK)[0].dtype == torch.get_default_dtype()
    assert reduce.constant(MASK, 3, F64)[1].dtype == F64


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(-5, 5), min_size=1, max_size=12))
def test_segments_equal_a_loop(ids):
    group = torch.tensor(ids) * 10**12
    order = sorted(set(ids))
    assert reduce.dense_ids(group).tolist() == [order.index(i) for i in ids]
    x = torch.arange(len(ids), dtype=F64)
    assert reduce.segment_sum(x, group).tolist() == [sum(k for k, j in enumerate(ids) if j == i) for i in ids]


def test_one_value_per_row_counts_at_every_position():
    x = torch.tensor([[2.0], [math.nan], [-1.0]], requires_grad=True)
    weight = torch.tensor([[0.5, 0.25, 0.0], [0.0, 0.0, 0.0], [1.0, 1.0, 1.0]])
    kept = weight.clone()
    total = reduce.weighted_sum(x, weight)
    total.backward()
    assert total.item() == 2.0 * 0.75 - 3.0 and torch.equal(weight, kept)
    assert x.grad is not None and x.grad.tolist() == [[0.75], [0.0], [3.0]]
