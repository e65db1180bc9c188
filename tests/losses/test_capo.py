"""CAPO: the quadratic model against its hand-worked case and true changes, the gate, its limits."""

import math

import pytest
import torch
from losses.golden import begun, case_of, categorical_output, objective, weights

from ctrlrl.core.penalty import categorical_kl, gaussian_kl
from ctrlrl.data.rows import rows
from ctrlrl.losses.capo import CAPO, geometry
from ctrlrl.losses.group import GroupLoss
from ctrlrl.nets.heads import DiagonalGaussian

OPEN = {"fisher_max": math.inf, "objective_min": -math.inf, "objective_max": math.inf}


def coin(**settings):
    """Ascent weight of one position: p = (.5, .5), A = 1, modelled with a step of .1."""
    out = categorical_output(torch.zeros(1, 1, 2, dtype=torch.float64, requires_grad=True), torch.tensor([[0]]))
    batch = rows(case_of(CAPO, rows=2, length=1).batch, torch.tensor([0]))._replace(
        action=torch.tensor([[0]]),
        mask=torch.ones(1, 1, dtype=torch.bool),
        logp_old=out.logp.detach(),
        advantage=torch.ones(1, 1, dtype=torch.float64),
    )
    return weights(CAPO(model_step=0.1, **OPEN | settings), batch, out).item()


@pytest.mark.parametrize("fisher", ["empirical", "full"])
def test_the_coin(fisher):
    """v.v = 1/2, v.F v = 1/4: curvature 0, m_H = .05, m_F = .00125 either way; the true KL is .00124948."""
    assert coin(fisher=fisher, fisher_max=0.0012501) == coin(fisher=fisher, objective_max=0.050001) == 1.0
    assert coin(fisher=fisher, objective_min=0.049999) == 1.0
    assert coin(fisher=fisher, fisher_max=0.0012499) == coin(fisher=fisher, objective_max=0.049999) == 0.0
    assert coin(fisher=fisher, objective_min=0.050001) == 0.0
    step = torch.tensor([0.05, -0.05], dtype=torch.float64)
    kl = categorical_kl(torch.zeros(2, dtype=torch.float64), step).item()
    assert kl == pytest.approx(0.00124948, abs=1e-8)


def test_the_two_measures_differ_off_the_coin():
    """p = (.9, .1), the unlikely action: (v.v)^2 = 1.62^2 = 2.6244, v.F v = .81 - .72^2 = .2916."""
    out = categorical_output(torch.tensor([[[0.9, 0.1]]]).double().log().requires_grad_(), torch.tensor([[1]]))
    batch = rows(case_of(CAPO, rows=2, length=1).batch, torch.tensor([0]))._replace(
        action=torch.tensor([[1]]),
        mask=torch.ones(1, 1, dtype=torch.bool),
        logp_old=out.logp.detach(),
        advantage=torch.ones(1, 1, dtype=torch.float64),
    )
    for fisher, change in (("empirical", 0.013122), ("full", 0.001458)):
        for bound, expected in ((change * 1.001, 1.0), (change * 0.999, 0.0)):
            loss = CAPO(model_step=0.1, **OPEN | {"fisher_max": bound, "fisher": fisher})
            assert weights(loss, batch, out).item() == expected


def changes(params, action, advantage, step):
    """The model's m_H and m_F, empirical and full."""
    length, own = geometry(params, action)
    u = step * advantage
    empirical, full = (u * length) ** 2, u**2 * own
    return advantage * u * length + 0.5 * advantage * (empirical - full), 0.5 * empirical, 0.5 * full


def test_the_model_of_a_choice_is_second_order():
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(5, 4, generator=g, dtype=torch.float64)
    action = torch.randint(4, (5,), generator=g)
    advantage = torch.randn(5, generator=g, dtype=torch.float64)
    v = torch.nn.functional.one_hot(action, 4) - logits.softmax(-1)
    moved = logits + 1e-3 * advantage.unsqueeze(1) * v
    ratio = (moved.log_softmax(-1) - logits.log_softmax(-1)).gather(1, action.unsqueeze(1)).squeeze(1).exp()
    objective_change, _, full = changes({"logits": logits}, action, advantage, 1e-3)
    torch.testing.assert_close(objective_change, advantage * (ratio - 1), atol=1e-8, rtol=0)
    torch.testing.assert_close(full, categorical_kl(logits, moved), atol=1e-9, rtol=1e-2)


def test_the_single_action_measure_is_the_full_one_on_average():
    """For a fixed step u: sum_a p_a (v_a . u)^2 = u.F u. With u along v_b it is checked through |v|^2 and v.F v."""
    p = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    v = torch.eye(3, dtype=torch.float64) - p
    for b in range(3):
        _, own = geometry({"logits": p.log()}, torch.tensor(b))
        torch.testing.assert_close((p * (v @ v[b]).square()).sum(), own)


def test_the_model_of_a_gaussian():
    g = torch.Generator().manual_seed(1)
    mean, log_std = torch.randn(6, 2, generator=g).double(), 0.3 * torch.randn(6, 2, generator=g).double()
    action = mean + log_std.exp() * torch.randn(6, 2, generator=g).double()
    leaves = [x.clone().requires_grad_() for x in (mean, log_std)]
    score = torch.autograd.grad(DiagonalGaussian(*leaves).log_prob(action).sum(), leaves)
    length, own = geometry({"mean": mean, "log_std": log_std}, action)
    torch.testing.assert_close(length, sum(s.square().sum(-1) for s in score))
    c = 1e-4
    moved = [x + c * s for x, s in zip((mean, log_std), score, strict=True)]
    torch.testing.assert_close(0.5 * c**2 * own, gaussian_kl(mean, log_std, *moved), rtol=2e-2, atol=0)


def test_without_bounds_it_is_the_base_method():
    """Importance-weighted advantages, no clip."""
    case = case_of(CAPO)
    leaf = case.leaf.clone().requires_grad_()
    out, loss = case.output(leaf), CAPO(**OPEN)
    batch = begun(loss, case.batch)
    plain = GroupLoss.begin(loss, case.batch, {}, {}).batch.advantage
    expected = torch.where(batch.mask, (out.logp - batch.logp_old).exp() * plain, 0.0).detach()
    torch.testing.assert_close(weights(loss, batch, out), expected)


def test_rejected_positions_are_silent_and_counted():
    case = case_of(CAPO)
    loss = CAPO(model_step=0.02)
    batch, out = begun(loss, case.batch), case.output(case.leaf.clone().requires_grad_())
    prepared = loss.prepare(batch, {})
    batch = batch._replace(coef=prepared.coef, weight=prepared.weight)
    trusted = loss.trusted(batch, out)
    valid = batch.mask & (batch.advantage != 0)
    assert 0 < (trusted & valid).sum() < valid.sum()
    got = weights(loss, batch, out)
    assert (got[~trusted] == 0).all() and (got[trusted & valid] != 0).all()
    sums = loss.loss(batch, case.output(case.leaf), {})
    assert sums.metrics["rejected"].item() == (~trusted & batch.mask).sum().item()
    assert objective(loss, batch, case.output(case.leaf)).isfinite()
