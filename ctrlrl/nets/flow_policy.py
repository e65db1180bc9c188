"""Policies that act by denoising: a velocity field turns Gaussian noise into an action in a few small steps."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Literal, TypeAlias

import gymnasium as gym
import numpy as np
import torch
from torch import Tensor, nn

from ctrlrl.nets.actor_critic import ActorCritic, NetworkConfig
from ctrlrl.nets.heads import DiagonalGaussian, GaussianHead
from ctrlrl.nets.mlp import mlp, orthogonal
from ctrlrl.nets.sampler import Sampler
from ctrlrl.types import Distribution, Obs, PolicyOutput

Likelihood: TypeAlias = Literal["denoising", "matching"]
"""What stands for the log-probability of an action: that of every denoising step, or minus the matching loss."""
MatchingWeight: TypeAlias = Literal["uniform", "noise", "time", "time_squared", "huber", "ghuber"]

LIKELIHOODS: tuple[Likelihood, ...] = ("denoising", "matching")
MATCHING_WEIGHTS: tuple[MatchingWeight, ...] = ("uniform", "noise", "time", "time_squared", "huber", "ghuber")
OBS, X, TIME = "obs", "x", "time"
"""Keys of an unfolded observation; a dictionary observation is spread over ``obs/<key>``."""


class FlowHead(GaussianHead):
    """Last layer of the velocity field, with the Gaussian head's way of meeting the bounds.

    An action, and the noise that selects it, is a whole chain [K + 1, D]: noise first, action last.
    """

    def __init__(self, features: int, space: gym.spaces.Box, steps: int, action_map: str) -> None:
        super().__init__(features, space, 0.0, action_map)
        del self.log_std  # the schedule says how large the noise of a step is
        self.noise_shape = self.action_shape = (steps + 1, *self.action_shape)

    def forward(self, features: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Velocities [..., D]."""
        return self.linear(features)

    def to_env(self, action: Tensor) -> Tensor:
        return super().to_env(action[..., -1, :])


class Matching:
    """The flow-matching loss in a likelihood's place: ``log_prob(u) = -f(mean_d (v_d - u_d)^2, t)``.

    u = eps - x0 is what the velocity v at x_t = (1 - t) x0 + t eps should be. It is not normalised, so it has no
    entropy, and only differences at the same (t, eps) mean anything.

    ============  ====================================================
    uniform       f(m, t) = m: the loss a flow is usually trained with
    noise         (1 - t)^2 m: what v says of eps, (x_t + (1 - t) v - eps)^2, in the place of v
    time          t m
    time_squared  t^2 m
    huber         t (sqrt(m + c) - sqrt c),  c = 1e-10
    ghuber        t ((m + c)^q - c^q) / q
    ============  ====================================================
    """

    def __init__(self, mean: Tensor, time: Tensor, weight: MatchingWeight = "uniform", power: float = 0.25) -> None:
        self.mean, self.time = mean, time
        self.weight: MatchingWeight = weight
        self.power = power

    def log_prob(self, action: Tensor) -> Tensor:
        """Minus the weighted loss of the velocity against ``action`` [..., D], as [...]."""
        error = (self.mean - action).square().mean(-1)
        if self.weight == "uniform":
            return -error
        if self.weight == "noise":
            return -error * (1.0 - self.time).square()
        if self.weight in ("huber", "ghuber"):
            power = 0.5 if self.weight == "huber" else self.power
            error = (error + 1e-10) ** power - 1e-10**power
            return -error * self.time if self.weight == "huber" else -error * self.time / power
        return -error * (self.time if self.weight == "time" else self.time.square())

    def entropy(self) -> Tensor:
        """Zero: there is no density."""
        return torch.zeros_like(self.time)

    def kl(self, params: Mapping[str, Tensor]) -> Tensor:
        """Mean over dimensions of the squared distance to the other velocity, [...]."""
        return (self.mean - params["mean"]).square().mean(-1)

    def params(self) -> dict[str, Tensor]:
        """``mean`` [..., D], the velocity: the mean of the targets that a trained flow has seen there."""
        return {"mean": self.mean}

    def sample(self, noise: Tensor) -> Tensor:
        """The velocity, whatever the noise."""
        return self.mean

    def mode(self) -> Tensor:
        """The velocity."""
        return self.mean


