"""One optimiser step of any policy loss, as a pure function of tensors.

All parameters live in one flat vector. The eager step, the compiled one and the CUDA graph are the same
function: :func:`make_step`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from ctrlrl.core import reduce
from ctrlrl.data.rows import split
from ctrlrl.engine.config import OnPolicyConfig
from ctrlrl.losses.base import Knobs, PolicyLoss
from ctrlrl.types import PolicyOutput, SequenceBatch

Phase: TypeAlias = Literal["joint", "policy", "value"]
Metrics: TypeAlias = dict[str, Tensor]


class OptState(NamedTuple):
    """Parameters and Adam's state; functions return a new one."""

    params: Tensor
    """[P] all parameters, flat."""
    m: Tensor
    """[P] first moments."""
    v: Tensor
    """[P] second moments."""
    clock: Tensor
    """[2] steps taken: by the policy (or joint) update, by the separate value update."""
    alive: Tensor
    """Bool scalar: false once target_kl has stopped this iteration's policy update."""


Step: TypeAlias = Callable[[OptState, SequenceBatch, dict[str, Tensor]], tuple[OptState, Metrics]]


class FlatParameters:
    """A module's parameters as views into one vector: all of them, or those that require gradients."""

    def __init__(self, module: nn.Module, trained_only: bool = False) -> None:
        named = [(n, p) for n, p in module.named_parameters() if p.requires_grad or not trained_only]
        self.names = [n for n, _ in named]
        self.shapes = [p.shape for _, p in named]
        self.sizes = [p.numel() for _, p in named]
        self.flat = torch.cat([p.detach().flatten() for _, p in named]) if named else torch.zeros(0)
        for (_, parameter), view in zip(named, self.views(self.flat).values(), strict=True):
            parameter.data = view

    def views(self, flat: Tensor) -> dict[str, Tensor]:
        """The parameters by name, as views of ``flat`` [P]."""
        parts = flat.split(self.sizes)
        return {n: p.view(s) for n, p, s in zip(self.names, parts, self.shapes, strict=True)}

    def mask(self, prefix: str) -> Tensor:
        """[P] true at parameters whose name begins with ``prefix``."""
        return torch.cat(
            [
                torch.full((size,), name.startswith(prefix), device=self.flat.device)
                for name, size in zip(self.names, self.sizes, strict=True)
            ]
        )


def gradient(f: Callable[[Tensor], tuple[Tensor, Any]], x: Tensor) -> tuple[Tensor, Any]:
    """Gradient and auxiliary output of ``f`` at ``x``; torch.func's where the compiler needs it, autograd elsewhere."""
    if torch.compiler.is_compiling():
        return torch.func.grad(f, has_aux=True)(x)
    x = x.detach().requires_grad_()
    value, aux = f(x)
    return torch.autograd.grad(value, x)[0], aux


