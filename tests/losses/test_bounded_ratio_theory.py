"""Known answers of bounded-ratio policy improvement, on finite state and action sets.

Every check compares ``ctrlrl.core.weight`` or ``ctrlrl.core.head`` with something that does not use it: a convex
program, exact policy evaluation, a closed form. Where a well-known slip exists, it is shown to fail.
"""

import math
from itertools import pairwise, product

import pytest
import torch
from losses.tabular import F64, garnet, iterate, rate, smallest_rise
from torch import Tensor

from ctrlrl.core import gate, head, weight


def random_problem(seed: int, actions: int = 6) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    q = torch.randn(1, actions, generator=g, dtype=F64)
    return q, torch.softmax(torch.randn(1, actions, generator=g, dtype=F64), -1)


def optimum(q: Tensor, p: Tensor, eps: float, lam: float) -> Tensor:
    return weight.tanh_target(q - weight.solve_threshold(q, p, lam)[:, None], eps, lam)


def fermi_dirac(r: Tensor, eps: float) -> Tensor:
    """H(r) = (r - 1 + eps) log(r - 1 + eps) + (1 + eps - r) log(1 + eps - r)."""
    up, down = (r - 1 + eps).clamp(min=0), (1 + eps - r).clamp(min=0)  # at an edge rounding may leave the band
    return torch.special.xlogy(up, up) + torch.special.xlogy(down, down)


# -- the optimum in one state ---------------------------------------------------------------------


def convex_program(q: Tensor, p: Tensor, low: float, high: float, lam: float) -> tuple[Tensor, float]:
    """max E_p[r q] - lam E_p[H(r)], low <= r <= high, E_p[r] = 1."""
    cp = pytest.importorskip("cvxpy")
    np_q, np_p = q[0].numpy(), p[0].numpy()
    r = cp.Variable(len(np_q))
    objective = (np_p * np_q) @ r
    if lam:
        objective = objective + lam * (np_p @ (cp.entr(r - low) + cp.entr(high - r)))
    program = cp.Problem(cp.Maximize(objective), [r >= low, r <= high, np_p @ r == 1])
    program.solve(solver=cp.CLARABEL)
    assert program.status == "optimal"
    return torch.as_tensor(r.value, dtype=F64)[None], float(program.value)


SETTINGS = [(seed, eps, lam) for seed, (eps, lam) in enumerate(product([0.1, 0.3, 0.6], [0.05, 0.2, 0.5, 1.0, 3.0]))]


def test_closed_form_is_the_convex_optimum():
    worst, without_two, within = 0.0, [], 0.0
    for seed, eps, lam in SETTINGS:
        q, p = random_problem(seed)
        want, _ = convex_program(q, p, 1 - eps, 1 + eps, lam)
        worst = max(worst, (optimum(q, p, eps, lam) - want).abs().max().item())
        # the slip: tanh(x / lam), with the threshold that normalises it
        slip = weight.tanh_target(q - weight.solve_threshold(q, p, lam / 2)[:, None], eps, lam / 2)
        without_two.append((slip - want).abs().max().item())
        if lam >= 0.5:  # below, tanh rounds to one
            within = max(within, ((optimum(q, p, eps, lam) - 1).abs() / eps).max().item())
    assert worst < 1e-3
    assert 0.5 < within < 1
    assert sum(gap > 1e-2 for gap in without_two) >= 12


def test_asymmetric_closed_form_is_the_convex_optimum():
    for seed, (low, high) in enumerate([(0.8, 1.3), (0.5, 1.2), (0.0, 3.0)]):
        q, p = random_problem(100 + seed)
        want, _ = convex_program(q, p, low, high, 0.3)
        mu = weight.solve_threshold(q, p, 0.3, low, high)[:, None]
        assert (weight.sigmoid_target(q - mu, low, high, 0.3) - want).abs().max() < 1e-3


