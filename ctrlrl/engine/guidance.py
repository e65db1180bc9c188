"""Pushing generated trajectories towards a policy, while they are being denoised.

Source: Jackson et al. 2024, "Policy-Guided Diffusion", arXiv:2404.06356, and its released code. The aim is

p(tau) ~ p_data(tau) prod_t pi(a_t | s_t)^lambda

whose score at noise level sigma is that of the data plus lambda grad log pi. Two ways to add the second part:
"heuristic" is the released code's, "posterior" that of Chung et al. 2023 (DPS, arXiv:2209.14687).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import gymnasium as gym
import numpy as np
import torch
from torch import Tensor

from ctrlrl.engine.agent import Agent
from ctrlrl.engine.policy_density import RESOLUTION, NoDensityError
from ctrlrl.nets.actor_critic import ActorCritic
from ctrlrl.nets.actors import BoxActor, SquashedGaussian
from ctrlrl.nets.edm import Denoise, SamplerConfig
from ctrlrl.nets.heads import DiagonalGaussian, GaussianHead
from ctrlrl.nets.latent_policy import LatentPolicy
from ctrlrl.nets.trajectory_codec import TrajectoryCodec
from ctrlrl.types import check_types

LogProb: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""(raw observations [N, O], actions [N, A] in (-1, 1)) -> log-densities [N], with gradients to both."""


@dataclass(frozen=True)
class GuidanceConfig:
    """How strongly, and by which gradient, trajectories are pushed towards a policy.

    The released code's own defaults leave ``denoised`` and ``normalize`` off.
    """

    kappa: float = 0.0
    """Strength; 0 is no guidance. For the posterior form without ``normalize``: the exponent lambda itself."""
    cosine: float = 0.3
    """c of the schedule lambda_i = kappa (1 - i / N + c sin(pi (i + 1) / N)) over the N sampler steps."""
    guidance: Literal["heuristic", "posterior"] = "heuristic"
    """Gradient at the denoised trajectory, added to the noisy one as it is; or taken through the denoiser with respect
    to the noisy one, which costs its backward pass (see :class:`Guidance`)."""
    grad_wrt: Literal["action", "both"] = "action"
    """Push actions alone, at observations held constant, as released; or observations too. Pushed actions alone let
    the model infer other states, and for some policies (one that acts like the data's but more strongly) the actions
    become less likely, not more."""
    denoised: bool = True
    """Ask the policy at D(x, sigma); otherwise at the noisy x itself."""
    normalize: bool = True
    """Scale the gradient of each trajectory to length 1, over all its steps and guided channels."""
    kernel_std: float = 1.0
    """Deviation of the Gaussian around a deterministic policy's action, in units of actions in [-1, 1]."""
    kappa_at: tuple[int, int, int] | None = None
    """(sampler steps, length of a trajectory, guided channels) at which ``kappa`` was chosen, from where it is carried
    over by :func:`rescaled_kappa`; None takes it as it is. Guided channels are A; with ``grad_wrt`` "both" O + A, or
    all of the codec's in the posterior form."""

    def __post_init__(self) -> None:
        check_types(self)
        if not 0.0 <= self.kappa < math.inf:
            raise ValueError(f"kappa={self.kappa} must be finite and not negative")
        if not math.isfinite(self.cosine):
            raise ValueError(f"cosine={self.cosine} must be finite")
        if not 0.0 < self.kernel_std < math.inf:
            raise ValueError(f"kernel_std={self.kernel_std} must be finite and positive")
        if self.guidance == "posterior" and not self.denoised:
            raise ValueError("guidance='posterior' is the gradient through the denoiser; it needs denoised=True")
        if self.kappa_at is not None:
            at = self.kappa_at
            if not isinstance(at, tuple) or len(at) != 3 or any(type(v) is not int or v < 1 for v in at):
                raise ValueError(f"kappa_at={at!r} must be a tuple of three whole numbers of at least 1")
            if not self.normalize:
                raise ValueError("kappa_at carries over the strength of normalised gradients; it needs normalize=True")


