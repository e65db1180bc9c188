"""Identities between variants, and the one that makes all of them settings of the same estimator."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from losses.golden import Case, begun, case_of, knobs_of, objective
from torch import Tensor
from torch.nn.functional import softplus

from ctrlrl.losses import base
from ctrlrl.losses.base import PolicyLoss, Prepared
from ctrlrl.types import DEMONSTRATION, SequenceBatch

F64 = torch.float64


def make(name: str, **settings) -> PolicyLoss:
    return base.get(name)(**settings)


def everything(spread: float = 0.4, **changes) -> Case:
    """A case that any of the losses below can run on; ``spread`` 0 is on-policy."""
    case = case_of(base.get("grpo"), spread=spread)
    zeros = torch.zeros(len(case.leaf), dtype=torch.long)
    return case._replace(batch=case.batch._replace(**{"source": zeros, "pivot": zeros} | changes))


def gradient(loss: PolicyLoss, case: Case) -> Tensor:
    """[B, T, K] by the logits, after ``begin``."""
    leaf = case.leaf.detach().requires_grad_()
    (found,) = torch.autograd.grad(objective(loss, begun(loss, case.batch), case.output(leaf)), leaf)
    return found


def same(one: PolicyLoss, other: PolicyLoss, case: Case, factor: float = 1.0, rtol: float = 1e-9) -> None:
    """The gradient of one is ``factor`` times that of the other, and is there at all."""
    got, want = gradient(one, case), factor * gradient(other, case)
    assert want.abs().max() > 1e-6
    torch.testing.assert_close(got, want, rtol=rtol, atol=1e-12)


# -- the estimator: - aggregation x gates x weights x ratio x advantage ------------------------------


class At(NamedTuple):
    """What the hand product may look at; all without gradient."""

    a: Tensor
    """[B, T] advantage"""
    r: Tensor
    """[B, T] ratio of the position"""
    lp: Tensor
    batch: SequenceBatch
    prepared: Prepared
    now: Tensor
    """[B, T, K] log-probabilities under the policy"""


def kept(s: At, low: float | Tensor, high: float | Tensor) -> Tensor:
    return (~((s.a > 0) & (s.r > 1 + high) | (s.a < 0) & (s.r < 1 - low))).to(F64)


def clip(low: float = 0.2, high: float = 0.2, ceiling: float = math.inf) -> Callable[[At], Tensor]:
    """r A inside PPO's band; ``ceiling``: of a negative advantage, up to that ratio only."""
    return lambda s: kept(s, low, high) * ~((s.a < 0) & (s.r > ceiling)) * s.r * s.a


def score(s: At) -> Tensor:
    return s.a


def sampler_weight(s: At) -> Tensor:
    assert s.batch.logp_behaviour is not None
    return kept(s, 0.2, 0.27) * (s.lp - s.batch.logp_behaviour).exp().clamp(max=1.5) * s.a


def hazard(s: At) -> Tensor:
    c, x = 1.5, s.r.log()
    psi = c * torch.tanh(x / c)
    zeta = softplus(psi) ** 1.5 + (softplus(-psi) / 0.8) ** 2
    return s.a / torch.cosh(x / c) ** 2 * torch.exp(psi - zeta)


def quadratic_pull(s: At) -> Tensor:
    return s.r * (s.a - s.a.abs() * (s.r - 1) / 0.2)


def priced(s: At) -> Tensor:
    return s.r * (s.a - 2.0 * (s.r - 1))


def sign_pull(s: At) -> Tensor:
    target = 1 + 0.3 * torch.tanh((s.batch.value_target - s.batch.value_old) / 2e-3)
    return s.r * (target - s.r).sign() * s.a.abs()


def group_sign_pull(s: At) -> Tensor:
    """Groups of four distinct outcomes: the upper two are pulled up, the lower two down."""
    assert s.batch.sequence_return is not None
    rows = s.batch.sequence_return.view(-1, 4)
    up = (rows.argsort(-1).argsort(-1) >= 2).flatten().unsqueeze(-1)
    return s.r * (torch.where(up, 1.2, 0.8).to(F64) - s.r).sign() * s.a.abs()


def elastic(s: At) -> Tensor:
    assert s.batch.score is not None
    spread = s.batch.score.view(-1, 4).var(-1, correction=0).repeat_interleave(4).unsqueeze(-1)
    width = 0.2 * (1 + 0.5 * s.a.abs().clamp(max=2) / 2) * (1 + 0.25 * 4 * spread)
    return kept(s, width, width) * s.r * s.a


