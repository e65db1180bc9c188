"""Log-ratios between policies: the only place where one log-probability is subtracted from another.

The clamp sits in the exponential alone. Whatever uses a log-ratio directly (preference losses,
sequence sums, KL estimators) keeps its value and its gradient however large it is.
"""

from __future__ import annotations

from typing import Literal, TypeAlias

import torch
from torch import Tensor

from ctrlrl.core import reduce

Level: TypeAlias = Literal["token", "turn", "sequence", "sequence_sum"]

LOG_RATIO_CLAMP = 20.0
"""Bound on a log-ratio inside an exponential: ratios lie in [2e-9, 4.9e8]. Beyond it the gradient is zero."""


def log_ratio(
    logp: Tensor, logp_old: Tensor, mask: Tensor, level: Level = "token", turn: Tensor | None = None
) -> Tensor:
    """How much likelier the policy makes each position than another policy did, in nats.

    token         l_t = logp_t - logp_old_t
    turn          mean of l over the valid positions of the turn, given to each of them
    sequence      mean of l over the valid positions of the sequence (GSPO, arXiv 2507.18071)
    sequence_sum  their sum: the log-ratio of the whole sequence (DPO, arXiv 2305.18290)

    Positions that are masked, or at level ``turn`` have no turn, give 0 and receive no gradient,
    whatever the inputs hold there.

    ========  ======  ==============================================================
    logp      [B, T]  log-probability under the policy
    logp_old  [B, T]  log-probability under the other policy
    mask      [B, T]  bool, True where valid
    level             see above
    turn      [B, T]  int, turn of each position, -1 = none; level ``turn`` only
    return    [B, T]  log-ratios
    ========  ======  ==============================================================
    """
    valid = mask
    if level == "turn":
        if turn is None:
            raise ValueError("level='turn' needs turn: [B, T] integers, -1 where a position has no turn")
        valid = mask & (turn >= 0)
    zero = logp.new_zeros(())
    if level == "sequence":
        length = mask.sum(-1, keepdim=True).clamp(min=1)
        return torch.where(valid, sequence_log_ratio(logp, logp_old, mask, length), zero)
    token = torch.where(valid, logp - logp_old, zero)
    if level == "token":
        return token
    if level == "turn" and turn is not None:
        count = reduce.segment_sum(valid.to(token.dtype), turn).clamp(min=1.0)
        spread = reduce.segment_sum(token, turn) / count
    elif level == "sequence_sum":
        spread = token.sum(-1, keepdim=True)
    else:
        raise ValueError(f"level must be token, turn, sequence or sequence_sum, not {level!r}")
    return torch.where(valid, spread, zero)


def sequence_log_ratio(logp: Tensor, logp_old: Tensor, mask: Tensor, length: Tensor) -> Tensor:
    """Level ``sequence`` of :func:`log_ratio` as one number per sequence, 0 for an empty one.

    mean of l over the valid positions of the sequence

    ========  ======  ==============================================
    logp      [B, T]  log-probability under the policy
    logp_old  [B, T]  log-probability under the other policy
    mask      [B, T]  bool, True where valid
    length    [B, 1]  number of valid positions, at least 1
    return    [B, 1]  log-ratios
    ========  ======  ==============================================
    """
    return log_ratio(logp, logp_old, mask).sum(-1, keepdim=True) / length


def ratio(log_ratio: Tensor) -> Tensor:
    """Probability ratio, finite for any log-ratio.

    exp(clamp(l, -C, C)),  C = ``LOG_RATIO_CLAMP``

    =========  ======  ==============================================
    log_ratio  any     l, from :func:`log_ratio`
    return     same    ratio; gradient zero where ``|l| > C``
    =========  ======  ==============================================
    """
    return log_ratio.clamp(-LOG_RATIO_CLAMP, LOG_RATIO_CLAMP).exp_()


def ratio_minus_one(log_ratio: Tensor) -> Tensor:
    """The same less one, exact also near one, where float32 cannot hold the difference.

    expm1(clamp(l, -C, C))

    =========  ======  ==============================================
    log_ratio  any     l, from :func:`log_ratio`
    return     same    ratio - 1; gradient zero where ``|l| > C``
    =========  ======  ==============================================
    """
    return log_ratio.clamp(-LOG_RATIO_CLAMP, LOG_RATIO_CLAMP).expm1_()