class Guidance:
    """What to add to noisy trajectories x [B, C, T] before a sampler step: a guide of :func:`ctrlrl.nets.edm.sample`.

    ================  ==============================================================================
    heuristic         lambda_i g,  g the gradient of l = sum_t log pi(a_t | s_t) with respect to the standardised
                      channels of D(x, sigma), or of x; there is no factor of sigma
    posterior         kappa sigma_i (sigma_i - sigma_{i+1}) g,  g the gradient of l(D(x, sigma)) with respect to x
    either, normalized    lambda_i g / (|g| + 1e-8)
    ================  ==============================================================================

    The actions' gradient passes the codec's tanh and deviation. The tilt is by a density of the action itself: no
    log-determinant of the codec's tanh is added, as in the released code. That code divides by |g| and then adds 1e-8,
    which a gradient of zero turns into NaN.

    The posterior form: log p(x; sigma) of the tilted data has the gradient of log p_data(x; sigma) and that of
    log E[exp(lambda l(data)) | x], for which DPS takes lambda l(D(x, sigma)). For Gaussian data this is exact where l
    is linear, and pulls too strongly where it is concave and the data are not yet known. The sampler follows
    dx / dsigma = -sigma grad log p, so that a first-order step from sigma_i to sigma_{i+1} adds
    sigma_i (sigma_i - sigma_{i+1}) lambda g. The schedule belongs to the heuristic and is left out: kappa is lambda, at
    any number of steps. With churn a step begins at a higher level than it is guided at. Guided over all that it covers
    it diverges for many policies; guided from sigma_i on, lambda shrinks as steps become more. So churn is refused;
    normalised increments have a bounded length and go with it.

    Stability: the same factor on a gradient that is not taken through the denoiser diverges, for sigma^2 is 6400 at
    first. Through it, it is stable with ``grad_wrt`` "both" as long as steps are many for the exponent; "action" is
    then no gradient of any function, and can still diverge.

    With ``grad_wrt`` "action" all channels but the actions' receive exactly 0. With "both" the heuristic pushes
    observations and actions; the posterior form every channel, for D makes the actions depend on all.

    Args:
        log_prob: The policy's log-density (see :func:`log_prob_of`).
        codec: Between channels and observations and actions.
        denoise: D(x, sigma). The posterior form differentiates it.
        config: How to guide.
        sampler: The sampler's settings.

    Raises:
        ValueError: The posterior form, not normalised, and a sampler with churn.
    """

    def __init__(
        self,
        log_prob: LogProb,
        codec: TrajectoryCodec,
        denoise: Denoise,
        config: GuidanceConfig,
        sampler: SamplerConfig,
    ) -> None:
        if config.guidance == "posterior" and not config.normalize and sampler.s_churn > 0.0:
            raise ValueError(
                f"guidance='posterior' without normalize follows the equation without churn, found s_churn="
                f"{sampler.s_churn}; set s_churn=0"
            )
        self.log_prob, self.codec, self.denoise = log_prob, codec, denoise
        self.config, self.sampler = config, sampler
        self._levels = sampler.levels()
        self._posterior = config.guidance == "posterior"
        self._actions_only = config.grad_wrt == "action"
        self.kappa = config.kappa
        if config.kappa_at is not None:
            both = codec.channels if self._posterior else codec.obs_size + codec.action_size
            to = (sampler.sampler_steps, codec.length, codec.action_size if self._actions_only else both)
            self.kappa = rescaled_kappa(config.kappa, from_=config.kappa_at, to=to)

    def __call__(self, x: Tensor, sigma: Tensor, i: int) -> Tensor:
        """The increment, shape of x [B, C, T], before step ``i`` from level ``sigma``.

        Zero before the last step and for kappa 0. Works in every grad mode.
        """
        if self.kappa == 0.0 or i >= self.sampler.sampler_steps - 1:
            return torch.zeros_like(x)
        with torch.inference_mode(False), torch.enable_grad():
            # a copy, since autograd keeps no tensor that was made in inference mode
            g = self._gradient(x.detach().clone(), sigma.clone())
        if self.config.normalize:
            norm = g.flatten(1).norm(dim=1).view(-1, 1, 1)
            return g * (self.strength(i) / (norm + 1e-8))
        if self._posterior:
            return g * (self.kappa * self._levels[i] * (self._levels[i] - self._levels[i + 1]))
        return g * self.strength(i)

    def strength(self, i: int) -> float:
        """lambda_i."""
        n = self.sampler.sampler_steps
        return self.kappa * (1.0 - i / n + self.config.cosine * math.sin(math.pi * (i + 1) / n))

    def _gradient(self, x: Tensor, sigma: Tensor) -> Tensor:
        if self._posterior:
            variable = x.requires_grad_()
            base = self.denoise(variable, sigma)
            if not base.requires_grad:
                raise RuntimeError(
                    "guidance='posterior' needs a denoiser that can be differentiated, found one that runs without "
                    "gradients; call it outside of torch.no_grad, or use guidance='heuristic'"
                )
        else:
            with torch.no_grad():
                base = self.denoise(x, sigma) if self.config.denoised else x
            variable = base = base.detach().requires_grad_()
        obs, action, _ = self.codec.split(base)
        if self._actions_only:
            obs = obs.detach()
        logp = self.log_prob(obs.flatten(0, 1), action.flatten(0, 1)).sum()
        (g,) = torch.autograd.grad(logp, variable)
        if not self._actions_only:
            return g
        guided = torch.zeros_like(g)
        guided[:, self.codec.action_channels] = g[:, self.codec.action_channels]
        return guided


