"""Closed forms of what each loss does in expectation, for tests/contracts/test_exactness.py: sums over sequences,
or over pairs of them, of the exact task. They share no code with the losses."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from helpers.enumeration import Task
from torch import Tensor
from torch.nn import functional

from ctrlrl.types import TEMPERED


@dataclass(frozen=True)
class Claim:
    """One setting of a loss and the exact direction, to be climbed, that it takes in expectation."""

    kind: str
    """unbiased; scaled: a constant times the policy gradient; or stated bias, and what it is."""
    form: Callable[[Task], Tensor]
    settings: dict[str, Any] = field(default_factory=dict)
    members: Callable[[Task], dict[str, Any]] = lambda world: {}
    """Further arguments of ``expected_ascent``."""
    world: dict[str, bool] = field(default_factory=dict)
    """Further arguments of the task."""


def exact(factor: float | Callable[[Task], float] = 1.0, of: str = "outcome", **settings) -> Claim:
    """The policy gradient of the expected return (or of another reward of the task), times a factor."""

    def form(w: Task) -> Tensor:
        return (factor(w) if callable(factor) else factor) * w.policy_gradient(getattr(w, of).double())

    return Claim("unbiased" if factor == 1.0 else "scaled", form, settings)


def biased(what: str, form: Callable[[Task], Tensor], members=None, world=None, **settings) -> Claim:
    return Claim(f"stated bias: {what}", form, settings, members or (lambda w: {}), world or {})


def per_position(w: Task) -> float:
    return 1.0 / w.length


# -- pieces of closed forms --------------------------------------------------------------------------


def gap(x: Tensor) -> Tensor:
    """[N, N] x_a - x_b."""
    return x.unsqueeze(1) - x


def zscore(x: Tensor, floor: float = 1e-6) -> Tensor:
    """[N, N] the first one's score in a group of two: half the gap over the unbiased deviation |gap| / sqrt 2."""
    return 0.5 * gap(x) / (gap(x).abs() / math.sqrt(2) + floor)


def wins(w: Task) -> Tensor:
    """[N] chance to beat a partner less the chance to lose to one."""
    return torch.stack([w.p[w.outcome < r].sum() - w.p[w.outcome > r].sum() for r in w.outcome])


def grouped(w: Task, floor: float = 1e-6) -> Tensor:
    """GRPO of two: wins less losses, over sqrt 2, up to the floor; not the size of the gap."""
    return w.push(w.between(zscore(w.outcome, floor))) / w.length


def to_reference(w: Task, weight: Tensor) -> Tensor:
    """Descent of KL(reference || policy) at each prefix, by how often it is visited."""
    return w.visits(weight) * (w.ref - w.policy)


def entropy_gradient(w: Task) -> Tensor:
    """[S, V] of each prefix's entropy by its own logits."""
    return -w.policy * (w.policy.log() + w.entropy.unsqueeze(-1))


def tempered(w: Task, temperature: Tensor | float) -> Tensor:
    """[..., S, V] the policy at another temperature."""
    t = torch.as_tensor(temperature, dtype=torch.float64)
    return (w.policy.log() / t[..., None, None]).softmax(-1)


def log_ratio_to_reference(w: Task) -> Tensor:
    """[N]"""
    return (w.logp - w.ref.log()[w.row, w.sequence]).sum(-1)


def group(**settings) -> Claim:
    return biased("wins less losses", grouped, **settings)


# -- closed forms of the biased losses ---------------------------------------------------------------


def median_sign(w: Task) -> Tensor:
    """The size of the advantage with the sign of the distance to the median."""
    away = w.q[w.row, w.sequence] - w.median[w.row]
    return w.push(w.p.unsqueeze(-1) * w.advantage.abs() * away.sign()) / w.length