def regression(s: At) -> Tensor:
    return s.a - s.r.log()


def uniform_regression(s: At) -> Tensor:
    """Twice the distance of the log-ratio from the advantage plus the uniform policy's next value."""
    assert s.batch.dist_old is not None
    value = (s.now - s.batch.dist_old["logits"]).mean(-1)
    following = torch.cat([value[:, 1:], torch.zeros_like(value[:, :1])], -1)
    last = s.batch.mask.sum(-1, keepdim=True) - 1
    following = torch.where(torch.arange(value.shape[1]) < last, following, 0.0)
    return 2 * (s.a + following - s.r.log())


def steadied(s: At) -> Tensor:
    """The clipped product, by 0.8 ^ (entropy change / largest change before the first step)."""
    assert s.batch.dist_old is not None

    def change(log_p: Tensor, r: Tensor | float) -> Tensor:
        p = log_p.exp()
        each = p * (log_p - (p * log_p).sum(-1, keepdim=True))
        own = each.gather(-1, s.batch.action.unsqueeze(-1)).squeeze(-1)
        return (r * s.a * (own - (p * each).sum(-1))).abs()

    peak = torch.where(s.batch.mask, change(s.batch.dist_old["logits"], 1.0), 0.0).amax()
    return (0.8 ** (change(s.now, s.r) / peak)).clamp(min=0.8) * clip(0.2, 0.28, 10.0)(s)


RAW: dict[str, Any] = {"standardize_advantage": False}
TOKEN_LEVEL: dict[str, tuple[dict[str, Any], Callable[[At], Tensor]]] = {
    "adora": ({}, clip()),
    "aepo": ({}, clip()),
    "bapo": ({}, clip(0.4, 0.2)),
    "bnpo": ({}, clip(0.2, 0.28)),
    "bpo_mean": ({}, sign_pull),
    "c3po": ({"ref_kl_coef": 0.0, "budget": 20}, clip()),
    "cispo": ({"eps_low": 0.3, "eps_high": 0.4}, lambda s: s.r.clamp(0.7, 1.4) * s.a),
    "d3s": ({"steps_start": 0.9, "steps_end": 0.9}, clip()),
    "dagrpo": ({}, clip()),
    "dcpo": ({"ratio_max": 1.4}, clip(0.2, 0.28, 1.4)),
    "direct_advantage": ({}, regression),
    "dapo": ({}, clip(0.2, 0.28)),
    "dr_grpo": ({}, clip()),
    "empg": ({}, clip()),
    "etr": ({}, elastic),
    "g2rpo": ({}, clip()),
    "gbpo": ({"ref_kl_coef": 0.0}, group_sign_pull),
    "gdpo": ({}, clip()),
    "ghpo": ({}, clip()),
    "grpo": ({"ref_kl_coef": 0.0}, clip()),
    "knapsack": ({}, clip()),
    "mhpo": ({}, hazard),
    "mini_rl": ({"ratio_max": 1.5}, sampler_weight),
    "obl_rpo": ({}, clip()),
    "pf_ppo": ({"best_to_other": 3.0}, clip()),
    "ppo": ({}, clip()),
    "qwen_long": ({}, clip()),
    "r2vpo": ({}, priced),
    "r3l": ({}, score),
    "reinforce": ({}, score),
    "risk_po": ({}, clip()),
    "rloo": ({}, score),
    "rover": ({}, uniform_regression),
    "s_ppo": (RAW, clip()),
    "simple_tir": ({}, clip()),
    "spear": ({"cov_low": 0.1}, clip(0.2, 0.28)),
    "spo": ({}, quadratic_pull),
    "steer": ({"ratio_max": 10.0}, steadied),
    "v0": ({}, clip()),
    "vas": ({}, clip()),
}
"""Losses whose gradient on each log-probability is a number that multiplies it, and that number by hand. The
advantage is what ``begin`` and ``prepare`` made of the outcomes, which is not what is at stake here."""


def on_logp(loss: PolicyLoss, case: Case) -> tuple[Tensor, At]:
    """The gradient on each log-probability, and what the hand product is made of."""
    batch, knobs = begun(loss, case.batch), knobs_of(loss)
    out = case.output(case.leaf)
    logp = out.logp.detach().requires_grad_()
    total = objective(loss, batch, out._replace(logp=logp), knobs)
    (found,) = torch.autograd.grad(total, logp)
    prepared = loss.prepare(batch, knobs)
    lp = logp.detach()
    a = prepared.coef.get("advantage", batch.value_target - batch.value_old)
    return found, At(a, (lp - batch.logp_old).exp(), lp, batch, prepared, out.dist.params()["logits"].detach())


