"""One optimiser step of any policy loss, as a pure function of tensors, and what wraps it from outside.

All parameters live in one flat vector. The eager step, the compiled one and the CUDA graph are the same
function: :func:`make_step`.
"""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ctrlrl.core import reduce
from ctrlrl.engine.config import ConfigError, OnPolicyConfig
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
    """A module's parameters as views into one vector."""

    def __init__(self, module: nn.Module) -> None:
        named = list(module.named_parameters())
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


def _gradient(f: Callable[[Tensor], tuple[Tensor, Any]], x: Tensor) -> tuple[Tensor, Any]:
    """Gradient and auxiliary output of ``f`` at ``x``; torch.func's where the compiler needs it, autograd elsewhere."""
    if torch.compiler.is_compiling():
        return torch.func.grad(f, has_aux=True)(x)
    x = x.detach().requires_grad_()
    value, aux = f(x)
    (gradient,) = torch.autograd.grad(value, x)
    return gradient, aux


def make_step(
    policy: nn.Module, flat: FlatParameters, loss: PolicyLoss, config: OnPolicyConfig, phase: Phase = "joint"
) -> Step:
    """The optimiser step ``(state, update_batch, knobs) -> (state, metrics)``.

    ``phase`` "joint" trains policy and critics in one objective; "policy" and "value" each train their own
    parameters with Adam moments of their own.
    """
    train_policy, train_value = phase != "value", phase != "policy"
    clock = 1 if phase == "value" else 0
    mine: Tensor | None = None
    if phase != "joint":
        critics = flat.mask("critics.")
        mine = critics if phase == "value" else ~critics

    def outputs(params: Tensor, batch: SequenceBatch) -> PolicyOutput:
        # views of one vector are never tied, and looking for ties costs a tenth of an eager step
        views = flat.views(params)
        return torch.func.functional_call(policy, views, (batch.obs, batch.action), tie_weights=False)

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
            _gradient(lambda p, b=part: objective(p, b, knobs, prepared.denominator, count), state.params)
            for part in parts
        ]
        gradient, metrics = found[0]
        for more, values in found[1:]:
            gradient = gradient + more
            metrics = {k: metrics[k] + v for k, v in values.items()}
        if train_policy and type(loss).grad_transform is not PolicyLoss.grad_transform:

            def gradient_of(f: Callable[[SequenceBatch, PolicyOutput], Tensor]) -> Tensor:
                def scalar(params: Tensor) -> tuple[Tensor, Metrics]:
                    value = reduce.weighted_sum(f(batch, outputs(params, batch)), prepared.weight)
                    return value / prepared.denominator, {}

                return _gradient(scalar, state.params)[0]

            gradient = loss.grad_transform(gradient, gradient_of, knobs)
        norm = torch.linalg.vector_norm(gradient if mine is None else torch.where(mine, gradient, 0.0))
        metrics["grad_norm" if train_policy else "value_grad_norm"] = norm
        if config.max_grad_norm is not None:
            gradient = gradient * (config.max_grad_norm / (norm + 1e-6)).clamp(max=1.0)
        stepped = _adam(state, gradient, knobs["learning_rate"], config.adam_eps, clock, mine)
        if train_policy and config.target_kl is not None and "approx_kl" in metrics:
            alive = state.alive & (metrics["approx_kl"] <= 1.5 * config.target_kl)
            kept = [torch.where(alive, new, old) for new, old in zip(stepped[:4], state[:4], strict=True)]
            stepped = OptState(kept[0], kept[1], kept[2], kept[3], alive)
        return stepped, metrics

    return step


def _value_error(batch: SequenceBatch, out: PolicyOutput, clip: float | None) -> Tensor:
    """[B, T] squared error of the value; with ``clip`` the larger of it and that of the clipped prediction."""
    value = out.values["value"]
    error = (value - batch.value_target) ** 2
    if clip is None:
        return error
    near = batch.value_old + (value - batch.value_old).clamp(-clip, clip)
    return torch.maximum(error, (near - batch.value_target) ** 2)


