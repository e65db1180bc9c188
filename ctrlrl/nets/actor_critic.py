"""The policy network of the on-policy methods: encoder, action head and any number of scalar critics."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import gymnasium as gym
import numpy as np
import torch
from torch import Tensor, nn

from ctrlrl import names
from ctrlrl.nets.cnn import NatureCNN
from ctrlrl.nets.heads import ActionHead, GaussianHead, action_head
from ctrlrl.nets.mlp import mlp, orthogonal
from ctrlrl.nets.normalizer import ObsNormalizer, ObsScaling
from ctrlrl.nets.sampler import Sampler, sampler
from ctrlrl.types import Distribution, Obs, PolicyOutput, check_types


@dataclass(frozen=True)
class NetworkConfig:
    """Shape of the policy network."""

    actor_hidden: tuple[int, ...] = (64, 64)
    """Widths of the actor's hidden layers."""
    critic_hidden: tuple[int, ...] = (64, 64)
    """Widths of every critic's hidden layers."""
    activation: Literal["tanh", "relu", "elu", "gelu", "silu"] = "tanh"
    """Activation between the layers."""
    orthogonal_init: bool = True
    """Orthogonal weights (gain sqrt 2; head_gain before the actions, 1 before the values), or torch's own."""
    log_std_init: float = 0.0
    """Initial log standard deviation of Gaussian actions."""
    std: Literal["free", "state"] = "free"
    """Deviations of Gaussian actions: parameters of their own, or softplus of a linear function of the features."""
    head_gain: float = 0.01
    """Gain of the orthogonal weights before the actions; 0 starts with the same distribution in every state."""
    action_map: Literal["clip", "tanh"] = "clip"
    """How Gaussian actions meet finite bounds: cut off, or squashed onto the open interval."""
    image_features: int = 512
    """Features of the convolutional encoder, for image observations."""
    encoder: str | None = None
    """``package.module:Class`` of your own encoder: a module built from the observation space, which maps the
    preprocessed observation to [B, out_features] and has that attribute. Shared by actor and critics."""

    policy: Literal["auto", "mlp", "transformer", "tabular", "flow"] = "auto"
    """Kind of policy: a multilayer perceptron (behind convolutions for images), a causal transformer or a table for
    token sequences, a flow that denoises Box actions; auto takes what environment and loss ask for."""
    width: int = 64
    """Width of the transformer."""
    layers: int = 2
    """Its blocks."""
    heads: int = 4
    """Its attention heads."""
    denoising_steps: int = 8
    """Steps from noise to an action, for flow policies."""
    flow_noise: float = 0.7
    """Size of the noise that sampling adds at each of them (a of Flow-GRPO). With 0 the steps are those of the ODE and
    have no density, which is for losses on the matching loss alone."""
    step_std: float | None = None
    """Deviation of every denoising step, which then is one of the ODE with noise on it; None: as flow_noise says."""
    logp_reduce: Literal["sum", "mean"] = "sum"
    """Log-probability of a denoising step: sum over the action's dimensions, or their mean as for images."""
    matching_weight: Literal["uniform", "noise", "time", "time_squared", "huber", "ghuber"] = "uniform"
    """Weight over time of the flow-matching loss, where it stands for the likelihood."""
    matching_power: float = 0.25
    """Exponent of the ghuber weight."""
    matching_times: int = 6
    """Times per action at which the flow-matching loss is taken."""

    def __post_init__(self) -> None:
        check_types(self)
        if min(self.denoising_steps, self.matching_times) < 1 or not self.flow_noise >= 0:
            raise ValueError("denoising_steps and matching_times must be at least 1 and flow_noise not negative")
        if self.step_std is not None and not self.step_std > 0:
            raise ValueError(f"step_std={self.step_std} must be positive")
        if not self.head_gain >= 0:
            raise ValueError(f"head_gain={self.head_gain} must not be negative")
        if min(self.width, self.layers, self.heads) < 1 or self.width % self.heads:
            raise ValueError(f"width={self.width}, layers={self.layers}, heads={self.heads}: all at least 1, and the "
                             "width a multiple of the heads")  # fmt: skip


def is_image(space: gym.Space) -> bool:
    """Whether ``space`` is a uint8 Box of three dimensions, channels first or last."""
    return isinstance(space, gym.spaces.Box) and space.dtype == np.uint8 and len(space.shape) == 3


def _channels_last(shape: tuple[int, ...]) -> bool:
    return shape[-1] <= 4 or shape[0] > shape[-1]


