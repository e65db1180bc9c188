"""A Gaussian policy over latents, which a decoder turns into actions."""

from __future__ import annotations

from collections.abc import Callable

import gymnasium as gym
import numpy as np
from torch import Tensor, nn

from ctrlrl.nets.actor_critic import ActorCritic, NetworkConfig
from ctrlrl.nets.decoders import DecoderConfig, make_decoder
from ctrlrl.nets.sampler import Sampler, chooser, sampler
from ctrlrl.types import Obs


class LatentPolicy(ActorCritic):
    """pi(a | s) = integral of pi(eps | s) delta(a - g(s, eps)), GoRL's factorisation (arXiv:2512.02581, section 3).

    The density is that of the latent eps, which has as many dimensions as the action: ``act``, ``forward`` and all
    that trains the policy know nothing of the decoder g, and no gradient of theirs reaches it. Its parameters do not
    require gradients. ``to_env`` decodes; ``deterministic`` decodes the most probable latent.

    Args:
        decoding: Shape of the decoder; the other arguments are those of :class:`ActorCritic`.

    Attributes:
        decoder: g, before the map onto the action's bounds.
        decoding: Whether the decoder has been fitted. Until then it is the identity, and is left out.
    """

    def __init__(
        self,
        observation_space: gym.Space,
        action_space: gym.Space,
        network: NetworkConfig | None = None,
        critics: tuple[str, ...] = ("value",),
        normalize_obs: bool = True,
        clip_obs: float = 10.0,
        encoder: Callable[..., nn.Module] | None = None,
        *,
        decoding: DecoderConfig | None = None,
    ) -> None:
        if not isinstance(action_space, gym.spaces.Box) or not np.issubdtype(action_space.dtype, np.floating):
            raise TypeError(f"a decoder makes actions in a Box of floats, found {action_space}")
        super().__init__(observation_space, action_space, network, critics, normalize_obs, clip_obs, encoder)
        self.decoder = make_decoder(decoding or DecoderConfig(), observation_space, self.action_shape[0])
        self.decoder.requires_grad_(False)
        self.decoding = False

    def decode(self, obs: Obs, latent: Tensor) -> Tensor:
        """The actions [N, A], before the map onto the bounds, of latents [N, A] at observations [N, ...]."""
        return self.decoder(self.decoder.features(obs), latent) if self.decoding else latent

    def to_env(self, obs: Obs, action: Tensor) -> Tensor:
        """Turn latents into the environment's actions."""
        return self.head.to_env(self.decode(obs, action))

    def encode(self, obs: Obs, action: Tensor) -> tuple[Tensor, Tensor]:
        """The latents [N, A] that :meth:`decode` turns into ``action`` [N, A], and log|det| [N] of what it does there.

        Raises:
            RuntimeError: No latent leads to an action.
        """
        if not self.decoding:
            return action, action.new_zeros(len(action))
        return self.decoder.invert(self.decoder.features(obs), action)

    def sampler(self) -> Sampler:
        """``act`` and ``to_env`` in one call."""
        if not self.decoding:
            return sampler(self)
        act, to_env = chooser(self) or self.act, self.head.to_env
        decode, features = self.decoder.sampler(), self.decoder.features

        def sample(obs: Obs, noise: Tensor) -> tuple[Tensor, Tensor]:
            latent = act(obs, noise)
            return latent, to_env(decode(features(obs), latent))

        return sample