def _adam(
    state: OptState, gradient: Tensor, learning_rate: Tensor, eps: float, clock: int, mine: Tensor | None
) -> OptState:
    """Adam (Kingma and Ba 2015) with torch.optim.Adam's arithmetic, on the flat vector."""
    tick = torch.zeros_like(state.clock)
    tick[clock] = 1.0
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


# -- rows -----------------------------------------------------------------------------------------


def rows(batch: SequenceBatch, index: Tensor | slice) -> SequenceBatch:
    """The batch's rows at ``index``."""

    def pick(x: Any) -> Any:
        if isinstance(x, Tensor):
            return x[index]
        return {k: v[index] for k, v in x.items()} if isinstance(x, dict) else x

    return SequenceBatch(*(pick(x) for x in batch))


def split(batch: SequenceBatch, parts: int, together: Tensor | None) -> Iterator[SequenceBatch]:
    """``batch`` in ``parts`` of about equal size; rows with equal ``together`` [B] ids stay in one part."""
    if together is None:
        for index in torch.arange(batch.mask.shape[0], device=batch.mask.device).tensor_split(parts):
            yield rows(batch, index)
        return
    for ids in together.unique().tensor_split(parts):
        yield rows(batch, torch.isin(together, ids).nonzero().squeeze(-1))


def shuffled(size: int, together: Tensor | None, batch_size: int, generator: torch.Generator) -> Tensor:
    """[B] a random order of rows in which rows of one ``together`` id are neighbours.

    Raises ``ConfigError`` if cutting that order every ``batch_size`` rows would cut through a group.
    """
    if together is None:
        return torch.randperm(size, generator=generator)
    ids, inverse, counts = together.cpu().unique(return_inverse=True, return_counts=True)
    if (batch_size < size and (counts != counts[0]).any()) or batch_size % int(counts[0]):
        raise ConfigError(
            f"batch_size={batch_size} would split groups of {counts.unique().tolist()} rows; "
            "use a multiple of the group size, or None for the whole rollout"
        )
    rank = torch.randperm(len(ids), generator=generator)
    return torch.argsort(rank[inverse], stable=True)


# -- compile and CUDA graphs ----------------------------------------------------------------------


def compiler_available() -> bool:
    """Whether torch.compile can build C++ kernels here."""
    import os

    compiler = os.environ.get("CXX")
    return any(shutil.which(c) for c in ([compiler] if compiler else ["g++", "clang++", "cl"]))


def many(step: Step, count: int, batch_size: int) -> Step:
    """``step`` on ``count`` update batches, stored one after the other in its batch; metrics are stacked [count]."""

    def steps(state: OptState, batch: SequenceBatch, knobs: dict[str, Tensor]) -> tuple[OptState, Metrics]:
        found: list[Metrics] = []
        for i in range(count):
            state, metrics = step(state, rows(batch, slice(i * batch_size, (i + 1) * batch_size)), knobs)
            found.append(metrics)
        return state, {k: torch.stack([f[k] for f in found]) for k in found[0]}

    return steps


