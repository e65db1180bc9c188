"""Action distributions and the layers that parametrise them."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping

import gymnasium as gym
import numpy as np
import torch
from torch import Tensor, nn

from ctrlrl.core import penalty
from ctrlrl.nets.mlp import orthogonal
from ctrlrl.types import Distribution

STD_MIN, STD_MAX = 1e-3, 10.0
"""Bounds on a deviation that depends on the state."""


class DiagonalGaussian:
    """Independent normals over the last dimension; ``mean`` and ``log_std`` are [..., A]."""

    def __init__(self, mean: Tensor, log_std: Tensor) -> None:
        self.mean = mean
        self.log_std = log_std

    def log_prob(self, action: Tensor) -> Tensor:
        """Log-density of ``action`` [..., A], as [...]."""
        z = (action - self.mean) * torch.exp(-self.log_std)
        return (-0.5 * z * z - self.log_std).sum(-1) - 0.5 * math.log(2 * math.pi) * action.shape[-1]

    def entropy(self) -> Tensor:
        """Differential entropy in nats, [...]."""
        return penalty.gaussian_entropy(self.log_std)

    def kl(self, params: Mapping[str, Tensor]) -> Tensor:
        """KL(self || other), [...]."""
        return penalty.gaussian_kl(self.mean, self.log_std, params["mean"], params["log_std"])

    def params(self) -> dict[str, Tensor]:
        """``mean`` and ``log_std``, each [..., A]."""
        return {"mean": self.mean, "log_std": self.log_std}

    def sample(self, noise: Tensor) -> Tensor:
        """mean + std x noise, with standard normal ``noise`` [..., A]."""
        return torch.addcmul(self.mean, self.log_std.exp(), noise)

    def mode(self) -> Tensor:
        """The mean."""
        return self.mean


class Categorical:
    """One choice among K; ``logits`` [..., K] are normalised here. Actions are int64 [...]."""

    def __init__(self, logits: Tensor) -> None:
        self.logits = torch.log_softmax(logits, dim=-1)

    def log_prob(self, action: Tensor) -> Tensor:
        """Log-probability of ``action`` [...]."""
        return self.logits.gather(-1, action.unsqueeze(-1)).squeeze(-1)

    def entropy(self) -> Tensor:
        """Entropy in nats, [...]."""
        return penalty.categorical_entropy(self.logits)

    def kl(self, params: Mapping[str, Tensor]) -> Tensor:
        """KL(self || other), [...]."""
        return penalty.categorical_kl(self.logits, params["logits"])

    def params(self) -> dict[str, Tensor]:
        """``logits`` [..., K], normalised."""
        return {"logits": self.logits}

    def sample(self, noise: Tensor) -> Tensor:
        """The Gumbel-max choice for Gumbel ``noise`` [..., K]."""
        return (self.logits + noise).argmax(-1)

    def mode(self) -> Tensor:
        """The most probable choice."""
        return self.logits.argmax(-1)


class MultiCategorical:
    """Independent choices; ``logits`` [..., sum(nvec)] hold one block per choice. Actions are int64 [..., k]."""

    def __init__(self, logits: Tensor, nvec: tuple[int, ...]) -> None:
        self.nvec = nvec
        self.parts = [Categorical(part) for part in logits.split(list(nvec), dim=-1)]

    def log_prob(self, action: Tensor) -> Tensor:
        """Sum of the choices' log-probabilities, [...]."""
        return torch.stack([p.log_prob(a) for p, a in zip(self.parts, action.unbind(-1), strict=True)], -1).sum(-1)

    def entropy(self) -> Tensor:
        """Sum of the choices' entropies, [...]."""
        return torch.stack([p.entropy() for p in self.parts], -1).sum(-1)

    def kl(self, params: Mapping[str, Tensor]) -> Tensor:
        """KL(self || other), [...]."""
        others = params["logits"].split(list(self.nvec), dim=-1)
        return torch.stack([p.kl({"logits": o}) for p, o in zip(self.parts, others, strict=True)], -1).sum(-1)

    def params(self) -> dict[str, Tensor]:
        """``logits`` [..., sum(nvec)], normalised block by block."""
        return {"logits": torch.cat([p.logits for p in self.parts], -1)}

    def sample(self, noise: Tensor) -> Tensor:
        """The Gumbel-max choices for Gumbel ``noise`` [..., sum(nvec)]."""
        blocks = noise.split(list(self.nvec), dim=-1)
        return torch.stack([p.sample(n) for p, n in zip(self.parts, blocks, strict=True)], -1)

    def mode(self) -> Tensor:
        """The most probable choices."""
        return torch.stack([p.mode() for p in self.parts], -1)


