"""PF-PPO: the expected number of copies of each sequence when its group is resampled."""

import pytest
import torch
from losses.golden import batch_of, begun, column, weights

from ctrlrl.losses.pf_ppo import PFPPO
from ctrlrl.losses.ppo import PPO

RETURNS = [-2.0, -1.0, 0.0, 1.0, 3.0]


def grouped(returns, advantage=None, group=None, mask=None):
    rows = len(returns)
    advantage = torch.ones(rows, 1, dtype=torch.float64) if advantage is None else advantage
    batch, out = batch_of(torch.ones_like(advantage), advantage, mask)
    group = torch.zeros(rows, dtype=torch.long) if group is None else torch.tensor(group)
    return batch._replace(sequence_return=torch.tensor(returns, dtype=torch.float64), group=group), out


def copies(returns, group=None, **settings):
    batch, _ = grouped(returns, group=group)
    return begun(PFPPO(**settings), batch).coef["copies"]


@pytest.mark.parametrize(
    ("rule", "want"),
    [
        ("best_random", [0.625, 0.625, 0.625, 0.625, 2.5]),  # the best is half of all draws
        ("best_worst", [2.5, 0, 0, 0, 2.5]),
        ("best_of_n", [0, 0, 0, 0, 5]),
        ("power", [5 * 4 / 15, 5 / 15, 0, 5 / 15, 5 * 9 / 15]),
    ],
)
def test_golden_table(rule, want):
    torch.testing.assert_close(copies(RETURNS, keep_rule=rule), column(*want))
    monotone = [x**3 - 7 for x in RETURNS]
    same = torch.allclose(copies(monotone, keep_rule=rule), column(*want))
    assert same == (rule != "power")


def test_the_weights_reach_the_objective():
    """The mean is over copies: two rows of advantages 1 and -1 with 1.6 and 0.4 copies."""
    batch, out = grouped([1.0, 0.0], column(1, -1))
    loss = PFPPO(standardize_advantage=False)
    torch.testing.assert_close(weights(loss, begun(loss, batch), out), column(1.6, -0.4))
    mask = torch.tensor([[True, True, True], [True, False, False]])
    long, _ = grouped([1.0, 0.0], torch.ones(2, 3, dtype=torch.float64), mask=mask)
    prepared = loss.prepare(begun(loss, long), {})
    torch.testing.assert_close(prepared.denominator.item(), 3 * 1.6 + 0.4)
    assert (prepared.weight[~mask] == 0).all()


def test_equal_weights_are_ppo():
    g = torch.Generator().manual_seed(0)
    batch, out = grouped(RETURNS, torch.randn(5, 1, generator=g, dtype=torch.float64))
    loss = PFPPO(best_to_other=1.0)
    torch.testing.assert_close(weights(loss, begun(loss, batch), out), weights(PPO(), batch, out))


def test_groups_resample_apart_unless_the_batch_is_the_scope():
    group, returns = [0, 0, 1, 1], [0.0, 1.0, 2.0, 3.0]
    torch.testing.assert_close(copies(returns, group, keep_rule="best_of_n"), column(0, 2, 0, 2))
    torch.testing.assert_close(copies(returns, group, keep_rule="best_of_n", scope="batch"), column(0, 0, 0, 4))


def test_ties_share_and_nothing_to_choose_by_keeps_all():
    torch.testing.assert_close(copies([1.0, 1.0, 0.0, 0.0], keep_rule="best_of_n"), column(2, 2, 0, 0))
    assert (copies([0.0, 0.0], keep_rule="power") == 1).all()
    torch.testing.assert_close(copies([7.0], keep_rule="best_worst"), column(1))
