"""ROVER's golden table: two actions, a uniform old policy, two steps."""

import math

import pytest
import torch
from losses.golden import batch_of, begun, categorical_output, column, objective, weights

from ctrlrl.losses.direct_advantage import DirectAdvantage
from ctrlrl.losses.rover import ROVER

F64 = torch.float64


def two_rows(p, mask, returns=(1.0, 0.0)):
    """Two actions, old policy uniform; ``p`` [B, T] is the current probability of action 0, which was taken."""
    p = torch.tensor(p, dtype=F64)
    logits = torch.stack([p, 1 - p], -1).log().requires_grad_()
    out = categorical_output(logits, torch.zeros(p.shape, dtype=torch.long))
    logp = out.logp.detach().requires_grad_()
    batch, _ = batch_of(torch.ones_like(p), torch.zeros_like(p), torch.tensor(mask))
    old = torch.full_like(p, math.log(0.5))
    batch = batch._replace(
        logp_old=old,
        dist_old={"logits": torch.stack([old, old], -1)},
        sequence_return=torch.tensor(returns, dtype=F64),
        group=torch.zeros(len(p), dtype=torch.long),
    )
    return batch, out._replace(logp=logp)


def test_golden_table():
    """q = (log 1.2, log 1.4); before the second step the uniform average of log(pi/old) is -.087177."""
    batch, out = two_rows([[0.6, 0.7], [0.5, 0.5]], [[True, True], [False, False]])
    loss = ROVER()
    batch = begun(loss, batch)
    assert objective(loss, batch, out).item() == pytest.approx(0.039936, abs=5e-7)
    expected = torch.tensor([[2 * (0.412823 - 0.182322), 2 * (0.5 - 0.336472)], [0, 0]], dtype=F64)
    torch.testing.assert_close(weights(loss, batch, out), expected, atol=3e-6, rtol=0)


def test_the_next_value_is_read_before_the_next_own_position_and_is_constant():
    batch, out = two_rows([[0.6, math.nan, 0.7], [0.5, 0.5, 0.5]], [[True, False, True], [False] * 3])
    value = ROVER().next_value(batch, out)
    torch.testing.assert_close(value[0, 0].item(), 0.5 * math.log(0.7 * 0.3 / 0.25), atol=1e-12, rtol=0)
    assert (value[0, 2], value[1, 0]) == (0, 0) and value.isfinite().all() and not value.requires_grad


def test_actions_that_do_not_exist_are_not_averaged():
    batch, out = two_rows([[0.6, 0.7]], [[True, True]], [1.0])
    none = torch.full((1, 2, 1), -math.inf, dtype=F64)
    wide = {"logits": torch.cat([out.dist.params()["logits"], none], -1)}
    batch = batch._replace(dist_old={"logits": torch.cat([batch.dist_old["logits"], none], -1)})
    dist = type(out.dist)(wide["logits"])
    assert ROVER().next_value(batch, out._replace(dist=dist))[0, 0].item() == pytest.approx(-0.087177, abs=5e-7)


def test_on_policy_it_is_twice_reinforce_with_the_centred_return():
    batch, out = two_rows([[0.5, 0.5], [0.5, 0.5]], [[True, True], [True, False]], (3.0, 1.0))
    expected = torch.tensor([[2.0, 2.0], [-2.0, 0.0]], dtype=F64)
    for loss in (ROVER(), ROVER(eps=0.2)):
        torch.testing.assert_close(weights(loss, begun(loss, batch), out), expected, atol=1e-12, rtol=0)
    assert weights(ROVER(), begun(ROVER(), batch._replace(sequence_return=batch.sequence_return * 0)), out).max() == 0


def test_one_step_is_twice_direct_advantage():
    """Without a next value both regress the log-ratio on a centred number."""
    batch, out = two_rows([[0.6], [0.3], [0.5]], [[True]] * 3, (1.0, 0.0, 0.2))
    rover, direct = ROVER(), DirectAdvantage(kl_temp=1.0)
    mine = begun(rover, batch)
    other = batch._replace(advantage=batch.sequence_return.unsqueeze(-1))
    torch.testing.assert_close(weights(rover, mine, out), 2 * weights(direct, other, out), atol=1e-12, rtol=0)


def test_batch_reward_pays_for_rarity_whatever_the_group():
    batch, _ = two_rows([[0.5]] * 4, [[True]] * 4, (1.0, 0.0, 0.0, 0.0))
    loss = ROVER(reward_mode="batch_asymmetric")
    batch = batch._replace(group=torch.arange(4))
    torch.testing.assert_close(begun(loss, batch).advantage, column(3.75, -0.5, -0.5, -0.5))
    same = begun(loss, batch._replace(sequence_return=torch.ones(4, dtype=F64)))
    assert same.advantage.abs().max() == 0


def test_clamp_and_temperature():
    batch, out = two_rows([[0.75], [0.5]], [[True], [True]])
    loss = ROVER(eps=0.2)  # ratio 1.5 is beyond the band: no gradient left
    assert weights(loss, begun(loss, batch), out)[0, 0] == 0
    warm = ROVER(q_temp=2.0)
    expected = 2 * 2 * (0.5 - 2 * math.log(1.5))
    assert weights(warm, begun(warm, batch), out)[0, 0].item() == pytest.approx(expected)
    with pytest.raises(ValueError, match=r"eps=1.5 must be below 1"):
        ROVER(eps=1.5)


def test_a_tree_is_required_unless_assumed():
    assert "tree" in ROVER().required()
    assert ROVER(assume_tree=True).required() == ROVER.needs - {"tree"}


def test_greedy_on_the_uniform_policys_values_is_optimal_in_trees_with_binary_leaves():
    g = torch.Generator().manual_seed(0)
    for _ in range(50):
        leaves = (torch.rand(3, 3, 3, generator=g) < 0.2).double()
        first = leaves.mean((1, 2)).argmax()
        second = leaves[first].mean(-1).argmax()
        assert leaves[first, second].max() == leaves.max()
    graded = torch.tensor([[1.0, 0.0], [0.6, 0.6]])  # the assumption cannot be dropped
    assert graded[graded.mean(-1).argmax()].max() < graded.max()
