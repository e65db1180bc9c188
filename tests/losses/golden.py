"""How a golden table is read off a loss: the weight on grad log-prob, by autograd, in float64."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ctrlrl.losses.base import PolicyLoss
from ctrlrl.nets.heads import Categorical, DiagonalGaussian
from ctrlrl.types import PolicyOutput, SequenceBatch


def batch_of(
    ratios: Tensor, advantage: Tensor, mask: Tensor | None = None, value: Tensor | None = None, **values: Tensor
) -> tuple[SequenceBatch, PolicyOutput]:
    """A batch [B, T] with the given ratios and advantages; ``values`` are critics' outputs [B, T].

    value_target is value + advantage, so that R - V is the advantage.
    """
    shape = ratios.shape
    logp_old = torch.linspace(-1.0, -2.0, ratios.numel(), dtype=torch.float64).reshape(shape)
    logp = (logp_old + ratios.log()).detach().requires_grad_()
    value = torch.zeros(shape, dtype=torch.float64) if value is None else value
    dist = DiagonalGaussian(torch.zeros(*shape, 1, dtype=torch.float64), torch.zeros(*shape, 1, dtype=torch.float64))
    batch = SequenceBatch(
        obs=torch.zeros(*shape, 1, dtype=torch.float64),
        action=torch.zeros(*shape, 1, dtype=torch.float64),
        mask=torch.ones(shape, dtype=torch.bool) if mask is None else mask,
        logp_old=logp_old,
        advantage=advantage,
        value_target=value + advantage,
        value_old=value,
        dist_old=dist.params(),
    )
    critics = {"value": value, "median": value} | values
    return batch, PolicyOutput(logp, torch.zeros(shape, dtype=torch.float64), critics, dist)


def weights(
    loss: PolicyLoss, batch: SequenceBatch, out: PolicyOutput, knobs: Mapping[str, Tensor] | None = None
) -> Tensor:
    """[B, T] ascent weight on grad log-prob, times the denominator: what the golden tables list."""
    knobs = knobs or {"step_size": torch.tensor(1.0, dtype=torch.float64)}
    prepared = loss.prepare(batch, knobs)
    batch = batch._replace(coef=prepared.coef, weight=prepared.weight)
    total = loss.loss(batch, out, knobs).policy
    (gradient,) = torch.autograd.grad(total, out.logp)
    return -gradient


def column(*numbers: float) -> Tensor:
    """[B, 1] float64."""
    return torch.tensor(numbers, dtype=torch.float64).unsqueeze(-1)


def categorical_output(logits: Tensor, action: Tensor) -> PolicyOutput:
    """A policy output over a softmax table, logits [B, T, K] and actions [B, T]."""
    dist = Categorical(logits)
    return PolicyOutput(dist.log_prob(action), dist.entropy(), {}, dist)