def cut_second_row(w: Task) -> Tensor:
    """Budget of one and a half sequences: the first counts in full, the second with its first half."""
    budget = w.length + w.length // 2
    counted = 1.0 + (torch.arange(w.length) < w.length // 2).double()
    return w.push(w.between(zscore(w.outcome)).unsqueeze(-1) * counted) / budget


def trusted(model_step: float, fisher_max: float, bound: float) -> Callable[[Task], Tensor]:
    """Advantages of the groups where the quadratic model of the position's own step keeps within its bounds."""

    def form(w: Task) -> Tensor:
        v = functional.one_hot(w.sequence, w.vocabulary).double() - w.policy[w.row]
        pi = w.policy[w.row]
        fisher = torch.diag_embed(pi) - pi.unsqueeze(-1) * pi.unsqueeze(-2)
        # [N, 1, T]: of the first one's positions, whoever the partner is
        square, own = (x.unsqueeze(1) for x in (v.square().sum(-1), torch.einsum("ntv,ntvu,ntu->nt", v, fisher, v)))
        a = zscore(w.outcome).unsqueeze(-1)
        along = model_step * a * square
        change = a * along + 0.5 * a * (along.square() - (model_step * a).square() * own)
        kept = (change.abs() <= bound) & (0.5 * along.square() <= fisher_max)
        assert 0.1 < kept.double().mean() < 0.9
        return w.push(w.between(torch.where(kept, a, 0.0))) / w.length

    return form


def regularised_return(w: Task, temperature: float) -> Tensor:
    """Policy gradient of E[R] - c KL(policy || reference), the KL of whole sequences."""
    reference = w.ref.log()[w.row, w.sequence].sum(-1)

    def value(logp: Tensor, _: Tensor) -> Tensor:
        total = logp.sum(-1)
        return (total.exp() * (w.outcome - temperature * (total - reference))).sum()

    return w.gradient(value)


def by_answers(sharpness: float, threshold: float) -> Callable[[Task], Tensor]:
    """GRPO, weighed by the entropy of the two answers: log 2 or 0. A single group says nothing about others."""

    def form(w: Task) -> Tensor:
        entropy = math.log(2) * (gap(w.answer) != 0).double()
        return w.push(w.between(torch.sigmoid(sharpness * (entropy - threshold)) * zscore(w.outcome))) / w.length

    return form


def most_telling_steps(w: Task) -> Tensor:
    """A fifth of the positions, those of highest entropy; each row that has one counts the same."""
    weight = torch.zeros_like(w.logp)
    entropy, count = w.entropy[w.row], math.ceil(0.2 * 2 * w.length)
    a = zscore(w.outcome)
    for i in range(len(w.p)):
        for j in range(len(w.p)):
            both = [(-entropy[k, t].item(), place, t) for place, k in enumerate((i, j)) for t in range(w.length)]
            chosen = sorted(both)[:count]
            rows = [[t for _, place, t in chosen if place == which] for which in (0, 1)]
            present = sum(bool(r) for r in rows)
            for k, steps, value in ((i, rows[0], a[i, j]), (j, rows[1], a[j, i])):
                for t in steps:
                    weight[k, t] += w.p[i] * w.p[j] * value / (len(steps) * present)
    return w.push(weight)


def distinct(score_gap: float) -> Callable[[Task], Tensor]:
    """Half the gap, where the scores differ enough."""

    def form(w: Task) -> Tensor:
        kept = (gap(w.score).abs() >= score_gap).double()
        return w.push(w.between(kept * 0.5 * gap(w.outcome))) / w.length

    return form


def joined_by_an_expert(w: Task) -> Tensor:
    """Groups of two where a member succeeds, else of three with the demonstration."""
    d, told = w.demonstration, (gap(w.score).abs() >= 0.1).double()
    a = told * gap(w.outcome)
    failed = (~w.success).double()
    both = torch.outer(failed, failed)
    own = w.between((1 - both) * a / 2) + w.between(both * (a + a[:, d, None]) / 3) * 2 / 3
    expert = torch.zeros_like(own)
    expert[d] = (torch.outer(w.p, w.p) * both * (a[d].unsqueeze(1) + a[d])).sum() / 3 / 3
    return w.push(own + expert) / w.length


def pulled_to_hotter(w: Task) -> Tensor:
    """GRPO and, as everything succeeds here, the tempered policy less the policy, at each prefix."""
    blend = 0.1 / 1.1
    return (1 - blend) * grouped(w) + blend * w.visits(w.p) * (tempered(w, 1.2) - w.policy) / w.length


def pulled_by_entropy(target: float) -> Callable[[Task], Tensor]:
    """Each group by its own sampled entropy and its own share of successes."""

    def form(w: Task) -> Tensor:
        mean = -w.logp.mean(-1)
        measured = 0.5 * (mean.unsqueeze(1) + mean)
        hot = measured <= target
        assert hot.any() and not hot.all()
        good = (w.score > 0.05).double()
        share = 0.5 * (good.unsqueeze(1) + good)
        distance = (measured - target).abs().clamp(max=0.1)
        blend = torch.where(share > 0, distance / share / (1 + distance / share), 0.0)
        ratio = [(tempered(w, t)[w.row, w.sequence] / w.logp.exp()).unsqueeze(1) for t in (1.2, 0.8)]
        added = torch.where(hot.unsqueeze(-1), *ratio) * good[:, None, None]
        f = (1 - blend).unsqueeze(-1) * zscore(w.outcome).unsqueeze(-1) + blend.unsqueeze(-1) * added
        return w.push(w.between(f)) / w.length

    return form


def first_of_turn(w: Task) -> Tensor:
    """Only the action that opens a turn is credited; the mean over the group's turns takes its own share off."""
    starts = (torch.arange(w.length) % w.turn_length == 0).double()
    turns = w.length // w.turn_length
    return (1 - 0.5 / turns) / 0.02 * w.push(w.p.unsqueeze(-1) * w.advantage * starts) / turns


def preferred(temperature: float, sft: float = 0.0) -> Callable[[Task], Tensor]:
    """Winner less loser by the chance that the reference-relative margin gives to the wrong order, plus the winner."""

    def form(w: Task) -> Tensor:
        margin = temperature * gap(log_ratio_to_reference(w))
        right = torch.where(gap(w.outcome) > 0, torch.sigmoid(-margin), 0.0)
        pull = 2 * temperature * (w.between(right) - w.between(right.T.contiguous()))
        return w.push(pull + 2 * sft / w.length * w.between((gap(w.outcome) > 0).double()))

    return form


def modulated(w: Task) -> Tensor:
    """The z-score by a turn's confidence, a bonus for the next one's clarity, less the mean over the group's turns."""
    turns = w.length // w.turn_length
    entropy = w.entropy[w.row].view(-1, turns, w.turn_length).mean(-1)
    pair = torch.stack([entropy.unsqueeze(1).expand(-1, len(w.p), -1), entropy.expand(len(w.p), -1, -1)], -2)
    low, high = pair.amin((-1, -2), keepdim=True), pair.amax((-1, -2), keepdim=True)
    h = (pair - low) / (high - low + 1e-8)
    confidence = (-h).exp()
    confidence = confidence / (confidence.mean((-1, -2), keepdim=True) + 1e-8)
    a = torch.stack([zscore(w.outcome), -zscore(w.outcome)], -1).unsqueeze(-1)
    bonus = torch.cat([(-h[..., 1:]).exp(), torch.zeros_like(h[..., :1])], -1)
    value = a * confidence + 0.1 * bonus
    value = value - value.mean((-1, -2), keepdim=True)
    return w.push(w.between(value[..., 0, :]).repeat_interleave(w.turn_length, -1)) / w.length


def entropy_band(smooth: float, low: float, high: float) -> Callable[[Task], Tensor]:
    """GRPO and the entropy's gradient, turned where it has left the band around its mean at that turn."""

    def form(w: Task) -> Tensor:
        entropy = w.entropy[w.row].view(len(w.p), -1, w.turn_length)
        mean = entropy.mean(-1)
        past = (0.5 * (mean.unsqueeze(1) + mean)).unsqueeze(-1)
        now = entropy.unsqueeze(1)
        slope = ((now > (1 + high) * past).double() - (now < (1 - low) * past).double()) / past
        weight = w.between(0.001 * (1 - smooth * slope).flatten(-2))
        return grouped(w) + w.visits(weight) * entropy_gradient(w) / w.length

    return form


def towards_reference(coef: float, floor: float = 1e-6) -> Callable[[Task], Tensor]:
    """GRPO and the estimator k3, whose gradient is that of KL(reference || policy) at the visited prefixes."""
    return lambda w: grouped(w, floor) + coef * to_reference(w, w.p) / w.length


def two_channels(w: Task) -> Tensor:
    """A vote of the channels' z-scores, brought to deviation one in the group."""
    total = torch.stack([zscore(x, 1e-4) for x in w.rewards.unbind(-1)]).sum(0)
    return w.push(w.between(total / (math.sqrt(2) * total.abs() + 1e-4))) / w.length


def taught_or_reinforced(w: Task) -> Tensor:
    """The demonstration where both failed, else half the gap."""
    failed = (~w.success).double()
    both = torch.outer(failed, failed)
    taught = (torch.outer(w.p, w.p) * both).sum() * functional.one_hot(torch.tensor(w.demonstration), len(w.p))
    return w.push(taught + w.between((1 - both) * 0.5 * gap(w.outcome))) / w.length


def score_norm(w: Task) -> Tensor:
    """[N] squared norm of grad log pi of each sequence: 1 - 2 pi(a) + sum pi^2 by position."""
    chosen = w.policy[w.row, w.sequence]
    return (1 - 2 * chosen + w.policy[w.row].square().sum(-1)).sum(-1)


def norm_baseline(w: Task) -> Tensor:
    """The gap, times the partner's share of the two squared norms."""
    n = score_norm(w)
    return w.push(w.between(gap(w.outcome) * n / (n.unsqueeze(1) + n))) / w.length


def norm_baseline_by_signal(w: Task) -> Tensor:
    """The same, every group's gradient times its share of signal: 4 g1.g2 / |g1 + g2|^2 in [0, 1]."""
    n = score_norm(w)
    unit = torch.eye(len(w.p), dtype=torch.float64)
    score = torch.stack([w.push(row).flatten() for row in unit]) / w.length
    a = gap(w.outcome) * n / (n.unsqueeze(1) + n)
    first, second = a.unsqueeze(-1) * score.unsqueeze(1), a.T.unsqueeze(-1) * score
    product, square = (first * second).sum(-1), (first + second).square().sum(-1)
    share = torch.where(square > 1e-20, 4 * product / square.clamp(min=1e-20), 0.0).clamp(0, 1)
    each = 0.5 * share.unsqueeze(-1) * (first + second)
    return torch.einsum("a,b,abk->k", w.p, w.p, each).view_as(w.theta)


def filtered(best: float) -> Callable[[Task], Tensor]:
    """Exact advantages, by the expected number of copies: 2 b / (1 + b) for a winner, 2 / (1 + b) for a loser."""

    def form(w: Task) -> Tensor:
        copies = 1 + (best - 1) / (best + 1) * wins(w)
        return w.push((w.p * copies).unsqueeze(-1) * w.advantage) / w.length

    return form


def shaped(exponent: float, top: float = 0.0, tail: float = 0.0) -> Callable[[Task], Tensor]:
    """pi (r - E r) at the demonstration's prefixes, r of its actions (1 - pi)^b / pi and of others by rank."""

    def form(w: Task) -> Tensor:
        out = torch.zeros_like(w.theta)
        for row, action in zip(w.row[w.demonstration].tolist(), w.sequence[w.demonstration].tolist(), strict=True):
            pi = w.policy[row]
            r = torch.full_like(pi, tail)
            r[pi.topk(min(2, w.vocabulary)).indices] = top
            r[action] = (1 - pi[action]) ** exponent / pi[action]
            out[row] += pi * (r - (pi * r).sum()) / w.length
        return out

    return form


def winners_only(w: Task) -> Tensor:
    """A group's winner alone, at full weight."""
    return w.push(w.between(2 * zscore(w.outcome).clamp(min=0))) / w.length


def amplified(w: Task) -> Tensor:
    """Half the gap of scores, three times it for winners; one for the perfect."""
    half = 0.5 * gap(w.score)
    f = torch.where(half >= 0, 3 * half, half)
    return w.push(w.between(torch.where(w.success.unsqueeze(1), 1.0, f))) / (2 * w.length)


def losers_only(w: Task) -> Tensor:
    """With both quantiles inside the gap d, the loser's value is -d; over two deviations d / sqrt 2 it is -2 / d."""
    lost = gap(w.score) < 0
    return w.push(w.between(torch.where(lost, 2 / torch.where(lost, gap(w.score), 1.0), 0.0))) / w.length


def without_void(w: Task) -> Tensor:
    """GRPO on the rows left, each position of them the same."""
    kept = (~w.void.any(-1)).double()
    assert 0 < (w.p * kept).sum() < 1
    share = kept.unsqueeze(1) * 2 / (1 + kept)
    return w.push(w.between(share * zscore(w.outcome))) / w.length


def thinned(low: float) -> Callable[[Task], Tensor]:
    """Half the gap; of the positions of high covariance one is dropped, an equal share of each."""

    def form(w: Task) -> Tensor:
        half = 0.5 * gap(w.outcome)
        mean = w.logp.mean(-1)
        centre = 0.5 * (mean.unsqueeze(1) + mean)
        first = half.unsqueeze(-1) * (w.logp.unsqueeze(1) - centre.unsqueeze(-1)) > low
        second = -half.unsqueeze(-1) * (w.logp - centre.unsqueeze(-1)) > low
        number = first.sum(-1) + second.sum(-1)
        kept = torch.where(first, 1 - 1 / number.clamp(min=1).unsqueeze(-1), 1.0)
        assert (kept < 1).any()
        return w.push(w.between(half.unsqueeze(-1) * kept)) / w.length

    return form


def steadied(w: Task) -> Tensor:
    """GRPO, each position by 0.8 ^ (its entropy change / the largest of the group)."""
    pi, entropy = w.policy, w.entropy
    each = pi * (pi.log() + entropy.unsqueeze(-1))
    change = (each - (pi * each).sum(-1, keepdim=True))[w.row, w.sequence].abs()
    a = zscore(w.outcome)
    own = a.abs().unsqueeze(-1) * change.unsqueeze(1)
    peak = torch.maximum(own.amax(-1), (a.abs().unsqueeze(-1) * change).amax(-1)).clamp(min=0.02)
    return w.push(w.between(a.unsqueeze(-1) * 0.8 ** (own / peak.unsqueeze(-1)))) / w.length


def best_of_two(w: Task) -> Tensor:
    """Cross-entropy to the best of two, p (2 P(worse) + P(equal)), and KL(reference || policy) on its way."""
    best = w.p * torch.stack([2 * w.p[w.score < s].sum() + w.p[w.score == s].sum() for s in w.score])
    torch.testing.assert_close(best.sum(), w.p.sum())
    return (w.push(best) + 0.35 * to_reference(w, best)) / w.length


def tempered_winners(w: Task) -> Tensor:
    """c E over tempered pairs of the winner's score function; GRPO's rows agree here and say nothing."""
    q = tempered_chance(w)
    return 0.7 * w.push(q * torch.stack([q[w.outcome < r].sum() for r in w.outcome])) / w.length


def tempered_chance(w: Task) -> Tensor:
    """[N] probability of each sequence at the temperature 1.2."""
    return tempered(w, 1.2)[w.row, w.sequence].prod(-1)


def hot_pair(w: Task) -> dict[str, Any]:
    """Two tempered rows among four of GRPO's: c is for the mean over the one and the mean over the other."""
    return {"chance": tempered_chance(w), "others": (0,) * 4, "source": (TEMPERED, TEMPERED, 0, 0, 0, 0)}


def demonstration_only(w: Task) -> Tensor:
    """Cross-entropy to the expert's sequence."""
    return w.push(functional.one_hot(torch.tensor(w.demonstration), len(w.p)).double()) / w.length


def over_turns(w: Task) -> float:
    return 1.0 / (w.length * w.turn_length)
