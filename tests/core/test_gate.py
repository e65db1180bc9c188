import torch

from ctrlrl.core import gate, head

F64 = torch.float64


def test_clip_gate_truth_table():
    r = torch.tensor([1.25, 1.25, 0.75, 0.75, 1.0, 1.0, 9.0, 1.2, 0.8], dtype=F64)
    a = torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0, -1.0, 0.0, 1.0, -1.0], dtype=F64)
    assert gate.clip_gate(r, a, 0.2, 0.2).tolist() == [0, 1, 1, 0, 1, 1, 1, 1, 1]
    assert gate.clip_gate(r, a, 0.3, 0.2).tolist() == [0, 1, 1, 1, 1, 1, 1, 1, 1]
    assert gate.clip_gate(r, a, 0.2, 0.3).tolist() == [1, 1, 1, 0, 1, 1, 1, 1, 1]
    assert gate.clipped(r, 0.2, 0.2).tolist() == [True] * 4 + [False, False, True, False, False]


def test_gates_carry_no_gradient_and_keep_the_dtype():
    r = torch.ones(3, dtype=F64, requires_grad=True)
    a = torch.ones(3, dtype=F64, requires_grad=True)
    for g in (gate.clip_gate(r, a, 0.2, 0.2), gate.target_gate(r, r + 1, a), gate.clipped(r, 0.1, 0.1)):
        assert not g.requires_grad
    assert gate.clip_gate(r, a, 0.2, 0.2).dtype == F64


def test_clip_gate_is_where_the_clipped_surrogate_has_gradient():
    r = torch.rand(4000, generator=torch.Generator().manual_seed(0), dtype=F64) * 2
    a = torch.randn(4000, generator=torch.Generator().manual_seed(1), dtype=F64)
    r.requires_grad_()
    (grad,) = torch.autograd.grad(head.clipped_surrogate(r, a, 0.1, 0.3).sum(), r)
    assert (grad - gate.clip_gate(r, a, 0.1, 0.3) * a).abs().max() < 1e-12


def test_target_gate_at_the_edge_of_the_band_is_clip_gate():
    r = torch.linspace(0, 2, 401, dtype=F64).repeat(2)
    a = torch.cat([torch.ones(401, dtype=F64), -torch.ones(401, dtype=F64)])
    eps = 0.2003  # no grid point on an edge
    assert torch.equal(gate.target_gate(r, 1 + eps * a.sign(), a), gate.clip_gate(r, a, eps, eps))