class ActionHead(nn.Module, ABC):
    """Maps features to a distribution, draws its noise, and turns its actions into the environment's."""

    noise_shape: tuple[int, ...]
    """Shape of the noise that selects one action."""
    action_shape: tuple[int, ...]
    """Shape of one action as the density sees it."""
    action_dtype: torch.dtype = torch.float32

    @abstractmethod
    def noise(self, lead: tuple[int, ...], generator: torch.Generator) -> Tensor:
        """[*lead, *noise_shape] on the CPU, so that every device draws the same numbers."""

    @abstractmethod
    def to_env(self, action: Tensor) -> Tensor:
        """The action the environment receives."""


class GaussianHead(ActionHead):
    """Gaussians around a linear mean, for Box actions of any shape.

    ``std`` "free" has deviations that do not depend on the state, one parameter each; with "state" they are
    softplus(linear) + 0.001, cut to [0.001, 10] (the form of Brax's and GoRL's networks).

    ``action_map`` "clip" cuts at the bounds (as Stable-Baselines3 does); "tanh" maps the whole real line onto
    (low, high), which needs finite bounds. The density is that of the unmapped action in both cases: the map's
    Jacobian cancels in every ratio.
    """

    low: Tensor
    high: Tensor

    def __init__(
        self, features: int, space: gym.spaces.Box, log_std_init: float, action_map: str, std: str = "free"
    ) -> None:
        super().__init__()
        size = int(np.prod(space.shape))
        self.linear = nn.Linear(features, size)
        self.log_std_init = float(log_std_init)
        self.spread: nn.Linear | None = None
        if std == "free":
            self.log_std = nn.Parameter(torch.full((size,), self.log_std_init))
        else:
            if not STD_MIN < math.exp(log_std_init) < STD_MAX:
                raise ValueError(f"log_std_init={log_std_init} is outside of what a state's deviation can be, "
                                 f"{STD_MIN} to {STD_MAX}")  # fmt: skip
            self.spread = nn.Linear(features, size)
        self.noise_shape = self.action_shape = (size,)
        self.env_shape = space.shape
        self.action_map = action_map
        self.bounded = bool(np.isfinite(space.low).any() or np.isfinite(space.high).any())
        if action_map == "tanh" and not (np.isfinite(space.low).all() and np.isfinite(space.high).all()):
            raise ValueError(f"action_map='tanh' needs finite bounds, found {space}; use action_map='clip'")
        self.register_buffer("low", _inward(space.low, np.inf), persistent=False)
        self.register_buffer("high", _inward(space.high, -np.inf), persistent=False)

    def start(self, gain: float) -> None:
        """Orthogonal weights times ``gain``, mean 0, deviations exp(log_std_init)."""
        orthogonal(self, gain)
        if self.spread is not None:
            nn.init.constant_(self.spread.bias, math.log(math.expm1(math.exp(self.log_std_init) - STD_MIN)))

    def forward(self, features: Tensor) -> Distribution:
        mean = self.linear(features)
        return DiagonalGaussian(mean, self.log_deviation(features).expand_as(mean))

    def log_deviation(self, features: Tensor) -> Tensor:
        """Log standard deviations: [A], or [..., A] where they depend on the state."""
        if self.spread is None:
            return self.log_std
        return (nn.functional.softplus(self.spread(features)) + STD_MIN).clamp(max=STD_MAX).log()

    def noise(self, lead: tuple[int, ...], generator: torch.Generator) -> Tensor:
        return torch.randn(*lead, *self.noise_shape, generator=generator)

    def to_env(self, action: Tensor) -> Tensor:
        if self.action_map == "tanh":
            action = self.low + (self.high - self.low) * 0.5 * (torch.tanh(action) + 1.0)
        if self.bounded:  # the map too may round to one unit in the last place beyond
            action = torch.clamp(action, self.low, self.high)
        return action if len(self.env_shape) == 1 else action.reshape(*action.shape[:-1], *self.env_shape)