class Preprocess(nn.Module):
    """Raw observations [B, ...] to network inputs: floats normalised, images scaled to [0, 1], integers one-hot.

    Returns ``{"flat": [B, F], "image/<key>": [B, C, H, W]}`` with the parts that exist.
    """

    def __init__(self, space: gym.Space, normalize: bool, clip: float) -> None:
        super().__init__()
        self.space = space
        leaves = dict(space.spaces) if isinstance(space, gym.spaces.Dict) else {"": space}
        self.images = {k: s for k, s in leaves.items() if is_image(s)}
        self.leaves = {k: s for k, s in leaves.items() if k not in self.images}
        for key, leaf in self.leaves.items():
            if not isinstance(
                leaf, gym.spaces.Box | gym.spaces.Discrete | gym.spaces.MultiDiscrete | gym.spaces.MultiBinary
            ):
                raise TypeError(
                    f"observation {key or 'space'} of type {type(leaf).__name__} is not supported; expected Box, "
                    "Discrete, MultiDiscrete, MultiBinary or a flat Dict of these. "
                    "gymnasium.wrappers.FlattenObservation turns the others into a Box."
                )
        floats = [int(np.prod(s.shape)) for s in self.leaves.values() if isinstance(s, gym.spaces.Box)]
        self.float_size = sum(floats)
        self.normalizer: ObsNormalizer | ObsScaling | None = None
        if normalize and self.float_size:
            self.normalizer = ObsNormalizer(self.float_size, clip)
        self.flat_size = sum(gym.spaces.flatdim(s) for s in self.leaves.values())
        # one float vector and nothing else, by far the most common observation, skips the bookkeeping below
        self.plain = isinstance(space, gym.spaces.Box) and len(space.shape) == 1 and space.dtype.kind == "f"

    def image_shape(self, key: str) -> tuple[int, int, int]:
        """(C, H, W) of the image observation ``key``."""
        shape = self.images[key].shape
        assert shape is not None
        return (shape[2], shape[0], shape[1]) if _channels_last(shape) else (shape[0], shape[1], shape[2])

    def floats(self, obs: Obs) -> Tensor | None:
        """[B, F] the float observations side by side, raw: what the normaliser sees."""
        parts = [self._get(obs, k).flatten(1) for k, s in self.leaves.items() if isinstance(s, gym.spaces.Box)]
        return None if not parts else parts[0].float() if len(parts) == 1 else torch.cat([p.float() for p in parts], 1)

    def forward(self, obs: Obs) -> dict[str, Tensor]:
        if self.plain and isinstance(obs, Tensor):
            obs = obs if obs.dtype == torch.float32 else obs.float()
            return {"flat": obs if self.normalizer is None else self.normalizer(obs)}
        out: dict[str, Tensor] = {}
        flat = self.floats(obs)
        parts = [] if flat is None else [flat if self.normalizer is None else self.normalizer(flat)]
        parts += [_one_hot(self._get(obs, k), s) for k, s in self.leaves.items() if not isinstance(s, gym.spaces.Box)]
        if parts:
            out["flat"] = parts[0] if len(parts) == 1 else torch.cat(parts, 1)
        for key, space in self.images.items():
            image = self._get(obs, key)
            if _channels_last(space.shape or ()):
                image = image.permute(0, 3, 1, 2)
            out[f"image/{key}"] = image.float() / 255.0
        return out

    def _get(self, obs: Obs, key: str) -> Tensor:
        return obs[key] if isinstance(obs, dict) else obs


def _one_hot(x: Tensor, space: gym.Space) -> Tensor:
    if isinstance(space, gym.spaces.Discrete):
        return nn.functional.one_hot(x.long() - int(space.start), int(space.n)).float()
    if isinstance(space, gym.spaces.MultiDiscrete):
        columns = zip(x.flatten(1).long().unbind(1), space.start.flatten(), space.nvec.flatten(), strict=True)
        return torch.cat([nn.functional.one_hot(c - int(start), int(n)) for c, start, n in columns], 1).float()
    return x.flatten(1).float()


class Encoder(nn.Module):
    """Flat inputs pass through; each image goes through its own convolutions; all are joined."""

    def __init__(self, preprocess: Preprocess, image_features: int) -> None:
        super().__init__()
        self.keys = {f"image/{k}": f"image_{i}" for i, k in enumerate(preprocess.images)}
        self.cnns = nn.ModuleDict(
            {self.keys[f"image/{k}"]: NatureCNN(preprocess.image_shape(k), image_features) for k in preprocess.images}
        )
        self.out_features = preprocess.flat_size + image_features * len(self.keys)

    def forward(self, inputs: dict[str, Tensor]) -> Tensor:
        parts = [inputs["flat"]] if "flat" in inputs else []
        parts += [self.cnns[name](inputs[key]) for key, name in self.keys.items()]
        return parts[0] if len(parts) == 1 else torch.cat(parts, -1)


