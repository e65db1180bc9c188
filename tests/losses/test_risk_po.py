"""RiskPO's golden table, the bundles, and the memory of the quantiles."""

import math

import pytest
import torch
from losses.golden import batch_of, column, knobs_of, weights

from ctrlrl.losses.risk_po import RiskPO


def scored(score, group):
    score = torch.tensor(score, dtype=torch.float64)
    batch, out = batch_of(torch.ones(len(score), 1, dtype=torch.float64), torch.zeros(len(score), 1))
    return batch._replace(score=score, group=torch.tensor(group)), out


def at(loss, low, high):
    return {"quantiles": torch.tensor([low, high], dtype=torch.float64), "known": torch.tensor(True)}


def test_golden_table():
    """One prompt per bundle, S = 0..5, qa = 1, qb = 4: A = -5, -2, -4/3, -2/3, 0, 0, over its deviation sqrt 3.5."""
    loss = RiskPO(bundle=1, credit="uniform")
    batch, out = scored([0, 1, 2, 3, 4, 5], [0] * 6)
    start = loss.begin(batch, {}, at(loss, 1.0, 4.0))
    expected = column(-5, -2, -4 / 3, -2 / 3, 0, 0) / math.sqrt(3.5)
    torch.testing.assert_close(weights(loss, start.batch, out, knobs_of(loss)), expected)
    # one of six lies below 1, four below 4
    torch.testing.assert_close(
        start.memory["quantiles"], torch.tensor([1 + 0.1 * (0.2 - 1 / 6), 4 + 0.1 * (0.8 - 4 / 6)], dtype=torch.float64)
    )


def test_papers_are_the_jth_responses_of_a_bundles_prompts():
    """Groups (1, 0) and (0, 1, 1): papers 1 + 0 and 0 + 1, and the fifth response is not used."""
    loss = RiskPO(bundle=2, credit="uniform")
    batch, _ = scored([1, 0, 0, 1, 1], [4, 4, 2, 2, 2])
    got = loss.begin(batch, {}, at(loss, 2.0, 3.0)).batch.advantage[:, 0]
    # S = 1 for both: middle -1/.6, tail -1/.2, together (-1/.6 - 7.5) / 2.5; their deviation is 0, so nothing divides
    torch.testing.assert_close(got[:4], torch.full((4,), (-1 / 0.6 - 7.5) / 2.5, dtype=torch.float64))
    assert got[4] == 0


def test_groups_beyond_whole_bundles_form_a_smaller_one_and_quantiles_move_per_bundle():
    loss = RiskPO(bundle=2, quantile_rate=0.5)
    batch, _ = scored([1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 2, 2])
    start = loss.begin(batch, {}, at(loss, 0.0, 0.0))
    torch.testing.assert_close(start.memory["quantiles"], torch.tensor([0.2, 0.8], dtype=torch.float64))


def test_trackers_start_at_the_first_iterations_quantiles_or_at_zero():
    batch, _ = scored([0, 1, 2, 3, 4], [0] * 5)
    for start, want in (("first", [0.8, 3.2]), ("zero", [0.0, 0.0])):
        loss = RiskPO(bundle=1, quantile_start=start, quantile_rate=0.0)
        memory = loss.begin(batch, {}, loss.memory()).memory
        torch.testing.assert_close(memory["quantiles"], torch.tensor(want, dtype=torch.float64))
        again = loss.begin(batch._replace(score=batch.score + 9), {}, memory).memory
        torch.testing.assert_close(again["quantiles"], memory["quantiles"])


def test_credit():
    batch, _ = scored([0, 1, 0, 0, 0, 1], [0, 0, 0, 1, 1, 1])
    memory = at(RiskPO(), 1.0, 2.0)
    plain = RiskPO(credit="uniform").begin(batch, {}, memory).batch.advantage[:, 0]
    by_std = RiskPO().begin(batch, {}, memory).batch.advantage[:, 0]
    torch.testing.assert_close(by_std, plain * math.sqrt(3))  # one of three right: deviation 1/sqrt 3
    by_score = RiskPO(credit="score").begin(batch, {}, memory).batch.advantage[:, 0]
    torch.testing.assert_close(by_score, plain * torch.tensor([1.5, 0.5, 1.5, 1.5, 1.5, 0.5]))


def test_never_positive_unless_the_mean_is_taken_off():
    batch, _ = scored([0.0, 0.2, 0.5, 0.9, 1.0, 1.0], [0, 0, 0, 1, 1, 1])
    natural = RiskPO().begin(batch, {}, at(RiskPO(), 0.5, 1.5)).batch.advantage
    assert natural.max() <= 0 and natural.min() < 0
    centred = RiskPO(baseline="mean", credit="uniform").begin(batch, {}, at(RiskPO(), 0.5, 1.5)).batch.advantage
    torch.testing.assert_close(centred.sum().item(), 0.0, atol=1e-12, rtol=0)
    assert centred.max() > 0


def test_levels_must_be_ordered():
    with pytest.raises(ValueError, match="level_low < level_high"):
        RiskPO(level_low=0.8, level_high=0.2)
    with pytest.raises(ValueError, match="at least 1"):
        RiskPO(bundle=0)
