"""Stages of a latent policy's training with a decoder fitted between them, whatever trains the policy."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ctrlrl.engine.collected import Collected
from ctrlrl.engine.refinement import Refinement, RefinementConfig
from ctrlrl.engine.seeding import derive
from ctrlrl.engine.trainer import TrainedAgent
from ctrlrl.nets.decoders import Decoder
from ctrlrl.types import Obs

PHASES = ("latent", "collect", "fit")
PAIRS = ("features", "action", "latent")


def to_collect(config: RefinementConfig, steps: int, stages: int) -> int:
    """Environment steps to collect for each of the fits of a run of ``steps`` in ``stages``."""
    # two pairs at least: one to learn from, one held out
    return max(2, config.refine_steps or steps // (100 * max(stages - 1, 1)))


class Staged(TrainedAgent):
    """An agent in stages, in front of the loop that trains its latent policy (arXiv:2512.02581, algorithm 1).

    An iteration is one of the loop's, one of collecting, or one epoch of the decoder's fit; a checkpoint may fall
    behind any of them.

    Attributes:
        policy: A latent policy with ``decoder``, and ``decoding``: whether the decoder has been fitted.
        stage: Number of the stage, from 0.
        phase: One of PHASES.
        ends: Steps at which the stages end; empty before the first call of ``learn``.
        refine_steps: Environment steps to collect for each fit.
        refinement: The fit under way.
    """

    policy: Any

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.stage, self.phase = 0, PHASES[0]
        self.ends: list[int] = []
        self.refine_steps = 0
        self._pairs: dict[str, list[Tensor]] = {k: [] for k in PAIRS}
        self.refinement: Refinement | None = None

    # -- what an agent adds -------------------------------------------------------------------

    @abstractmethod
    def _collect(self) -> None:
        """Act for one iteration, and give what was done to :meth:`_keep` and :meth:`_count`."""

    @abstractmethod
    def _fresh_decoder(self, seed: int) -> Decoder:
        """A decoder that has not been fitted, on the agent's device."""

    @abstractmethod
    def _begin_stage(self, decoder: Decoder) -> None:
        """Take over the fitted decoder, and begin the latent policy's training again."""

    def _stage_is_over(self) -> bool:
        """Whether the stage has had its steps; asked after each of the loop's iterations."""
        return not self.in_last_stage and self.steps >= self.ends[self.stage]

    def _leave_stage(self) -> None:
        """Called when a stage is over, before its policy collects."""

    # -- iterations ---------------------------------------------------------------------------

    @property
    def in_last_stage(self) -> bool:
        """Whether no stage follows; that one goes on for as long as training does."""
        return self.stage >= len(self.ends) - 1

    @property
    def collected(self) -> int:
        """Pairs kept for the next fit so far."""
        return sum(len(rows) for rows in self._pairs["action"])

    def _iterate(self) -> dict[str, float]:
        where = {"stage/index": float(self.stage), "stage/phase": float(PHASES.index(self.phase))}
        if self.phase == "collect":
            self._collect()
            if self.collected >= self.refine_steps:
                self.phase, self.refinement = "fit", self._refinement()
                self._pairs = {k: [] for k in PAIRS}
            return where
        if self.phase == "fit":
            return self._fit() | where
        metrics = super()._iterate()
        if self._stage_is_over():
            self.phase = "collect"
            self._leave_stage()
        return metrics | where

    @torch.no_grad()
    def _keep(self, obs: Obs, latent: Tensor) -> None:
        """Pairs of what the decoder sees of ``obs`` and the action before the map onto the bounds."""
        features = self.policy.decoder.features(obs)
        action = self.policy.decoder(features, latent) if self.policy.decoding else latent
        for name, rows in zip(PAIRS, (features, action, latent), strict=True):
            self._pairs[name].append(rows.clone())

    def _count(self, steps: int, episodes: list[tuple[float, int]], simulation_s: float) -> None:
        self.iteration += 1
        self.steps += steps
        self.episodes += len(episodes)
        self.recent.extend(episodes)
        self.timings["simulation_s"] += simulation_s

    def _refinement(self) -> Refinement:
        fresh = self._fresh_decoder(derive(self.seed, "decoder", self.stage))
        seed = derive(self.seed, "refinement", self.stage)
        return Refinement(
            fresh, self.config.refinement, seed, **{k: torch.cat(rows) for k, rows in self._pairs.items()}
        )

    def _fit(self) -> dict[str, float]:
        """One epoch of the decoder's fit; after the last one, the next stage."""
        assert self.refinement is not None
        found = {f"decoder/{k}": v for k, v in self.refinement.epoch(self.steps, self.iteration).items()}
        self.iteration += 1
        if self.refinement.done:
            decoder = self.refinement.result()
            self.stage, self.phase, self.refinement = self.stage + 1, PHASES[0], None
            self.recent.clear()
            self._begin_stage(decoder)
            self.policy.decoding = True
            if self.run_dir is not None:
                self.write_checkpoint(self.run_dir, f"stage_{self.stage}")
        return found

    # -- state --------------------------------------------------------------------------------

    def tensors(self) -> dict[str, Tensor]:
        found = super().tensors()
        if self.refinement is not None:
            return found | {f"refinement/{k}": v for k, v in self.refinement.tensors().items()}
        return found | {f"refinement/{k}": torch.cat(rows) for k, rows in self._pairs.items() if rows}

    def counters(self) -> dict[str, Any]:
        return super().counters() | {
            "stage": self.stage, "phase": self.phase, "ends": self.ends, "refine_steps": self.refine_steps,
            "decoding": self.policy.decoding,
            "refinement": None if self.refinement is None else self.refinement.counters(),
        }  # fmt: skip

    def restore(self, tensors: Mapping[str, Tensor], counters: Mapping[str, Any]) -> None:
        self.stage, self.phase, self.ends = counters["stage"], counters["phase"], list(counters["ends"])
        self.refine_steps, self.policy.decoding = counters["refine_steps"], counters["decoding"]
        super().restore(tensors, counters)
        prefix = "refinement/"
        fit = {k.removeprefix(prefix): v.to(self.device) for k, v in tensors.items() if k.startswith(prefix)}
        self._pairs = {k: [fit[k]] if k in fit else [] for k in PAIRS}
        self.refinement = None
        if counters["refinement"] is not None:
            self.refinement = self._refinement()
            self.refinement.restore(fit, counters["refinement"])
            self._pairs = {k: [] for k in PAIRS}


def valid_rows(collected: Collected) -> tuple[Obs, Tensor]:
    """Observations and actions [N, ...] of the steps that were not spent on resetting."""
    obs, mask = collected.obs, collected.valid_t
    return {k: v[mask] for k, v in obs.items()} if isinstance(obs, dict) else obs[mask], collected.action[mask]