def test_optimum_beats_feasible_neighbours():
    """The same without a solver: H by its formula, random feasible directions."""
    g = torch.Generator().manual_seed(0)
    for seed, eps, lam in [s for s in SETTINGS if s[2] >= 0.5]:
        q, p = random_problem(seed)
        r = optimum(q, p, eps, lam)

        def value(x, q=q, p=p, eps=eps, lam=lam):
            return (p * (x * q - lam * fermi_dirac(x, eps))).sum(-1)

        d = torch.randn(200, q.shape[1], generator=g, dtype=F64)
        d = d - (p * d).sum(-1, keepdim=True)
        room = eps - (r - 1).abs().max()
        assert room > 1e-3 * eps
        moved = r + 0.9 * room * d / d.abs().amax(-1, keepdim=True)
        assert (value(moved) <= value(r) + 1e-12).all()


def test_dual_minimiser_is_the_normalising_threshold():
    q, p = random_problem(3, actions=9)
    for lam in (0.05, 0.3, 2.0):
        mu = weight.solve_threshold(q, p, lam)[0]
        m = mu.clone().requires_grad_()
        (slope,) = torch.autograd.grad((p * weight.median_dual((q - m) / lam)).sum(), m)
        assert slope.abs() < 1e-12 / lam
        grid = mu + torch.linspace(-1, 1, 20001, dtype=F64)[:, None]
        best = grid[(p * weight.median_dual((q - grid) / lam)).sum(-1).argmin(), 0]
        assert (best - mu).abs() <= 1e-4


def test_range_of_the_entropy():
    for eps in (0.05, 0.2, 0.7):
        h = fermi_dirac(torch.linspace(1 - eps, 1 + eps, 2001, dtype=F64), eps)
        assert h.min().item() == pytest.approx(2 * eps * math.log(eps), abs=1e-12) and h.argmin() == 1000
        for end in (h[0], h[-1]):
            assert end.item() == pytest.approx(2 * eps * math.log(2 * eps), abs=1e-12)


def test_three_level_rule_solves_the_linear_program():
    for seed in range(10):
        q, p = random_problem(seed, actions=5)
        q = q.round(decimals=0) if seed % 2 else q
        eps = 0.1 + 0.05 * seed
        _, value = convex_program(q, p, 1 - eps, 1 + eps, 0.0)
        r = weight.lp_ratio(q, p, eps)
        assert abs((p * r * q).sum().item() - value) < 1e-6
        assert abs((p * r).sum().item() - 1) < 1e-12
        assert (r - 1).abs().max() <= eps + 1e-15


def test_sign_rules_do_not_normalise():
    """Neither the mean nor the median makes 1 + eps sign(.) a policy; the mean's error tends to eps."""
    q, p = random_problem(2)
    mean = weight.sign_target(q - (p * q).sum(), 0.3)
    order = q[0].argsort()
    median = q[0, order[int((p[0, order].cumsum(-1) < 0.5).sum())]]
    for rule in (mean, weight.sign_target(q - median, 0.3)):
        assert ((p * rule).sum() - 1).abs() > 1e-3
    sure = torch.tensor([[0.98, 0.01, 0.01]], dtype=F64)
    q = torch.tensor([[1.0, 0.0, -1.0]], dtype=F64)
    rule = weight.sign_target(q - (sure * q).sum(), 0.3)
    assert (sure * rule).sum().item() == pytest.approx(1 + 0.3 * 0.96)
    soft = weight.tanh_target(q - (sure * q).sum(), 0.3, 1e-3)
    assert ((sure * soft).sum() - 1).abs() > 0.25
    assert ((sure * optimum(q, sure, 0.3, 1e-3)).sum() - 1).abs() < 1e-12


def test_surrogate_identity():
    """E_p[r* (Q - V)] = eps E_p[tanh(A~ / 2 lam) A~] >= 0 with A~ = Q - mu."""
    for seed, eps, lam in SETTINGS:
        q, p = random_problem(seed)
        gap = q - weight.solve_threshold(q, p, lam)[:, None]
        left = (p * optimum(q, p, eps, lam) * (q - (p * q).sum())).sum()
        right = eps * (p * torch.tanh(gap / (2 * lam)) * gap).sum()
        assert (left - right).abs() < 1e-12 and right >= 0


