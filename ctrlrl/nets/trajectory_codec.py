"""Between trajectories and what a diffusion model sees of them: standardised channels over time."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from ctrlrl.nets.normalizer import varies

EDGE = 0.999
"""Largest size of an action before atanh, as in policy-guided diffusion's released code."""


class Steps(NamedTuple):
    """Steps side by side, [B, T, ...] or [N, ...]."""

    obs: Tensor
    """[..., O] raw flat observations."""
    action: Tensor
    """[..., A] in [-1, 1]."""
    reward: Tensor
    """[...] the environment's own."""
    done: Tensor
    """[...] 0 or 1: the episode ended here."""
    next_obs: Tensor
    """[..., O]; of the last step of a trajectory it may be unknown (see :meth:`TrajectoryCodec.decode`)."""


class TrajectoryCodec(nn.Module):
    """Channels [obs, atanh(action), reward, done] of T steps, each to mean 0 and deviation 1 over all training data.

    With T = 1 there is no following step that would hold the next observation: it is a channel of its own, and the
    model is one of single transitions, as SynthER's (arXiv:2303.06614).

    Attributes:
        obs_size, action_size: O and A.
        length: T.
        channels: C = O + A + 2, and another O where T = 1.
    """

    mean: Tensor
    std: Tensor
    varies: Tensor

    def __init__(self, obs_size: int, action_size: int, length: int) -> None:
        super().__init__()
        self.obs_size, self.action_size, self.length = obs_size, action_size, length
        self.channels = obs_size + action_size + 2 + (obs_size if length == 1 else 0)
        self.register_buffer("mean", torch.zeros(self.channels))
        self.register_buffer("std", torch.ones(self.channels))
        self.register_buffer("varies", torch.ones(self.channels))

    @property
    def action_channels(self) -> slice:
        """Where the actions are."""
        return slice(self.obs_size, self.obs_size + self.action_size)

    def raw(self, steps: Steps) -> Tensor:
        """[B, C, T] channels of ``steps`` [B, T, ...] before they are standardised."""
        parts = [steps.obs, steps.action.clamp(-EDGE, EDGE).atanh(), steps.reward[..., None], steps.done[..., None]]
        parts += [steps.next_obs] if self.length == 1 else []
        return torch.cat([p.float() for p in parts], -1).transpose(-1, -2)

    def fit(self, mean: Tensor, std: Tensor) -> None:
        """Take over mean and deviation [C] of the raw channels.

        A channel that never changes is 0 to the model, and its mean again whatever the model makes of it.
        """
        self.mean.copy_(mean)
        self.varies.copy_(varies(mean, std))
        self.std.copy_(torch.where(self.varies > 0, std, torch.ones_like(std)))

    def encode(self, steps: Steps) -> Tensor:
        """[B, C, T] standardised channels of ``steps`` [B, T, ...]."""
        return (self.raw(steps) - self.mean[:, None]) / self.std[:, None]

    def split(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Raw observations [B, T, O], actions [B, T, A] in (-1, 1), and the remaining raw channels, of x [B, C, T].

        Differentiable; tanh and the deviation are part of an action's gradient.
        """
        raw = (x * (self.std * self.varies)[:, None] + self.mean[:, None]).transpose(-1, -2)
        a = self.action_channels
        return raw[..., : a.start], raw[..., a].tanh(), raw[..., a.stop :]

    def decode(self, x: Tensor) -> tuple[Steps, Tensor]:
        """Steps [B, T, ...] of x [B, C, T], and [B, T] bool: whether they are transitions.

        The next observation is that of the following step. The last one has none, and is a transition only where the
        episode ends there. An end is a done above one half, as in the released code.
        """
        obs, action, rest = self.split(x)
        done = rest[..., 1] > 0.5
        known = torch.ones_like(done)
        if self.length == 1:
            following = rest[..., 2:]
        else:
            following = torch.cat([obs[:, 1:], obs[:, -1:]], 1)
            known[:, -1] = done[:, -1]
        return Steps(obs, action, rest[..., 0], done.to(obs.dtype), following), known
