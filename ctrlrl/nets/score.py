"""The density of recorded steps, by its gradient; and what leads from one state to another.

Sources: Vincent 2011, "A Connection Between Score Matching and Denoising Autoencoders" (the loss); Karras et al. 2022,
arXiv:2206.00364 (the scaling of inputs and outputs); Liu, Yang and Li 2024, arXiv:2406.07541 (CDSA: what it is for).
"""

from __future__ import annotations

import dataclasses
import math
from typing import Literal, TypeAlias

import gymnasium as gym
import numpy as np
import torch
from torch import Tensor, nn

from ctrlrl.nets.actors import BoxActor, QNetworkConfig
from ctrlrl.nets.mlp import mlp
from ctrlrl.nets.normalizer import varies
from ctrlrl.types import Obs

ScoreOn: TypeAlias = Literal["joint", "conditional"]
"""Whose gradient: of log p(s, a), or of log p(a | s) for actions and log p(s) for states."""
Densities: TypeAlias = Literal["both", "joint", "conditional"]

FREQUENCIES = (1.0, 2.0)
"""Of the sines and cosines of ln(sigma) that a score network sees."""
LEVELS = 16
"""Noise levels at which the sizes of gradients in the data are kept."""
TYPICAL = 0.9
"""Share of the data whose gradient is no larger than what is kept."""


class ScoreNetwork(nn.Module):
    """S(x, sigma): gradient of the log-density of x = data + sigma noise, for data of mean 0 and deviation 1.

    S = -x / (1 + sigma^2) + F(x / sqrt(1 + sigma^2), ln sigma) / (sigma sqrt(1 + sigma^2)). So scaled, inputs and
    targets of F have deviation 1 at every level, and x + sigma^2 S is EDM's denoiser. F begins at 0, where S is the
    score of a standard normal.

    Args:
        size: D.
        hidden: Widths of the hidden layers of F.
        activation: Between them.
        given: Numbers that the density is conditional on, which have no noise.
    """

    def __init__(self, size: int, hidden: tuple[int, ...], activation: str, given: int = 0) -> None:
        super().__init__()
        inputs = size + given + 1 + 2 * len(FREQUENCIES)
        self.body = mlp(inputs, hidden, activation)
        self.out = nn.Linear(hidden[-1] if hidden else inputs, size)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, x: Tensor, sigma: Tensor, given: Tensor | None = None) -> Tensor:
        """[B, D] in the units of 1 / x, at x [B, D], noise level ``sigma`` [B] or [] and ``given`` [B, G]."""
        sigma = sigma.expand(x.shape[0]).unsqueeze(-1)
        total, level = 1.0 + sigma.square(), sigma.log()
        waves = [f(k * level) for k in FREQUENCIES for f in (torch.sin, torch.cos)]
        parts = [x * total.rsqrt(), level, *waves, *([] if given is None else [given])]
        return self.out(self.body(torch.cat(parts, -1))) * total.rsqrt() / sigma - x / total


def denoising_loss(score: nn.Module, x: Tensor, sigma: Tensor, noise: Tensor, given: Tensor | None = None) -> Tensor:
    """[B] sigma^2 |S(x + sigma n, sigma) + n / sigma|^2, whose minimiser is the score (Vincent 2011, section 4.2).

    Args:
        score: S(x, sigma, given).
        x: [B, D] data.
        sigma: [B].
        noise: [B, D] standard normal n.
        given: [B, G] what the density is conditional on.
    """
    found = score(torch.addcmul(x, sigma.unsqueeze(-1), noise), sigma, given)
    return torch.addcmul(noise, sigma.unsqueeze(-1), found).square().sum(-1)


