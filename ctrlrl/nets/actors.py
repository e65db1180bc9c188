"""Policies of the off-policy methods: bounded actions in [-1, 1], by a squashed Gaussian or deterministic."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import gymnasium as gym
import numpy as np
import torch
from torch import Tensor, nn

from ctrlrl import names
from ctrlrl.nets.actor_critic import Encoder, Preprocess
from ctrlrl.nets.heads import DiagonalGaussian
from ctrlrl.nets.mlp import mlp
from ctrlrl.nets.normalizer import ObsScaling
from ctrlrl.types import Obs, check_types


@dataclass(frozen=True)
class QNetworkConfig:
    """Shape of the actor and of the critics of an off-policy method."""

    actor_hidden: tuple[int, ...] = (256, 256)
    """Widths of the actor's hidden layers."""
    critic_hidden: tuple[int, ...] = (256, 256)
    """Widths of every critic's hidden layers."""
    activation: Literal["tanh", "relu", "elu", "gelu", "silu"] = "relu"
    """Activation between the layers."""
    log_std_min: float = -20.0
    """Smallest log-deviation of policies squashed by tanh, before the squashing; the largest is 2."""
    n_critics: int = 2
    """Critics whose smallest value is the target."""
    image_features: int = 512
    """Features of the convolutional encoders, for image observations; actor and critics have one each."""
    encoder: str | None = None
    """``package.module:Class`` of your own encoder: a module built from the observation space, which maps the
    preprocessed observation to [B, out_features] and has that attribute. Actor and critics have one each."""
    normalize_obs: bool = False
    """Shift and scale observations by the mean and deviation of the recorded data; online they are taken over from the
    run that training starts from."""
    layer_norm: Literal["none", "critic", "both"] = "none"
    """Which networks have layer normalisation behind the activation of each hidden layer, as in ReBRAC's code."""

    def __post_init__(self) -> None:
        check_types(self)
        if self.n_critics < 1:
            raise ValueError(f"n_critics={self.n_critics} must be at least 1")
        if self.image_features < 1:
            raise ValueError(f"image_features={self.image_features} must be at least 1")


class Features(nn.Module):
    """Observations [B, ...] to features [B, out_features]: preprocessing and an encoder."""

    def __init__(self, space: gym.Space, network: QNetworkConfig, encoder: Callable[..., nn.Module] | None) -> None:
        super().__init__()
        self.preprocess = Preprocess(space, normalize=False, clip=0.0)
        if network.normalize_obs and self.preprocess.float_size:
            self.preprocess.normalizer = ObsScaling(self.preprocess.float_size)
        build = encoder or (None if network.encoder is None else names.load(network.encoder, "encoder"))
        self.encoder = build(space) if build else Encoder(self.preprocess, network.image_features)
        self.own = build is not None
        self.plain = self.preprocess.plain and not self.own
        self.out_features = int(self.encoder.out_features)  # type: ignore[arg-type]

    def forward(self, obs: Obs) -> Tensor:
        inputs = self.preprocess(obs)
        if self.plain:
            return inputs["flat"]
        return self.encoder(inputs["flat"] if self.own and set(inputs) == {"flat"} else inputs)


class SquashedGaussian:
    """tanh of independent normals; ``mean`` and ``log_std`` are [..., A] and belong to the normal.

    Densities are those of the squashed action in (-1, 1)^A and are taken at the pre-squashing value ``u``, where
    they are exact; a stored action near the bounds cannot give ``u`` back.
    """

    def __init__(self, mean: Tensor, log_std: Tensor) -> None:
        self.mean, self.log_std = mean, log_std

    def pre_tanh(self, noise: Tensor) -> Tensor:
        """u = mean + std x noise, [..., A]."""
        return torch.addcmul(self.mean, self.log_std.exp(), noise)

    def log_density(self, u: Tensor) -> Tensor:
        """log-density of tanh(u) by dimension, [..., A]: log N(u) - log(1 - tanh(u)^2), the latter without overflow."""
        z = (u - self.mean) * torch.exp(-self.log_std)
        normal = -0.5 * z * z - self.log_std - 0.5 * math.log(2 * math.pi)
        return normal - 2.0 * (math.log(2.0) - u - nn.functional.softplus(-2.0 * u))

    def log_prob(self, u: Tensor) -> Tensor:
        """log-density of tanh(u), [...]."""
        return self.log_density(u).sum(-1)


