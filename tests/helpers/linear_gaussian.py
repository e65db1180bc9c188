"""Trajectories of a linear system under a linear Gaussian policy: everything about them is known exactly.

Double integrator, dt 0.1: s' = A s + B a, a ~ N(K s, 0.3^2), s_0 ~ N(0, I). States and actions of T steps are jointly
Gaussian, and so is every conditional; a denoiser, a likelihood and a tilted distribution are matrices. Actions are
not bounded, so there is no tanh anywhere: a codec with one would make none of this Gaussian.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

STEPS, DT, POLICY_STD = 32, 0.1, 0.3
A = torch.tensor([[1.0, DT], [0.0, 1.0]], dtype=torch.float64)
B = torch.tensor([0.0, DT], dtype=torch.float64)
K = torch.tensor([-1.0, -1.5], dtype=torch.float64)


class LinearCodec:
    """What guidance asks of a codec, for the scaled tokens of a :class:`LinearGaussian`."""

    obs_size, action_size, channels = 2, 1, 3
    action_channels = slice(2, 3)

    def __init__(self, system: LinearGaussian) -> None:
        self.scale, self.length = system.scale, system.steps

    def split(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """States [N, T, 2], actions [N, T, 1] and nothing else, of scaled tokens x [N, 3, T]."""
        raw = x.transpose(1, 2) * self.scale
        return raw[..., :2], raw[..., 2:], raw[..., 3:]


class LinearGaussian:
    """The distribution of tokens [T, 3] (two states, one action), each channel scaled to deviation 1 over time.

    Attributes:
        scale: [3] deviation of each channel, by which tokens are divided; their mean is 0.
        covariance: [3 T, 3 T] of scaled tokens, time first: element t * 3 + channel.
    """

    def __init__(self, gain: Tensor = K, std: float = POLICY_STD, steps: int = STEPS) -> None:
        self.steps, self.gain, self.std = steps, gain, std
        # every token as a linear map of the independent normals (s_0, noise_0, ..., noise_{T-1})
        sources = 2 + steps
        rows = torch.zeros(steps, 3, sources, dtype=torch.float64)
        state = torch.zeros(2, sources, dtype=torch.float64)
        state[0, 0] = state[1, 1] = 1.0
        for t in range(steps):
            action = gain @ state
            action[2 + t] += std
            rows[t, :2], rows[t, 2] = state, action
            state = A @ state + torch.outer(B, action)
        self._rows = rows
        raw = rows.reshape(3 * steps, sources)
        variances = (raw @ raw.T).diagonal().view(steps, 3)
        self.scale = variances.mean(0).sqrt()
        scaled = raw / self.scale.repeat(steps).unsqueeze(1)
        self.covariance = scaled @ scaled.T
        self._values, self._vectors = torch.linalg.eigh(self.covariance)

    def denoise(self, x: Tensor, sigma: Tensor) -> Tensor:
        """The exact D(x, sigma) of scaled tokens x [N, 3, T] (channels first, as networks have them)."""
        flat = x.transpose(1, 2).reshape(len(x), -1)
        gains = self._values / (self._values + sigma.square())
        found = (flat @ self._vectors * gains) @ self._vectors.T
        return found.view(len(x), self.steps, 3).transpose(1, 2)

    def start(self, n: int, seed: int) -> Tensor:
        """[n, 3, T] standard normal noise to sample from."""
        g = torch.Generator().manual_seed(seed)
        return torch.randn(n, 3, self.steps, generator=g, dtype=torch.float64)

    def covariance_error(self, x: Tensor) -> float:
        """Relative Frobenius distance of the covariance of samples x [N, 3, T] from the exact one."""
        flat = x.transpose(1, 2).reshape(len(x), -1)
        found = flat.T @ flat / len(flat)
        return float((found - self.covariance).norm() / self.covariance.norm())

    def residual(self, x: Tensor) -> float:
        """Mean squared error of s' = A s + B a along x [N, 3, T], in the units of the system."""
        raw = x.transpose(1, 2) * self.scale
        state, action = raw[..., :2], raw[..., 2]
        following = state[:, :-1] @ A.T + action[:, :-1, None] * B
        return float((following - state[:, 1:]).square().mean())

    def log_policy(self, x: Tensor, gain: Tensor, offset: float = 0.0, std: float = POLICY_STD) -> float:
        """Mean log-likelihood per step of the actions in x [N, 3, T] under N(gain s + offset, std^2)."""
        raw = x.transpose(1, 2) * self.scale
        normal = torch.distributions.Normal(raw[..., :2] @ gain + offset, std)
        return float(normal.log_prob(raw[..., 2]).mean())

    # -- policies as targets ----------------------------------------------------------------------

    @staticmethod
    def policy(gain: Tensor, offset: float = 0.0, std: float = POLICY_STD):
        """log N(a; gain s + offset, std^2) as guidance takes it: (states [M, 2], actions [M, 1]) -> [M]."""
        return lambda state, action: torch.distributions.Normal(state @ gain + offset, std).log_prob(action[:, 0])

    def tilted(
        self, gain: Tensor, offset: float = 0.0, weight: float = 1.0, std: float = POLICY_STD
    ) -> tuple[Tensor, Tensor]:
        """Mean [3 T] and covariance [3 T, 3 T] of scaled tokens under p(tau) prod_t N(a_t; gain s_t + offset)^weight.

        By conditioning the normals that everything is a linear map of.
        """
        distance = self._rows[:, 2] - torch.einsum("c,tcs->ts", gain, self._rows[:, :2])
        precision = torch.eye(distance.shape[1], dtype=torch.float64) + weight / std**2 * distance.T @ distance
        spread = torch.linalg.inv(precision)
        centre = spread @ distance.sum(0) * offset * weight / std**2
        tokens = (self._rows / self.scale[:, None]).flatten(0, 1)
        return tokens @ centre, tokens @ spread @ tokens.T

    def expected_log_policy(
        self, mean: Tensor, covariance: Tensor, gain: Tensor, offset: float = 0.0, std: float = POLICY_STD
    ) -> float:
        """What :meth:`log_policy` is on average, for scaled tokens of a mean [3 T] and a covariance [3 T, 3 T]."""
        row = torch.cat([-gain, torch.ones(1, dtype=torch.float64)]) * self.scale
        distance = torch.kron(torch.eye(self.steps, dtype=torch.float64), row[None])
        squared = (distance @ mean - offset).square() + (distance @ covariance @ distance.T).diagonal()
        return float(-0.5 * math.log(2 * math.pi * std**2) - squared.mean() / (2 * std**2))
