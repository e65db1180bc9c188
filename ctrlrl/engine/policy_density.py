"""How likely a policy makes recorded actions, in the environment's units: what importance sampling needs to know.

Recorded actions are what the environment received. Where a policy squashes or clips, they are taken back:

- squashed by tanh: ``u = atanh(a)``. In float32 an action near its bound does not give ``u`` back (every ``u`` above 9
  is the bound itself). Such steps are taken as near to the bound as float32 comes, and reported as guesses.
- clipped: inside the bounds the action is the sample. At a bound the policy has no density but a probability, that of
  all samples beyond; its logarithm takes the density's place. Behaviour has to be recorded so, as
  :mod:`ctrlrl.engine.roll_out` does.

Densities are per unit of the environment's actions. Policies on both sides of a ratio have to be.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple, Protocol

import gymnasium as gym
import torch
from torch import Tensor

from ctrlrl.data.dataset import Dataset
from ctrlrl.engine.agent import Agent
from ctrlrl.engine.prior import same_bounds
from ctrlrl.nets.actor_critic import ActorCritic
from ctrlrl.nets.actors import BoxActor, SquashedGaussian
from ctrlrl.nets.heads import CategoricalHead, DiagonalGaussian, GaussianHead, MultiCategoricalHead
from ctrlrl.nets.latent_policy import LatentPolicy
from ctrlrl.types import Obs

RESOLUTION = 2.0**-24
"""Largest distance of a number below 1 from its nearest float32."""
TOLERANCE = 1e-2
"""Error of ``u`` from which on it counts as a guess."""


class NoDensityError(ValueError):
    """A policy does not say how likely an action is; the text says why."""


class Density(NamedTuple):
    """Log-densities of actions."""

    logp: Tensor
    """[N]"""
    exact: Tensor
    """[N] bool: false where it is a guess, for the action lies at a bound."""


class Likelihood(Protocol):
    """A policy of which only the density is asked."""

    def log_prob(self, obs: Any, action: Any, /) -> Any:
        """:class:`Density`, or [N] exact log-densities, of the environment's actions [N, ...] at observations [N, ...].

        Raises:
            NoDensityError: It has none.
        """
        ...


class EvaluatedPolicy(Likelihood, Protocol):
    """What off-policy evaluation needs of a policy; write one for a policy that is no agent."""

    stochastic: bool
    """Whether it is a distribution."""
    device: torch.device
    """Where observations are expected."""

    def check(self, dataset: Dataset) -> None:
        """Raise ValueError if the dataset's spaces are not the policy's."""
        ...

    def act(self, obs: Obs, generator: torch.Generator, /) -> Tensor:
        """The environment's actions [N, ...] at raw observations [N, ...], drawn with a generator on the CPU."""
        ...


class AgentPolicy:
    """An agent's policy, or its mode.

    Raises:
        ValueError: The agent has a memory: it does not act on observations alone.
    """

    def __init__(self, agent: Agent, deterministic: bool = False) -> None:
        if type(agent).session is not Agent.session:
            raise ValueError(
                f"{agent.method} acts by what it remembers of an episode; evaluation without an environment needs a "
                "policy that acts on the observation alone"
            )
        self.agent, self.device = agent, agent.device
        self.stochastic = bool(getattr(agent.policy, "stochastic", True)) and not deterministic

    def check(self, dataset: Dataset) -> None:
        """Raise ValueError if the dataset's spaces are not the agent's."""
        for kind in ("observation", "action"):
            mine, theirs = (getattr(x, f"{kind}_space") for x in (self.agent, dataset))
            if not _fits(mine, theirs) or (kind == "action" and not same_bounds(mine, theirs)):
                raise ValueError(
                    f"the policy's {kind}s are {mine}, those of {dataset.info.id} are {theirs}: use data of the "
                    "policy's own environment"
                )

    @torch.no_grad()
    def act(self, obs: Obs, generator: torch.Generator, /) -> Tensor:
        """The environment's actions [N, ...]: drawn, or the mode."""
        policy = self.agent.policy
        if not self.stochastic:
            return policy.deterministic(obs)
        count = (next(iter(obs.values())) if isinstance(obs, dict) else obs).shape[0]
        return policy.to_env(obs, policy.act(obs, policy.noise(1, count, generator)[0].to(self.device)))

    @torch.no_grad()
    def log_prob(self, obs: Obs, action: Tensor, /) -> Density:
        """Log-density of the environment's actions [N, ...], see above.

        Raises:
            NoDensityError: A deterministic policy, or one whose density is not known.
        """
        policy = self.agent.policy
        if not self.stochastic:
            raise NoDensityError("a deterministic policy has no density")
        if isinstance(policy, BoxActor):
            found = policy(obs)
            if isinstance(found, SquashedGaussian):
                return squashed_density(found, action.flatten(1), policy.low, policy.high)
            if isinstance(found, DiagonalGaussian):
                wide = DiagonalGaussian(policy.middle + policy.scale * found.mean, found.log_std + policy.scale.log())
                return clipped_density(wide, action.flatten(1), policy.low, policy.high)
        elif isinstance(policy, LatentPolicy) and policy.decoding:
            return decoded_density(policy, obs, action.flatten(1))
        elif isinstance(policy, ActorCritic):
            head, found = policy.head, policy.distribution(obs)
            if type(head) is GaussianHead and isinstance(found, DiagonalGaussian):
                if head.action_map == "tanh":
                    squashed = SquashedGaussian(found.mean, found.log_std)
                    return squashed_density(squashed, action.flatten(1), head.low, head.high)
                return clipped_density(found, action.flatten(1), head.low, head.high)
            if type(head) is CategoricalHead:
                return density_of(found.log_prob(action.long().reshape(-1) - head.start))
            if type(head) is MultiCategoricalHead:
                return density_of(found.log_prob(action.long().flatten(1) - head.start))
        kind = type(policy).__name__
        raise NoDensityError(f"the density of {self.agent.method}'s policy ({kind}) is not known; fqe needs none")


