"""How a golden table is read off a loss: the weight on grad log-prob, by autograd, in float64."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from ctrlrl.losses.base import PolicyLoss
from ctrlrl.nets.heads import Categorical, DiagonalGaussian
from ctrlrl.types import DEMONSTRATION, RETRIED, TEMPERED, PolicyOutput, SequenceBatch


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
    knobs = knobs_of(loss, 0.0) if knobs is None else knobs
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


# -- a batch with everything in it ----------------------------------------------------------------


class Case(NamedTuple):
    """A batch in which nothing is missing, and the policy as a function of one leaf tensor."""

    leaf: Tensor
    """[B, T, K] logits, or [B, T, 2] means for losses on Gaussians."""
    batch: SequenceBatch
    output: Callable[[Tensor], PolicyOutput]
    """The policy's output at a leaf."""


CHOICES = 4


def case_of(
    loss: type[PolicyLoss] | PolicyLoss,
    rows: int = 12,
    length: int = 4,
    spread: float = 0.3,
    seed: int = 3,
    dtype: torch.dtype = torch.float64,
    peak: float = 1.0,
) -> Case:
    """Groups of four (or ``rows``) sequences in two tasks, with turns of two positions; ``spread`` 0 is on-policy.

    A high ``peak`` makes the collecting policy sure of its choices.
    """
    g = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)

    gaussian = bool(loss.needs & {"gaussian", "denoising", "matching"})
    size = 2 if gaussian else CHOICES
    old, ref, behaviour = randn(rows, length, size), randn(rows, length, size), randn(rows, length, size)
    old = peak * old
    leaf = old + spread * randn(rows, length, size)
    log_std = torch.full((rows, length, size), -0.5, dtype=dtype)
    action = randn(rows, length, size) if gaussian else torch.randint(CHOICES, (rows, length), generator=g)

    def distribution(x: Tensor) -> DiagonalGaussian | Categorical:
        return DiagonalGaussian(x, log_std[: len(x)]) if gaussian else Categorical(x)

    lengths = torch.randint(1, length + 1, (rows, 1), generator=g)
    lengths[::4] = length
    mask = torch.arange(length) < lengths
    value, advantage = randn(rows, length), randn(rows, length)
    score = torch.rand(rows, generator=g, dtype=torch.float64).to(dtype)
    group = torch.arange(rows) // min(4, rows)
    success = torch.arange(rows) % 4 < 2
    best, worst = torch.zeros(rows, dtype=torch.long), torch.zeros(rows, dtype=torch.long)
    for k in group.unique():
        members = (group == k).nonzero().flatten()
        best[members[score[members].argmax()]] = 1
        worst[members[score[members].argmin()]] = 1
    wanted = loss.needs | loss.uses
    source, pivot = torch.zeros(rows, dtype=torch.long), torch.zeros(rows, dtype=torch.long)
    if "demonstrations" in wanted:
        source[3::4] = DEMONSTRATION
        solved = torch.arange(rows) % 4 < 2 - group % 3  # groups with two, one and no sequence solved
        success = solved | (torch.arange(rows) % 4 == 3)
    if "tempered" in wanted:
        source[2::4] = source[3::4] = TEMPERED
    if "retries" in wanted:
        source[2::4], source[3::4], pivot = RETRIED, RETRIED, torch.ones(rows, dtype=torch.long)
    support = torch.ones(rows, length, size, dtype=torch.bool)
    if not gaussian:
        support = torch.rand(rows, length, size, generator=g) < 0.6
        support |= torch.nn.functional.one_hot(action, size).bool()
    void = torch.zeros(rows, length, dtype=torch.bool)
    void[1:2, 0] = True
    batch = SequenceBatch(
        obs=torch.zeros(rows, length, 1, dtype=dtype),
        action=action,
        mask=mask,
        logp_old=distribution(old).log_prob(action),
        advantage=advantage,
        value_target=value + advantage,
        value_old=value,
        dist_old=distribution(old).params(),
        logp_ref=distribution(ref).log_prob(action),
        logp_behaviour=distribution(old + 0.01 * behaviour).log_prob(action),
        sequence_return=score * 2.0 - 0.5,
        group=group,
        task=group % 2,
        turn=torch.where(mask, torch.arange(length) // 2, -1),
        entropy_old=distribution(old).entropy(),
        dist_ref=distribution(ref).params(),
        score=score,
        success=success,
        rewards=torch.stack([score, 1.0 - score**2], -1),
        answer=torch.arange(rows) % 3,
        preference=best - worst,
        source=source,
        pivot=pivot,
        void=void,
        support=support,
        coef={"velocity_gain": torch.linspace(0.5, 2.0, length, dtype=dtype).expand(rows, length)}
        if gaussian
        else None,
    )

    def output(x: Tensor) -> PolicyOutput:
        dist = distribution(x)
        critics = {"value": value[: len(x)], "median": value[: len(x)]}
        return PolicyOutput(dist.log_prob(action[: len(x)]), dist.entropy(), critics, dist)

    return Case(leaf, batch, output)


def knobs_of(loss: PolicyLoss, progress: float = 0.5) -> dict[str, Tensor]:
    """The knobs of the loss's controllers in their first iteration."""
    found: dict[str, Tensor] = {}
    for controller in loss.controllers().values():
        values = controller.step(controller.initial(), {"progress": progress})[1]
        found |= {k: torch.tensor(v, dtype=torch.float64) for k, v in values.items()}
    return found


def begun(loss: PolicyLoss, batch: SequenceBatch, knobs: Mapping[str, Tensor] | None = None) -> SequenceBatch:
    """What ``begin`` makes of the batch in a first iteration."""
    return loss.begin(batch, knobs_of(loss) if knobs is None else knobs, loss.memory()).batch


def objective(
    loss: PolicyLoss, batch: SequenceBatch, out: PolicyOutput, knobs: Mapping[str, Tensor] | None = None
) -> Tensor:
    """Scalar: the whole objective that an optimiser step on ``batch`` (after ``begin``) minimises."""
    knobs = knobs_of(loss) if knobs is None else knobs
    prepared = loss.prepare(batch, knobs)
    batch = batch._replace(coef={k: v.detach() for k, v in prepared.coef.items()}, weight=prepared.weight)
    return loss.loss(batch, out, knobs).policy / prepared.denominator