def compiled(function: Step) -> Step:
    """``function`` through torch.compile, whole and for fixed shapes."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.compile(function, fullgraph=True, dynamic=False)


class CudaGraph:
    """Replay ``function`` as one CUDA graph. Inputs are copied to fixed memory, outputs are copied out.

    Captured at the first call, after three warm-up runs on a side stream; one graph per input shape.
    """

    def __init__(self, function: Step) -> None:
        self.function = function
        self.graphs: dict[tuple[Any, ...], tuple[torch.cuda.CUDAGraph, list[Tensor], Any]] = {}

    def __call__(self, state: OptState, batch: SequenceBatch, knobs: dict[str, Tensor]) -> tuple[OptState, Metrics]:
        leaves, tree = pytree.tree_flatten((state, batch, knobs))
        tensors = [x for x in leaves if isinstance(x, Tensor)]
        key = tuple((x.shape, x.dtype) for x in tensors)
        if key not in self.graphs:
            self.graphs[key] = self._capture(leaves, tree)
        graph, inputs, outputs = self.graphs[key]
        for fixed, x in zip(inputs, tensors, strict=True):
            fixed.copy_(x)
        graph.replay()
        return pytree.tree_map(lambda x: x.clone(), outputs)

    def _capture(self, leaves: list[Any], tree: Any) -> tuple[torch.cuda.CUDAGraph, list[Tensor], Any]:
        leaves = [x.clone() if isinstance(x, Tensor) else x for x in leaves]
        arguments = pytree.tree_unflatten(leaves, tree)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                self.function(*arguments)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs = self.function(*arguments)
        return graph, [x for x in leaves if isinstance(x, Tensor)], outputs


class Updater:
    """Runs the update of one rollout: epochs, shuffled batches, one or two phases."""

    def __init__(self, policy: nn.Module, loss: PolicyLoss, config: OnPolicyConfig, compile: bool) -> None:
        self.config, self.loss = config, loss
        self.flat = FlatParameters(policy)
        device = self.flat.flat.device
        zeros = torch.zeros_like(self.flat.flat)
        self.state = OptState(
            self.flat.flat,
            zeros,
            zeros.clone(),
            torch.zeros(2, device=device),
            torch.ones((), dtype=torch.bool, device=device),
        )
        separate = config.value_epochs is not None
        self.steps: dict[Phase, Step] = {
            phase: make_step(policy, self.flat, loss, config, phase)
            for phase in (("policy", "value") if separate else ("joint",))
        }
        self.compile = compile
        self._wrapped: dict[tuple[Phase, int, int], Step] = {}
        if config.cudagraphs and device.type != "cuda":
            raise ConfigError(f"cudagraphs needs a CUDA device, found {device}; leave it off or set device='cuda'")
        if config.micro_batches > 1 and (compile or config.cudagraphs) and "groups" in loss.needs:
            raise ConfigError("micro_batches with a loss on groups cannot be compiled; set compile and cudagraphs off")

    def run(self, batch: SequenceBatch, knobs: dict[str, Tensor], generator: torch.Generator) -> Metrics:
        """Update on one rollout. Returns metrics averaged over the optimiser steps, still as tensors.

        The parameters change only at the end, and only if every number is finite.
        """
        state = self.state._replace(alive=torch.ones_like(self.state.alive))
        found: dict[str, list[Tensor]] = {}
        for phase in self.steps:
            epochs, size = self.config.epochs, self.config.batch_size
            if phase == "value":
                epochs, size = self.config.value_epochs or 0, self.config.value_batch_size
            for _ in range(epochs):
                state, metrics = self._epoch(phase, state, batch, knobs, size, generator)
                for key, values in metrics.items():
                    found.setdefault(key, []).extend(values)
                if phase != "value" and self.config.target_kl is not None and not bool(state.alive):
                    break
        self.pending = state
        return {key: torch.cat(values) for key, values in found.items()}

    def accept(self) -> None:
        """Make the last :meth:`run`'s parameters the policy's."""
        self.flat.flat.copy_(self.pending.params)
        self.state = self.pending._replace(params=self.flat.flat)

    def _epoch(
        self,
        phase: Phase,
        state: OptState,
        batch: SequenceBatch,
        knobs: dict[str, Tensor],
        size: int | None,
        generator: torch.Generator,
    ) -> tuple[OptState, dict[str, list[Tensor]]]:
        total = batch.mask.shape[0]
        size = total if size is None else min(size, total)
        if size < total:
            order = shuffled(total, self.loss.together(batch), size, generator)
            batch = rows(batch, order.to(batch.mask.device))
        block = self.config.steps_per_graph if self.compile or self.config.cudagraphs else 1
        found: dict[str, list[Tensor]] = {}
        start = 0
        while start < total:
            width = min(size, total - start)
            count = block if start + block * size <= total else 1
            function = self._function(phase, count, width)
            state, metrics = function(state, rows(batch, slice(start, start + count * width)), knobs)
            for key, value in metrics.items():
                found.setdefault(key, []).append(value)
            start += count * width
        return state, found

    def _function(self, phase: Phase, count: int, width: int) -> Step:
        key = (phase, count, width)
        if key not in self._wrapped:
            function = many(self.steps[phase], count, width)
            if self.compile:
                function = compiled(function)
            if self.config.cudagraphs:
                function = CudaGraph(function)
            self._wrapped[key] = function
        return self._wrapped[key]
