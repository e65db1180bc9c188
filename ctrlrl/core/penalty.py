"""Divergences and entropies: sample estimators from a log-ratio, and closed forms.

The estimators take ``log_ratio = logp_new - logp_old`` of samples drawn from *old* and estimate
KL(old || new). To estimate KL(new || other) from samples of *new*, pass the log-ratio the other way round:
``log_ratio(logp_other, logp_new, mask)``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from ctrlrl.core import ratio


def kl_k1(log_ratio: Tensor) -> Tensor:
    """Unbiased, of either sign, high variance (Schulman, "Approximating KL divergence", 2020).

    -l;  E_old[-l] = KL(old || new)

    =========  ======  ======================================
    log_ratio  [B, T]  l = logp_new - logp_old, a ~ old
    return     [B, T]  estimate
    =========  ======  ======================================
    """
    return -log_ratio


def kl_k2(log_ratio: Tensor) -> Tensor:
    """Biased by third order, never negative; its gradient under a ~ new is that of KL(new || old).

    l^2 / 2

    =========  ======  ======================================
    log_ratio  [B, T]  l = logp_new - logp_old, a ~ old
    return     [B, T]  estimate
    =========  ======  ======================================
    """
    return 0.5 * log_ratio.square()


def kl_k3(log_ratio: Tensor) -> Tensor:
    """Unbiased and never negative.

    exp(l) - 1 - l;  E_old[.] = KL(old || new), exact as long as ``|l|`` stays below the clamp of the ratio

    =========  ======  ======================================
    log_ratio  [B, T]  l = logp_new - logp_old, a ~ old
    return     [B, T]  estimate
    =========  ======  ======================================
    """
    return ratio.ratio_minus_one(log_ratio) - log_ratio


def gaussian_kl(mean: Tensor, log_std: Tensor, other_mean: Tensor, other_log_std: Tensor) -> Tensor:
    """KL(self || other) of diagonal Gaussians, summed over the action's dimensions.

    sum_d  log(s'/s) + (s^2 + (m - m')^2) / (2 s'^2) - 1/2

    =============  ========  ==================================================
    mean           [..., D]  m
    log_std        [..., D]  log s; broadcasts against the mean
    other_mean     [..., D]  m'
    other_log_std  [..., D]  log s'
    return         [...]     nats
    =============  ========  ==================================================
    """
    spread = log_std - other_log_std
    distance = (mean - other_mean) * torch.exp(-other_log_std)
    return (0.5 * torch.expm1(2.0 * spread) - spread + 0.5 * distance.square()).sum(-1)


def categorical_kl(logits: Tensor, other_logits: Tensor) -> Tensor:
    """KL(self || other) of categorical distributions; a logit of -inf is an action that does not exist.

    sum_a p_a (log p_a - log q_a)

    ============  ========  ================================
    logits        [..., K]  of p, not normalised
    other_logits  [..., K]  of q, not normalised
    return        [...]     nats; inf where q lacks an action of p
    ============  ========  ================================
    """
    exists = logits > -torch.inf
    log_p, log_q = logits.log_softmax(-1), other_logits.log_softmax(-1)
    zero = torch.zeros_like(log_p)
    return (log_p.exp() * (torch.where(exists, log_p, zero) - torch.where(exists, log_q, zero))).sum(-1)


def kl_between(params: Mapping[str, Tensor], other: Mapping[str, Tensor], mask: Tensor) -> Tensor:
    """KL(self || other) of two policies known by their parameters, as ``Distribution.params`` gives them.

    Either may carry the gradient, so this is also KL(reference || policy). Logits are taken as they are, normalised
    in blocks: where an action is several choices, their divergences add up. Masked positions give 0 and no gradient,
    whatever the parameters hold there.

    ======  ======  =======================================================================
    params          of self, each [B, T, ...]: ``logits``, or ``mean`` and ``log_std``
    other           the same of the other policy
    mask    [B, T]  bool, True where valid
    return  [B, T]  nats
    ======  ======  =======================================================================
    """
    valid = mask.unsqueeze(-1)
    p, q = ({k: torch.where(valid, v, torch.zeros_like(v)) for k, v in d.items()} for d in (params, other))
    if "mean" in p:
        return gaussian_kl(p["mean"], p["log_std"], q["mean"], q["log_std"])
    log_p, log_q = p["logits"], q["logits"]
    exists = log_p > -torch.inf
    zero = torch.zeros_like(log_p)
    difference = torch.where(exists, log_p, zero) - torch.where(exists, log_q, zero)
    return (torch.exp(log_p) * difference).sum(-1)


def gaussian_entropy(log_std: Tensor) -> Tensor:
    """Entropy of a diagonal Gaussian, summed over the action's dimensions.

    sum_d  log s + log(2 pi e) / 2

    =======  ========  =========
    log_std  [..., D]  log s
    return   [...]     nats
    =======  ========  =========
    """
    return (log_std + 0.5 * math.log(2.0 * math.pi * math.e)).sum(-1)


def categorical_entropy(logits: Tensor) -> Tensor:
    """Entropy of a categorical distribution; a logit of -inf is an action that does not exist.

    -sum_a p_a log p_a

    ======  ========  ======================
    logits  [..., K]  not normalised
    return  [...]     nats
    ======  ========  ======================
    """
    log_p = logits.log_softmax(-1)
    return -(log_p.exp() * torch.where(logits > -torch.inf, log_p, torch.zeros_like(log_p))).sum(-1)
