"""Finite decision processes, evaluated exactly."""

from typing import NamedTuple

import torch
from torch import Tensor

F64 = torch.float64


class Mdp(NamedTuple):
    transition: Tensor
    """[S, A, S]"""
    reward: Tensor
    """[S, A]"""
    gamma: float

    def values(self, pi: Tensor) -> tuple[Tensor, Tensor]:
        """V [S] and Q [S, A] of a policy, by a linear solve."""
        p = torch.einsum("sa,sat->st", pi, self.transition)
        v = torch.linalg.solve(torch.eye(len(p), dtype=F64) - self.gamma * p, (pi * self.reward).sum(-1))
        return v, self.reward + self.gamma * self.transition @ v

    def optimal(self) -> tuple[Tensor, Tensor, list[Tensor]]:
        """V*, Q* and the policies that policy iteration passes through, beginning with uniform."""
        pi = torch.full_like(self.reward, 1 / self.reward.shape[1])
        passed = [pi]
        while True:
            v, q = self.values(pi)
            new = torch.nn.functional.one_hot(q.argmax(-1), q.shape[1]).to(F64)
            if torch.equal(new, pi):
                return v, q, passed
            passed.append(new)
            pi = new

    def occupancy(self, pi: Tensor, start: Tensor) -> Tensor:
        """Discounted state distribution [S], summing to one."""
        p = torch.einsum("sa,sat->st", pi, self.transition)
        return (1 - self.gamma) * torch.linalg.solve(torch.eye(len(p), dtype=F64) - self.gamma * p.T, start)


def garnet(seed: int, states: int = 20, actions: int = 5, branch: int = 3, gamma: float = 0.9) -> Mdp:
    """Random MDP: each pair leads to ``branch`` states; rewards standard normal."""
    g = torch.Generator().manual_seed(seed)
    transition = torch.zeros(states, actions, states, dtype=F64)
    where = torch.rand(states, actions, states, generator=g).argsort(-1)[..., :branch]
    share = torch.rand(states, actions, branch, generator=g, dtype=F64) + 0.05
    transition.scatter_(-1, where, share / share.sum(-1, keepdim=True))
    return Mdp(transition, torch.randn(states, actions, generator=g, dtype=F64), gamma)


def iterate(mdp: Mdp, step, iterations: int, record=None) -> tuple[Tensor, list[Tensor]]:
    """Policies under pi <- step(q, pi, k); returns the last one and the values on the way."""
    pi = torch.full_like(mdp.reward, 1 / mdp.reward.shape[1])
    trail = []
    for k in range(iterations):
        v, q = mdp.values(pi)
        trail.append(v)
        if record is not None:
            record.append(pi)
        pi = step(q, pi, k)
        assert (pi.sum(-1) - 1).abs().max() < 1e-9
        pi = pi / pi.sum(-1, keepdim=True)
    return pi, trail


def smallest_rise(trail: list[Tensor]) -> float:
    values = torch.stack(trail)
    return (values[1:] - values[:-1]).min().item()


def rate(mdp: Mdp, policies: list[Tensor], first: int, last: int) -> float:
    """Factor per iteration by which the mass on actions that are not optimal shrinks."""
    _, q, _ = mdp.optimal()
    off = q < q.amax(-1, keepdim=True) - 1e-9
    mass = [torch.where(off, policies[k], 0.0).sum().item() for k in (first, last)]
    return (mass[1] / mass[0]) ** (1 / (last - first))