def rescaled_kappa(kappa: float, from_: tuple[int, int, int], to: tuple[int, int, int]) -> float:
    """``kappa`` that pushes at (sampler steps, length, guided channels) ``to`` as ``kappa`` does at those of ``from_``.

    kappa (N0 / N) sqrt(T A / (T0 A0)): normalised increments add up over the steps, and are shared out among the
    elements of a trajectory. Our own rule; the released code has none.
    """
    return kappa * (from_[0] / to[0]) * math.sqrt(to[1] * to[2] / (from_[1] * from_[2]))


def log_prob_of(policy: Agent | Any, kernel_std: float = 1.0) -> LogProb:
    """The log-density of a policy's actions, per unit of actions in [-1, 1], with gradients.

    A policy squashed by tanh is asked at atanh(a), with |a| at most 1 - 2^-24; one that is cut off at the bounds has
    the density of the uncut normal. A deterministic policy stands for a normal of ``kernel_std`` around its action.

    Args:
        policy: An agent, or its policy.
        kernel_std: In units of actions in [-1, 1].

    Raises:
        TypeError: Observations are not a flat Box of floats.
        NoDensityError: The policy has a memory, or its density is not known or has no gradient.
        ValueError: ``kernel_std`` is not positive.
    """
    if not 0.0 < kernel_std < math.inf:
        raise ValueError(f"kernel_std={kernel_std} must be finite and positive")
    if isinstance(policy, Agent):
        if type(policy).session is not Agent.session:
            raise NoDensityError(
                f"{policy.method} acts by what it remembers of an episode; guidance needs a policy that acts on the "
                "observation alone"
            )
        policy = policy.policy
    if not isinstance(policy, BoxActor | ActorCritic):
        raise NoDensityError(f"the density of a {type(policy).__name__} is not known")
    space = policy.observation_space
    if not isinstance(space, gym.spaces.Box) or len(space.shape) != 1 or not np.issubdtype(space.dtype, np.floating):
        raise TypeError(f"trajectories have flat Box observations of floats, the policy's are {space}")
    return _of_box_actor(policy, kernel_std) if isinstance(policy, BoxActor) else _of_actor_critic(policy)


def _of_box_actor(policy: BoxActor, kernel_std: float) -> LogProb:
    if not policy.stochastic:

        def kernel(obs: Tensor, action: Tensor) -> Tensor:
            mean = policy.mode(obs)
            return DiagonalGaussian(mean, torch.full_like(mean, math.log(kernel_std))).log_prob(action)

        return kernel
    with torch.no_grad():
        found = policy(torch.zeros(1, *(policy.observation_space.shape or ()), device=policy.middle.device))
    if isinstance(found, SquashedGaussian):
        return lambda obs, action: policy(obs).log_prob(_before_tanh(action))
    if isinstance(found, DiagonalGaussian):
        return lambda obs, action: policy(obs).log_prob(action)
    raise NoDensityError(f"the density of a {type(policy).__name__} is not known")


def _of_actor_critic(policy: ActorCritic) -> LogProb:
    head = policy.head
    if isinstance(policy, LatentPolicy) and policy.decoding:
        raise NoDensityError("a policy that decodes latents is inverted step by step, which has no gradient")
    if type(head) is not GaussianHead:
        raise NoDensityError(f"guidance needs a Gaussian policy over a Box, found {type(head).__name__}")
    if not (head.low.isfinite() & head.high.isfinite()).all():
        raise NoDensityError(f"trajectories have actions between finite bounds, the policy's are {policy.action_space}")
    if head.action_map == "tanh":
        return lambda obs, action: SquashedGaussian(**policy.distribution(obs).params()).log_prob(_before_tanh(action))
    middle, half = (head.high + head.low) / 2, (head.high - head.low) / 2
    return lambda obs, action: policy.distribution(obs).log_prob(middle + half * action) + half.log().sum()


def _before_tanh(action: Tensor) -> Tensor:
    return action.clamp(-1.0 + RESOLUTION, 1.0 - RESOLUTION).atanh()