def test_large_temperature_is_a_mirror_descent_step():
    q, p = random_problem(4)
    eps, lam = 0.2, 1e4
    a = q - (p * q).sum()
    assert (optimum(q, p, eps, lam) - (1 + eps * a / (2 * lam))).abs().max() < 1e-12


# -- one family of losses -------------------------------------------------------------------------


def ratio_grid() -> tuple[Tensor, Tensor]:
    r = torch.linspace(0.0, 2.0, 4001, dtype=F64) + 1.7e-5  # off the kinks
    return r.repeat(2).requires_grad_(), torch.cat([torch.full_like(r, 1.3), torch.full_like(r, -0.7)])


@pytest.mark.parametrize("eps", [0.1, 0.2, 0.3])
def test_clipped_surrogate_is_a_gated_pull_to_the_edge(eps):
    r, a = ratio_grid()
    target = weight.sign_target(a, eps)
    (ppo,) = torch.autograd.grad(-head.clipped_surrogate(r, a, eps, eps).sum(), r)

    def pull(keep: Tensor | None) -> Tensor:
        return torch.autograd.grad(head.ratio_target(r, target, a.abs(), gate=keep).sum(), r)[0]

    assert (pull(gate.target_gate(r, target, a)) - ppo).abs().max() < 1e-12
    band = (~gate.clipped(r, eps, eps)).to(F64)
    assert ((pull(band) - ppo).abs() > 1e-9).double().mean() > 0.3  # a dead zone |r - 1| > eps is another method
    assert ((pull(None) - ppo).abs() > 1e-9).double().mean() > 0.3  # and so is none


@pytest.mark.parametrize("eps", [0.1, 0.2, 0.3])
def test_quadratic_pull_is_the_quadratic_penalty(eps):
    r, a = ratio_grid()
    pull = head.ratio_target(r, weight.sign_target(a, eps), a.abs() / (2 * eps), "l2")
    penalised = -(a * r - a.abs() * (r - 1) ** 2 / (2 * eps))
    constant = pull - penalised
    assert (constant - (a + a.abs() * eps / 2)).abs().max() < 1e-12


# -- exact policy iteration -----------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("eps", [0.1, 0.2])
def test_exact_iteration_improves_everywhere_and_contracts_at_one_minus_eps(seed, eps):
    mdp, policies = garnet(seed), []
    _, trail = iterate(mdp, lambda q, pi, k: pi * weight.lp_ratio(q, pi, eps), 151, policies)
    assert smallest_rise(trail) >= -1e-10
    assert rate(mdp, policies, 100, 150) == pytest.approx(1 - eps, abs=1e-4)
    best, _, _ = mdp.optimal()
    error = [(best - trail[k]).max().item() for k in (0, 10, 20, 50, 100)]
    assert error[0] > 1 and all(b < a for a, b in pairwise(error))
    assert error[-1] < (1e-2 if eps == 0.1 else 1e-6)


@pytest.mark.parametrize("seed", [0, 1])
def test_mean_baseline_contracts_at_another_rate(seed):
    eps, mdp, policies = 0.1, garnet(seed), []
    iterate(mdp, lambda q, pi, k: pi * weight.mean_ratio(q, pi, eps), 151, policies)
    got = rate(mdp, policies, 90, 130)
    assert got == pytest.approx((1 - eps) / (1 + eps), abs=1e-4)
    assert abs(got - (1 - eps)) > 0.05  # not the rate of the exact rule


def test_sign_flip_makes_it_worse():
    mdp = garnet(0)
    _, trail = iterate(mdp, lambda q, pi, k: pi * weight.lp_ratio(-q, pi, 0.1), 20)
    assert smallest_rise(trail) < -1e-2 and (trail[-1] < trail[0]).all()


