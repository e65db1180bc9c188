"""OBLR-PO: the baseline of least variance, and the gradient's share of signal."""

import pytest
import torch
from losses.golden import batch_of, begun, column, weights

from ctrlrl.losses.obl_rpo import OBLRPO


def bandit(p, draws, returns):
    """One group of draws from two arms with pi(0) = p."""
    rows = len(draws)
    batch, out = batch_of(torch.ones(rows, 1, dtype=torch.float64), torch.zeros(rows, 1))
    probabilities = torch.tensor([p, 1 - p], dtype=torch.float64)
    return batch._replace(
        action=torch.tensor(draws).unsqueeze(-1),
        dist_old={"logits": probabilities.log().expand(rows, 1, 2)},
        sequence_return=torch.tensor(returns, dtype=torch.float64),
        group=torch.zeros(rows, dtype=torch.long),
    ), out


def test_golden_table():
    """pi = (.2, .8): norms 2 (.8)^2 = 1.28 and 2 (.2)^2 = .08. Drawn once and four times, b = 1.28 / 1.6 = .8."""
    batch, out = bandit(0.2, [0, 1, 1, 1, 1], [1, 0, 0, 0, 0])
    got = weights(OBLRPO(), begun(OBLRPO(), batch), out)
    torch.testing.assert_close(got, column(0.2, *[-0.8] * 4))
    # A times the score of arm 0 is the same for every draw: the estimator has no variance
    score = torch.tensor([0.8, -0.2, -0.2, -0.2, -0.2], dtype=torch.float64)
    torch.testing.assert_close(got[:, 0] * score, torch.full((5,), 0.16, dtype=torch.float64))


def test_equal_norms_give_grpos_numerator():
    batch, _ = bandit(0.5, [0, 1, 1, 0], [1, 0, 5, 2])
    torch.testing.assert_close(begun(OBLRPO(), batch).advantage, column(-1, -2, 3, 0))


def test_gaussian_norms_and_lengths():
    """Distance 1 at deviation 2 and distance 3 at deviation 1: norms (1/4)^2 and 3^2, so b = 144/145."""
    batch, _ = batch_of(
        torch.ones(2, 3, dtype=torch.float64), torch.zeros(2, 3), torch.tensor([[1, 0, 0], [1, 1, 1]]) > 0
    )
    action = torch.zeros(2, 3, 1, dtype=torch.float64)
    action[0, 0], action[1, 1], action[0, 1] = 1.0, -3.0, torch.nan
    log_std = torch.tensor([2.0, 1.0], dtype=torch.float64).log().view(2, 1, 1).expand(2, 3, 1)
    batch = batch._replace(
        action=action,
        dist_old={"mean": torch.zeros_like(action), "log_std": log_std},
        sequence_return=torch.tensor([0.0, 1.0], dtype=torch.float64),
        group=torch.zeros(2, dtype=torch.long),
    )
    torch.testing.assert_close(
        begun(OBLRPO(), batch).advantage[:, 0], torch.tensor([-144, 1], dtype=torch.float64) / 145
    )
    by_length = begun(OBLRPO(norm="length"), batch).advantage[:, 0]
    torch.testing.assert_close(by_length, torch.tensor([-0.75, 0.25], dtype=torch.float64))
    assert "step_dist" in OBLRPO().required() and "step_dist" not in OBLRPO(norm="length").required()
    with pytest.raises(ValueError, match="norm='length'"):
        begun(OBLRPO(), batch._replace(dist_old={"logits": action}))


def test_a_group_that_agrees_gives_exactly_nothing():
    batch, _ = bandit(0.2, [0, 1, 1], [0.1, 0.1, 0.1])
    assert begun(OBLRPO(), batch).advantage.abs().max() == 0


def factor(advantage, rows_of_group, **settings):
    """The gradient with eta and without; the rows' log-probabilities are two parameters in turn."""
    loss = OBLRPO(**settings)
    batch, out = batch_of(torch.ones_like(advantage), advantage)
    batch = batch._replace(group=torch.arange(len(advantage)) // rows_of_group)
    prepared = loss.prepare(batch, {})
    batch = batch._replace(coef=prepared.coef, weight=prepared.weight)
    theta = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    slope = torch.tensor([[1.0, 0.0], [0.0, 1.0]], dtype=torch.float64).repeat(len(advantage) // 2, 1)

    def gradient_of(f):
        logp = out.logp.detach() + (slope @ theta).unsqueeze(-1)
        total = (f(batch, out._replace(logp=logp)) * batch.weight).sum() / prepared.denominator
        return torch.autograd.grad(total, theta)[0]

    whole = gradient_of(lambda b, o: loss.per_token(b, o, {}))
    return loss.grad_transform(whole, gradient_of, {}), whole


def test_the_gradient_is_scaled_by_its_share_of_signal():
    """Groups of two rows with gradients (a, b): halves (1, 2) and (1, 0) give 1 / (1 + 4 / 4) = 1/2."""
    got, whole = factor(column(-2, -4, -2, 0), 2)
    torch.testing.assert_close(whole, torch.tensor([1.0, 1.0], dtype=torch.float64))
    torch.testing.assert_close(got, 0.5 * whole)
    same, whole = factor(column(-2, -4, -2, -4), 2)
    torch.testing.assert_close(same, whole)
    opposed, _ = factor(column(-2, -4, 2, 4), 2)
    assert opposed.abs().max() == 0
    against, whole = factor(column(-2, -4, 2, 0), 2)
    assert whole.abs().max() > 0 and against.abs().max() == 0
    plain, whole = factor(column(-2, -4, -2, 0), 2, snr_step=False)
    assert torch.equal(plain, whole)


def test_one_group_is_halved_by_rows_and_nothing_stays_nothing():
    orthogonal, whole = factor(column(-2, -4), 2)
    assert whole.abs().min() > 0 and orthogonal.abs().max() == 0
    repeated, whole = factor(column(-2, 0, -2, 0), 4)
    assert repeated.abs().max() == 0  # rows 0 and 2 are one half, and the other has no gradient
    nothing, _ = factor(column(0, 0, 0, 0), 2)
    assert torch.equal(nothing, torch.zeros(2, dtype=torch.float64))


def test_halves_of_unequal_length_are_means_of_their_own():
    """Three groups of the same gradient: the halves hold four and two rows, and still agree."""
    same, whole = factor(column(-2, -4, -2, -4, -2, -4), 2)
    torch.testing.assert_close(same, whole)
