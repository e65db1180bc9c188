"""Diffusion as in EDM: noise levels, preconditioning, the loss, and a second-order sampler with churn.

Source: Karras et al. 2022, "Elucidating the Design Space of Diffusion-Based Generative Models", arXiv:2206.00364.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn

from ctrlrl.types import check_types

Denoise: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""D(x, sigma): the expected data [B, ...] given x = data + sigma noise; sigma [B] or a single number."""
Guide: TypeAlias = Callable[[Tensor, Tensor, int], Tensor]
"""What is added to x [B, ...] at level sigma, before step i."""

SIGMA_DATA = 1.0
"""Deviation of the data, which callers standardise."""


@dataclass(frozen=True)
class SamplerConfig:
    """How noise is turned into data; names and defaults of levels and churn are those of EDM's table 5."""

    sampler_steps: int = 32
    """Noise levels; all but the last step ask the network twice."""
    sigma_min: float = 0.002
    """Smallest noise level, before none."""
    sigma_max: float = 80.0
    """Largest noise level, with which sampling begins."""
    rho: float = 7.0
    """How much closer levels lie towards the smallest."""
    s_churn: float = 80.0
    """Noise that is added again over all steps; 0 makes the sampler deterministic."""
    s_tmin: float = 0.05
    """Smallest level at which noise is added again."""
    s_tmax: float = 50.0
    """Largest such level."""
    s_noise: float = 1.003
    """Deviation of that noise."""
    sampler_order: Literal["heun", "euler"] = "heun"
    """Second order, or first: half as many network calls."""
    legacy_predictor: bool = False
    """Take the Euler step from where x was before noise was added again, as policy-guided diffusion's released code
    does: the second slope is then that of another place. Variances come out too large, at 32 steps by half."""

    def __post_init__(self) -> None:
        check_types(self)
        if self.sampler_steps < 1:
            raise ValueError(f"sampler_steps={self.sampler_steps} must be at least 1")
        if not 0.0 < self.sigma_min < self.sigma_max < math.inf:
            raise ValueError(f"0 < sigma_min={self.sigma_min} < sigma_max={self.sigma_max} does not hold")
        if not self.rho > 0.0:
            raise ValueError(f"rho={self.rho} must be positive")
        for name in ("s_churn", "s_tmin", "s_tmax", "s_noise"):
            if not getattr(self, name) >= 0.0:
                raise ValueError(f"{name}={getattr(self, name)} must not be negative")

    def levels(self) -> list[float]:
        """[sampler_steps + 1] noise levels from the largest to the smallest, and 0 (eq. 5)."""
        n, root = self.sampler_steps, 1.0 / self.rho
        first, last = self.sigma_max**root, self.sigma_min**root
        return [(first + i / max(n - 1, 1) * (last - first)) ** self.rho for i in range(n)] + [0.0]

    def churn(self, sigma: float) -> float:
        """gamma: by which share ``sigma`` grows before a step from it (algorithm 2)."""
        inside = self.s_tmin <= sigma <= self.s_tmax
        return min(self.s_churn / self.sampler_steps, math.sqrt(2.0) - 1.0) if inside else 0.0


class Preconditioned(nn.Module):
    """D(x, sigma) = c_skip x + c_out F(c_in x, ln(sigma) / 4), with F asked at inputs and outputs of deviation 1.

    Args:
        network: F(x [B, ...], c_noise [B]) to the shape of x.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        sigma = sigma.expand(x.shape[0])
        wide = sigma.view(-1, *[1] * (x.dim() - 1))
        total = wide.square() + SIGMA_DATA**2
        scaled = self.network(x * total.rsqrt(), 0.25 * sigma.log())
        return torch.addcmul(x * (SIGMA_DATA**2 / total), scaled, wide * SIGMA_DATA * total.rsqrt())

    def loss(self, x: Tensor, sigma: Tensor, noise: Tensor) -> Tensor:
        """[B] weighted squared error, mean over the elements of x [B, ...] (eq. 8, weights of table 1).

        Args:
            x: Data of deviation 1.
            sigma: [B] (see :func:`training_sigma`).
            noise: Standard normal, as x.
        """
        wide = sigma.view(-1, *[1] * (x.dim() - 1))
        error = (self(torch.addcmul(x, wide, noise), sigma) - x).square().flatten(1).mean(1)
        return error * (sigma.square() + SIGMA_DATA**2) / (sigma * SIGMA_DATA).square()


def training_sigma(normal: Tensor, mean: float = -1.2, std: float = 1.2) -> Tensor:
    """Noise levels to train at from standard normal numbers: ln sigma ~ N(mean, std^2) (table 1)."""
    return torch.exp(mean + std * normal)


def sample(
    denoise: Denoise, start: Tensor, config: SamplerConfig, generator: torch.Generator, guide: Guide | None = None
) -> Tensor:
    """Data [B, ...] from standard normal ``start`` [B, ...], by algorithm 2 of EDM.

    Args:
        denoise: D(x, sigma).
        start: Noise of deviation 1; levels scale it.
        config: Levels, churn, order.
        generator: Of the noise that churn adds, on the CPU, so that every device draws the same.
        guide: Increment of x before each step but the last, and before churn, as policy-guided diffusion has it. It
            may need gradients, and is called with them enabled; without it everything runs in inference mode.
    """
    levels, churning = config.levels(), config.s_churn > 0.0
    with torch.inference_mode() if guide is None else contextlib.nullcontext(), torch.no_grad():
        x = start * levels[0]
        sigmas = torch.tensor(levels, dtype=x.dtype, device=x.device)
        for i, (now, following) in enumerate(itertools.pairwise(levels)):
            if guide is not None and i < config.sampler_steps - 1:
                with torch.enable_grad():
                    change = guide(x.detach(), sigmas[i], i)
                x = x + change.detach()
            gamma = config.churn(now) if churning else 0.0
            above, sigma, noisy = now * (1.0 + gamma), sigmas[i], x
            if gamma > 0.0:
                noise = torch.randn(x.shape, generator=generator, dtype=x.dtype).to(x.device)
                noisy = x.add(noise, alpha=math.sqrt(above**2 - now**2) * config.s_noise)
                sigma = sigma * (1.0 + gamma)
            slope = (noisy - denoise(noisy, sigma)).div_(above)
            x = (x if config.legacy_predictor else noisy).add(slope, alpha=following - above)
            if following > 0.0 and config.sampler_order == "heun":
                ahead = (x - denoise(x, sigmas[i + 1])).div_(following)
                x = noisy.add(slope.add_(ahead), alpha=0.5 * (following - above))
        return x
