"""What the gradient of every loss is in expectation, exactly: all groups of two of an enumerable task, none sampled.

At the policy that collected them, a loss either has the policy gradient of the expected return, perhaps times a
constant, or a bias that can be written down. The table below says which for every loss that runs on token sequences.
Closed forms are sums over sequences, or over pairs, of the exact task; they share no code with the losses.
"""

import math
from typing import Any

import pytest
import torch
from contracts.exactness_forms import (
    Claim,
    amplified,
    best_of_two,
    biased,
    by_answers,
    cut_second_row,
    demonstration_only,
    distinct,
    entropy_band,
    exact,
    filtered,
    first_of_turn,
    group,
    grouped,
    hot_pair,
    joined_by_an_expert,
    losers_only,
    median_sign,
    modulated,
    most_telling_steps,
    norm_baseline,
    norm_baseline_by_signal,
    over_turns,
    per_position,
    preferred,
    pulled_by_entropy,
    pulled_to_hotter,
    regularised_return,
    shaped,
    steadied,
    taught_or_reinforced,
    tempered_winners,
    thinned,
    towards_reference,
    trusted,
    two_channels,
    winners_only,
    wins,
    without_void,
)
from helpers.enumeration import demonstrated, expected_ascent, task

from ctrlrl.losses import base
from ctrlrl.losses.base import PolicyLoss
from ctrlrl.losses.needs import missing