def test_unnormalised_sign_rule_is_no_policy():
    """The mean in the median's place: after 30 iterations the ratios sum far from one."""
    mdp = garnet(0)
    pi, _ = iterate(mdp, lambda q, pi, k: pi * weight.mean_ratio(q, pi, 0.1), 30)
    v, q = mdp.values(pi)
    drift = ((pi * weight.sign_target(q - v[:, None], 0.1)).sum(-1) - 1).abs()
    assert drift.max() > 0.09
    assert ((pi * weight.lp_ratio(q, pi, 0.1)).sum(-1) - 1).abs().max() < 1e-12


@pytest.mark.parametrize("lam", [1e-3, 0.1, 1.0])
def test_finite_temperature_improves_everywhere(lam):
    mdp = garnet(2)
    _, trail = iterate(mdp, lambda q, pi, k: pi * optimum(q, pi, 0.2, lam), 60)
    assert smallest_rise(trail) >= -1e-10
    if lam == 1e-3:
        _, exact = iterate(mdp, lambda q, pi, k: pi * weight.lp_ratio(q, pi, 0.2), 60)
        assert max((a - b).abs().max().item() for a, b in zip(trail, exact, strict=True)) < 0.05


def test_small_temperature_slows_down_only_where_gaps_are_as_small():
    """Two actions with a known gap: rate 1 - eps while gap >> lam, slower when gap ~ lam."""
    eps, lam, rates = 0.1, 1e-3, []
    for gap in (1.0, 1e-3):
        q, p = torch.tensor([[gap, 0.0]], dtype=F64), torch.full((1, 2), 0.5, dtype=F64)
        for k in range(150):
            new = p * optimum(q, p, eps, lam)
            if k == 149:
                rates.append((new[0, 1] / p[0, 1]).item())
            p = new / new.sum()
    assert rates[0] == pytest.approx(1 - eps, abs=1e-6)
    # mu sits at the dominant value, so the other's ratio is 1 - eps tanh(gap / 2 lam)
    assert rates[1] == pytest.approx(1 - eps * math.tanh(0.5), abs=1e-4)


def test_improvement_is_the_expected_surrogate_under_the_new_policy():
    """eta(pi*) - eta(pi) = 1/(1-gamma) E_{s ~ d_pi*}[ eps E_pi[ tanh(A~ / 2 lam) A~ ] ]."""
    mdp, eps, lam = garnet(3), 0.3, 0.2
    pi = torch.softmax(torch.randn(20, 5, generator=torch.Generator().manual_seed(9), dtype=F64), -1)
    start = torch.full((20,), 1 / 20, dtype=F64)
    v, q = mdp.values(pi)
    new = pi * optimum(q, pi, eps, lam)
    gap = q - weight.solve_threshold(q, pi, lam)[:, None]
    gain = eps * (pi * torch.tanh(gap / (2 * lam)) * gap).sum(-1)
    assert (gain >= 0).all()
    want = (mdp.occupancy(new, start) * gain).sum() / (1 - mdp.gamma)
    assert ((mdp.values(new)[0] - v) @ start - want).abs() < 1e-11


def test_surrogate_of_any_policy_is_bounded_by_its_distance_to_the_target():
    """L(pi') >= L(pi*) - E_{d, pi}[ |A| |r - r*| ]."""
    mdp, eps, lam = garnet(4), 0.2, 0.05
    g = torch.Generator().manual_seed(0)
    start = torch.full((20,), 1 / 20, dtype=F64)
    for _ in range(50):
        pi, other = torch.softmax(torch.randn(2, 20, 5, generator=g, dtype=F64), -1)
        v, q = mdp.values(pi)
        d, a = mdp.occupancy(pi, start)[:, None] * pi, q - v[:, None]
        best, r = optimum(q, pi, eps, lam), other / pi
        loss = (d * head.ratio_target(r, best, a.abs())).sum()
        assert (d * best * a).sum() > 0
        assert (d * r * a).sum() >= (d * best * a).sum() - loss - 1e-12