def make_step(
    policy: nn.Module, flat: FlatParameters, loss: PolicyLoss, config: OnPolicyConfig, phase: Phase = "joint"
) -> Step:
    """The optimiser step ``(state, update_batch, knobs) -> (state, metrics)``.

    ``phase`` "joint" trains policy and critics in one objective; "policy" and "value" each train their own
    parameters with Adam moments of their own.
    """
    train_policy, train_value = phase != "value", phase != "policy"
    clock = 1 if phase == "value" else 0
    tick = (torch.arange(2, device=flat.flat.device) == clock).to(flat.flat.dtype)
    mine: Tensor | None = None
    if phase != "joint":
        critics = flat.mask("critics.")
        mine = critics if phase == "value" else ~critics

    def outputs(params: Tensor, batch: SequenceBatch) -> PolicyOutput:
        # views of one vector are never tied, and looking for ties costs a tenth of an eager step
        views = flat.views(params)
        inputs = (batch.obs, batch.action) if batch.route is None else (batch.obs, batch.action, batch.route)
        return torch.func.functional_call(policy, views, inputs, tie_weights=False)

    def objective(
        params: Tensor, batch: SequenceBatch, knobs: Knobs, denominator: Tensor, count: Tensor
    ) -> tuple[Tensor, Metrics]:
        out = outputs(params, batch)
        sums = loss.loss(batch, out, knobs)
        metrics: Metrics = {}
        total = torch.zeros((), device=params.device)
        if train_policy:
            metrics |= {k: v / count for k, v in sums.metrics.items()}
            policy_loss = sums.policy / denominator
            entropy = reduce.masked_sum(out.entropy, batch.mask) / count
            total = total + policy_loss - config.entropy_coef * entropy
            metrics |= {"policy_gradient_loss": policy_loss.detach(), "entropy_loss": -entropy.detach()}
            if config.moment_coef > 0.0:
                total = total + config.moment_coef * reduce.masked_sum(_moments(out), batch.mask) / count
        if train_value and "value" in loss.critics:
            value_loss = reduce.masked_sum(_value_error(batch, out, config.value_clip), batch.mask) / count
            total = total + config.value_coef * value_loss
            metrics["value_loss"] = value_loss.detach()
        if train_value:
            for name, value in sums.critics.items():
                total = total + value / count
                metrics[f"{name}_loss"] = (value / count).detach()
        if train_policy:
            metrics["loss"] = total.detach()
        return total, metrics

    def step(state: OptState, batch: SequenceBatch, knobs: dict[str, Tensor]) -> tuple[OptState, Metrics]:
        prepared = loss.prepare(batch, knobs)
        batch = batch._replace(coef={k: v.detach() for k, v in prepared.coef.items()}, weight=prepared.weight.detach())
        count = batch.mask.sum().clamp_min(1)
        parts = [batch] if config.micro_batches == 1 else list(split(batch, config.micro_batches, loss.together(batch)))
        found = [
            gradient(lambda p, b=part: objective(p, b, knobs, prepared.denominator, count), state.params)
            for part in parts
        ]
        grad, metrics = found[0]
        for more, values in found[1:]:
            grad = grad + more
            metrics = {k: metrics[k] + v for k, v in values.items()}
        if train_policy and type(loss).grad_transform is not PolicyLoss.grad_transform:

            def gradient_of(f: Callable[[SequenceBatch, PolicyOutput], Tensor]) -> Tensor:
                def scalar(params: Tensor) -> tuple[Tensor, Metrics]:
                    value = reduce.weighted_sum(f(batch, outputs(params, batch)), prepared.weight)
                    return value / prepared.denominator, {}

                return gradient(scalar, state.params)[0]

            grad = loss.grad_transform(grad, gradient_of, knobs)
        norm = torch.linalg.vector_norm(grad if mine is None else torch.where(mine, grad, 0.0))
        metrics["grad_norm" if train_policy else "value_grad_norm"] = norm
        if config.max_grad_norm is not None:
            grad = grad * (config.max_grad_norm / (norm + 1e-6)).clamp(max=1.0)
        stepped = adam(state, grad, knobs["learning_rate"], config.adam_eps, clock, tick, mine)
        if train_policy and config.target_kl is not None and "approx_kl" in metrics:
            alive = state.alive & (metrics["approx_kl"] <= 1.5 * config.target_kl)
            kept = [torch.where(alive, new, old) for new, old in zip(stepped[:4], state[:4], strict=True)]
            stepped = OptState(kept[0], kept[1], kept[2], kept[3], alive)
        return stepped, metrics

    return step


def _moments(out: PolicyOutput) -> Tensor:
    """[B, T] mean over the action's dimensions of mean^2 + std^2, of the distribution's parameters.

    Of sampled actions it would have no gradient.
    """
    params = out.dist.params()
    return (params["mean"].square() + (2.0 * params["log_std"]).exp()).mean(-1)


def _value_error(batch: SequenceBatch, out: PolicyOutput, clip: float | None) -> Tensor:
    """[B, T] squared error of the value; with ``clip`` the larger of it and that of the clipped prediction."""
    value = out.values["value"]
    error = (value - batch.value_target) ** 2
    if clip is None:
        return error
    near = batch.value_old + (value - batch.value_old).clamp(-clip, clip)
    return torch.maximum(error, (near - batch.value_target) ** 2)


def adam(
    state: OptState, gradient: Tensor, learning_rate: Tensor, eps: float, clock: int, tick: Tensor, mine: Tensor | None
) -> OptState:
    """Adam (Kingma and Ba 2015) with torch.optim.Adam's arithmetic, on the flat vector."""
    count = state.clock + tick
    t = count[clock]
    m = torch.lerp(state.m, gradient, 0.1)
    v = torch.lerp(state.v, gradient * gradient, 0.001)
    denominator = v.sqrt() / torch.sqrt(1.0 - 0.999**t) + eps
    params = state.params - learning_rate / (1.0 - 0.9**t) * m / denominator
    if mine is not None:
        params, m, v = (
            torch.where(mine, new, old) for new, old in ((params, state.params), (m, state.m), (v, state.v))
        )
    return OptState(params, m, v, count, state.alive)
