"""The agent of GoRL on SAC: stages of SAC over latents, with a decoder fitted between them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar, Self, cast

import torch
from torch import Tensor

from ctrlrl.engine.algorithm import Networks, Spaces
from ctrlrl.engine.config import ConfigError
from ctrlrl.engine.learner import Learner
from ctrlrl.engine.off_policy import OffPolicyAgent
from ctrlrl.engine.refinement import Refinement
from ctrlrl.engine.seeding import derive, generator
from ctrlrl.nets.decoders import make_decoder
from ctrlrl.online.gorl_sac import GoRLSAC, GoRLSACConfig, LatentActor
from ctrlrl.types import Obs

PHASES = ("latent", "collect", "fit")
PAIRS = ("features", "action", "latent")


class GoRLSACAgent(OffPolicyAgent):
    """A latent policy pi(eps | s) with critics Q(s, eps), and a generative decoder a = g(s, eps), trained in turns.

    A stage is SAC with the decoder, frozen, as part of the environment: the policy climbs the critics of latents, and
    no gradient passes through the decoder. Between two stages (a) the policy collects fresh pairs (s, a), for those of
    the replay are from all the policies before it, (b) a fresh decoder is fitted to them from fresh, prior noise,
    keeping the epoch with the lowest validation loss, and (c) policy, critics, optimisers and temperature begin
    again, with an empty replay: under another decoder an old latent would mean another action. The policy then is
    N(0, I), which the new decoder turns into what was learnt, and acts so until the replay has ``learning_starts``
    transitions.

    Steps of collecting count as the run's. ``learn`` once more goes on with the last stage. Source: GoRL
    (arXiv:2512.02581), algorithm 1 and appendix F.2.

    Raises:
        ConfigError: ``start_from`` is set.
        TypeError: Actions that are not a Box of floats, or image observations.
        ValueError: Actions without finite bounds.
    """

    loop: ClassVar[type[GoRLSACConfig]] = GoRLSACConfig
    algorithm: GoRLSAC
    config: GoRLSACConfig
    policy: LatentActor  # type: ignore[assignment]

    def __init__(self, env: Any, method: str | None = None, *, encoder: Any = None, **settings: Any) -> None:
        if settings.get("start_from") is not None:
            raise ConfigError(
                "gorl_sac begins every stage with fresh networks, and its replay holds latents: it cannot go on with "
                "an offline run; train sac from it"
            )
        self._encoder = None if isinstance(encoder, str) else encoder
        super().__init__(env, method, encoder=encoder, **settings)
        self.stage, self.phase = 0, PHASES[0]
        self.ends: list[int] = []
        """Steps at which the stages end."""
        self.refine_steps = 0
        """Environment steps to collect for each fit."""
        self._pairs: dict[str, list[Tensor]] = {k: [] for k in PAIRS}
        self.refinement: Refinement | None = None

    # -- training -----------------------------------------------------------------------------

    def learn(self, steps: int, **options: Any) -> Self:
        """As in TrainedAgent; the stages share the steps of the first call.

        Raises:
            ConfigError: A stage would be over before its first update.
        """
        if steps >= 1 and not self.ends:
            self.algorithm.plan(self.steps, steps, self.config, self.steps_bound)  # which says what is wrong with it
        return super().learn(steps, **options)

    def _open(self) -> None:
        if not self.ends:
            start, end = self.span
            self.ends, self.refine_steps = self.algorithm.plan(start, end - start, self.config, self.steps_bound)
        super()._open()

    def _iterate(self) -> dict[str, float]:
        where = {"stage/index": float(self.stage), "stage/phase": float(PHASES.index(self.phase))}
        self.cut = False
        if self.phase == "collect":
            self._collect()
            return where
        if self.phase == "fit":
            return self._fit() | where
        metrics = super()._iterate()
        if self.stage < len(self.ends) - 1 and self.steps >= self.ends[self.stage]:
            self.phase, self.debt = "collect", 0.0
            self._drop_replay()
        return metrics | where

    def _collect(self) -> None:
        """Act for at most an iteration's steps, and keep what the decoder is to be fitted to."""
        missing = self.refine_steps - sum(len(rows) for rows in self._pairs["action"])
        self.collector.n_steps = math.ceil(min(missing, self.steps_bound) / self.n_envs)
        self.explorer.ready = True
        try:
            c = self.collector.collect(generator(self.seed, "act", self.iteration))
        finally:
            self.collector.n_steps = self.config.collect_steps
        mask = c.valid_t
        self._keep({k: v[mask] for k, v in c.obs.items()} if isinstance(c.obs, dict) else c.obs[mask], c.action[mask])
        self.iteration += 1
        self.steps += int(mask.sum())
        self.episodes += len(c.episodes)
        self.recent.extend(c.episodes)
        self.timings["simulation_s"] += c.simulation_s
        if sum(len(rows) for rows in self._pairs["action"]) >= self.refine_steps:
            self.phase, self.refinement = "fit", self._refinement()

    @torch.no_grad()
    def _keep(self, obs: Obs, action: Tensor) -> None:
        policy = self.policy
        latent = policy.latent(action)
        found = policy.decoder.features(obs), policy.decode(obs, latent), latent
        for name, rows in zip(PAIRS, found, strict=True):
            self._pairs[name].append(rows.clone())

    def _refinement(self) -> Refinement:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive(self.seed, "decoder", self.stage))
            fresh = make_decoder(self.config.decoding, self.observation_space, self.policy.action_shape[0])
        seed = derive(self.seed, "refinement", self.stage)
        pairs = {k: torch.cat(rows) for k, rows in self._pairs.items()}
        return Refinement(fresh.to(self.device), self.config.refinement, seed, **pairs)

    def _fit(self) -> dict[str, float]:
        """One epoch of the decoder's fit; after the last one, the next stage."""
        assert self.refinement is not None
        found = {f"decoder/{k}": v for k, v in self.refinement.epoch(self.steps, self.iteration).items()}
        self.iteration += 1
        if self.refinement.done:
            self._next_stage(self.refinement)
            if self.run_dir is not None:
                self.write_checkpoint(self.run_dir, f"stage_{self.stage}")
        return found

    def _next_stage(self, fitted: Refinement) -> None:
        """Everything afresh but the decoder, in the memory of what was there: compiled updates go on with it."""
        self.stage, self.phase, self.refinement = self.stage + 1, "latent", None
        self._pairs = {k: [] for k in PAIRS}
        self.recent.clear()
        made = self._networks(derive(self.seed, "network", self.stage))
        actor = cast(LatentActor, made.actor)
        actor.begin_at_prior()
        actor.decoder.load_state_dict(fitted.result().state_dict())
        modules = {"actor": actor, **made.trained}
        fresh = Learner(self.algorithm, modules, made.copies, self.config, self.device, compile=False)
        self.learner.restore(fresh.tensors(), self.learner.updates)
        self.policy.decoding = True

    def _networks(self, seed: int) -> Networks:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return self.algorithm.networks(
                Spaces(self.observation_space, self.action_space), self.config, self._encoder
            )

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
        super().restore(tensors, counters)
        self.stage, self.phase, self.ends = counters["stage"], counters["phase"], list(counters["ends"])
        self.refine_steps, self.policy.decoding = counters["refine_steps"], counters["decoding"]
        prefix = "refinement/"
        fit = {k.removeprefix(prefix): v.to(self.device) for k, v in tensors.items() if k.startswith(prefix)}
        self._pairs = {k: [fit[k]] if k in fit else [] for k in PAIRS}
        self.refinement = None
        if counters["refinement"] is not None:
            self.refinement = self._refinement()
            self.refinement.restore(fit, counters["refinement"])
