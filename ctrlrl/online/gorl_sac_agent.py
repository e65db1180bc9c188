"""The agent of GoRL on SAC: stages of SAC over latents, with a decoder fitted between them."""

from __future__ import annotations

import math
from typing import Any, ClassVar, Self, cast

import torch

from ctrlrl.engine.algorithm import Networks, Spaces
from ctrlrl.engine.config import ConfigError
from ctrlrl.engine.learner import Learner
from ctrlrl.engine.off_policy import OffPolicyAgent
from ctrlrl.engine.seeding import derive, generator
from ctrlrl.engine.stages import Staged, valid_rows
from ctrlrl.nets.decoders import Decoder, make_decoder
from ctrlrl.online.gorl_sac import GoRLSAC, GoRLSACConfig, LatentActor


class GoRLSACAgent(Staged, OffPolicyAgent):
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
        self.cut = False
        return super()._iterate()

    def _leave_stage(self) -> None:
        self.debt = 0.0
        self._drop_replay()

    def _collect(self) -> None:
        missing = self.refine_steps - self.collected
        self.collector.n_steps = math.ceil(min(missing, self.steps_bound) / self.n_envs)
        self.explorer.ready = True
        try:
            collected = self.collector.collect(generator(self.seed, "act", self.iteration))
        finally:
            self.collector.n_steps = self.config.collect_steps
        obs, action = valid_rows(collected)
        self._keep(obs, self.policy.latent(action))
        self._count(len(action), collected.episodes, collected.simulation_s)

    def _fresh_decoder(self, seed: int) -> Decoder:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            fresh = make_decoder(self.config.decoding, self.observation_space, self.policy.action_shape[0])
        return fresh.to(self.device)

    def _begin_stage(self, decoder: Decoder) -> None:
        """Everything afresh but the decoder, in the memory of what was there: compiled updates go on with it."""
        made = self._networks(derive(self.seed, "network", self.stage))
        actor = cast(LatentActor, made.actor)
        actor.begin_at_prior()
        actor.decoder.load_state_dict(decoder.state_dict())
        modules = {"actor": actor, **made.trained}
        fresh = Learner(self.algorithm, modules, made.copies, self.config, self.device, compile=False)
        self.learner.restore(fresh.tensors(), self.learner.updates)

    def _networks(self, seed: int) -> Networks:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return self.algorithm.networks(
                Spaces(self.observation_space, self.action_space), self.config, self._encoder
            )
