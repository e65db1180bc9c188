"""GoRL on SAC: a soft actor-critic over latents, and a decoder that turns them into actions."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any, ClassVar, cast

import gymnasium as gym
import torch
from torch import Tensor, nn

from ctrlrl.engine.algorithm import Networks, Spaces, register
from ctrlrl.engine.config import ConfigError
from ctrlrl.engine.off_policy_config import OffPolicyConfig
from ctrlrl.engine.refinement import RefinementConfig
from ctrlrl.engine.stages import to_collect
from ctrlrl.nets.actors import BoxActor, QNetworkConfig, SquashedGaussian
from ctrlrl.nets.decoders import Decoder, DecoderConfig, make_decoder
from ctrlrl.nets.q_ensemble import QEnsemble
from ctrlrl.online.gorl import PAPER, StagesConfig
from ctrlrl.online.sac import SAC
from ctrlrl.types import Obs

if TYPE_CHECKING:
    from ctrlrl.engine.transition_config import TransitionConfig
    from ctrlrl.online.gorl_sac_agent import GoRLSACAgent

EDGE = 1.0 - 2.0**-24
"""Largest float32 below 1; its latent is 8.7."""


@dataclass(frozen=True)
class GoRLSACConfig(OffPolicyConfig):
    """The off-policy loop's settings with those of the decoder and its fit."""

    decoding: DecoderConfig = field(default_factory=DecoderConfig)
    """Shape of the decoder."""
    refinement: RefinementConfig = field(default_factory=RefinementConfig)
    """How it is fitted."""


@register
@dataclass(frozen=True)
class GoRLSAC(SAC):
    """SAC over the latents of a generative decoder, which is fitted between stages to what the policy did."""

    paper: ClassVar[str] = PAPER
    differs: ClassVar[str] = (
        "A latent is stored and valued as tanh(eps), and the policy's entropy is that of tanh(eps), as SAC has it of "
        "actions. The Gaussian of eps keeps all of R^A, which the decoder was fitted on, and the first stage is sac "
        "itself, its random warm-up included. In eps the bonus is a pull towards a logistic distribution of deviation "
        "0.91, next to N(0, I). Later stages begin at N(0, I) exactly, which also acts during their warm-up. One "
        "update per environment step, where the paper has twenty, and smaller batches of the fit (preset 'paper')."
    )
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {"paper": {"replay_ratio": 20.0, "refine_batch_size": 8192}}
    capabilities: ClassVar[frozenset[str]] = frozenset(["resume", "vector", "box", "dict_obs", "compile"])

    target_entropy: float | None = None
    """Entropy in nats, of the latent's tanh, that a learned coefficient aims at; None is minus the number of action
    dimensions."""
    stages: tuple[float, ...] = (0.5, 0.25, 0.25)
    """Share of the steps that each stage has; the decoder is fitted between them, and is the identity in the first."""

    def __post_init__(self) -> None:
        super().__post_init__()
        StagesConfig(stages=self.stages)

    @classmethod
    def agent_class(cls) -> type[GoRLSACAgent]:
        from ctrlrl.online.gorl_sac_agent import GoRLSACAgent

        return GoRLSACAgent

    def plan(self, start: int, steps: int, config: GoRLSACConfig, iteration: int) -> tuple[list[int], int]:
        """The steps at which the stages of a run of ``steps`` from ``start`` end, and those collected for each fit.

        Args:
            start: Steps done before.
            steps: Of the whole run.
            config: The loop's settings.
            iteration: Steps of an iteration, by which a stage may be longer.

        Raises:
            ConfigError: A stage would be over before its first update.
        """
        ends = StagesConfig(stages=self.stages).ends(start, steps)
        collected = to_collect(config.refinement, steps, len(ends))
        for stage, (begin, end) in enumerate(pairwise([start, *ends])):
            least = config.learning_starts + (collected + iteration if stage else 0)
            if len(ends) > 1 and end - begin <= least:
                raise ConfigError(
                    f"stages={self.stages}: number {stage} would have {end - begin:,} of {steps:,} steps and needs "
                    f"more than {least:,}, for learning_starts={config.learning_starts:,} and, from the second on, "
                    f"{collected:,} steps for the fit before it and an iteration ({iteration:,}). Train for longer, or "
                    "set learning_starts, refine_steps or iteration_steps lower"
                )
        return ends, collected

    def networks(self, spaces: Spaces, config: TransitionConfig, encoder: Callable[..., nn.Module] | None) -> Networks:
        actor = LatentActor(spaces.observation, spaces.action, config.network, encoder)
        critic = QEnsemble(spaces.observation, actor.action_shape[0], config.network, encoder)
        # last, so that the other networks begin as those of sac
        actor.add_decoder(cast(GoRLSACConfig, config).decoding)
        return Networks(actor, {"critic": critic, **self.temperature()}, {"critic_target": "critic"})