class CorrectionModel(BoxActor):
    """What CDSA learns of a dataset: scores of its states and actions, inverse and forward dynamics.

    It is where agents keep their policy, and is none. Its quantities are standardised by dimension, with mean and
    deviation over the data: s [N, O] of observations, a [N, A] of actions in [-1, 1], d [N, O] of the changes of an
    observation in a step. A score g in these units is g / deviation in raw ones, and a step eta sigma^2 g along it is
    the raw step eta (sigma deviation)^2 (g / deviation). What never changes in the data has no noise and score 0.

    Args:
        observation_space: Flat Box of floats.
        action_space: Bounded Box of floats.
        network: ``actor_hidden`` and ``activation`` of all networks.
        densities: Which scores there are.
        sigma_range: Smallest and largest noise level they are trained at.

    Attributes:
        joint: S of (s, a), or None.
        conditional: S of a given s, or None.
        marginal: S of s, or None.
        inverse: (s, d) to the standardised action that leads there.
        forward_dynamics: (s, a) to d.

    Raises:
        TypeError: Other spaces.
    """

    stochastic = False
    obs_mean: Tensor
    obs_std: Tensor
    obs_varies: Tensor
    action_mean: Tensor
    action_std: Tensor
    action_varies: Tensor
    change_mean: Tensor
    change_std: Tensor
    typical: Tensor

    def __init__(
        self, observation_space: gym.Space, action_space: gym.Space, network: QNetworkConfig,
        densities: Densities = "both", sigma_range: tuple[float, float] = (0.03, 1.0),
    ) -> None:  # fmt: skip
        check_flat(observation_space)
        super().__init__(observation_space, action_space, dataclasses.replace(network, actor_hidden=()))
        (self.obs_size,), (self.action_size,) = observation_space.shape or (0,), self.action_shape
        both, hidden, activation = self.obs_size + self.action_size, network.actor_hidden, network.activation
        apart = densities in ("both", "conditional")
        self.joint = ScoreNetwork(both, hidden, activation) if densities in ("both", "joint") else None
        self.conditional = ScoreNetwork(self.action_size, hidden, activation, self.obs_size) if apart else None
        self.marginal = ScoreNetwork(self.obs_size, hidden, activation) if apart else None
        self.inverse = regression(2 * self.obs_size, self.action_size, hidden, activation)
        self.forward_dynamics = regression(both, self.obs_size, hidden, activation)
        sizes = {"obs": self.obs_size, "action": self.action_size, "change": self.obs_size}
        for name, size in sizes.items():
            self.register_buffer(f"{name}_mean", torch.zeros(size))
            self.register_buffer(f"{name}_std", torch.ones(size))
            if name != "change":
                self.register_buffer(f"{name}_varies", torch.ones(size))
        self.sigma_range = sigma_range
        # [joint or conditional, of states or actions, level] sigma times the norm of the score
        self.register_buffer("typical", torch.zeros(2, 2, LEVELS))

    # -- units --------------------------------------------------------------------------------

    def fit(self, name: Literal["obs", "action", "change"], mean: Tensor, std: Tensor) -> None:
        """Standardise by mean and deviation; a dimension that never changes, up to rounding, keeps deviation 1."""
        changes = varies(mean, std)
        getattr(self, f"{name}_mean").copy_(mean)
        getattr(self, f"{name}_std").copy_(torch.where(changes, std, torch.ones_like(std)))
        if name != "change":
            getattr(self, f"{name}_varies").copy_(changes)

    def standard_obs(self, obs: Tensor) -> Tensor:
        """s of raw observations."""
        return (obs - self.obs_mean) / self.obs_std

    def standard_action(self, action: Tensor) -> Tensor:
        """a of actions in [-1, 1]."""
        return (action - self.action_mean) / self.action_std

    def unit_action(self, a: Tensor) -> Tensor:
        """The inverse of :meth:`standard_action`."""
        return torch.addcmul(self.action_mean, a, self.action_std)

    # -- the data's density -------------------------------------------------------------------

    def score(self, s: Tensor, a: Tensor, sigma: Tensor, score_on: ScoreOn, of: Literal["state", "action"]) -> Tensor:
        """g_s [N, O] or g_a [N, A] at s, a, by the noise level ``sigma`` [].

        Raises:
            ValueError: These densities were not learned.
        """
        net = self.joint if score_on == "joint" else self.conditional if of == "action" else self.marginal
        if net is None:
            raise ValueError(f"score_on={score_on!r} was not learned: train with densities='both'")
        if score_on == "joint":
            both = net(torch.cat([s, a], -1), sigma)
            found = both[..., : self.obs_size] if of == "state" else both[..., self.obs_size :]
        else:
            found = net(a, sigma, s) if of == "action" else net(s, sigma)
        return found * (self.obs_varies if of == "state" else self.action_varies)

    def levels(self) -> Tensor:
        """[LEVELS] where :attr:`typical` is kept, evenly spaced in ln(sigma)."""
        low, high = (math.log(x) for x in self.sigma_range)
        return torch.linspace(low, high, LEVELS).exp()

    @torch.no_grad()
    def fit_typical(self, s: Tensor, a: Tensor) -> None:
        """Take note of how large scores are at data s, a without noise, at all levels: :data:`TYPICAL`'s quantiles."""
        for k, sigma in enumerate(self.levels().to(s.device)):
            for i, (score_on, net) in enumerate((("joint", self.joint), ("conditional", self.conditional))):
                for j, of in enumerate(("state", "action")):
                    if net is not None:
                        norm = self.score(s, a, sigma, score_on, of).norm(dim=-1)  # type: ignore[arg-type]
                        self.typical[i, j, k] = sigma * norm.quantile(TYPICAL)

    def typical_norm(self, sigma: float, score_on: ScoreOn, of: Literal["state", "action"]) -> float:
        """Norm that nine tenths of the data's scores at level ``sigma`` do not exceed."""
        row = self.typical[int(score_on == "conditional"), int(of == "action")].cpu().numpy()
        return float(np.interp(math.log(sigma), np.log(self.levels().numpy()), row)) / sigma

    # -- dynamics -----------------------------------------------------------------------------

    def change(self, s: Tensor, a: Tensor) -> Tensor:
        """Predicted change of s in a step, in units of s."""
        d = self.forward_dynamics(torch.cat([s, a], -1))
        return torch.addcmul(self.change_mean, d, self.change_std) / self.obs_std

    def action_for(self, s: Tensor, change: Tensor) -> Tensor:
        """a that changes s by ``change``, in units of s."""
        d = (change * self.obs_std - self.change_mean) / self.change_std
        return self.inverse(torch.cat([s, d], -1))

    # -- training -----------------------------------------------------------------------------

    def forward(
        self, obs: Tensor, action: Tensor, next_obs: Tensor, uniform: Tensor, noise: Tensor
    ) -> dict[str, Tensor]:
        """Losses of every network, means over the batch.

        Args:
            obs, next_obs: [B, O] raw.
            action: [B, A] in [-1, 1].
            uniform: [B] in [0, 1); selects ln(sigma) between the bounds of ``sigma_range``.
            noise: [B, O + A] standard normal.
        """
        low, high = (math.log(x) for x in self.sigma_range)
        sigma = (low + (high - low) * uniform).exp()
        s, a = self.standard_obs(obs), self.standard_action(action)
        d = (next_obs - obs - self.change_mean) / self.change_std
        # what never changes has a density that no network can learn: its score is 1 / sigma times the distance
        noise = noise * torch.cat([self.obs_varies, self.action_varies])
        of_s, of_a = noise.split([self.obs_size, self.action_size], -1)
        found = {}
        if self.joint is not None:
            found["joint_loss"] = denoising_loss(self.joint, torch.cat([s, a], -1), sigma, noise)
        if self.conditional is not None and self.marginal is not None:
            found["conditional_loss"] = denoising_loss(self.conditional, a, sigma, of_a, s)
            found["marginal_loss"] = denoising_loss(self.marginal, s, sigma, of_s)
        found["inverse_loss"] = (self.inverse(torch.cat([s, d], -1)) - a).square().sum(-1)
        found["forward_loss"] = (self.forward_dynamics(torch.cat([s, a], -1)) - d).square().sum(-1)
        return {name: loss.mean() for name, loss in found.items()}

    # -- what it is not -----------------------------------------------------------------------

    def act(self, obs: Obs, noise: Tensor) -> Tensor:
        """Raises ValueError: it is no policy."""
        raise ValueError(NO_POLICY)

    def mode(self, obs: Obs) -> Tensor:
        """Raises ValueError: it is no policy."""
        raise ValueError(NO_POLICY)


NO_POLICY = (
    "CDSA learns the density of a dataset and no policy: agent.correct(policy) is a policy corrected by it "
    "(ctrlrl eval RUN --correct CDSA_RUN)"
)


def regression(inputs: int, outputs: int, hidden: tuple[int, ...], activation: str) -> nn.Sequential:
    """A perceptron with a linear layer last."""
    body = mlp(inputs, hidden, activation)
    return body.append(nn.Linear(hidden[-1] if hidden else inputs, outputs))


def check_flat(space: gym.Space) -> None:
    """Raise TypeError for observations that are no flat Box of floats."""
    if not isinstance(space, gym.spaces.Box) or len(space.shape) != 1 or space.dtype.kind != "f":
        raise TypeError(
            f"cdsa needs flat observations, a Box of floats with one dimension; found {space} "
            "(gymnasium.wrappers.FlattenObservation makes one of many others)"
        )
