"""A world model: an ensemble of networks that say what comes next, and how sure they are of it.

Sources: PETS (Chua et al. 2018, arXiv:1805.12114) for the networks, MOPO (Yu et al. 2020, arXiv:2005.13239) for the
uncertainty.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ctrlrl.nets.normalizer import varies
from ctrlrl.nets.q_ensemble import EnsembleLinear

LOG_VAR_BOUNDS = (-10.0, 0.5)
"""Where the learned bounds of the log-variance begin, as in PETS."""


class Prediction(NamedTuple):
    """What E members say of N transitions, in the data's own units: change of the observation, then the reward."""

    mean: Tensor
    """[E, N, O + 1]."""
    std: Tensor
    """[E, N, O + 1]."""

    def draw(self, member: Tensor, noise: Tensor) -> Tensor:
        """[N, O + 1] one sample of each row by its ``member`` [N] int64, from standard normal ``noise`` [N, O + 1]."""
        rows = torch.arange(len(member), device=member.device)
        return torch.addcmul(self.mean[member, rows], self.std[member, rows], noise)

    def uncertainty(self) -> Tensor:
        """[N] the largest norm of a member's deviations: the penalty of MOPO (section 4.3, as released).

        The reward's deviation is among them. The paper writes the norm of the covariance, its code takes deviations.
        """
        return torch.linalg.vector_norm(self.std, dim=-1).amax(0)


class DynamicsEnsemble(nn.Module):
    """E networks side by side, each a Gaussian over change of the observation and reward with independent dimensions.

    Inputs and outputs are standardised inside; PETS standardises inputs alone, which leaves the likelihood what it is
    up to a constant. Every parameter has the members first: no member depends on another.

    Args:
        obs_size: O, of flat observations.
        action_size: A, of actions in [-1, 1].
        members: E.
        hidden: Widths of the hidden layers.
        elites: How many members speak in :attr:`elites`.

    Attributes:
        elites: Numbers of the members to roll out with; the first ones until the fit has chosen.
        least, most: [O + 1] smallest and largest next observation and reward in the data.
    """

    input_mean: Tensor
    input_std: Tensor
    target_mean: Tensor
    target_std: Tensor
    least: Tensor
    most: Tensor
    elites: Tensor

    def __init__(self, obs_size: int, action_size: int, members: int, hidden: tuple[int, ...], elites: int) -> None:
        super().__init__()
        self.obs_size, self.action_size, self.members = obs_size, action_size, members
        inputs, self.outputs = obs_size + action_size, obs_size + 1
        layers: list[nn.Module] = []
        for before, after in itertools.pairwise((inputs, *hidden)):
            layers += [EnsembleLinear(members, before, after), nn.SiLU()]
        self.body = nn.Sequential(*layers, EnsembleLinear(members, (inputs, *hidden)[-1], 2 * self.outputs))
        low, high = LOG_VAR_BOUNDS
        self.log_var_min = nn.Parameter(torch.full((members, 1, self.outputs), low))
        self.log_var_max = nn.Parameter(torch.full((members, 1, self.outputs), high))
        for name, size, value in (("input", inputs, 1.0), ("target", self.outputs, 1.0)):
            self.register_buffer(f"{name}_mean", torch.zeros(size))
            self.register_buffer(f"{name}_std", torch.full((size,), value))
        self.register_buffer("least", torch.full((self.outputs,), -torch.inf))
        self.register_buffer("most", torch.full((self.outputs,), torch.inf))
        self.register_buffer("elites", torch.arange(elites))

    @torch.no_grad()
    def scale(self, name: str, mean: Tensor, std: Tensor) -> None:
        """Standardise ``"input"`` or ``"target"`` by mean and deviation; what never changes keeps deviation 1."""
        getattr(self, f"{name}_mean").copy_(mean)
        getattr(self, f"{name}_std").copy_(torch.where(varies(mean, std), std, torch.ones_like(std)))

    def inputs(self, obs: Tensor, action: Tensor) -> Tensor:
        """[..., O + A] standardised."""
        return (torch.cat([obs, action], -1) - self.input_mean) / self.input_std

    def targets(self, obs: Tensor, reward: Tensor, next_obs: Tensor) -> Tensor:
        """[..., O + 1] standardised."""
        return (torch.cat([next_obs - obs, reward.unsqueeze(-1)], -1) - self.target_mean) / self.target_std

    def forward(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance [E, B, O + 1] of the standardised targets, at ``inputs`` [B, O + A] or [E, B, O + A].

        The log-variance bends softly at its bounds (PETS, appendix A.1).
        """
        mean, raw = self.body(inputs).chunk(2, -1)
        below = self.log_var_max - nn.functional.softplus(self.log_var_max - raw)
        return mean, self.log_var_min + nn.functional.softplus(below - self.log_var_min)

    @torch.no_grad()
    def predict(self, obs: Tensor, action: Tensor) -> Prediction:
        """What all members say at observations [N, O] and actions [N, A] in [-1, 1]."""
        mean, log_var = self(self.inputs(obs, action))
        return Prediction(
            torch.addcmul(self.target_mean, mean, self.target_std), (0.5 * log_var).exp() * self.target_std
        )

    def sample(self, obs: Tensor, action: Tensor, member: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Next observations [N, O] and rewards [N], each row by its ``member`` [N] and ``noise`` [N, O + 1]."""
        drawn = self.predict(obs, action).draw(member, noise)
        return obs + drawn[:, :-1], drawn[:, -1]

    def uncertainty(self, obs: Tensor, action: Tensor) -> Tensor:
        """[N] see :meth:`Prediction.uncertainty`."""
        return self.predict(obs, action).uncertainty()


def likelihood_loss(mean: Tensor, log_var: Tensor, target: Tensor) -> Tensor:
    """[E] twice the negative log-likelihood per number, without its constant: mean of (x - mean)^2 / var + log var."""
    return ((mean - target).square() * (-log_var).exp() + log_var).mean((1, 2))