class FlowPolicy(ActorCritic):
    """A flow x_t = (1 - t) x0 + t eps whose x0, given the observation, is the action.

    K steps of length h = 1/K go from t = 1 (noise) to t = 0 (action). A step keeps the marginals of the flow and
    adds noise (Flow-GRPO, arXiv:2505.05470), which gives it a density:

    x' ~ N(x (1 - c h) - v h (1 + c (1 - t)),  s^2),   s = sigma sqrt(h),  sigma = a sqrt(t / (1 - t)),
    c = sigma^2 / (2 t)

    At t = 1, where sigma is infinite, 1 - t counts as h. The last step starts at t = h, so its noise is not zero
    either: s = a h / sqrt(1 - h), which also bounds from below how exact a sampled action can be. With a = 0 the
    steps are those of the ODE; they have no density, and the log-probability is 0.
    ``step_std`` sets s itself: the mean is then that of the ODE, x - v h, and the marginals are wider than the flow's.

    Args:
        denoising_steps: K.
        flow_noise: a.
        step_std: s, the same for all steps; None is the schedule above.
        logp_reduce: Log-probability of a step as a sum over the action's dimensions, as in any other policy, or as
            their mean, as is usual for images. A mean is not a log-density: its ratio has a mean below one.
        likelihood: See :data:`Likelihood`; it is what ``forward`` answers with.
        matching_weight: See :class:`Matching`.
        matching_power: The exponent of ghuber.
        matching_times: Times at which each action's matching loss is looked at.

    The other arguments are those of :class:`ActorCritic`. The stored action is the whole chain [K + 1, D].
    """

    times: Tensor

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
        denoising_steps: int = 8,
        flow_noise: float = 0.7,
        step_std: float | None = None,
        logp_reduce: Literal["sum", "mean"] = "sum",
        likelihood: Likelihood = "denoising",
        matching_weight: MatchingWeight = "uniform",
        matching_power: float = 0.25,
        matching_times: int = 6,
    ) -> None:
        if not isinstance(action_space, gym.spaces.Box) or not np.issubdtype(action_space.dtype, np.floating):
            raise TypeError(f"a flow policy needs actions in a Box of floats, found {action_space}")
        if denoising_steps < 1 or matching_times < 1:
            raise ValueError(f"{denoising_steps=} and {matching_times=} must be at least 1")
        if not flow_noise >= 0:
            raise ValueError(f"flow_noise={flow_noise} must not be negative")
        if step_std is not None and not step_std > 0:
            raise ValueError(f"step_std={step_std} must be positive")
        if not matching_power > 0:
            raise ValueError(f"matching_power={matching_power} must be positive")
        for name, value, known in (
            ("logp_reduce", logp_reduce, ("sum", "mean")),
            ("likelihood", likelihood, LIKELIHOODS),
            ("matching_weight", matching_weight, MATCHING_WEIGHTS),
        ):
            if value not in known:
                raise ValueError(f"{name}={value!r} is unknown; expected one of {', '.join(known)}")
        network = network or NetworkConfig()
        super().__init__(observation_space, action_space, network, critics, normalize_obs, clip_obs, encoder)
        self.denoising_steps, self.flow_noise, self.logp_reduce = denoising_steps, flow_noise, logp_reduce
        self.step_std = step_std
        self.likelihood: Likelihood = likelihood
        self.matching_weight: MatchingWeight = matching_weight
        self.matching_power, self.matching_times = matching_power, matching_times
        features = int(self.encoder.out_features)  # type: ignore[arg-type]
        inputs = features + int(np.prod(action_space.shape)) + 1
        self.actor = mlp(inputs, network.actor_hidden, network.activation)
        width = network.actor_hidden[-1] if network.actor_hidden else inputs
        self.head = FlowHead(width, action_space, denoising_steps, network.action_map)
        if network.orthogonal_init:
            orthogonal(self.actor)
            orthogonal(self.head, network.head_gain)
        self.register_buffer("times", 1.0 - torch.arange(denoising_steps) / denoising_steps, persistent=False)

    # -- the flow -----------------------------------------------------------------------------

    def velocity(self, features: Tensor, x: Tensor, time: Tensor) -> Tensor:
        """Velocity [..., D] at x [..., D], time [...] and features [..., F] of the observation."""
        return self.head(self.actor(torch.cat([features, x, time.unsqueeze(-1)], -1)))

    def transition(self, velocity: Tensor, x: Tensor, time: Tensor) -> DiagonalGaussian:
        """Distribution of the next x [..., D]."""
        time, h = time.unsqueeze(-1), 1.0 / self.denoising_steps
        c = self._drift(time)
        mean = x * (1.0 - c * h) - velocity * (h * (1.0 + c * (1.0 - time)))
        if self.step_std is not None:
            return DiagonalGaussian(mean, torch.full_like(mean, math.log(self.step_std)))
        return DiagonalGaussian(mean, (0.5 * (2.0 * c * time * h).log()).expand_as(mean))

    def velocity_gain(self, time: Tensor) -> Tensor:
        """How far a step's mean moves with the velocity, h (1 + c (1 - t)); [...]."""
        return (1.0 + self._drift(time) * (1.0 - time)) / self.denoising_steps

    def _drift(self, time: Tensor) -> Tensor:
        if self.step_std is not None:
            return torch.zeros_like(time)
        return 0.5 * self.flow_noise**2 / (1.0 - time).clamp(min=1.0 / self.denoising_steps)

    # -- learning -----------------------------------------------------------------------------

    def forward(self, obs: Obs, action: Tensor) -> PolicyOutput:
        """Everything a loss needs about rows of K positions each, as ``engine.denoise.unfold`` makes them.

        ``obs`` holds the environment's observations [R, ...] (``obs``, or ``obs/<key>``), ``x`` [R, K, D] and
        ``time`` [R, K]. ``action`` [R, K, D] is the next x or, for matching, the velocity's target. Critics see
        the environment's observation only, so they say the same at each of the K positions.
        """
        assert isinstance(obs, dict)
        x, time = obs[X], obs[TIME]
        features = self._features(env_obs(obs))
        velocity = self.velocity(features.unsqueeze(1).expand(-1, x.shape[1], -1), x, time)
        values = {name: critic(features).expand(-1, x.shape[1]) for name, critic in self.critics.items()}
        if self.likelihood == "matching":
            dist: Distribution = Matching(velocity, time, self.matching_weight, self.matching_power)
            return PolicyOutput(dist.log_prob(action), dist.entropy(), values, dist)
        dist = self.transition(velocity, x, time)
        if self.flow_noise == 0 and self.step_std is None:
            return PolicyOutput(torch.zeros_like(time), torch.zeros_like(time), values, dist)
        logp = dist.log_prob(action)
        return PolicyOutput(logp / x.shape[-1] if self.logp_reduce == "mean" else logp, dist.entropy(), values, dist)

    # -- acting -------------------------------------------------------------------------------

    def act(self, obs: Obs, noise: Tensor) -> Tensor:
        """The chains [N, K + 1, D] that ``noise`` [N, K + 1, D] selects at observations [N, ...]."""
        features = self._features(obs)
        start, *steps = noise.unbind(1)
        chain = [start]
        for time, step in zip(self.times, steps, strict=True):
            time = time.expand(start.shape[0])
            chain.append(self.transition(self.velocity(features, chain[-1], time), chain[-1], time).sample(step))
        return torch.stack(chain, 1)

    def deterministic(self, obs: Obs) -> Tensor:
        """The environment's actions [N, ...] that the ODE leads to from the most probable noise, zero."""
        features = self._features(obs)
        x = features.new_zeros(features.shape[0], self.action_shape[-1])
        for time in self.times:
            x = x - self.velocity(features, x, time.expand(x.shape[0])) / self.denoising_steps
        return self.to_env(obs, x.unsqueeze(1))

    def sampler(self) -> Sampler:
        """``act`` and ``to_env`` in one call."""
        return lambda obs, noise: (action := self.act(obs, noise), self.to_env(obs, action))

    def distribution(self, obs: Obs) -> Distribution:
        """Raises ``TypeError``: only the steps of a flow have a density."""
        raise TypeError("a flow policy has no density of its actions, only of denoising steps; see act and transition")


def env_obs(obs: Mapping[str, Tensor]) -> Obs:
    """The environment's part of an unfolded observation."""
    if OBS in obs:
        return obs[OBS]
    prefix = f"{OBS}/"
    return {k.removeprefix(prefix): v for k, v in obs.items() if k.startswith(prefix)}
