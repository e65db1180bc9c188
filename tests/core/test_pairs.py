import math

import pytest
import torch

from ctrlrl.core import pairs

F64 = torch.float64


def test_mean_over_others_by_hand():
    """Rows 0, 2, 3 are a group; row 1 is alone. The diagonal and the other groups do not count, NaN or not."""
    group = torch.tensor([7, -1, 7, 7])
    x = torch.arange(16, dtype=F64).reshape(4, 4)
    x[group.unsqueeze(-1) != group] = torch.nan
    x.fill_diagonal_(torch.nan)
    assert pairs.mean_over_others(x, group).tolist() == [2.5, 0.0, 9.5, 13.0]


def test_anchored_logsumexp_by_hand():
    x = torch.tensor([0.0, 5.0, math.log(2.0), 3.0], dtype=F64)
    member = torch.tensor([True, False, True, False])
    got = pairs.anchored_logsumexp(x, member, torch.tensor([1, 1, 1, 0]))
    torch.testing.assert_close(got, torch.tensor([math.log(4.0)] * 3 + [0.0], dtype=F64))


def test_anchored_logsumexp_against_torch_and_far_out():
    x = torch.randn(6, generator=torch.Generator().manual_seed(0), dtype=F64).requires_grad_()
    member = torch.tensor([True, True, False, True, True, False])
    group = torch.tensor([0, 1, 0, 0, 1, 1])
    got = pairs.anchored_logsumexp(x, member, group)
    zero = torch.zeros(1, dtype=F64)
    first, second = (torch.cat([zero, x[list(rows)]]).logsumexp(0) for rows in ((0, 3), (1, 4)))
    assert torch.allclose(got, torch.stack([first, second, first, first, second, second]), atol=1e-14)
    (gradient,) = torch.autograd.grad(got[0] + got[1], x)
    (expected,) = torch.autograd.grad(first + second, x)
    assert torch.allclose(gradient, expected, atol=1e-14)
    far = torch.tensor([400.0, -400.0, 1e30], requires_grad=True)
    value = pairs.anchored_logsumexp(far, torch.tensor([True, True, False]), torch.zeros(3, dtype=torch.long))
    value.sum().backward()
    assert value.tolist() == pytest.approx([400.0] * 3) and far.grad is not None and far.grad.tolist() == [3, 0, 0]


def test_rank_within_breaks_ties_by_place():
    x = torch.tensor([1.0, 3.0, 3.0, 0.0, 9.0])
    assert pairs.rank_within(x, torch.tensor([0, 0, 0, 0, 5])).tolist() == [2, 0, 1, 3, 0]
    assert pairs.rank_within(torch.zeros(3), torch.tensor([4, 4, 4])).tolist() == [0, 1, 2]


def test_compiles_without_a_graph_break():
    def everything(x, member, group):
        grid = x.unsqueeze(-1) - x
        return (
            pairs.mean_over_others(grid, group)
            + pairs.anchored_logsumexp(x, member, group)
            + pairs.rank_within(x, group)
        )

    args = (torch.randn(6), torch.arange(6) > 2, torch.arange(6) % 2)
    assert torch.allclose(torch.compile(everything, fullgraph=True, backend="eager")(*args), everything(*args))
