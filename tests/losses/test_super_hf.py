"""SuperHF's golden table: the best of each group, and a forward KL from the reference."""

import pytest
import torch
from losses.golden import batch_of, begun, categorical_output, objective, weights

from ctrlrl.losses.super_hf import SuperHF

F64 = torch.float64


def bandit(arms, group, score, prior):
    """Rows that chose ``arms`` in one state; the prior [K]."""
    arms = torch.tensor(arms).unsqueeze(-1)
    ones = torch.ones(arms.shape, dtype=F64)
    batch, _ = batch_of(ones, ones)
    prior = torch.as_tensor(prior, dtype=F64).log()
    return batch._replace(
        action=arms,
        group=torch.tensor(group),
        score=torch.tensor(score, dtype=F64),
        dist_ref={"logits": prior.expand(*arms.shape, -1)},
    )


def solve(loss, batch, start):
    batch = begun(loss, batch)
    logits = torch.as_tensor(start, dtype=F64).log().requires_grad_()
    solver = torch.optim.LBFGS([logits], max_iter=100, tolerance_grad=1e-12, tolerance_change=1e-16)

    def closure():
        solver.zero_grad()
        out = categorical_output(logits.expand(*batch.mask.shape, -1), batch.action)
        value = objective(loss, batch, out)
        value.backward()
        return value

    solver.step(closure)
    return logits.detach().softmax(0)


def test_golden_table():
    """Only the best is imitated; two arms, current (.5, .5), prior (.8, .2), so dKL/dlogit = pi - prior = (-.3, .3)."""
    batch = bandit([0, 1, 0, 1], [0, 0, 3, 3], [0.2, 0.9, 0.4, 0.1], [0.8, 0.2])
    loss = SuperHF(ref_kl_coef=0.5)
    leaf = torch.full((4, 1, 2), 0.5, dtype=F64).log().requires_grad_()
    objective(loss, begun(loss, batch), categorical_output(leaf, batch.action)).backward()
    # per kept row: pi - onehot + .5 (pi - prior), over two kept rows
    expected = torch.tensor([[0, 0], [0.35, -0.35], [-0.65, 0.65], [0, 0]], dtype=F64).unsqueeze(1) / 2
    torch.testing.assert_close(leaf.grad, expected)
    out = categorical_output(leaf.detach().requires_grad_(), batch.action)
    got = weights(SuperHF(ref_kl_coef=0.0), begun(loss, batch), out)
    assert got.flatten().tolist() == [0, 1, 1, 0]


def test_the_minimum_is_the_mixture_of_best_of_n_and_prior():
    """Three of four groups have the good arm as their best: p_n = 3/4, c = .35, prior .3."""
    batch = bandit([0, 1, 1, 0, 0, 0, 1, 1], [0, 0, 1, 1, 2, 2, 3, 3], [1, 0, 0, 1, 1, 1, 0, 0], [0.3, 0.7])
    p = solve(SuperHF(), batch, [0.3, 0.7])
    assert p[0].item() == pytest.approx((0.75 + 0.35 * 0.3) / 1.35, abs=1e-6)


def test_best_of_sixteen_once_and_to_its_fixed_point():
    """Expectations in place of samples: best-of-16 rows weighted by how often they win, solved again and again."""
    loss = SuperHF()

    def round_(p):
        best = 1 - (1 - p) ** 16
        rows = round(best * 1000)
        batch = bandit([0] * rows + [1] * (1000 - rows), list(range(1000)), [1.0] * 1000, [0.3, 0.7])
        return solve(loss, batch, [0.5, 0.5])[0].item()

    p = round_(0.3)
    assert p == pytest.approx(0.816057, abs=5e-4)
    assert round_(p) == pytest.approx(0.818519, abs=5e-4)


def test_ties_keep_the_first_and_more_can_be_kept():
    batch = bandit([0, 1, 0], [0, 0, 0], [0.5, 0.5, 0.1], [0.5, 0.5])
    for keep, expected in ((1, [True, False, False]), (2, [True, True, False])):
        assert begun(SuperHF(keep_best=keep), batch).coef["kept"].flatten().tolist() == expected
    with pytest.raises(ValueError, match="keep_best=0"):
        SuperHF(keep_best=0)


def test_masked_positions_of_either_policy_may_hold_anything():
    batch = bandit([0, 1], [0, 1], [1.0, 1.0], [0.3, 0.7])
    mask = torch.tensor([[True], [False]])
    wild = torch.where(mask.unsqueeze(-1), batch.dist_ref["logits"], torch.nan)
    batch = begun(SuperHF(), batch._replace(mask=mask, dist_ref={"logits": wild}))
    leaf = torch.zeros(2, 1, 2, dtype=F64, requires_grad=True)
    objective(SuperHF(), batch, categorical_output(leaf, batch.action)).backward()
    assert leaf.grad.isfinite().all() and (leaf.grad[1] == 0).all() and (leaf.grad[0] != 0).all()
