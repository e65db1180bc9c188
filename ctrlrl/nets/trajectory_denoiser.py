"""The networks of trajectory diffusion: a U-Net over time, or a residual MLP for single transitions."""

from __future__ import annotations

import math
from dataclasses import dataclass

import gymnasium as gym
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import pad, silu

from ctrlrl.nets.actors import BoxActor, QNetworkConfig
from ctrlrl.nets.edm import Preconditioned
from ctrlrl.nets.trajectory_codec import Steps, TrajectoryCodec
from ctrlrl.types import check_types

GROUPS = 8
"""Groups of the U-Net's group normalisation, which must divide its channels."""
TIME_SCALE = 100.0
"""c_noise = ln(sigma) / 4 is shown to sinusoids, which expect numbers of the order of a thousand, as 25 ln(sigma)."""


@dataclass(frozen=True)
class DenoiserConfig:
    """Shape of the network that denoises trajectories."""

    denoiser_channels: tuple[int, ...] = (32, 64, 128)
    """Channels of the U-Net's levels, each of half the length of the one before; multiples of 8."""
    denoiser_layers: int = 1
    """Residual blocks at each level of the U-Net, beside the one that changes the channels."""
    denoiser_width: int = 256
    """Width of the residual MLP, which single transitions (window_length=1) have instead."""
    denoiser_blocks: int = 4
    """Residual blocks of that MLP."""

    def __post_init__(self) -> None:
        check_types(self)
        if not self.denoiser_channels or any(c < GROUPS or c % GROUPS for c in self.denoiser_channels):
            raise ValueError(
                f"denoiser_channels={self.denoiser_channels} must be one or more multiples of {GROUPS} "
                "(the groups of its normalisation)"
            )
        for name in ("denoiser_layers", "denoiser_width", "denoiser_blocks"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")


def make_denoiser(config: DenoiserConfig, channels: int, length: int) -> nn.Module:
    """F(x [B, C, T], c_noise [B]) to the shape of x, for C = ``channels`` and T = ``length``.

    Raises:
        ImportError: diffusers is missing, of which the U-Net is (T > 1).
    """
    return ResidualMLP(config, channels) if length == 1 else UNet(config, channels, length)


class UNet(nn.Module):
    """diffusers' UNet1DModel of temporal residual blocks, for trajectories of any length.

    Lengths that its levels cannot halve are padded with zeros at the end, as its convolutions pad at every level.
    Residual blocks are those of Diffuser (Janner et al. 2022, arXiv:2205.09991): kernel 5, group normalisation, Mish.
    """

    def __init__(self, config: DenoiserConfig, channels: int, length: int) -> None:
        super().__init__()
        try:
            from diffusers import UNet1DModel
        except ImportError as error:
            raise ImportError(
                f"trajectory diffusion needs the diffusers library: pip install 'ctrlrl[diffusion]' ({error}). "
                "Single transitions (window_length=1) do without"
            ) from error
        levels = len(config.denoiser_channels)
        self.missing = -length % 2 ** (levels - 1)
        self.net = UNet1DModel(
            sample_size=length + self.missing,
            in_channels=channels,
            out_channels=channels,
            time_embedding_type="positional",
            use_timestep_embedding=True,
            flip_sin_to_cos=False,
            freq_shift=1.0,
            down_block_types=("DownResnetBlock1D",) * levels,
            mid_block_type="MidResTemporalBlock1D",
            up_block_types=("UpResnetBlock1D",) * levels,
            out_block_type="OutConv1DBlock",
            block_out_channels=config.denoiser_channels,
            layers_per_block=config.denoiser_layers,
            norm_num_groups=GROUPS,
            act_fn="mish",
        )

    def forward(self, x: Tensor, c_noise: Tensor) -> Tensor:
        padded = pad(x, (0, self.missing)) if self.missing else x
        found = self.net(padded, TIME_SCALE * c_noise, return_dict=False)[0]
        return found[..., : x.shape[-1]]


class ResidualMLP(nn.Module):
    """x + f(x), several times, for single transitions [B, C, 1], as in SynthER (arXiv:2303.06614)."""

    frequencies: Tensor

    def __init__(self, config: DenoiserConfig, channels: int, time_features: int = 64) -> None:
        super().__init__()
        width, half = config.denoiser_width, time_features // 2
        frequencies = torch.exp(-math.log(10_000.0) / (half - 1) * torch.arange(half))
        self.register_buffer("frequencies", frequencies, persistent=False)
        self.inputs = nn.Linear(channels, width)
        self.time = nn.Sequential(nn.Linear(2 * half, width), nn.SiLU(), nn.Linear(width, width))
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.SiLU(), nn.Linear(width, width))
            for _ in range(config.denoiser_blocks)
        )
        self.out = nn.Linear(width, channels)

    def forward(self, x: Tensor, c_noise: Tensor) -> Tensor:
        angle = TIME_SCALE * c_noise.unsqueeze(-1) * self.frequencies
        hidden = self.inputs(x.squeeze(-1)) + self.time(torch.cat([angle.sin(), angle.cos()], -1))
        for block in self.blocks:
            hidden = hidden + block(hidden)
        return self.out(silu(hidden)).unsqueeze(-1)


class TrajectoryModel(BoxActor):
    """A diffusion model of trajectories with what makes channels of them. It has spaces as an actor, but never acts.

    Attributes:
        codec: Between steps and standardised channels; its statistics are part of the model.
        denoise: D(x [B, C, T], sigma).

    Raises:
        TypeError: Observations that are not a flat Box of floats, or actions that are not a Box of floats.
        ValueError: A bound of an action is infinite.
    """

    def __init__(
        self, observation_space: gym.Space, action_space: gym.Space, config: DenoiserConfig, length: int
    ) -> None:
        box = isinstance(observation_space, gym.spaces.Box) and np.issubdtype(observation_space.dtype, np.floating)
        if not box or len(observation_space.shape or ()) != 1:
            raise TypeError(
                f"trajectories are generated with observations of a flat Box of floats, found {observation_space}; "
                "gymnasium.wrappers.FlattenObservation makes one of others without images"
            )
        super().__init__(observation_space, action_space, QNetworkConfig(actor_hidden=()))
        self.codec = TrajectoryCodec(observation_space.shape[0], self.action_shape[0], length)  # type: ignore[index]
        self.denoise = Preconditioned(make_denoiser(config, self.codec.channels, length))

    def forward(self, steps: Steps, sigma: Tensor, noise: Tensor) -> Tensor:
        """[B] loss of denoising ``steps`` [B, T, ...] with standard normal ``noise`` [B, C, T] at ``sigma`` [B]."""
        return self.denoise.loss(self.codec.encode(steps), sigma, noise)
