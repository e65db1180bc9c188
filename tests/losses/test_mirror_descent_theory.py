"""Known answers of mirror-descent policy improvement, on finite state and action sets."""

import math
from itertools import pairwise

import pytest
import torch
from losses.tabular import F64, garnet, iterate, smallest_rise
from torch import Tensor

from ctrlrl.core import head, penalty


def mdpo_objective(logits: Tensor, old: Tensor, a: Tensor, t: float) -> Tensor:
    r = (logits.log_softmax(-1) - old.log_softmax(-1)).exp()
    expected = (old.softmax(-1) * head.ratio_advantage(r, a)).sum(-1)
    return (expected - penalty.categorical_kl(logits, old) / t).sum()


def softmax_problem(seed: int = 0) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    old, q = torch.randn(2, 4, 5, generator=g, dtype=F64)
    return old, q - (old.softmax(-1) * q).sum(-1, keepdim=True)


@pytest.mark.parametrize("t", [0.1, 1.0, 10.0])
def test_first_gradient_is_the_policy_gradient(t):
    old, a = softmax_problem()
    logits = old.clone().requires_grad_()
    (got,) = torch.autograd.grad(mdpo_objective(logits, old, a, t), logits)
    want = old.softmax(-1) * a  # since E[a] = 0
    assert (got - want).abs().max() < 1e-12


@pytest.mark.parametrize("t", [0.3, 1.0])
def test_many_steps_reach_the_exponential_update(t):
    old, a = softmax_problem()
    want = (old + t * a).softmax(-1)
    for forward in (False, True):
        logits = old.clone().requires_grad_()
        search = torch.optim.LBFGS(
            [logits], max_iter=400, tolerance_grad=1e-13, tolerance_change=1e-18, line_search_fn="strong_wolfe"
        )

        def closure(logits=logits, forward=forward, search=search):
            search.zero_grad()
            gain = (logits.softmax(-1) * a).sum()
            other = gain - penalty.categorical_kl(old, logits).sum() / t
            loss = -(other if forward else mdpo_objective(logits, old, a, t))
            loss.backward()
            return loss

        search.step(closure)  # type: ignore[arg-type]
        miss = (logits.detach().softmax(-1) - want).abs().max()
        assert miss > 1e-3 if forward else miss < 1e-8  # the other direction of the divergence ends elsewhere


def test_distance_to_the_exponential_update_falls_with_the_number_of_steps():
    old, a = softmax_problem()
    goal = old + a
    logits, seen = old.clone().requires_grad_(), []
    for m in range(1, 201):
        (grad,) = torch.autograd.grad(mdpo_objective(logits, old, a, 1.0), logits)
        logits = (logits + 0.5 * grad).detach().requires_grad_()
        if m in (1, 5, 10, 50, 200):
            seen.append(penalty.categorical_kl(logits.detach(), goal).sum().item())
    assert all(b < a for a, b in pairwise(seen)) and seen[-1] < 1e-2 * seen[0]


def test_mirror_divergence_has_the_direction_new_to_old():
    from torch.distributions import Independent, Normal, kl_divergence

    g = torch.Generator().manual_seed(0)
    m, s, m2, s2 = torch.randn(4, 8, 3, generator=g, dtype=F64)
    new, old = Independent(Normal(m, s.exp()), 1), Independent(Normal(m2, s2.exp()), 1)
    got = penalty.gaussian_kl(m, s, m2, s2)
    assert ((got - kl_divergence(new, old)) / got).abs().max() < 1e-12
    assert ((got - kl_divergence(old, new)).abs() > 1e-2).all()


@pytest.mark.parametrize("seed", [0, 1])
def test_mirror_descent_improves_everywhere_within_its_bound(seed):
    mdp, t = garnet(seed), 1.0
    _, trail = iterate(mdp, lambda q, pi, k: torch.softmax(pi.log() + t * q, -1), 201)
    assert smallest_rise(trail) >= -1e-10
    best, _, _ = mdp.optimal()
    for k, v in enumerate(trail):
        bound = (math.log(5) / (t * (1 - mdp.gamma)) + 1 / (1 - mdp.gamma) ** 2) / (k + 1)
        assert (best - v).max() < bound
    assert (best - trail[200]).max() < 0.1 * (best - trail[10]).max()
    _, wrong = iterate(mdp, lambda q, pi, k: torch.softmax(pi.log() - t * q, -1), 5)
    assert smallest_rise(wrong) < -1e-2


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_huge_steps_are_policy_iteration(seed):
    mdp = garnet(seed)
    _, _, passed = mdp.optimal()
    policies: list[Tensor] = []

    def step(q: Tensor, pi: Tensor, k: int) -> Tensor:
        # keep every action alive in logarithms: exp(1e6 gap) underflows, and log 0 would stay dead for ever
        return torch.softmax(pi.clamp(min=1e-300).log() + 1e6 * (q - q.amax(-1, keepdim=True)), -1)

    iterate(mdp, step, len(passed) + 1, policies)
    assert len(passed) >= 3
    for got, want in zip(policies, passed, strict=False):
        assert (got - want).abs().max() < 1e-12


@pytest.mark.parametrize("seed", [0, 1])
def test_geometric_steps_converge_linearly_or_faster(seed):
    mdp = garnet(seed)
    logits = torch.zeros_like(mdp.reward)
    best, _, _ = mdp.optimal()
    error = []
    for k in range(101):
        v, q = mdp.values(logits.softmax(-1))
        error.append((best - v).max().item())
        logits = logits + (1 / mdp.gamma) ** (k + 1) * (q - q.amax(-1, keepdim=True))
    assert error[50] <= 1e-4 and error[100] < 1e-12
    assert all(e <= error[0] * mdp.gamma**k + 1e-12 for k, e in enumerate(error))
