"""The agent of GoRL: stages of a latent policy's training, with a decoder fitted between them."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Self, cast

import gymnasium as gym
import torch
from torch import Tensor

from ctrlrl.engine import checkpoint, runfolder
from ctrlrl.engine.agent import load_module
from ctrlrl.engine.config import ConfigError, OnPolicyConfig, build, field_names, flat
from ctrlrl.engine.errors import CheckpointError
from ctrlrl.engine.evaluate import Evaluation
from ctrlrl.engine.feed import TransitionFeed
from ctrlrl.engine.log import Progress, RunLogger
from ctrlrl.engine.on_policy import OnPolicyAgent
from ctrlrl.engine.refinement import Refinement
from ctrlrl.engine.seeding import derive, generator
from ctrlrl.engine.update import Updater
from ctrlrl.losses import base as losses
from ctrlrl.losses.base import PolicyLoss
from ctrlrl.losses.needs import WORLDS
from ctrlrl.nets.latent_policy import LatentPolicy
from ctrlrl.online.gorl import DIFFERS, LATENT, PAPER, PRESETS, GoRLConfig
from ctrlrl.types import Obs

PHASES = ("latent", "collect", "fit")
PAIRS = ("features", "action", "latent")


class GoRL(OnPolicyAgent):
    """A latent policy pi(eps | s) and a generative decoder a = g(s, eps), trained in turns (arXiv:2512.02581).

    A stage trains the latent policy with the decoder frozen: to the loss, the decoder is part of the environment.
    Between two stages (a) the policy collects pairs (s, a), (b) a fresh decoder is fitted to them from fresh, prior
    noise, keeping the epoch with the lowest validation loss, and (c) the latent policy, its critic, its optimiser
    and its observation statistics begin again at N(0, I), which the new decoder turns into what was learnt. The
    decoder's own observation statistics are those of its pairs.

    With an exact fit the composed policy stays a Gaussian in every state for ever: modes come out of what the decoder
    cannot fit exactly, in states that share it.

    Paper: GoRL: An Algorithm-Agnostic Framework for Online RL with Generative Policies, arXiv:2512.02581

    Steps of collecting count as the run's. ``learn`` once more goes on with the last stage.

    Raises:
        ConfigError: The loss does not run on Gaussian actions, or has no eps to change.
        TypeError: Actions that are not a Box of floats, or image observations.
    """

    method = "gorl"
    paper: ClassVar[str] = PAPER
    differs: ClassVar[str] = DIFFERS
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = PRESETS
    capabilities: ClassVar[frozenset[str]] = frozenset(["resume", "vector", "box", "dict_obs", "gpu", "compile"])
    policy: LatentPolicy  # pyright: ignore[reportIncompatibleVariableOverride]
    config: GoRLConfig

    def __init__(self, env: Any, method: str | None = None, *, restoring: bool = False, **settings: Any) -> None:
        if settings.get("decoder_from") is not None and not restoring:
            settings["decoder_from"] = os.path.abspath(settings["decoder_from"])
        super().__init__(env, method, restoring=restoring, **settings)
        stage = self.config.stage
        if stage.later_eps is not None and "eps" not in field_names(type(self.loss)):
            raise ConfigError(f"later_eps is set, but the loss {stage.latent!r} has no eps; leave it out")
        self._own, self._later = self.loss, False
        self.stage, self.phase = 0, PHASES[0]
        self.ends: list[int] = []
        """Steps at which the stages end."""
        self.refine_steps = 0
        """Environment steps to collect for each fit."""
        self.plateau_steps = 0
        """Steps without a higher return that end a stage."""
        self.peak, self.peak_at, self.begun_at = -math.inf, 0, 0
        """Highest mean return of this stage, the step it was reached at, and the step the stage began at."""
        self.best_of_stage = -math.inf
        self._best: dict[str, Tensor] = {}
        self._pairs: dict[str, list[Tensor]] = {k: [] for k in PAIRS}
        self.refinement: Refinement | None = None
        if stage.decoder_from is not None and not restoring:
            self._take_decoder(Path(stage.decoder_from), stage.decoder_checkpoint)

    def _take_decoder(self, run: Path, name: str) -> None:
        path = run / runfolder.CHECKPOINTS / f"{name}.safetensors"
        tensors, state = checkpoint.read(path, expect={"method": self.method})
        if not state["decoding"]:
            raise CheckpointError(f"{path} is of a first stage: its decoder has not been fitted yet")
        load_module(self.policy.decoder, tensors, "policy/decoder.")
        self.policy.decoding = True

    @classmethod
    def _loss_type(cls, chosen: str | None) -> type[PolicyLoss]:
        return losses.get(chosen or GoRLConfig().stage.latent)

    @classmethod
    def _settle(
        cls, loss: type[PolicyLoss], settings: Mapping[str, Any], preset: str | None, found: Mapping[str, Any]
    ) -> tuple[OnPolicyConfig, PolicyLoss]:
        if preset is not None and preset not in PRESETS:
            raise ConfigError(f"gorl has no preset {preset!r}; known: {', '.join(PRESETS)}")
        chosen = {**LATENT, **found, **(PRESETS[preset] if preset else {})}
        if "eps" not in field_names(loss):  # eps is PPO's
            chosen = {k: v for k, v in chosen.items() if k not in ("eps", "later_eps")}
        return build(loss, {**chosen, **settings}, None, loop=GoRLConfig)

    def _own_defaults(self) -> dict[str, Any]:
        finite = isinstance(self.action_space, gym.spaces.Box) and self.action_space.is_bounded()
        return {} if finite else {"action_map": "clip"}  # tanh would have nowhere to map to

    def _build_policy(self, config: OnPolicyConfig) -> LatentPolicy:
        if self.world != "continuous":
            raise ConfigError(
                f"gorl has Gaussian latents of Box actions, but {self.loss.name} here runs on {WORLDS[self.world]}"
            )
        return LatentPolicy(
            self.observation_space, self.action_space, config.network, self.loss.critics, config.normalize_obs,
            config.clip_obs, self._encoder, decoding=cast(GoRLConfig, config).decoding,
        )  # fmt: skip

    # -- training -----------------------------------------------------------------------------

    def learn(self, steps: int, **options: Any) -> Self:
        """As in TrainedAgent; the stages share the steps of the first call."""
        if steps >= 1 and not self.ends:
            fits = len(self.config.stage.stages) - 1
            self.ends = self.config.stage.ends(self.steps, steps)
            # two pairs at least: one to learn from, one held out
            self.refine_steps = max(2, self.config.refinement.refine_steps or steps // (100 * max(fits, 1)))
            self.plateau_steps = round(self.config.stage.plateau_share * steps)
            self.begun_at = self.peak_at = self.steps
        return super().learn(steps, **options)

    def _iterate(self) -> dict[str, float]:
        where = {"stage/index": float(self.stage), "stage/phase": float(PHASES.index(self.phase))}
        if self.phase == "collect":
            return self._collect() | where
        if self.phase == "fit":
            return self._fit() | where
        metrics = super()._iterate()
        if self._stage_is_over():
            self.phase = "collect"
            if self._best:
                load_module(self.policy, {**self._decoder_state(), **self._best}, "")
        return metrics | where

    def _stage_is_over(self) -> bool:
        if self.stage >= len(self.config.stage.stages) - 1:
            return False
        if self.config.stage.stage_trigger == "share":
            return self.steps >= self.ends[self.stage]
        if self.recent:
            mean = sum(r for r, _ in self.recent) / len(self.recent)
            if mean > self.peak:
                self.peak, self.peak_at = mean, self.steps
        return self.steps - max(self.peak_at, self.begun_at) >= self.plateau_steps

    def _collect(self) -> dict[str, float]:
        """Act, and keep what the decoder is to be fitted to."""
        number = self.iteration
        if isinstance(self.feed, TransitionFeed):
            missing = self.refine_steps - sum(len(rows) for rows in self._pairs["action"])
            self.collector.n_steps = min(self.config.n_steps, math.ceil(missing / self.n_envs))
            try:
                collected = self.collector.collect(generator(self.seed, "actions", number))
            finally:
                self.collector.n_steps = self.config.n_steps
            obs, latent, mask = collected.obs, collected.action, collected.valid_t
            episodes, steps = collected.episodes, mask.numel()
        else:
            gathered = self.feed.gather(number, self._knobs()[0], 0.0)
            obs, latent, mask = gathered.batch.obs, gathered.batch.action, gathered.batch.mask
            episodes, steps = gathered.episodes, gathered.steps
        self._keep({k: v[mask] for k, v in obs.items()} if isinstance(obs, dict) else obs[mask], latent[mask])
        self.iteration += 1
        self.steps += steps
        self.episodes += len(episodes)
        if sum(len(rows) for rows in self._pairs["action"]) >= self.refine_steps:
            self.phase = "fit"
            self.refinement = self._refinement()
        return {}

    @torch.no_grad()
    def _keep(self, obs: Obs, latent: Tensor) -> None:
        features = self.policy.decoder.features(obs)
        action = self.policy.decoder(features, latent) if self.policy.decoding else latent
        for name, rows in zip(PAIRS, (features, action, latent), strict=True):
            self._pairs[name].append(rows.clone())

    def _refinement(self) -> Refinement:
        fresh = cast(LatentPolicy, self._network(self.config, derive(self.seed, "decoder", self.stage))).decoder
        seed = derive(self.seed, "refinement", self.stage)
        pairs = {k: torch.cat(rows) for k, rows in self._pairs.items()}
        return Refinement(fresh, self.config.refinement, seed, **pairs)

    def _fit(self) -> dict[str, float]:
        """One epoch of the decoder's fit; after the last one, the next stage."""
        assert self.refinement is not None
        found = {f"decoder/{k}": v for k, v in self.refinement.epoch().items()}
        self.iteration += 1
        if self.refinement.done:
            self.policy.decoder.load_state_dict(self.refinement.result().state_dict())
            self._next_stage()
            if self.run_dir is not None:
                self.write_checkpoint(self.run_dir, f"stage_{self.stage}")
        return found

    def _next_stage(self) -> None:
        self.stage, self.phase, self.refinement = self.stage + 1, "latent", None
        self.policy.decoding = True
        self._pairs, self._best, self.best_of_stage = {k: [] for k in PAIRS}, {}, -math.inf
        self.recent.clear()
        self.peak, self.peak_at, self.begun_at = -math.inf, self.steps, self.steps
        self._use_later_settings()
        if not self.config.stage.reset_latent:
            return
        fresh = self._network(self.config, derive(self.seed, "network", self.stage)).state_dict()
        latent = {k: v for k, v in fresh.items() if not k.startswith("decoder.")}
        self.policy.load_state_dict(self._decoder_state() | latent)
        if self.reference is not None:
            self.reference.load_state_dict(self.policy.state_dict())
        state = self.updater.state
        zeros = torch.zeros_like(state.m)
        self.updater.state = state._replace(
            params=self.updater.flat.flat, m=zeros, v=zeros.clone(), clock=torch.zeros_like(state.clock)
        )
        self.controller_states = {k: c.initial() for k, c in self.controllers.items()}
        self.stats = {}

    def _decoder_state(self) -> dict[str, Tensor]:
        return {f"decoder.{k}": v for k, v in self.policy.decoder.state_dict().items()}

    def _use_later_settings(self) -> None:
        """Build the update again if the second and later stages have settings of their own."""
        later = {k.removeprefix("later_"): v for k, v in flat(self.config.stage).items() if k.startswith("later_")}
        later = {k: v for k, v in later.items() if v is not None}
        if self._later or not later:
            return
        self._later = True
        eps = later.pop("eps", None)
        self.loss = self.loss if eps is None else dataclasses.replace(self.loss, eps=eps)  # type: ignore[call-arg]
        state = self.updater.state
        self.updater = Updater(self.policy, self.loss, dataclasses.replace(self.config, **later), self._compiles())
        self.updater.state = state._replace(params=self.updater.flat.flat)

    def _evaluate(self, log: RunLogger | None, bar: Progress, callbacks: Any) -> Evaluation:
        result = super()._evaluate(log, bar, callbacks)
        if self.config.stage.collect_with == "best" and self.phase == "latent" and result.mean > self.best_of_stage:
            self.best_of_stage = result.mean
            latent = {k: v for k, v in self.policy.state_dict().items() if not k.startswith("decoder.")}
            self._best = {k: v.clone() for k, v in latent.items()}
        return result

    # -- state --------------------------------------------------------------------------------

    @property
    def own(self) -> PolicyLoss:
        """The settings of the loss, as in the first stage."""
        return self._own

    def tensors(self) -> dict[str, Tensor]:
        found = {**super().tensors(), **{f"best/{k}": v for k, v in self._best.items()}}
        if self.refinement is not None:
            return {**found, **{f"refinement/{k}": v for k, v in self.refinement.tensors().items()}}
        return {**found, **{f"refinement/{k}": torch.cat(rows) for k, rows in self._pairs.items() if rows}}

    def counters(self) -> dict[str, Any]:
        return super().counters() | {
            "stage": self.stage, "phase": self.phase, "ends": self.ends, "refine_steps": self.refine_steps,
            "plateau": [self.plateau_steps, self.peak, self.peak_at, self.begun_at],
            "best_of_stage": self.best_of_stage, "decoding": self.policy.decoding,
            "refinement": None if self.refinement is None else self.refinement.counters(),
        }  # fmt: skip

    def restore(self, tensors: Mapping[str, Tensor], counters: Mapping[str, Any]) -> None:
        self.stage, self.phase, self.ends = counters["stage"], counters["phase"], list(counters["ends"])
        self.refine_steps, self.best_of_stage = counters["refine_steps"], counters["best_of_stage"]
        self.plateau_steps, self.peak, self.peak_at, self.begun_at = counters["plateau"]
        self.policy.decoding = counters["decoding"]
        if self.stage > 0:
            self._use_later_settings()
        super().restore(tensors, counters)
        self._best = {k.removeprefix("best/"): v.to(self.device) for k, v in tensors.items() if k.startswith("best/")}
        fit = {
            k.removeprefix("refinement/"): v.to(self.device) for k, v in tensors.items() if k.startswith("refinement/")
        }
        self._pairs = {k: [fit[k]] if k in fit else [] for k in PAIRS}
        self.refinement = None
        if counters["refinement"] is not None:
            self.refinement = self._refinement()
            self.refinement.restore(fit, counters["refinement"])
