"""Trajectories of a linear system under a linear Gaussian policy: everything about them is known exactly.

Double integrator, dt 0.1: s' = A s + B a, a ~ N(K s, 0.3^2), s_0 ~ N(0, I). States and actions of T steps are jointly
Gaussian, and so is every conditional; a denoiser, a likelihood and a tilted distribution are matrices.
"""

from __future__ import annotations

import torch
from torch import Tensor

STEPS, DT, POLICY_STD = 32, 0.1, 0.3
A = torch.tensor([[1.0, DT], [0.0, 1.0]], dtype=torch.float64)
B = torch.tensor([0.0, DT], dtype=torch.float64)
K = torch.tensor([-1.0, -1.5], dtype=torch.float64)


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
