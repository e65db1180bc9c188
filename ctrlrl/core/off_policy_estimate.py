"""What a policy would have earned, from episodes that another policy collected.

Episodes are rows [E, T], padded after their end, with any leading dimensions before (a bootstrap's replications). The
functions take the log-ratio of every step, from :func:`ctrlrl.core.ratio.log_ratio`, and form products of ratios as
sums of it. ``l`` is the log-ratio (0 where masked), ``w_t = exp(l_0 + ... + l_t)`` and ``w = w_{T-1}``: an episode that
has ended keeps its weight, as if it went on in a state where nothing is chosen or earned.

A product that the type cannot hold is cut at the largest value of which the sums are still finite. Self-normalised
forms never come near it. They are NaN where every weight is zero: the policy never acts as any episode did.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor


class Estimate(NamedTuple):
    """An estimate of the policy's value."""

    value: Tensor
    """[...] the estimate."""
    parts: Tensor | None
    """[..., E] contributions whose mean is the estimate; None where it is no mean over independent episodes."""


def log_weight(log_ratio: Tensor, mask: Tensor) -> Tensor:
    """Log of the product of the ratios up to and with each step; beyond the end it stays.

    log w_t = l_0 + ... + l_t

    =========  ===========  =====================================
    log_ratio  [..., E, T]  log of policy over behaviour policy
    mask       [..., E, T]  bool, True at the steps that exist
    return     [..., E, T]  log-weights
    =========  ===========  =====================================
    """
    return torch.where(mask, log_ratio, torch.zeros_like(log_ratio)).cumsum(-1)


def discounted_return(reward_t: Tensor, mask: Tensor, gamma: float) -> Tensor:
    """Discounted sum of each episode's rewards.

    G = sum_t gamma^t r_t

    ========  ===========  =====================================
    reward_t  [..., E, T]  rewards
    mask      [..., E, T]  bool, True at the steps that exist
    gamma                  discount
    return    [..., E]     G
    ========  ===========  =====================================
    """
    return _discounted(reward_t, mask, gamma).sum(-1)


def importance_sampling(log_ratio: Tensor, reward_t: Tensor, mask: Tensor, gamma: float) -> Estimate:
    """Trajectory importance sampling: whole returns weighted by whole products. Unbiased.

    mean_e w_e G_e                                         (Precup, Sutton and Singh 2000)

    =========  ===========  =====================================
    log_ratio  [..., E, T]  log of policy over behaviour policy
    reward_t   [..., E, T]  rewards
    mask       [..., E, T]  bool, True at the steps that exist
    gamma                   discount
    return                  estimate and contributions w_e G_e
    =========  ===========  =====================================
    """
    weight = log_weight(log_ratio, mask)[..., -1]
    return _mean(_weighted(weight, discounted_return(reward_t, mask, gamma), reward_t.shape))


def per_decision(log_ratio: Tensor, reward_t: Tensor, mask: Tensor, gamma: float) -> Estimate:
    """Per-decision importance sampling: a reward is weighted by what was chosen before it only. Unbiased.

    mean_e sum_t gamma^t w_t r_t                           (Precup, Sutton and Singh 2000)

    =========  ===========  =====================================
    log_ratio  [..., E, T]  log of policy over behaviour policy
    reward_t   [..., E, T]  rewards
    mask       [..., E, T]  bool, True at the steps that exist
    gamma                   discount
    return                  estimate and contributions
    =========  ===========  =====================================
    """
    terms = _weighted(log_weight(log_ratio, mask), _discounted(reward_t, mask, gamma), reward_t.shape)
    return _mean(terms.sum(-1))


def weighted_importance_sampling(log_ratio: Tensor, reward_t: Tensor, mask: Tensor, gamma: float) -> Estimate:
    """Trajectory importance sampling with weights that sum to one. Biased, consistent, within the observed returns.

    sum_e w_e G_e / sum_e w_e                              (Precup, Sutton and Singh 2000)

    =========  ===========  =====================================
    log_ratio  [..., E, T]  log of policy over behaviour policy
    reward_t   [..., E, T]  rewards
    mask       [..., E, T]  bool, True at the steps that exist
    gamma                   discount
    return                  estimate, no contributions
    =========  ===========  =====================================
    """
    share = log_weight(log_ratio, mask)[..., -1].softmax(-1)
    return Estimate((share * discounted_return(reward_t, mask, gamma)).sum(-1), None)


