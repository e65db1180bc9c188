"""The update of one rollout: epochs of shuffled batches, in one phase or two."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ctrlrl.data.rows import rows, shuffled
from ctrlrl.engine.config import ConfigError, OnPolicyConfig
from ctrlrl.engine.graphs import CudaGraph, compiled, many
from ctrlrl.engine.step import FlatParameters, Metrics, OptState, Phase, Step, make_step
from ctrlrl.losses.base import PolicyLoss
from ctrlrl.types import SequenceBatch


class Updater:
    """Runs the update of one rollout: epochs, shuffled batches, one or two phases."""

    def __init__(self, policy: nn.Module, loss: PolicyLoss, config: OnPolicyConfig, compile: bool) -> None:
        self.config, self.loss = config, loss
        self.flat = FlatParameters(policy, trained_only=True)
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