RAW: dict[str, Any] = {"standardize_advantage": False}
"""Advantages as they are: deviations of an update batch make the gradient a ratio of random numbers."""
HAZARD = math.exp(-(math.log(2) ** 1.5) - (math.log(2) / 0.8) ** 2)
CLAIMS: dict[str, list[Claim]] = {
    "adora": [
        biased("a tenth of wins less losses, as all are equally long", lambda w: 0.1 * grouped(w)),
        group(group_weight=1.0),
    ],
    "aepo": [group(), biased("tempered winners", tempered_winners, hot_pair, tempered_coef=0.7)],
    "bapo": [group()],
    "bnpo": [exact(0.5, of="score")],
    "bpo": [biased("sign from the median", median_sign)],
    "bpo_mean": [exact(per_position)],
    "c3po": [
        biased("positions within the budget", cut_second_row, ref_kl_coef=0.0, budget=6),
        biased(
            "wins less losses and KL(reference || policy)",
            lambda w: 2 * w.length / 256 * towards_reference(1e-3)(w),
        ),
    ],
    "capo": [
        biased(
            "trusted positions",
            trusted(1.0, 0.2, 0.35),
            model_step=1.0,
            fisher_max=0.2,
            objective_min=-0.35,
            objective_max=0.35,
        ),
    ],
    "cispo": [group()],
    "copg": [
        biased("2 c times the gradient of the regularised return", lambda w: 0.2 * regularised_return(w, 0.1)),
        Claim("scaled", lambda w: 0.2 * w.policy_gradient(w.outcome), world={"own_ref": True}),
    ],
    "copo": [
        biased("wins less losses by the answers' entropy", by_answers(20.0, 0.7), threshold=0.7),
        biased("wins less losses by the answers' entropy", by_answers(2.0, 0.3), sharpness=2.0, threshold=0.3),
    ],
    "d3s": [biased("most uncertain positions", most_telling_steps)],
    "dagrpo": [
        biased("gaps of distinct members", distinct(0.3), score_gap=0.3),
        exact(lambda w: 0.5 / w.length, score_gap=1e-9),
        biased("an expert joins failed groups", joined_by_an_expert, demonstrated),
    ],
    "dapo": [group()],
    "dcpo": [
        biased("pull to the tempered policy", pulled_to_hotter, entropy_target=10.0, score_min=-1.0),
        biased("pull to the tempered policy by the sampled entropy", pulled_by_entropy(1.15), entropy_target=1.15),
    ],
    "direct_advantage": [
        exact(lambda w: (1 - 0.5 / w.length) / 0.02 / w.length),
        biased("first actions of turns", first_of_turn, level="turn"),
    ],
    "dpo": [
        biased("preferences against the reference", preferred(0.1)),
        biased("wins less losses", lambda w: 0.1 * w.push(w.p * wins(w)), world={"own_ref": True}),
    ],
    "dr_grpo": [exact(lambda w: 0.5 / w.length), exact(0.5, max_length=1)],
    "empg": [biased("confidence and clarity", modulated)],
    "epo": [
        biased("entropy in a band", entropy_band(0.1, 0.2, 0.2), phase="constant"),
        biased("entropy", entropy_band(0.0, 0.0, 0.0), phase="constant", eps_band_low=1.0, eps_band_high=1e9),
    ],
    "etr": [group()],
    "g2rpo": [
        biased("wins less losses", lambda w: 0.6744897501960817 * w.push(w.p * wins(w)) / w.length),
    ],
    "gbpo": [biased("wins less losses and KL(reference || policy)", towards_reference(1e-3))],
    "gdpo": [biased("vote of the channels", two_channels)],
    "ghpo": [biased("wins less losses", lambda w: grouped(w, 1e-4))],
    "grpo": [
        biased("wins less losses and KL(reference || policy)", towards_reference(0.04)),
        group(ref_kl_coef=0.0),
    ],
    "gspo": [group()],
    "hpt": [
        biased("taught where all failed", taught_or_reinforced, demonstrated),
        exact(lambda w: 0.5 / w.length, gate=-1),
    ],
    "knapsack": [group()],
    "mdpo": [exact(per_position, **RAW)],
    "mhpo": [biased("0.265 of wins less losses", lambda w: HAZARD * grouped(w))],
    "mini_rl": [exact(0.5)],
    "nlpo": [
        exact(per_position, **RAW),
        Claim("scaled", lambda w: w.policy_gradient(w.outcome) / w.length, RAW, world={"restricted": True}),
    ],
    "obl_rpo": [
        biased("baseline by score norms", norm_baseline, snr_step=False),
        biased("baseline by score norms, times the share of signal", norm_baseline_by_signal),
        exact(lambda w: 0.5 / w.length, norm="length", snr_step=False),
    ],
    "p3o": [exact(), exact(clip="separate")],
    "pf_ppo": [
        biased("winners three times", filtered(3.0), best_to_other=3.0, **RAW),
        exact(per_position, best_to_other=1.0, **RAW),
        exact(per_position, keep_rule="best_worst", **RAW),
    ],
    "ppo": [exact(per_position, **RAW)],
    "precision_diversity": [
        biased("cross-entropy by (1 - pi)^b", shaped(-0.25), demonstrated),
        biased(
            "cross-entropy by (1 - pi)^b, others by rank",
            shaped(0.5, 0.125, -0.25),
            demonstrated,
            exponent=0.5,
            top_reward=0.125,
            tail_reward=-0.25,
            top_k=2,
        ),
    ],
    "qwen_long": [
        biased("winners only, while hot", winners_only, entropy_low=0.0, entropy_high=0.0),
        group(entropy_high=10.0),
    ],
    "r2vpo": [exact(per_position, **RAW)],
    "r3l": [
        biased("amplified winners, imitated perfection", amplified),
        exact(lambda w: 0.5 / w.length, of="score", amplify=1.0, perfect=None, anchor_coef=0.0),
    ],
    "real": [exact(lambda w: 2 / w.length, of="success")],
    "reinforce": [exact(), exact(0.5, baseline="batch")],
    "risk_po": [biased("losers only", losers_only)],
    "rloo": [exact()],
    "rover": [exact(per_position)],
    "rpo": [biased("preferences against the reference, and the winner", preferred(0.01, 0.005))],
    "s_ppo": [exact(per_position, **RAW)],
    "sft": [biased("cross-entropy", demonstration_only, demonstrated)],
    "simple_tir": [biased("wins less losses without void turns", without_void)],
    "spear": [
        exact(lambda w: 0.5 / w.length, cov_share=0.0),
        biased("thinned by covariance", thinned(0.05), cov_low=0.05),
    ],
    "spo": [exact(per_position, **RAW)],
    "st_ppo": [exact(over_turns, **RAW)],
    "steer": [biased("weighed by the entropy's change", steadied), group(weight_min=1.0)],
    "super_hf": [biased("best of two and KL(reference || policy)", best_of_two)],
    "turn_ppo": [exact(over_turns, **RAW)],
    "v0": [group()],
    "vas": [group()],
}
"""Every loss that runs on tokens. What groups of two cannot show is tested with the loss: how groups are chosen and
sized (knapsack, v0, vas), replayed rows (r2vpo, spear), the density of several groups (bnpo), standardising."""
LOOKS_AT_NUMBERS = {"d3s", "epo", "gbpo", "risk_po", "spear"}
"""Losses whose ``begin`` has to see one group at a time."""


