import math

import pytest
import torch
from torch.distributions import Categorical, Independent, Normal, kl_divergence

from ctrlrl.core import penalty

F64 = torch.float64


def rand(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def test_estimators_by_hand():
    x = torch.tensor([-1.0, 0.0, 2.0], dtype=F64)
    assert penalty.kl_k1(x).tolist() == [1, 0, -2]
    assert penalty.kl_k2(x).tolist() == [0.5, 0, 2]
    assert penalty.kl_k3(x).tolist() == pytest.approx([math.exp(-1), 0, math.exp(2) - 3])


def test_estimators_average_to_the_divergence_of_old_from_new():
    """Exact expectations over a finite action set."""
    old, new = rand(6, seed=1), rand(6, seed=2)
    log_old, log_new = old.log_softmax(-1), new.log_softmax(-1)
    log_ratio = log_new - log_old
    forward = kl_divergence(Categorical(logits=old), Categorical(logits=new))
    backward = kl_divergence(Categorical(logits=new), Categorical(logits=old))
    assert abs(forward - backward) > 0.05
    for estimator in (penalty.kl_k1, penalty.kl_k3):
        assert ((log_old.exp() * estimator(log_ratio)).sum() - forward).abs() < 1e-14
        assert ((log_new.exp() * estimator(-log_ratio)).sum() - backward).abs() < 1e-14
    near = 1e-3 * log_ratio
    assert ((log_old.exp() * (penalty.kl_k2(near) - penalty.kl_k3(near))).sum()).abs() < 1e-8


def test_k3_is_precise_in_float32_and_finite_when_far():
    assert penalty.kl_k3(torch.tensor([1e-3])).item() == pytest.approx(5.00167e-7, rel=1e-3)
    far = torch.tensor([200.0, -200.0], requires_grad=True)
    value = penalty.kl_k3(far)
    assert value.isfinite().all() and (value > 0).all()
    value.sum().backward()
    assert far.grad is not None and far.grad.tolist() == [-1, -1]


def test_gaussian_kl_against_torch_and_its_direction():
    m, s, m2, s2 = rand(7, 3), 0.5 * rand(7, 3, seed=1), rand(7, 3, seed=2), 0.5 * rand(7, 3, seed=3)
    p, q = Independent(Normal(m, s.exp()), 1), Independent(Normal(m2, s2.exp()), 1)
    got = penalty.gaussian_kl(m, s, m2, s2)
    assert (got - kl_divergence(p, q)).abs().max() < 1e-12
    assert (got - penalty.gaussian_kl(m2, s2, m, s)).abs().max() > 0.1
    assert penalty.gaussian_kl(m, s, m, s).abs().max() == 0
    assert (penalty.gaussian_entropy(s) - p.entropy()).abs().max() < 1e-12
    shared = penalty.gaussian_kl(m, s[0], m2, s2[0])
    assert shared.shape == (7,)


def test_categorical_kl_and_entropy_against_torch():
    a, b = rand(4, 5), rand(4, 5, seed=1)
    p, q = Categorical(logits=a), Categorical(logits=b)
    assert (penalty.categorical_kl(a, b) - kl_divergence(p, q)).abs().max() < 1e-14
    assert (penalty.categorical_kl(a, b) - penalty.categorical_kl(b, a)).abs().max() > 0.1
    assert (penalty.categorical_entropy(a) - p.entropy()).abs().max() < 1e-14


def test_impossible_actions():
    a = torch.tensor([0.0, 0.0, -math.inf], dtype=F64, requires_grad=True)
    b = torch.tensor([0.0, math.log(3), -math.inf], dtype=F64)
    kl, entropy = penalty.categorical_kl(a, b), penalty.categorical_entropy(a)
    assert kl.item() == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(2 / 3))
    assert entropy.item() == pytest.approx(math.log(2))
    (grad,) = torch.autograd.grad(kl + entropy, a)
    assert grad.isfinite().all() and grad[2] == 0
    assert penalty.categorical_kl(torch.zeros(3, dtype=F64), b) == math.inf


def test_kl_between_parameters_in_both_directions():
    """The Distribution's own KL, but with the gradient on either side; several choices add up; masked is silent."""
    from ctrlrl.nets.heads import Categorical, DiagonalGaussian, MultiCategorical

    mask = torch.tensor([[True, True, False]])
    s = 0.3 * rand(1, 3, 2, seed=5)
    for make in (Categorical, lambda x: MultiCategorical(x, (3, 2)), lambda x: DiagonalGaussian(x[..., :2], s)):
        leaf = rand(1, 3, 5).requires_grad_()
        policy, other = make(leaf), make(rand(1, 3, 5, seed=1))
        for self_, to in ((policy, other), (other, policy)):
            got = penalty.kl_between(self_.params(), to.params(), mask)
            assert torch.allclose(got[0, :2], self_.kl(to.params())[0, :2], atol=1e-14) and got[0, 2] == 0
            (gradient,) = torch.autograd.grad(got.sum(), leaf, retain_graph=True)
            (expected,) = torch.autograd.grad(self_.kl(to.params())[0, :2].sum(), leaf, retain_graph=True)
            assert torch.allclose(gradient, expected, atol=1e-14) and (gradient[0, 2] == 0).all()
        poisoned = {k: torch.where(mask.unsqueeze(-1), v, torch.nan) for k, v in other.params().items()}
        assert penalty.kl_between(poisoned, policy.params(), mask).isfinite().all()


def test_kl_between_ignores_actions_that_neither_has():
    a = torch.tensor([[[0.5, 0.5, 0.0]]], dtype=F64).log()
    b = torch.tensor([[[0.25, 0.75, 0.0]]], dtype=F64).log().requires_grad_()
    got = penalty.kl_between({"logits": a}, {"logits": b}, torch.ones(1, 1, dtype=torch.bool))
    assert got.item() == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(2 / 3))
    (grad,) = torch.autograd.grad(got.sum(), b)
    assert grad.isfinite().all()