class BoxActor(nn.Module):
    """What the collector and the agent need of an actor whose actions lie in [-1, 1]^A.

    Raises:
        TypeError: Actions are not a Box of floats.
        ValueError: A bound is infinite.
    """

    middle: Tensor
    scale: Tensor
    low: Tensor
    high: Tensor
    action_dtype = torch.float32
    stochastic = True
    """Whether the policy is a distribution; otherwise noise belongs to collecting data alone."""

    def __init__(
        self,
        observation_space: gym.Space,
        action_space: gym.Space,
        network: QNetworkConfig,
        encoder: Callable[..., nn.Module] | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(action_space, gym.spaces.Box) or not np.issubdtype(action_space.dtype, np.floating):
            raise TypeError(
                f"this method needs Box actions of floats, found {action_space}; try ppo, or dqn for Discrete ones"
            )
        low, high = (np.asarray(b, dtype=np.float64).flatten() for b in (action_space.low, action_space.high))
        if not np.isfinite([low, high]).all():
            raise ValueError(
                f"this method needs finite bounds on every action, found {action_space}. Set them by "
                "gymnasium.wrappers.RescaleAction or ClipAction to what the environment really takes"
            )
        self.observation_space, self.action_space = observation_space, action_space
        self.env_shape = action_space.shape
        self.action_shape = (low.size,)
        self.features = Features(observation_space, network, encoder)
        normed = network.layer_norm == "both"
        self.body = mlp(self.features.out_features, network.actor_hidden, network.activation, normed)
        self.width = network.actor_hidden[-1] if network.actor_hidden else self.features.out_features
        for name, value in {"middle": (high + low) / 2, "scale": (high - low) / 2}.items():
            self.register_buffer(name, torch.as_tensor(value, dtype=torch.float32), persistent=False)
        for name, bound, inside in (("low", low, np.inf), ("high", high, -np.inf)):
            # float32 that is never outside the space's own bound: 0.1 in float64 would round up
            narrow = bound.astype(np.float32)
            beyond = narrow < bound if name == "low" else narrow > bound
            narrow = np.where(beyond, np.nextafter(narrow, np.float32(inside)), narrow)
            self.register_buffer(name, torch.from_numpy(narrow.astype(np.float32)), persistent=False)

    def noise(self, n_steps: int, n_envs: int, generator: torch.Generator) -> Tensor:
        """Standard normal noise [n_steps, n_envs, A], drawn on the CPU so that every device has the same."""
        return torch.randn(n_steps, n_envs, *self.action_shape, generator=generator)

    def act(self, obs: Obs, noise: Tensor) -> Tensor:
        """The actions [N, A] in [-1, 1] with which this policy explores, selected by ``noise`` [N, A]."""
        raise NotImplementedError(f"{type(self).__name__} does not choose actions, it only maps them")

    def mode(self, obs: Obs) -> Tensor:
        """The deterministic actions [N, A] in [-1, 1]."""
        raise NotImplementedError(f"{type(self).__name__} does not choose actions, it only maps them")

    def deterministic(self, obs: Obs) -> Tensor:
        """Raw observations [N, ...] to the environment's actions [N, ...]: the policy one would deploy."""
        return self.to_env(obs, self.mode(obs))

    def to_env(self, obs: Obs, action: Tensor) -> Tensor:
        """Scale [-1, 1]^A onto the environment's bounds."""
        scaled = torch.clamp(torch.addcmul(self.middle, action, self.scale), self.low, self.high)
        return scaled if len(self.env_shape) == 1 else scaled.reshape(*action.shape[:-1], *self.env_shape)


class SquashedGaussianActor(BoxActor):
    """Mean and log-deviation from one body; ``log_std`` is cut to [network.log_std_min, 2]."""

    def __init__(
        self, observation_space: gym.Space, action_space: gym.Space, network: QNetworkConfig, **options: Any
    ) -> None:
        super().__init__(observation_space, action_space, network, **options)
        self.mean = nn.Linear(self.width, self.action_shape[0])
        self.log_std = nn.Linear(self.width, self.action_shape[0])
        self.log_std_bounds = (network.log_std_min, 2.0)

    def forward(self, obs: Obs) -> SquashedGaussian:
        body = self.body(self.features(obs))
        return SquashedGaussian(self.mean(body), self.log_std(body).clamp(*self.log_std_bounds))

    def act(self, obs: Obs, noise: Tensor) -> Tensor:
        return torch.tanh(self(obs).pre_tanh(noise))

    def mode(self, obs: Obs) -> Tensor:
        return torch.tanh(self.mean(self.body(self.features(obs))))


class DeterministicActor(BoxActor):
    """tanh of a linear layer; explores with Gaussian noise of a fixed size, cut at the bounds."""

    stochastic = False

    def __init__(self, *spaces: Any, exploration_noise: float = 0.1, **options: Any) -> None:
        super().__init__(*spaces, **options)
        self.out = nn.Linear(self.width, self.action_shape[0])
        self.exploration_noise = exploration_noise

    def forward(self, obs: Obs) -> Tensor:
        return torch.tanh(self.out(self.body(self.features(obs))))

    def act(self, obs: Obs, noise: Tensor) -> Tensor:
        return torch.clamp(self(obs) + self.exploration_noise * noise, -1.0, 1.0)

    def mode(self, obs: Obs) -> Tensor:
        return self(obs)


class GaussianActor(BoxActor):
    """A Gaussian in the action's own space: its mean a tanh, its log-deviation one number per dimension.

    Not squashed: samples are cut at the bounds, densities are those of the uncut normal. As in IQL's released code,
    ``log_std`` starts at 0 and is cut to [-5, 2].
    """

    def __init__(self, *spaces: Any, log_std_bounds: tuple[float, float] = (-5.0, 2.0), **options: Any) -> None:
        super().__init__(*spaces, **options)
        self.mean = nn.Linear(self.width, self.action_shape[0])
        self.log_std = nn.Parameter(torch.zeros(self.action_shape))
        self.log_std_bounds = log_std_bounds

    def forward(self, obs: Obs) -> DiagonalGaussian:
        mean = self.mode(obs)
        return DiagonalGaussian(mean, self.log_std.clamp(*self.log_std_bounds).expand_as(mean))

    def act(self, obs: Obs, noise: Tensor) -> Tensor:
        return self(obs).sample(noise).clamp(-1.0, 1.0)

    def mode(self, obs: Obs) -> Tensor:
        return torch.tanh(self.mean(self.body(self.features(obs))))