def one_by_one(name: str) -> bool:
    return name in LOOKS_AT_NUMBERS or base.get(name).grad_transform is not PolicyLoss.grad_transform


def test_every_loss_on_tokens_has_a_claim():
    assert set(CLAIMS) == {name for name in base.names() if not missing(base.get(name).needs, "tokens")}


def check(name: str, claim: Claim, sizes: tuple[int, int], reward: str) -> None:
    loss, world = base.get(name)(**claim.settings), task(*sizes, reward, **claim.world)
    want = claim.form(world)
    assert want.abs().max() > 1e-6
    members = claim.members(world)
    got = expected_ascent(loss, world, one_by_one=one_by_one(name), **members)
    torch.testing.assert_close(got, want, atol=1e-11, rtol=1e-9)


EACH = pytest.mark.parametrize(
    ("name", "k"), [(name, k) for name, claims in CLAIMS.items() for k in range(len(claims))]
)


@EACH
def test_the_expected_gradient_is_the_stated_one(name, k):
    """Losses that must see one group at a time do so on 8 sequences, the others on 256."""
    check(name, CLAIMS[name][k], (2, 3) if one_by_one(name) else (4, 4), "graded")


@pytest.mark.slow
@EACH
def test_the_expected_gradient_is_the_stated_one_for_a_binary_reward(name, k):
    check(name, CLAIMS[name][k], (3, 3) if one_by_one(name) else (4, 4), "binary")


def test_forms_are_what_they_are_called():
    """Score function, advantages and autograd agree; of outcomes 0 and 1 wins less losses is the exact direction."""
    for reward in ("graded", "binary"):
        w = task(4, 4, reward)
        gradient = w.policy_gradient(w.outcome)
        torch.testing.assert_close(w.p.sum(), torch.ones((), dtype=torch.float64))
        torch.testing.assert_close(w.push(w.p * w.outcome), gradient)
        torch.testing.assert_close(w.push(w.p.unsqueeze(-1) * w.advantage), gradient)
        rank = w.push(w.p * wins(w)) / math.sqrt(2) / w.length
        torch.testing.assert_close(grouped(w), rank, rtol=1e-5, atol=1e-9)
        # the return's two values are three apart
        exact_direction = gradient / (3 * math.sqrt(2) * w.length)
        assert torch.allclose(rank, exact_direction, rtol=1e-9, atol=1e-12) == (reward == "binary")
    restricted = task(4, 4, "graded", restricted=True)
    assert not restricted.support.all() and restricted.policy.eq(0).any()


@pytest.mark.parametrize("name", ["p3o", "dr_grpo", "grpo", "dagrpo", "steer", "empg", "super_hf", "copo"])
def test_side_by_side_and_one_by_one_are_the_same(name):
    loss, w = base.get(name)(), task(2, 3, "graded")
    torch.testing.assert_close(expected_ascent(loss, w), expected_ascent(loss, w, one_by_one=True))