@pytest.mark.parametrize("name", TOKEN_LEVEL)
def test_a_token_level_loss_is_the_product_of_its_parts(name):
    settings, product = TOKEN_LEVEL[name]
    loss = make(name, **settings)
    case = everything()
    found, s = on_logp(loss, case)
    share = s.prepared.weight.double() / s.prepared.denominator.double()
    want = -share * torch.where(s.batch.mask, product(s), 0.0)
    assert (want != 0).sum() > 1
    torch.testing.assert_close(found, want, rtol=1e-9, atol=1e-12)
    # the case closes gates on both sides, or they could be missing
    beyond = s.batch.mask & (s.batch.advantage != 0)
    assert (s.r[beyond] > 1.3).any() and (s.r[beyond] < 0.7).any()


@pytest.mark.parametrize("name", ["gspo", "turn_ppo", "st_ppo"])
def test_a_ratio_of_several_positions_spreads_its_gradient_over_them(name):
    """- w_k / |k| x the sum over the turn (or sequence) of aggregation x gate x advantage, at each of its positions."""
    band = {"eps_low": 0.2, "eps_high": 0.2} if name == "gspo" else RAW
    loss, case = make(name, **band), everything(spread=0.6)
    found, s = on_logp(loss, case)
    mask, want = s.batch.mask, torch.zeros_like(found)
    assert s.batch.turn is not None
    turn = torch.zeros_like(s.batch.turn) if name == "gspo" else s.batch.turn
    silent = 0
    for i in range(len(mask)):
        for k in range(2):
            unit = mask[i] & (turn[i] == k)
            if not unit.any():
                continue
            w, a = s.r[i][unit].log().mean().exp(), s.a[i][unit]
            gate = ~((a > 0) & (w > 1.2) | (a < 0) & (w < 0.8))
            silent += int((~gate).sum())
            share = (s.prepared.weight[i][unit] * gate * a).sum() / s.prepared.denominator
            want[i][unit] = -w / unit.sum() * share
    assert silent > 0
    torch.testing.assert_close(found, want, rtol=1e-9, atol=1e-12)


# -- two variants that are the same where their difference is taken away ------------------------------


def test_without_gate_or_price_the_ratio_is_all_that_is_left():
    """PPO with a wide band, mirror descent with an endless step and a ratio variance that costs nothing."""
    case = everything()
    ppo = make("ppo", eps=1e6, **RAW)
    same(make("mdpo", step_size=1e15, step_size_end=1e15, **RAW), ppo, case)
    same(make("r2vpo", dual_start=0.0, **RAW), ppo, case)
    assert not torch.allclose(gradient(make("r2vpo", **RAW), case), gradient(ppo, case))


def test_the_price_of_the_ratios_variance_is_chi_squared():
    """E_old[(r - 1)^2] = sum (p - q)^2 / q, by the exact expectation over the actions of one state."""
    g = torch.Generator().manual_seed(0)
    old, new = torch.randn(2, 4, generator=g, dtype=F64).log_softmax(-1)
    case = case_of(make("r2vpo"), rows=4, length=1)
    action = torch.arange(4).unsqueeze(-1)
    batch = case.batch._replace(
        mask=torch.ones(4, 1, dtype=torch.bool), action=action, logp_old=old.unsqueeze(-1), advantage=torch.zeros(4, 1)
    )
    out = case.output(case.leaf)._replace(logp=new.unsqueeze(-1))
    loss = make("r2vpo", dual_start=1.7, **RAW)
    prepared = loss.prepare(batch, {})
    each = loss.per_token(batch._replace(coef=prepared.coef), out, {"dual": torch.tensor(1.7, dtype=F64)})
    chi_squared = ((new.exp() - old.exp()).square() / old.exp()).sum()
    torch.testing.assert_close((old.exp() * each.squeeze(-1)).sum(), 1.7 * chi_squared)


