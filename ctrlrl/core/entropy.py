"""How a policy's entropy moves: by a step on one action, and by another temperature.

A policy is given by the parameters that ``Distribution.params`` returns: ``logits`` [..., K] of one choice, or
``mean`` and ``log_std`` [..., D] of a Gaussian.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from ctrlrl.core import penalty

Form: TypeAlias = Literal["exact", "single_logit", "released"]


def standardised_action(params: Mapping[str, Tensor], action: Tensor) -> Tensor:
    """Distance of the action from a Gaussian's mean, in deviations.

    z = (a - m) / s

    ======  ========  ====================
    params            mean and log_std
    action  [..., D]  a
    return  [..., D]  z
    ======  ========  ====================
    """
    return (action - params["mean"]) * torch.exp(-params["log_std"])


def log_probabilities(params: Mapping[str, Tensor], action: Tensor) -> Tensor:
    """Log-probabilities of all actions of one choice; several choices at a time are refused.

    ======  ========  ==============================
    params            logits, not normalised
    action  [...]     int64 actions, for their shape
    return  [..., K]  log p
    ======  ========  ==============================
    """
    logits = params["logits"]
    if logits.ndim != action.ndim + 1:
        raise ValueError(
            f"logits {tuple(logits.shape)} and actions {tuple(action.shape)}: expected one choice per position; "
            "a MultiDiscrete space makes several, use a Discrete one"
        )
    return logits.log_softmax(-1)


def entropy_change(params: Mapping[str, Tensor], action: Tensor, form: Form = "exact") -> Tensor:
    """First-order change of the entropy when a gradient step makes ``action`` likelier, per unit of the step.

    A step of size c moves the logits by c (e_a - p):  with g_v = log p_v + H,

    exact         -[p_a g_a - sum_v p_v^2 g_v]      all logits
    single_logit  -(1 - p_a) p_a g_a                the action's own logit alone
    released      -(1 - p_a) g_a                    the same without its factor p_a, as STEER's code (2510.10150)

    A Gaussian's log s moves by c (z^2 - 1) in each dimension and its entropy by their sum; it has the exact form alone.

    ======  =====  ==========================================
    params         logits, or mean and log_std
    action  [...]  the action that the step is on
    form           see above
    return  [...]  dH / dc
    ======  =====  ==========================================
    """
    if "log_std" in params:
        return (standardised_action(params, action).square() - 1.0).sum(-1)
    log_p = log_probabilities(params, action)
    pull = log_p + penalty.categorical_entropy(log_p).unsqueeze(-1)
    index = action.unsqueeze(-1)
    p_a, own = log_p.gather(-1, index).squeeze(-1).exp(), pull.gather(-1, index).squeeze(-1)
    if form == "released":
        return -(1.0 - p_a) * own
    if form == "single_logit":
        return -(1.0 - p_a) * p_a * own
    if form == "exact":
        p = log_p.exp()
        others = torch.where(p > 0, p.square() * pull, torch.zeros_like(p)).sum(-1)
        return others - p_a * own
    raise ValueError(f"form must be exact, single_logit or released, not {form!r}")


def tempered(params: Mapping[str, Tensor], temperature: float | Tensor) -> dict[str, Tensor]:
    """The same policy at another temperature.

    p_T ~ p^(1 / T):  logits / T, or s sqrt(T) with the same mean

    ===========  ===============================
    params       logits, or mean and log_std
    temperature  T; above 1 the entropy is larger
    return       parameters of p_T
    ===========  ===============================
    """
    if "log_std" in params:
        log_std = params["log_std"]
        return {"mean": params["mean"], "log_std": log_std + 0.5 * _like(log_std, temperature).log()}
    return {"logits": (params["logits"] / temperature).log_softmax(-1)}


def tempered_log_ratio(params: Mapping[str, Tensor], action: Tensor, temperature: float | Tensor) -> Tensor:
    """How much likelier the policy at temperature T makes the action than the policy itself.

    log p_T(a) - log p(a);  for a Gaussian  |z|^2 (1 - 1/T) / 2 - D log(T) / 2, which has no bound for T > 1

    ===========  =====  ===========================
    params              logits, or mean and log_std
    action       [...]  a
    temperature         T
    return       [...]  log-ratio; 0 for T = 1
    ===========  =====  ===========================
    """
    if "log_std" in params:
        z = standardised_action(params, action)
        t = _like(z, temperature)
        return (0.5 * z.square() * (1.0 - 1.0 / t) - 0.5 * t.log()).sum(-1)
    log_p = log_probabilities(params, action)
    index = action.unsqueeze(-1)
    hot = (log_p / temperature).log_softmax(-1).gather(-1, index)
    return (hot - log_p.gather(-1, index)).squeeze(-1)


def _like(x: Tensor, value: float | Tensor) -> Tensor:
    return torch.as_tensor(value, dtype=x.dtype, device=x.device)
