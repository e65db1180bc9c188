"""Curvature-aware policy optimisation: positions whose own step would move the policy too far are left out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ctrlrl.core import entropy, head, ratio
from ctrlrl.losses.base import Knobs, register
from ctrlrl.losses.group import Aggregation, GroupLoss
from ctrlrl.losses.needs import Need, Slot
from ctrlrl.types import PolicyOutput, SequenceBatch


@register
@dataclass(frozen=True)
class CAPO(GroupLoss):
    """-r A where objective_min <= m_H <= objective_max and m_F <= fisher_max, else 0

    m_H = A v.u + A [ (v.u)^2 - u.F u ] / 2,  m_F = (v.u)^2 / 2 (empirical) or u.F u / 2 (full),  u = model_step A v

    v is the gradient of log pi by the logits and F their Fisher matrix, so m_H and m_F are second-order models of the
    change of A r and of the policy (its KL) if a step u were taken on this position alone.
    """

    paper: ClassVar[str] = (
        "Stabilizing Policy Gradients for Sample-Efficient Reinforcement Learning in LLM Reasoning, arXiv:2510.00819"
    )
    differs: ClassVar[str] = (
        "The step is modelled on the logits, as plain gradient ascent with last-layer features of length one; the "
        "released code models the optimiser's own step on the last layer. Its thresholds differ by run (fisher_max "
        "1e-5 to 1e-3, objective_max 5e-4 to 0.1); model_step is set here so that both bind on unlikely actions. Only "
        "positions are rejected, not whole sequences or batches. For Gaussians v and F are those of the mean and log "
        "sigma, both by the formula, and -F stands for the second derivative of log pi."
    )
    slots: ClassVar[Mapping[Slot, str]] = {
        "mask": "quadratic model of the position's own step",
        "ratio": "token",
        "advantage": "(R - group mean) / group std",
    }
    needs: ClassVar[frozenset[Need]] = frozenset({"step_dist", "plain_action", "groups", "sequence_return"})
    aggregation: ClassVar[Aggregation] = "token_mean"

    model_step: float = 0.002
    """Step size of the model."""
    fisher_max: float = 1e-5
    """Largest change of the policy."""
    objective_min: float = -0.01
    """Smallest change of the objective."""
    objective_max: float = 0.01
    """Largest change of the objective."""
    fisher: Literal["empirical", "full"] = "empirical"
    """Measure of the policy's change: by the action taken, as in the paper, or its mean over all actions."""

    def per_token(self, batch: SequenceBatch, out: PolicyOutput, knobs: Knobs) -> Tensor:
        assert batch.coef is not None
        a = batch.coef["advantage"]
        loss = -head.ratio_advantage(ratio.ratio(ratio.log_ratio(out.logp, batch.logp_old, batch.mask)), a)
        return torch.where(self.trusted(batch, out), loss, torch.zeros_like(loss))

    def trusted(self, batch: SequenceBatch, out: PolicyOutput) -> Tensor:
        """[B, T] bool: positions whose modelled step stays within the bounds."""
        assert batch.coef is not None
        a = batch.coef["advantage"]
        length, own = geometry({k: v.detach() for k, v in out.dist.params().items()}, batch.action)
        step = self.model_step * a
        empirical, full = (step * length).square(), step.square() * own
        objective = a * step * length + 0.5 * a * (empirical - full)
        policy = 0.5 * (full if self.fisher == "full" else empirical)
        return (self.objective_min <= objective) & (objective <= self.objective_max) & (policy <= self.fisher_max)

    def metrics(self, batch: SequenceBatch, out: PolicyOutput, knobs: Knobs) -> dict[str, Tensor]:
        rejected = (~self.trusted(batch, out)).to(out.logp.dtype)
        return super().metrics(batch, out, knobs) | {"rejected": rejected}


def geometry(params: Mapping[str, Tensor], action: Tensor) -> tuple[Tensor, Tensor]:
    """|v|^2 and v.F v of the score v = grad log pi(action), by logits, or by a Gaussian's mean and log sigma.

    ======  =====  ===============================
    params         logits, or mean and log_std
    action  [...]  the action taken
    |v|^2   [...]  squared length of the score
    v.F v   [...]  the same, weighed by the Fisher matrix diag(p) - p p' (choice) or diag(1 / s^2, 2) (Gaussian)
    ======  =====  ===============================
    """
    if "log_std" in params:
        z, precision = entropy.standardised_action(params, action), torch.exp(-2.0 * params["log_std"])
        mean, spread = z.square() * precision, (z.square() - 1.0).square()
        return (mean + spread).sum(-1), (mean * precision + 2.0 * spread).sum(-1)
    p = entropy.log_probabilities(params, action).exp()
    v = torch.zeros_like(p).scatter(-1, action.unsqueeze(-1), 1.0) - p
    return v.square().sum(-1), (p * v.square()).sum(-1) - (p * v).sum(-1).square()
