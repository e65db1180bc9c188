"""The agent of GoRL: stages of a latent policy's training, with a decoder fitted between them."""

from __future__ import annotations

import dataclasses
import itertools
import logging
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
from ctrlrl.engine.seeding import derive, generator
from ctrlrl.engine.stages import Staged, to_collect, valid_rows
from ctrlrl.engine.update import Updater
from ctrlrl.losses import base as losses
from ctrlrl.losses.base import PolicyLoss
from ctrlrl.losses.needs import WORLDS
from ctrlrl.nets.decoders import Decoder
from ctrlrl.nets.latent_policy import LatentPolicy
from ctrlrl.online.gorl import DIFFERS, LATENT, PAPER, PRESETS, GoRLConfig

logger = logging.getLogger("ctrlrl")


class GoRL(Staged, OnPolicyAgent):
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
    looked_at: ClassVar[tuple[str, ...]] = ("latent", "decoder_from")
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
        self._own = self.loss
        self._later()  # which says what is wrong with it
        self.plateau_steps = 0
        """Steps without a higher return that end a stage."""
        self.peak, self.peak_at, self.begun_at = -math.inf, 0, 0
        """Highest mean return of this stage, the step it was reached at, and the step the stage began at."""
        self.best_of_stage = -math.inf
        self._best: dict[str, Tensor] = {}
        if stage.decoder_from is not None and not restoring:
            self._take_decoder(Path(stage.decoder_from), stage.decoder_checkpoint)

    def _take_decoder(self, run: Path, name: str) -> None:
        path = run / runfolder.CHECKPOINTS / f"{name}.safetensors"
        tensors, state = checkpoint.read(path, expect={"method": self.method})
        mine = {**flat(self.config.decoding), "action_map": self.config.network.action_map}
        shape = {k: v for k, v in self._shape({"decoder_from": run}).items() if k != "decoder_draws"}
        if wrong := [f"{k}={mine[k]!r} (it has {v!r})" for k, v in shape.items() if mine[k] != v]:
            raise ConfigError(f"the decoder of {run} is another one: {', '.join(wrong)}; leave these settings out")
        if not state["decoding"]:
            raise CheckpointError(f"{path} is of a first stage: its decoder has not been fitted yet")
        load_module(self.policy.decoder, tensors, "policy/decoder.")
        self.policy.decoding = True

    @classmethod
    def _loss_type(cls, settings: Mapping[str, Any]) -> type[PolicyLoss]:
        return losses.get(settings.get("latent") or GoRLConfig().stage.latent)

    @classmethod
    def _settle(
        cls, loss: type[PolicyLoss], settings: Mapping[str, Any], preset: str | None, found: Mapping[str, Any],
        actions: gym.Space | None,
    ) -> tuple[OnPolicyConfig, PolicyLoss]:  # fmt: skip
        if preset is not None and preset not in PRESETS:
            raise ConfigError(f"gorl has no preset {preset!r}; known: {', '.join(PRESETS)}")
        begin = {**found, **LATENT}
        if isinstance(actions, gym.spaces.Box) and not actions.is_bounded():
            begin["action_map"] = "clip"  # tanh would have nowhere to map to
        chosen = {**(PRESETS[preset] if preset else {}), **cls._shape(settings), **settings}
        if "eps" not in field_names(loss) and preset is not None:  # eps is PPO's
            chosen = {k: v for k, v in chosen.items() if k in settings or k not in ("eps", "later_eps")}
        return build(loss, chosen, None, begin, GoRLConfig)

    @staticmethod
    def _shape(settings: Mapping[str, Any]) -> dict[str, Any]:
        """The shape of the decoder that the run begins with, where it takes another run's."""
        run = settings.get("decoder_from")
        if run is None or not (Path(run) / runfolder.CONFIG).exists():
            return {}
        config = runfolder.read_config(run)["config"]
        theirs = {**config.get("decoding", {}), "action_map": config.get("network", {}).get("action_map")}
        return {k: tuple(v) if isinstance(v, list) else v for k, v in theirs.items() if v is not None}

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
        """As in TrainedAgent; the stages share the steps of the first call.

        Raises:
            ConfigError: A stage would be over before its first update; or the best evaluation's policy is to collect,
                and there are no evaluations.
        """
        if steps >= 1 and not self.ends:
            self._check_plan(steps)
        return super().learn(steps, **options)

    def _check_plan(self, steps: int) -> None:
        stage, ends = self.config.stage, self.config.stage.ends(self.steps, steps)
        needed = self._to_collect(steps) + self.steps_bound
        if stage.stage_trigger == "share" and len(ends) > 1:
            shortest = min(after - before for before, after in itertools.pairwise(ends))
            if shortest < needed:
                raise ConfigError(
                    f"a stage of {shortest:,} steps is over before its first update: collecting for its decoder and "
                    f"one iteration take {needed:,}. Train for longer, or set refine_steps, n_steps or n_envs lower"
                )
        if stage.collect_with == "best" and len(ends) > 1 and (self.config.eval_every is None or not self.can_evaluate):
            raise ConfigError("collect_with='best' needs evaluations: set eval_every, or use collect_with='last'")

    def _to_collect(self, steps: int) -> int:
        return to_collect(self.config.refinement, steps, len(self.config.stage.stages))

    def _open(self) -> None:
        if not self.ends:
            start, end = self.span
            self.ends, self.refine_steps = self.config.stage.ends(start, end - start), self._to_collect(end - start)
            self.plateau_steps = round(self.config.stage.plateau_share * (end - start))
            self.begun_at = self.peak_at = start
        super()._open()

    def _stretch(self) -> tuple[int, int]:
        """A stage's own: its policy begins afresh, and so do schedules."""
        if self.config.stage.stage_trigger == "share" and self.steps < self.ends[self.stage]:
            return self.begun_at, self.ends[self.stage]
        return self.begun_at, self.span[1]

    def _stage_is_over(self) -> bool:
        if self.in_last_stage or self.config.stage.stage_trigger == "share":
            return super()._stage_is_over()
        if len(self.recent) < (self.recent.maxlen or 0):
            return False  # the mean of a few could be a peak by luck
        mean = sum(r for r, _ in self.recent) / len(self.recent)
        if mean > self.peak:
            self.peak, self.peak_at = mean, self.steps
        return self.steps - max(self.peak_at, self.begun_at) >= self.plateau_steps

    def _collect(self) -> None:
        number = self.iteration
        if self.config.stage.collect_with == "best" and not self.collected:
            if self._best:
                load_module(self.policy, {**self._decoder_state(), **self._best}, "")
            else:
                logger.warning("No evaluation fell into stage %s: its last policy collects.", self.stage)
        if isinstance(self.feed, TransitionFeed):
            missing = self.refine_steps - self.collected
            self.collector.n_steps = min(self.config.n_steps, math.ceil(missing / self.n_envs))
            try:
                collected = self.collector.collect(generator(self.seed, "actions", number))
            finally:
                self.collector.n_steps = self.config.n_steps
            self._keep(*valid_rows(collected))
            self._count(collected.valid_t.numel(), collected.episodes, collected.simulation_s)
        else:
            gathered = self.feed.gather(number, self._knobs()[0], 0.0)
            obs, mask = gathered.batch.obs, gathered.batch.mask
            obs = {k: v[mask] for k, v in obs.items()} if isinstance(obs, dict) else obs[mask]
            self._keep(obs, gathered.batch.action[mask])
            self._count(gathered.steps, gathered.episodes, gathered.simulation_s)

    def _fresh_decoder(self, seed: int) -> Decoder:
        return cast(LatentPolicy, self._network(self.config, seed)).decoder

    def _begin_stage(self, decoder: Decoder) -> None:
        self.policy.decoder.load_state_dict(decoder.state_dict())
        self._best, self.best_of_stage = {}, -math.inf
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
        self.stats, self.feed.memory = {}, self.loss.memory()  # type: ignore[attr-defined]

    def _decoder_state(self) -> dict[str, Tensor]:
        return {f"decoder.{k}": v for k, v in self.policy.decoder.state_dict().items()}

    def _later(self) -> tuple[GoRLConfig, PolicyLoss] | None:
        """The settings of the second and later stages, where they have some of their own."""
        changed = {k.removeprefix("later_"): v for k, v in flat(self.config.stage).items() if k.startswith("later_")}
        changed = {k: v for k, v in changed.items() if v is not None}
        if not changed:
            return None
        eps = changed.pop("eps", None)
        try:
            loss = self._own if eps is None else dataclasses.replace(self._own, eps=eps)  # type: ignore[call-arg]
            return dataclasses.replace(self.config, **changed), loss
        except ValueError as error:
            raise ConfigError(f"gorl, from the second stage on: {error}") from None

    def _use_later_settings(self) -> None:
        """Build the update again, if it is not that of a later stage yet."""
        later = self._later()
        if later is None or self.loss is not self._own or self.updater.config is not self.config:
            return
        config, self.loss = later
        state = self.updater.state
        self.updater = Updater(self.policy, self.loss, config, self._compiles())
        self.updater.state = state._replace(params=self.updater.flat.flat)
        for part in (self.feed, getattr(self.feed, "player", None)):
            if part is not None:
                part.loss = self.loss  # type: ignore[attr-defined]

    def _evaluate(self, log: RunLogger | None, bar: Progress, callbacks: Any) -> Evaluation:
        result = super()._evaluate(log, bar, callbacks)
        # at the end of a stage too, whose policy has not been replaced yet
        acting = self.phase == "latent" or (self.phase == "collect" and not self.collected)
        if self.config.stage.collect_with == "best" and acting and result.mean > self.best_of_stage:
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
        return super().tensors() | {f"best/{k}": v for k, v in self._best.items()}

    def counters(self) -> dict[str, Any]:
        return super().counters() | {
            "plateau": [self.plateau_steps, self.peak, self.peak_at, self.begun_at],
            "best_of_stage": self.best_of_stage,
        }  # fmt: skip

    def restore(self, tensors: Mapping[str, Tensor], counters: Mapping[str, Any]) -> None:
        self.best_of_stage = counters["best_of_stage"]
        self.plateau_steps, self.peak, self.peak_at, self.begun_at = counters["plateau"]
        if counters["stage"] > 0:
            self._use_later_settings()
        super().restore(tensors, counters)
        self._best = {k.removeprefix("best/"): v.to(self.device) for k, v in tensors.items() if k.startswith("best/")}