def test_on_policy_seven_estimators_of_the_groups_mean_differ_in_their_averages_alone():
    """One group, whose mean is the batch's. By sequence sums, by the padded length, by sequence means, by positions."""
    case = case_of(base.get("grpo"), rows=4, spread=0.0)
    zeros = torch.zeros(4, dtype=torch.long)
    score = case.batch.score
    assert score is not None and not case.batch.mask.all()
    batch = case.batch._replace(
        sequence_return=score, logp_behaviour=case.batch.logp_old, source=zeros, pivot=zeros, answer=zeros
    )
    case = case._replace(batch=batch)
    plain = make("reinforce", baseline="batch")
    for other in (make("mini_rl"), make("bnpo"), make("dr_grpo", max_length=1)):
        same(other, plain, case)
    for other in (make("hpt", gate=-1), make("spear", cov_share=0.0), make("dr_grpo")):
        same(other, plain, case, factor=1 / batch.mask.shape[1])
    same(make("rloo"), plain, case, factor=4 / 3)
    same(make("rover"), make("r3l", amplify=1.0, perfect=None, anchor_coef=0.0), case, factor=2.0)
    case = case._replace(batch=batch._replace(mask=torch.ones_like(batch.mask)))
    length = batch.mask.shape[1]
    for name, settings in (("dagrpo", {"score_gap": 1e-12}), ("obl_rpo", {"norm": "length", "snr_step": False})):
        same(make(name, **settings), plain, case, factor=1 / length)


def test_contrastive_pairwise_and_leave_one_out_are_one_gradient_where_all_policies_agree():
    case = everything(spread=0.0)
    case = case._replace(batch=case.batch._replace(logp_ref=case.batch.logp_old))
    same(make("p3o"), make("rloo"), case)
    same(make("p3o", clip="separate"), make("rloo"), case)
    same(make("copg", kl_temp=0.3), make("rloo"), case, factor=0.6)


def test_a_contrastive_pair_is_the_identity_preference_loss():
    """Rewards half a unit apart: (x1 - x2)^2 = c^2 (difference of log-ratios - 1 / (2 c))^2."""
    case = case_of(base.get("copg"), rows=2)
    c = 0.3
    returns = torch.tensor([0.8, 0.3], dtype=F64)
    case = case._replace(batch=case.batch._replace(sequence_return=returns))
    out = case.output(case.leaf)
    assert case.batch.logp_ref is not None
    log_ratio = torch.where(case.batch.mask, out.logp - case.batch.logp_ref, 0.0).sum(-1)
    loss = make("copg", kl_temp=c)
    preference = (log_ratio[0] - log_ratio[1] - 1 / (2 * c)).square()
    torch.testing.assert_close(objective(loss, begun(loss, case.batch), out), 0.5 * c**2 * preference)


def test_at_the_reference_a_preference_of_two_is_a_comparison_of_two():
    """Groups of two: DPO moves winner from loser by c / 2 each, GRPO by half of 1 / sqrt 2, over the positions."""
    case = everything(spread=0.0)
    batch = case.batch._replace(
        logp_ref=case.batch.logp_old, group=torch.arange(12) // 2, mask=torch.ones_like(case.batch.mask)
    )
    assert batch.sequence_return is not None
    best = batch.sequence_return.view(-1, 2).argmax(-1)
    preference = torch.stack([1 - 2 * best, 2 * best - 1], -1).flatten()
    case = case._replace(batch=batch._replace(preference=preference))
    grpo = make("grpo", ref_kl_coef=0.0, std_floor=1e-300)
    length = batch.mask.shape[1]
    same(make("dpo", kl_temp=0.2), grpo, case, factor=0.2 * length * math.sqrt(2))
    # labels by the same order: every weight is 1 / (2 temperature), once per group
    labels = case._replace(batch=case.batch._replace(success=preference > 0))
    same(make("real", label_temp=0.25), grpo, labels, factor=4 * math.sqrt(2))
    # and so is the rank, by its normal quantile
    quantile = math.sqrt(2) * torch.special.erfinv(torch.tensor(0.5, dtype=F64)).item()
    same(make("g2rpo"), grpo, case, factor=quantile * math.sqrt(2))


def test_constant_clipped_weights_are_the_same_whichever_policy_sampled_them():
    """MiniRL without a gate, its sampler the old policy, weighs as CISPO with the same cap does."""
    case = everything(spread=1.0)
    cispo, mini = make("cispo", eps_high=0.5), make("mini_rl", ratio_max=1.5, eps_low=1e6, eps_high=1e6)
    batch = begun(mini, case.batch._replace(logp_behaviour=case.batch.logp_old))

    def total(loss: PolicyLoss) -> Tensor:
        leaf = case.leaf.detach().requires_grad_()
        prepared = loss.prepare(batch, {})
        sums = loss.loss(batch._replace(coef=prepared.coef, weight=prepared.weight), case.output(leaf), {})
        return torch.autograd.grad(sums.policy, leaf)[0]

    torch.testing.assert_close(total(mini), total(cispo))
    assert total(mini).abs().max() > 0


