"""Actions a policy may choose from: nucleus sets, and the policy renormalised on one."""

from __future__ import annotations

import torch
from torch import Tensor


def top_p_support(logits: Tensor, p: float, min_keep: int = 1) -> Tensor:
    """Nucleus: the likeliest actions up to and including the one whose cumulated probability reaches p.

    {a : sum of the probabilities of all likelier actions < p},  at least ``min_keep`` of them

    Of equally likely actions the first come first. A logit of -inf is an action that does not exist: never in
    the set. With p = 1 all others are, however small.

    ========  ========  ======================================
    logits    [..., K]  not normalised
    p                   probability to cover, in (0, 1]
    min_keep            smallest size of the set
    return    [..., K]  bool
    ========  ========  ======================================
    """
    exists = logits > -torch.inf
    if p >= 1.0:
        return exists
    ordered, order = torch.softmax(logits, -1).sort(dim=-1, descending=True, stable=True)
    before = ordered.cumsum(-1) - ordered
    rank = torch.arange(logits.shape[-1], device=logits.device)
    keep = (before < p) | (rank < min_keep)
    return torch.zeros_like(keep).scatter(-1, order, keep) & exists


def restricted_logp(logits: Tensor, allowed: Tensor, action: Tensor) -> Tensor:
    """Log-probability of an action under the policy restricted to the allowed ones and renormalised.

    log ( pi(a) / sum_{b allowed} pi(b) )

    The action itself is taken to be allowed, so that the result stays at or below 0 and finite.

    =======  ========  ==========================================
    logits   [..., K]  not normalised
    allowed  [..., K]  bool
    action   [...]     int64, the chosen action
    return   [...]     log-probability
    =======  ========  ==========================================
    """
    chosen = action.unsqueeze(-1)
    allowed = allowed.scatter(-1, chosen, torch.ones_like(chosen, dtype=torch.bool))
    total = torch.where(allowed, logits, -torch.inf).logsumexp(-1)
    return logits.gather(-1, chosen).squeeze(-1) - total