class ActorCritic(nn.Module):
    """Actor and critics over one observation space and one action space.

    Actor and critics have separate hidden layers; only an encoder with parameters (convolutions, or the
    user's) is shared. Input is always the raw observation: the normaliser is inside.
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
    ) -> None:
        super().__init__()
        network = network or NetworkConfig()
        self.observation_space, self.action_space = observation_space, action_space
        self.preprocess = Preprocess(observation_space, normalize_obs, clip_obs)
        build = encoder or (None if network.encoder is None else names.load(network.encoder, "encoder"))
        self.encoder = build(observation_space) if build else Encoder(self.preprocess, network.image_features)
        self.plain_encoder = build is None
        features = int(self.encoder.out_features)  # type: ignore[arg-type]
        self.actor = mlp(features, network.actor_hidden, network.activation)
        actor_features = network.actor_hidden[-1] if network.actor_hidden else features
        self.head: ActionHead = action_head(
            actor_features, action_space, network.log_std_init, network.action_map, network.std
        )
        critic_features = network.critic_hidden[-1] if network.critic_hidden else features
        self.critics = nn.ModuleDict(
            {
                name: nn.Sequential(
                    *mlp(features, network.critic_hidden, network.activation), nn.Linear(critic_features, 1)
                )
                for name in critics
            }
        )
        if network.orthogonal_init:
            if build is None:
                orthogonal(self.encoder)
            orthogonal(self.actor)
            if isinstance(self.head, GaussianHead):
                self.head.start(network.head_gain)
            else:
                orthogonal(self.head, network.head_gain)
            for critic in self.critics.values():
                orthogonal(critic)
                orthogonal(critic[-1], 1.0)  # type: ignore[index]

    # -- learning -----------------------------------------------------------------------------

    def forward(self, obs: Obs, action: Tensor) -> PolicyOutput:
        """Everything a loss needs about observations [B, T, ...] and the actions [B, T, ...] taken there."""
        lead = action.shape[: action.dim() - len(self.head.action_shape)]
        features = self._features(self._merge(obs, len(lead)))
        dist = self.head(self.actor(features).unflatten(0, lead))
        values = {name: critic(features).squeeze(-1).unflatten(0, lead) for name, critic in self.critics.items()}
        return PolicyOutput(dist.log_prob(action), dist.entropy(), values, dist)

    def update_normalizer(self, obs: Obs, valid: Tensor) -> None:
        """Take the valid observations [T, N, ...] of a rollout into the running statistics."""
        if isinstance(self.preprocess.normalizer, ObsNormalizer):
            flat = self.preprocess.floats(self._merge(obs, 2))
            assert flat is not None
            self.preprocess.normalizer.update(flat[valid.flatten()])

    # -- acting -------------------------------------------------------------------------------

    def noise(self, n_steps: int, n_envs: int, generator: torch.Generator) -> Tensor:
        """Noise for a whole rollout, [n_steps, n_envs, ...]."""
        return self.head.noise((n_steps, n_envs), generator)

    def act(self, obs: Obs, noise: Tensor) -> Tensor:
        """The actions [N, ...] that ``noise`` selects at observations [N, ...], as the density sees them."""
        return self.distribution(obs).sample(noise)

    def sampler(self) -> Sampler:
        """``act`` and ``to_env`` in one call, for stepping environments until the parameters change."""
        return sampler(self)

    def distribution(self, obs: Obs) -> Distribution:
        """The action distribution at observations [N, ...]."""
        return self.head(self.actor(self._features(obs)))

    def deterministic(self, obs: Obs) -> Tensor:
        """Raw observations [N, ...] to the environment's actions [N, ...]: the policy one would deploy."""
        return self.to_env(obs, self.distribution(obs).mode())

    def to_env(self, obs: Obs, action: Tensor) -> Tensor:
        """Turn the density's actions into the environment's."""
        return self.head.to_env(action)

    def values(self, obs: Obs) -> dict[str, Tensor]:
        """All critics at observations [M, ...], each [M]."""
        features = self._features(obs)
        return {name: critic(features).squeeze(-1) for name, critic in self.critics.items()}

    @property
    def action_shape(self) -> tuple[int, ...]:
        """Shape of one action as the density sees it."""
        return self.head.action_shape

    @property
    def action_dtype(self) -> torch.dtype:
        """Type of the actions as the density sees them."""
        return self.head.action_dtype

    def _features(self, obs: Obs) -> Tensor:
        inputs = self.preprocess(obs)
        if self.preprocess.plain and self.plain_encoder:
            return inputs["flat"]
        if not self.plain_encoder and set(inputs) == {"flat"}:
            return self.encoder(inputs["flat"])
        return self.encoder(inputs)

    def _merge(self, obs: Obs, lead: int) -> Obs:
        if isinstance(obs, dict):
            return {k: v.flatten(0, lead - 1) for k, v in obs.items()}
        return obs.flatten(0, lead - 1)


def encoder_path(encoder: Any) -> str | None:
    """``package.module:Class`` of an encoder class; None where another process could not import it by that."""
    path = f"{getattr(encoder, '__module__', '')}:{getattr(encoder, '__qualname__', '')}"
    try:
        return path if names.load(path, "encoder") is encoder and not path.startswith("__main__") else None
    except ValueError:
        return None
