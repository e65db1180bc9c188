"""Running normalisation of observations and rewards; part of the policy, saved and moved with it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ctrlrl.core.advantage import running_return


def varies(mean: Tensor, std: Tensor) -> Tensor:
    """Bool: where data of this mean and deviation changes by more than float32's rounding of it."""
    return std > 1e-6 * mean.abs()


class RunningMoments(nn.Module):
    """Mean and variance of a stream, merged batch by batch in float64 (Chan, Golub and LeVeque 1983)."""

    mean: Tensor
    var: Tensor
    count: Tensor

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(shape, dtype=torch.float64))
        self.register_buffer("var", torch.ones(shape, dtype=torch.float64))
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))

    @torch.no_grad()
    def update(self, x: Tensor) -> None:
        """Take in ``x`` [M, *shape]."""
        if x.shape[0] == 0:
            return
        x = x.double()
        n, mean, var = x.shape[0], x.mean(0), x.var(0, correction=0)
        total = self.count + n
        delta = mean - self.mean
        m2 = self.var * self.count + var * n + delta**2 * self.count * n / total
        self.mean += delta * n / total
        self.var.copy_(m2 / total)
        self.count.copy_(total)


class ObsNormalizer(nn.Module):
    """(x - mean) / std, clipped to [-clip, clip]. The identity until it has seen data.

    The statistics change between rollouts only, never inside one: the same observation means the same
    to the collecting policy and to every epoch of the update.
    """

    shift: Tensor
    scale: Tensor

    def __init__(self, size: int, clip: float, eps: float = 1e-8) -> None:
        super().__init__()
        self.moments = RunningMoments((size,))
        self.clip, self.eps = clip, eps
        self.register_buffer("scale", torch.ones(size))
        self.register_buffer("shift", torch.zeros(size))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise ``x`` [..., size] in float32."""
        return torch.addcmul(self.shift, x, self.scale).clamp(-self.clip, self.clip)

    @torch.no_grad()
    def update(self, x: Tensor) -> None:
        """Take in ``x`` [M, size]."""
        self.moments.update(x)
        inverse = torch.rsqrt(self.moments.var + self.eps)
        self.scale.copy_(inverse)
        self.shift.copy_(-self.moments.mean * inverse)


class ObsScaling(nn.Module):
    """x scale + shift with fixed numbers; the identity until :meth:`fit`."""

    shift: Tensor
    scale: Tensor

    def __init__(self, size: int) -> None:
        super().__init__()
        self.register_buffer("scale", torch.ones(size))
        self.register_buffer("shift", torch.zeros(size))

    def forward(self, x: Tensor) -> Tensor:
        """[..., size] to the same."""
        return torch.addcmul(self.shift, x, self.scale)

    def fit(self, mean: Tensor, std: Tensor, eps: float = 1e-3) -> None:
        """Normalise to (x - mean) / (std + eps), with TD3+BC's eps (Fujimoto and Gu 2021, section 5)."""
        scale = 1.0 / (std.double() + eps)
        self.scale.copy_(scale)
        self.shift.copy_(-mean.double() * scale)


class RewardNormalizer(nn.Module):
    """Divide rewards by the deviation of their running discounted sum, as VecNormalize does, and clip."""

    running: Tensor

    def __init__(self, n_envs: int, gamma: float, clip: float, eps: float = 1e-8) -> None:
        super().__init__()
        self.moments = RunningMoments(())
        self.gamma, self.clip, self.eps = gamma, clip, eps
        # not saved: every training begins at a border, which restarts it, and a run may be loaded with another width
        self.register_buffer("running", torch.zeros(n_envs, dtype=torch.float64), persistent=False)

    def restart(self) -> None:
        """Forget the running sums (the environments were recreated); keep the moments."""
        self.running.zero_()

    @torch.no_grad()
    def forward(self, reward_t: Tensor, cut_t: Tensor, valid_t: Tensor) -> Tensor:
        """Take in a rollout of rewards [T, N] and return them scaled, float32."""
        # an invalid transition (the reset step of some vector environments) always follows an end and carries
        # reward zero, so the restarted sum passes through it unchanged
        sums = running_return(reward_t.double(), self.gamma, cut_t, self.running)
        self.moments.update(sums[valid_t])
        self.running.copy_(torch.where(cut_t[-1], torch.zeros_like(sums[-1]), sums[-1]))
        scale = torch.rsqrt(self.moments.var + self.eps)
        return (reward_t.double() * scale).clamp(-self.clip, self.clip).float()