def squashed_density(policy: SquashedGaussian, action: Tensor, low: Tensor, high: Tensor) -> Density:
    """Log-density of actions [N, A] between ``low`` and ``high`` [A] under ``middle + half-range x tanh(u)``.

    log N(u) - log(1 - tanh(u)^2) - log(half-range), summed over dimensions
    """
    u, volume, exact = unsquashed(action, low, high)
    return Density(DiagonalGaussian(policy.mean.double(), policy.log_std.double()).log_prob(u) - volume, exact)


def decoded_density(policy: LatentPolicy, obs: Obs, action: Tensor) -> Density:
    """Log-density of actions [N, A] of a policy that decodes latents: log N(eps), less the log-volume of what decoding
    and squashing make of a unit of eps.

    Raises:
        NoDensityError: An action lies where decoded ones are cut off, or none is decoded to.
    """
    head = policy.head
    if not isinstance(head, GaussianHead):
        raise NoDensityError(f"latents are no Gaussian, found {type(head).__name__}")
    if head.action_map == "tanh":
        u, volume, exact = unsquashed(action, head.low, head.high)
    elif ((action <= head.low) | (action >= head.high)).any():
        raise NoDensityError("a decoded action was cut off at a bound, and how often that happens is not known")
    else:
        u, volume = action.double(), torch.zeros(len(action), dtype=torch.float64, device=action.device)
        exact = torch.ones(len(action), dtype=torch.bool, device=action.device)
    try:
        latent, decoding = policy.encode(obs, u.to(torch.float32))
    except RuntimeError as error:
        raise NoDensityError(str(error)) from None
    return Density(policy.distribution(obs).log_prob(latent).double() - decoding - volume, exact)


def unsquashed(action: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """u [N, A] in float64 of ``action = middle + half-range x tanh(u)`` [N, A], the log-volume [N] of the map there,
    and [N] whether u is more than a guess."""
    low, high = low.double(), high.double()
    half = (high - low) / 2
    unit = (action.double() - (high + low) / 2) / half
    unit = unit.clamp(-1.0 + RESOLUTION, 1.0 - RESOLUTION)
    # d atanh(a) = da / (1 - a^2); float32 rounds the action itself, before its middle is taken off
    rounding = RESOLUTION * torch.maximum(low.abs(), high.abs()) / half
    exact = (rounding / (1.0 - unit.square()) < TOLERANCE).all(-1)
    return unit.atanh(), (torch.log1p(-unit.square()) + half.log()).sum(-1), exact


def log_volume(u: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Log-volume [N] of ``middle + half-range x tanh(u)`` at u [N, A], without overflow."""
    squash = 2.0 * (math.log(2.0) - u - torch.nn.functional.softplus(-2.0 * u))
    return (squash + ((high - low) / 2).log()).sum(-1)


def clipped_density(policy: DiagonalGaussian, action: Tensor, low: Tensor, high: Tensor) -> Density:
    """Log-density of actions [N, A] under a normal that is cut off at ``low`` and ``high`` [A].

    log N(a) inside, log P(sample <= low) and log P(sample >= high) at the bounds, summed over dimensions
    """
    action, mean, log_std = action.double(), policy.mean.double(), policy.log_std.double()
    single = DiagonalGaussian(mean.unsqueeze(-1), log_std.unsqueeze(-1)).log_prob(action.unsqueeze(-1))
    at_low, at_high = action <= low, action >= high
    z = (action - mean) * torch.exp(-log_std)
    tail = torch.special.log_ndtr(torch.where(at_high, -z, z))
    return density_of(torch.where(at_low | at_high, tail, single).sum(-1))


def _fits(mine: gym.Space, theirs: gym.Space) -> bool:
    """Whether observations of one space can be those of the other; bounds may differ."""
    if isinstance(mine, gym.spaces.Box) and isinstance(theirs, gym.spaces.Box):
        return mine.shape == theirs.shape
    if isinstance(mine, gym.spaces.Dict) and isinstance(theirs, gym.spaces.Dict):
        return mine.spaces.keys() == theirs.spaces.keys() and all(_fits(mine[k], theirs[k]) for k in mine.spaces)
    return mine == theirs


def density_of(logp: Any) -> Density:
    """What ``log_prob`` gave as a Density; plain numbers are exact."""
    if isinstance(logp, Density):
        return logp
    logp = torch.as_tensor(logp).reshape(-1)
    return Density(logp, torch.ones_like(logp, dtype=torch.bool))
