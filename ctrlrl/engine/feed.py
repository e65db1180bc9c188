"""Feeds: what stands between the environments and an update. One of transitions, one of whole episodes."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ctrlrl.engine.collector import Collector
from ctrlrl.engine.config import OnPolicyConfig
from ctrlrl.engine.denoise import unfold
from ctrlrl.engine.episode_estimate import outputs
from ctrlrl.engine.estimate import estimate
from ctrlrl.engine.seeding import generator
from ctrlrl.losses.base import PolicyLoss
from ctrlrl.nets.normalizer import RewardNormalizer
from ctrlrl.types import Obs, SequenceBatch, World


class Gathered(NamedTuple):
    """One iteration's experience."""

    batch: SequenceBatch
    """What to update on."""
    obs: Obs
    """[T, N, ...] observations, for the normaliser's statistics."""
    valid: Tensor
    """[T, N] bool: which of them count."""
    episodes: list[tuple[float, int]]
    """Return and length of every episode that ended."""
    steps: int
    """Environment steps taken."""
    collecting_s: float
    """Seconds of acting and simulating."""
    simulation_s: float
    """Seconds of simulating alone."""
    stats: dict[str, Tensor]
    """Scalars to log."""


class Feed(Protocol):
    """What the loop asks of a feed."""

    steps_bound: int
    """Environment steps of an iteration without what a loss asks for beside it, at most."""
    horizon: int
    """Positions of the longest row there can be."""

    def border(self, iteration: int) -> None:
        """Start afresh: everything after it follows from the seed, the iteration and the saved state."""
        ...

    def gather(self, iteration: int, knobs: Mapping[str, Tensor], progress: float) -> Gathered:
        """Act, and make the batch of one iteration."""
        ...

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint must hold."""
        ...

    def counters(self) -> dict[str, Any]:
        """The same, for JSON values."""
        ...

    def restore(self, tensors: Mapping[str, Tensor], counters: Mapping[str, Any]) -> None:
        """Take over what :meth:`tensors` and :meth:`counters` gave."""
        ...

    def close(self) -> None:
        """Close the environments."""
        ...


class TransitionFeed:
    """A fixed number of steps of every environment; each transition is a row."""

    def __init__(
        self,
        collector: Collector,
        policy: Any,
        loss: PolicyLoss,
        config: OnPolicyConfig,
        normalizer: RewardNormalizer,
        seed: int,
        world: World,
    ) -> None:
        self.collector, self.policy, self.loss, self.config = collector, policy, loss, config
        self.normalizer, self.seed, self.world = normalizer, seed, world
        self.reference: Any = None
        self.memory = loss.memory()
        self.steps_bound = config.n_steps * collector.n_envs
        self.horizon = 1

    def border(self, iteration: int) -> None:
        self.collector.border(self.seed, iteration)
        self.normalizer.restart()

    def gather(self, iteration: int, knobs: Mapping[str, Tensor], progress: float) -> Gathered:
        began = time.perf_counter()
        collected = self.collector.collect(generator(self.seed, "actions", iteration))
        collecting = time.perf_counter() - began
        flow = self.world == "flow"
        batch = estimate(self.policy, self.loss, self.config, self.normalizer, collected, likelihood=not flow)
        if flow:
            batch = denoising_rows(self.policy, self.reference, batch, generator(self.seed, "denoise", iteration))
        elif self.reference is not None:
            ref = outputs(self.reference, batch.obs, batch.action, False)
            batch = batch._replace(logp_ref=ref["logp"], dist_ref=ref["dist"])
        start = self.loss.begin(batch, knobs, self.memory)
        self.memory = start.memory
        return Gathered(
            start.batch, collected.obs, collected.valid_t, collected.episodes, self.steps_bound, collecting,
            collected.simulation_s, start.stats,
        )  # fmt: skip

    def tensors(self) -> dict[str, Tensor]:
        return {f"memory/{k}": v for k, v in self.memory.items()}

    def counters(self) -> dict[str, Any]:
        return {}

    def restore(self, tensors: Mapping[str, Tensor], counters: Mapping[str, Any]) -> None:
        self.memory = {k.removeprefix("memory/"): v for k, v in tensors.items() if k.startswith("memory/")}

    def close(self) -> None:
        self.collector.close()


def denoising_rows(policy: Any, reference: Any, batch: SequenceBatch, noise: torch.Generator) -> SequenceBatch:
    """``batch`` [B, T] of chains as rows of denoising steps, with their likelihoods filled in."""
    batch = unfold(batch, policy, noise)
    old = outputs(policy, batch.obs, batch.action, False)
    batch = batch._replace(logp_old=old["logp"], dist_old=old["dist"], entropy_old=old["entropy"])
    if reference is None:
        return batch
    ref = outputs(reference, batch.obs, batch.action, False)
    return batch._replace(logp_ref=ref["logp"], dist_ref=ref["dist"])