class Latents:
    """The policy's density over latents, as SAC needs it.

    Not a SquashedGaussian, whose density is known of the environment's actions: of what a decoder makes of latents it
    is not.
    """

    def __init__(self, mean: Tensor, log_std: Tensor) -> None:
        self.mean, self.log_std = mean, log_std

    def pre_tanh(self, noise: Tensor) -> Tensor:
        """eps = mean + std x noise, [..., A]."""
        return SquashedGaussian(self.mean, self.log_std).pre_tanh(noise)

    def log_prob(self, latent: Tensor) -> Tensor:
        """log-density of tanh(eps), [...], at eps [..., A]."""
        return SquashedGaussian(self.mean, self.log_std).log_prob(latent)


class LatentActor(BoxActor):
    """A Gaussian over latents eps, which a decoder g turns into actions a = g(s, eps) before the map onto the bounds.

    ``act``, ``mode`` and all that trains the policy have latents as tanh(eps) in [-1, 1]^A and know nothing of the
    decoder; ``to_env`` decodes. tanh(eps) in float32 gives eps back to 0.0003 within 5, and none beyond 8.7: to the
    tanh behind the decoder that is the bound itself. The decoder's parameters do not require gradients.

    Attributes:
        decoder: g; see :meth:`add_decoder`.
        decoding: Whether it has been fitted. Until then it is the identity, and is left out.
    """

    decoder: Decoder

    def __init__(
        self,
        observation_space: gym.Space,
        action_space: gym.Space,
        network: QNetworkConfig,
        encoder: Callable[..., nn.Module] | None = None,
    ) -> None:
        super().__init__(observation_space, action_space, network, encoder)
        self.mean = nn.Linear(self.width, self.action_shape[0])
        self.log_std = nn.Linear(self.width, self.action_shape[0])
        self.log_std_bounds = (network.log_std_min, 2.0)
        self.decoding = False

    def add_decoder(self, config: DecoderConfig) -> None:
        """Give the policy a decoder that has not been fitted; image observations raise ``TypeError``."""
        self.decoder = make_decoder(config, self.observation_space, self.action_shape[0]).requires_grad_(False)

    @torch.no_grad()
    def begin_at_prior(self) -> None:
        """eps ~ N(0, I) in every state."""
        for parameter in (*self.mean.parameters(), *self.log_std.parameters()):
            parameter.zero_()

    def forward(self, obs: Obs) -> Latents:
        body = self.body(self.features(obs))
        return Latents(self.mean(body), self.log_std(body).clamp(*self.log_std_bounds))

    def act(self, obs: Obs, noise: Tensor) -> Tensor:
        return torch.tanh(self(obs).pre_tanh(noise))

    def mode(self, obs: Obs) -> Tensor:
        return torch.tanh(self.mean(self.body(self.features(obs))))

    def latent(self, action: Tensor) -> Tensor:
        """eps of tanh(eps), both [..., A]."""
        return action.clamp(-EDGE, EDGE).atanh()

    def decode(self, obs: Obs, latent: Tensor) -> Tensor:
        """The actions [N, A], before the map onto the bounds, of latents eps [N, A] at observations [N, ...]."""
        return self.decoder(self.decoder.features(obs), latent) if self.decoding else latent

    def to_env(self, obs: Obs, action: Tensor) -> Tensor:
        """The environment's actions of latents, given as tanh(eps)."""
        return super().to_env(obs, self.decode(obs, self.latent(action)).tanh() if self.decoding else action)