def weighted_per_decision(log_ratio: Tensor, reward_t: Tensor, mask: Tensor, gamma: float) -> Estimate:
    """Per-decision importance sampling whose weights sum to one at every step. Biased, consistent.

    sum_t gamma^t sum_e w_et r_et / sum_e w_et             (CWPDIS: Thomas 2015, arXiv 1604.00923)

    Episodes that have ended stay in the denominator with the weight they ended with; leaving them out would estimate
    the reward of a step that is reached instead of the reward at that time.

    =========  ===========  =====================================
    log_ratio  [..., E, T]  log of policy over behaviour policy
    reward_t   [..., E, T]  rewards
    mask       [..., E, T]  bool, True at the steps that exist
    gamma                   discount
    return                  estimate, no contributions
    =========  ===========  =====================================
    """
    share = log_weight(log_ratio, mask).softmax(-2)
    return Estimate((share * _discounted(reward_t, mask, gamma)).sum((-2, -1)), None)


def doubly_robust(
    log_ratio: Tensor, reward_t: Tensor, q: Tensor, value: Tensor, value_t: Tensor, mask: Tensor, gamma: float
) -> Estimate:
    """A model's action values corrected by what was observed: unbiased whatever the model, if ``value`` is its mean.

    mean_e V(s_0) + sum_t gamma^t w_t (r_t + gamma V(s_{t+1}) - Q(s_t, a_t))   (Jiang and Li 2016, arXiv 1511.03722)

    The paper's recursion, unrolled. V is the policy's mean of Q, and 0 after a termination. Where an episode was only
    cut, the value of the true next observation lets it go on (as the model says), and 0 estimates the return up to
    the cut.

    =========  ===========  ==============================================================
    log_ratio  [..., E, T]  log of policy over behaviour policy
    reward_t   [..., E, T]  rewards
    q          [..., E, T]  action value of the action taken
    value      [..., E, T]  value of the observation before the step; the first one counts
                            also where masked
    value_t    [..., E, T]  value of the observation after it, 0 where terminated
    mask       [..., E, T]  bool, True at the steps that exist
    gamma                   discount
    return                  estimate and contributions
    =========  ===========  ==============================================================
    """
    surprise = _discounted(reward_t + gamma * value_t - q, mask, gamma)
    terms = _weighted(log_weight(log_ratio, mask), surprise, reward_t.shape)
    return _mean(value[..., 0] + terms.sum(-1))


def weighted_doubly_robust(
    log_ratio: Tensor, reward_t: Tensor, q: Tensor, value: Tensor, value_t: Tensor, mask: Tensor, gamma: float
) -> Estimate:
    """The same with weights that sum to one at every step. Biased, consistent.

    mean_e V(s_0) + sum_t gamma^t sum_e w_et (r + gamma V' - Q)_et / sum_e w_et

    WDR of Thomas and Brunskill (2016, arXiv 1604.00923), its terms in the order of :func:`doubly_robust`.

    =========  ===========  ==============================================================
    log_ratio  [..., E, T]  log of policy over behaviour policy
    reward_t   [..., E, T]  rewards
    q          [..., E, T]  action value of the action taken
    value      [..., E, T]  value of the observation before the step; the first one counts
                            also where masked
    value_t    [..., E, T]  value of the observation after it, 0 where terminated
    mask       [..., E, T]  bool, True at the steps that exist
    gamma                   discount
    return                  estimate, no contributions
    =========  ===========  ==============================================================
    """
    surprise = _discounted(reward_t + gamma * value_t - q, mask, gamma)
    share = log_weight(log_ratio, mask).softmax(-2)
    return Estimate(value[..., 0].mean(-1) + (share * surprise).sum((-2, -1)), None)


def effective_sample_size(log_weight: Tensor) -> Tensor:
    """How many equally weighted episodes the weighted ones are worth, at every step; 0 where every weight is zero.

    (sum_e w_et)^2 / sum_e w_et^2                          (Kong 1992)

    ==========  ===========  =====================================
    log_weight  [..., E, T]  from :func:`log_weight`
    return      [..., T]     between 1 and E
    ==========  ===========  =====================================
    """
    size = (2.0 * log_weight.logsumexp(-2) - (2.0 * log_weight).logsumexp(-2)).exp()
    return torch.where(size.isnan(), torch.zeros_like(size), size)


def _discounted(x: Tensor, mask: Tensor, gamma: float) -> Tensor:
    """gamma^t x_t, 0 where masked."""
    power = gamma ** torch.arange(x.shape[-1], dtype=x.dtype, device=x.device)
    return torch.where(mask, x * power, torch.zeros_like(x))


def _weighted(log_weight: Tensor, x: Tensor, shape: torch.Size) -> Tensor:
    """exp(log_weight) x, cut so that sums over the last two dimensions of ``shape`` are finite; 0 where x is."""
    largest = math.log(torch.finfo(x.dtype).max) - math.log(shape[-1] * shape[-2]) - 1.0
    return x.sign() * (log_weight + x.abs().log()).clamp(max=largest).exp()


def _mean(parts: Tensor) -> Estimate:
    return Estimate(parts.mean(-1), parts)