def _inward(bound: np.ndarray, inside: float) -> Tensor:
    """[A] the bound in float32, never outside the space's own: 0.1 in float64 would round up."""
    rounded = bound.astype(np.float32)
    beyond = rounded < bound if inside > 0 else rounded > bound
    return torch.from_numpy(np.where(beyond, np.nextafter(rounded, np.float32(inside)), rounded).flatten())


def gumbel(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    # exponential variates avoid log(0): -log(-log(u)) = -log(e) with e ~ Exp(1)
    return -torch.empty(shape).exponential_(generator=generator).clamp_min(1e-30).log()


class CategoricalHead(ActionHead):
    """Logits of a Discrete space."""

    action_dtype = torch.int64

    def __init__(self, features: int, space: gym.spaces.Discrete) -> None:
        super().__init__()
        self.linear = nn.Linear(features, int(space.n))
        self.start = int(space.start)
        self.noise_shape, self.action_shape = (int(space.n),), ()

    def forward(self, features: Tensor) -> Distribution:
        return Categorical(self.linear(features))

    def noise(self, lead: tuple[int, ...], generator: torch.Generator) -> Tensor:
        return gumbel((*lead, *self.noise_shape), generator)

    def to_env(self, action: Tensor) -> Tensor:
        return action + self.start if self.start else action


class MultiCategoricalHead(ActionHead):
    """Logits of a MultiDiscrete space, one block per choice."""

    action_dtype = torch.int64
    start: Tensor

    def __init__(self, features: int, space: gym.spaces.MultiDiscrete) -> None:
        super().__init__()
        self.nvec = tuple(int(n) for n in space.nvec.flatten())
        self.linear = nn.Linear(features, sum(self.nvec))
        self.noise_shape, self.action_shape = (sum(self.nvec),), (len(self.nvec),)
        self.env_shape = space.nvec.shape
        self.register_buffer("start", torch.as_tensor(space.start.flatten(), dtype=torch.int64), persistent=False)

    def forward(self, features: Tensor) -> Distribution:
        return MultiCategorical(self.linear(features), self.nvec)

    def noise(self, lead: tuple[int, ...], generator: torch.Generator) -> Tensor:
        return gumbel((*lead, *self.noise_shape), generator)

    def to_env(self, action: Tensor) -> Tensor:
        return (action + self.start).reshape(*action.shape[:-1], *self.env_shape)


def action_head(
    features: int, space: gym.Space, log_std_init: float, action_map: str, std: str = "free"
) -> ActionHead:
    """The head for ``space``; raises ``TypeError`` for spaces no density is defined on."""
    if isinstance(space, gym.spaces.Box):
        if not np.issubdtype(space.dtype, np.floating):
            raise TypeError(f"actions {space} are integers in a Box; expected floats, or a MultiDiscrete space")
        return GaussianHead(features, space, log_std_init, action_map, std)
    if isinstance(space, gym.spaces.Discrete):
        return CategoricalHead(features, space)
    if isinstance(space, gym.spaces.MultiDiscrete):
        return MultiCategoricalHead(features, space)
    raise TypeError(
        f"actions of type {type(space).__name__} are not supported; expected Box, Discrete or MultiDiscrete. "
        "A wrapper can flatten others into one of these (gymnasium.wrappers.TransformAction)."
    )