def test_wide_bounds_leave_the_importance_weighted_gradient():
    case = everything(spread=0.6)
    unbounded = {"fisher_max": 1e9, "objective_min": -1e9, "objective_max": 1e9}
    capo = make("capo", **unbounded)
    same(make("cispo", eps_high=1e6), capo, case)
    same(make("etr", eps_low=1e6, eps_high=1e6, advantage_coef=0.0, variance_coef=0.0), capo, case)
    same(make("bapo", ratio_low=1e-9, ratio_low_max=1e-9, ratio_high=1e9, ratio_high_max=1e9), capo, case)


def test_two_entropy_controllers_at_rest_are_the_same_loss():
    """STEER without weights and DCPO at its target: a clip of .2 and .28, and a ceiling on negative advantages."""
    case = everything(spread=1.0)
    measured = -case.batch.logp_old[case.batch.mask].mean().item()
    steer, dcpo = {"weight_min": 1.0, "ratio_max": 1.5}, {"entropy_target": measured, "ratio_max": 1.5}
    same(make("steer", **steer), make("dcpo", **dcpo), case)
    # the ceiling is in use
    assert not torch.allclose(gradient(make("steer", weight_min=1.0), case), gradient(make("steer", **steer), case))


def test_a_budget_that_holds_everything_is_the_mean_over_positions():
    case = everything(spread=0.6)
    whole = int(case.batch.mask.sum())
    c3po = make("c3po", budget=whole, ref_kl_coef=0.0)
    same(c3po, make("etr", advantage_coef=0.0, variance_coef=0.0), case)
    same(dataclasses.replace(c3po, budget=2 * whole), c3po, case, factor=0.5)


def test_a_bundle_of_one_without_a_tail_is_grpo():
    """Quantiles at the extremes make the value S - max S, whose distance from its mean is that of S."""
    case = case_of(base.get("risk_po"), rows=4)
    batch = case.batch._replace(sequence_return=case.batch.score)
    risk = make("risk_po", level_low=0.0, level_high=1.0, tail_coef=0.0, bundle=1, credit="uniform", baseline="mean")
    grpo = make("grpo", ref_kl_coef=0.0, std_floor=1e-300)
    same(risk, grpo, case._replace(batch=batch))
    # not taking the mean off adds a constant: REINFORCE with the best outcome as the baseline
    natural = begun(dataclasses.replace(risk, baseline="natural"), batch).advantage
    assert batch.score is not None
    want = (batch.score - batch.score.max()) / batch.score.std()
    torch.testing.assert_close(natural[:, 0], want)


def test_two_outcomes_have_one_order():
    """Groups of two have mean and median half-way: the bounded target's sign is the advantage's, inside the band."""
    case = case_of(base.get("gbpo"), spread=0.02)
    batch = case.batch._replace(group=torch.arange(12) // 2)
    ratio = (case.output(case.leaf).logp - batch.logp_old)[batch.mask].exp()
    assert 0.8 < ratio.min() < 1 < ratio.max() < 1.2
    etr = make("etr", advantage_coef=0.0, variance_coef=0.0)
    same(make("gbpo", ref_kl_coef=0.0), etr, case._replace(batch=batch))


def test_a_median_at_the_value_is_the_ablation_with_the_mean():
    """The case gives both critics the same numbers."""
    case = everything()
    same(make("bpo", lam=0.7), make("bpo_mean", lam=0.7), case)


def test_imitating_all_is_supervision():
    """The best four of four without a prior are what SFT sees if every sequence is a demonstration."""
    case = everything()
    shown = case._replace(batch=case.batch._replace(source=torch.full((12,), DEMONSTRATION)))
    same(make("super_hf", keep_best=4, ref_kl_coef=0.0), make("sft"), shown)
    same(make("hpt", gate=99), make("sft"), shown)


def test_pulling_and_clipping_start_alike():
    """At ratio one SPO's parabola, PPO's minimum and the bounded target at its sign have the same slope."""
    case = everything(spread=0.0)
    # the target's value is the lambda-return less the value: the raw advantage
    ppo = make("ppo", **RAW)
    same(make("spo", **RAW), ppo, case)
    same(make("bpo_mean"), ppo, case)
    same(make("mdpo", **RAW), ppo, case)
