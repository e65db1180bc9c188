"""Actions by diffusion: noise levels, the deterministic sampler's steps through them, and the decoder of the two."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal, TypeAlias

import gymnasium as gym
import torch
from torch import Tensor

from ctrlrl.nets.decoders import DecoderConfig, DenoisingDecoder

Schedule: TypeAlias = Literal["cosine", "linear", "released"]
Prediction: TypeAlias = Literal["v", "epsilon"]


def noise_levels(schedule: Schedule, steps: int) -> Tensor:
    """alpha^2 of x = alpha a + sigma eps, alpha^2 + sigma^2 = 1, from the noisiest level to none; float64.

    ========  ===========================================================================================
    cosine    cos^2 of Nichol and Dhariwal 2021 (arXiv:2102.09672, eq. 17), betas at most 0.999; [steps + 1]
    linear    betas from 0.0001 to 0.02 (Ho et al. 2020), which in a few steps do not reach noise; [steps + 1]
    released  the cosine of GoRL's code, which stops one level short of noise; [steps]
    ========  ===========================================================================================
    """
    grid = torch.arange(steps + 1, dtype=torch.float64) / steps
    cosine = ((grid + 0.008) / 1.008 * math.pi / 2).cos().square()
    if schedule == "released":
        return (cosine / cosine[0])[:-1].flip(0)
    betas = (1.0 - cosine[1:] / cosine[:-1]).clamp(max=0.999)
    if schedule == "linear":
        betas = torch.linspace(1e-4, 0.02, steps, dtype=torch.float64)
    return torch.cat([grid.new_ones(1), (1.0 - betas).cumprod(0)]).flip(0)


def ddim(levels: Tensor, prediction: Prediction) -> tuple[Tensor, Tensor]:
    """(keep, move), each [n], of the deterministic steps x' = keep x + move p through ``levels`` [n + 1].

    p is the prediction: with theta = arctan(sigma / alpha), v gives keep = cos and move = -sin of the step in theta;
    epsilon gives keep = alpha' / alpha and move = sigma' - keep sigma. Source: Song et al. 2020, arXiv:2010.02502,
    eq. 12 with eta = 0.
    """
    alpha, sigma = levels.sqrt(), (1.0 - levels).sqrt()
    (a, b), (s, r) = (alpha[:-1], alpha[1:]), (sigma[:-1], sigma[1:])
    if prediction == "v":
        return a * b + s * r, a * r - b * s
    return b / a, r - b / a * s


class DiffusionDecoder(DenoisingDecoder):
    """A diffusion model of K noise levels, sampled by DDIM without noise.

    Cosine and linear schedule: the prediction is p = f + skip_k x, skip_k = (1 - keep_k) / move_k. A step keep_k x +
    move_k p then is x + move_k f, so the zero network is the identity for v and epsilon alike; what is fitted and
    sampled is the same DDIM. Without it the zero network multiplies the noise by prod keep_k, which at ten steps is
    0.884 (v, cosine), 1.052 (epsilon, linear) or 204 (epsilon, cosine), and not by the 1 that GoRL's text
    (arXiv:2512.02581) assumes.

    The released schedule has none of this (skip = 0) and K - 1 steps from level K - 1 to 0, as in GoRL's code; a
    K-th of its draws ask for the noise at the level that has none.
    """

    skip: Tensor
    alpha: Tensor
    sigma: Tensor

    def __init__(self, observation_space: gym.Space, size: int, config: DecoderConfig) -> None:
        super().__init__(observation_space, size, config)
        count, released = config.decoder_steps, config.decoder_schedule == "released"
        levels = noise_levels(config.decoder_schedule, count)
        keep, move = ddim(levels, config.decoder_prediction)
        skip = torch.zeros(count) if released else (1.0 - keep) / move
        keep = keep if released else torch.ones(count)
        self.steps = list(zip(keep.tolist(), move.tolist(), strict=True))
        self.initial_gain = keep.prod().item()
        trained = levels[:count]
        tables = {"skip": skip, "alpha": trained.sqrt(), "sigma": (1.0 - trained).sqrt(),
                  "times": (torch.arange(count, 0, -1) - int(released)) / count}  # fmt: skip
        for name, table in tables.items():
            self.register_buffer(name, table.float(), persistent=False)

    def draws(self, n: int, generator: torch.Generator) -> dict[str, Tensor]:
        """``noise`` [n, M, A] and ``level`` [n, M], an index into the sampler's order of levels."""
        shape = (n, self.config.decoder_draws)
        noise = torch.randn(*shape, self.size, generator=generator)
        return {"noise": noise, "level": torch.randint(len(self.times), shape, generator=generator)}

    def pairs(self, action: Tensor, draws: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        noise, level = draws["noise"], draws["level"]
        alpha, sigma = self.alpha[level].unsqueeze(-1), self.sigma[level].unsqueeze(-1)
        x = alpha * action + sigma * noise
        wanted = alpha * noise - sigma * action if self.config.decoder_prediction == "v" else noise
        return x, self.times[level], wanted - self.skip[level].unsqueeze(-1) * x
