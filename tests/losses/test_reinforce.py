"""REINFORCE's golden table: every position weighs its sequence's return."""

import pytest
import torch
from losses.golden import batch_of, begun, categorical_output, objective, weights

from ctrlrl.losses.reinforce import REINFORCE

F64 = torch.float64
MASK = torch.tensor([[True, True], [True, False], [True, True]])


def rollout():
    batch, out = batch_of(torch.full((3, 2), 1.7, dtype=F64), torch.zeros(3, 2, dtype=F64), MASK)
    return batch._replace(sequence_return=torch.tensor([3.0, -1.0, 4.0], dtype=F64)), out


@pytest.mark.parametrize(
    ("baseline", "expected"),
    [("none", [[3, 3], [-1, 0], [4, 4]]), ("batch", [[1, 1], [-3, 0], [2, 2]])],
)
def test_golden_table(baseline, expected):
    """The ratio plays no part; the mean return is 2; the objective is a mean over sequences of sums."""
    loss = REINFORCE(baseline=baseline)
    batch, out = rollout()
    batch = begun(loss, batch)
    torch.testing.assert_close(weights(loss, batch, out), torch.tensor(expected, dtype=F64))
    assert loss.prepare(batch, {}).denominator == 3
    by_hand = -(torch.tensor(expected, dtype=F64) * out.logp).sum() / 3
    torch.testing.assert_close(objective(loss, batch, out), by_hand)


def test_in_expectation_it_is_the_gradient_of_the_return():
    """One choice among three, all actions at once with their probabilities as frequencies: grad of E[R]."""
    theta = torch.tensor([0.2, -0.4, 0.9], dtype=F64, requires_grad=True)
    returns = torch.tensor([1.0, 0.0, 3.0], dtype=F64)
    counts = torch.tensor([5, 2, 3])
    with torch.no_grad():
        theta.copy_((counts / 10).log())
    action = torch.repeat_interleave(torch.arange(3), counts).unsqueeze(-1)
    batch, _ = batch_of(torch.ones(10, 1, dtype=F64), torch.zeros(10, 1, dtype=F64))
    batch = batch._replace(sequence_return=returns[action[:, 0]], action=action)
    for baseline in ("none", "batch"):
        loss = REINFORCE(baseline=baseline)
        out = categorical_output(theta.expand(10, 1, 3), action)
        (got,) = torch.autograd.grad(objective(loss, begun(loss, batch), out), theta)
        (want,) = torch.autograd.grad((theta.softmax(-1) * returns).sum(), theta)
        torch.testing.assert_close(-got, want)


def test_the_baseline_is_checked():
    with pytest.raises(ValueError, match="baseline='mean'"):
        REINFORCE(baseline="mean")  # type: ignore[arg-type]
