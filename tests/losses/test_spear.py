"""SPEAR: replayed successes, judged against the median of recent group means, with a weight that rises."""

import math

import pytest
import torch
from losses.golden import batch_of, column, weights

from ctrlrl.losses.spear import SPEAR, CosineRamp
from ctrlrl.types import ON_POLICY, REPLAYED

FULL = {"imitation": torch.tensor(1.0, dtype=torch.float64)}


def rollouts(returns, group, source=None, ratios=None, advantage=None):
    rows = len(returns)
    advantage = torch.zeros(rows, 1, dtype=torch.float64) if advantage is None else advantage
    batch, out = batch_of(torch.ones(rows, 1, dtype=torch.float64) if ratios is None else ratios, advantage)
    return batch._replace(
        sequence_return=torch.tensor(returns, dtype=torch.float64),
        group=torch.tensor(group),
        source=None if source is None else torch.tensor(source),
    ), out


def test_golden_table():
    """Means of two new groups 1/2 and 0 after 1/4 and 1: the median is 3/8. Of three replayed rows one is used.

    R = 1 was good and lies 5/8 above; R = .3 lies below; R = .9 was not good when it was kept.
    """
    loss = SPEAR(cov_share=0.0, group_share=1.0)
    source = [ON_POLICY] * 4 + [REPLAYED] * 3
    kept = column(0, 0, 0, 0, 0.5, 0.5, -0.5)
    batch, out = rollouts([1, 0, 0, 0, 1, 0.3, 0.9], [0, 0, 1, 1, 0, 0, 0], source, column(*[1.2] * 7), kept)
    memory = loss.memory()
    memory["means"][-2:], memory["count"] = torch.tensor([0.25, 1.0]), torch.tensor(2)
    start = loss.begin(batch, {}, memory)
    assert start.stats["return_median"] == 0.375 and start.memory["count"] == 4
    # the one replayed row in use weighs as much as all four new ones
    expected = column(0.6, -0.6, 0, 0, 4 * 1.2 * 0.625, 0, 0)
    torch.testing.assert_close(weights(loss, start.batch, out, FULL), expected)
    half = weights(loss, start.batch, out, {"imitation": FULL["imitation"] / 2})
    torch.testing.assert_close(half, expected * torch.tensor([[1.0]] * 4 + [[0.5]] * 3))
    assert loss.keep(start.batch).tolist() == [True, False, False, False, False, False, False]
    assert loss.prepare(start.batch, FULL).denominator == 4


def test_a_replayed_group_id_is_not_that_of_a_new_group():
    loss = SPEAR(group_share=1.0)
    new, _ = rollouts([1, 0], [0, 0])
    both, _ = rollouts([1, 0, 9], [0, 0, 0], [ON_POLICY, ON_POLICY, REPLAYED], advantage=column(0, 0, 1))
    alone = loss.begin(new, {}, loss.memory()).batch.advantage
    torch.testing.assert_close(loss.begin(both, {}, loss.memory()).batch.advantage[:2], alone)


def test_without_replay_weight_and_gate_it_is_the_groups_mean_with_a_constant_length():
    loss = SPEAR(cov_share=0.0, group_share=1.0)
    batch, out = rollouts([3, 1, 2, 7], [0, 0, 1, 1])
    start = loss.begin(batch, {}, loss.memory())
    got = weights(loss, start.batch, out, {"imitation": torch.tensor(0.0, dtype=torch.float64)})
    torch.testing.assert_close(got, column(1, -1, -2.5, 2.5))


def test_groups_of_least_deviation_are_left_out():
    loss = SPEAR(cov_share=0.0)
    batch, out = rollouts([0, 4, 0, 3, 0, 1, 0, 2], [0, 0, 1, 1, 2, 2, 3, 3])
    start = loss.begin(batch, {}, loss.memory())
    assert weights(loss, start.batch, out, FULL)[:, 0].tolist() == [-2, 2, -1.5, 1.5, 0, 0, -1, 1]
    assert loss.prepare(start.batch, FULL).denominator == 6


def test_positions_of_high_covariance_are_thinned():
    """Covariances 2.03, 0, 0, 3.75: two qualify, one of them would be dropped, so each keeps a half."""
    batch, out = rollouts([0] * 4, [0] * 4)
    batch = batch._replace(
        logp_old=torch.tensor([0.9, 0.5, 0.5, 0.05], dtype=torch.float64).log().unsqueeze(-1),
        advantage=column(2, 0, 0, -2),
    )
    out = out._replace(logp=batch.logp_old.clone().requires_grad_())
    torch.testing.assert_close(weights(SPEAR(), batch, out, FULL), column(1, 0, 0, -1))
    # above 3 only the last is left, and dropping it is certain
    torch.testing.assert_close(weights(SPEAR(cov_low=3.0), batch, out, FULL), column(2, 0, 0, 0))
    torch.testing.assert_close(weights(SPEAR(cov_high=3.0), batch, out, FULL), column(0, 0, 0, -2))
    # a share of half of the four positions drops both; none at all drops neither
    assert weights(SPEAR(cov_share=0.5), batch, out, FULL).abs().max() == 0
    torch.testing.assert_close(weights(SPEAR(cov_share=0.0), batch, out, FULL), column(2, 0, 0, -2))


def test_the_median_forgets():
    loss = SPEAR(history=2)
    memory = loss.memory()
    for mean in (10.0, 1.0, 3.0):
        batch, _ = rollouts([mean, mean], [0, 0])
        start = loss.begin(batch, {}, memory)
        memory = start.memory
    assert start.stats["return_median"] == 2.0


def test_the_ramp():
    ramp = CosineRamp("imitation", 0.8)
    at = {p: ramp.step(ramp.initial(), {"progress": p})[1]["imitation"] for p in (0.0, 0.2, 0.4, 0.8, 1.0)}
    assert at[0.0] == 0 and math.isclose(at[0.2], 0.146447, abs_tol=1e-6) and math.isclose(at[0.4], 0.5)
    assert at[0.8] == at[1.0] == 1
    assert ramp.step({"imitation": 0.3}, {}) == ({"imitation": 0.3}, {"imitation": 0.3})
    assert SPEAR(ramp=0.8).controllers()["imitation"] == ramp


@pytest.mark.parametrize("wrong", [{"ramp": 0.0}, {"history": 0}, {"group_share": 1.5}, {"cov_share": -0.1}])
def test_settings_are_checked(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        SPEAR(**wrong)
