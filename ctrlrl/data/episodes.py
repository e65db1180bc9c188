"""Whole episodes, row by row: what the collectors of groups and of token sequences give."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ctrlrl.types import Obs


class Episodes(NamedTuple):
    """``B`` whole episodes of at most ``T`` positions, padded. What the environment does not tell is None."""

    obs: Obs
    """[B, T, ...] observation before each position."""
    action: Tensor
    """[B, T, ...] action as the policy's density sees it; also where the environment or a hint wrote."""
    mask: Tensor
    """[B, T] bool: positions that exist and that the policy was free to choose."""
    reward_t: Tensor
    """[B, T] float32, zero after the end."""
    terminated_t: Tensor
    """[B, T] bool."""
    truncated_t: Tensor
    """[B, T] bool; never together with ``terminated_t``."""
    last_obs: Obs
    """[B, ...] the true final observation of each episode."""
    length: Tensor
    """[B] int64 positions of each episode, the environment's own included."""
    group: Tensor
    """[B] int64."""
    simulation_s: float
    """Seconds spent inside the environments."""
    logp_behaviour: Tensor | None = None
    """[B, T] log-probabilities as the sampler computed them; under the temperature they were drawn with."""
    turn: Tensor | None = None
    """[B, T] int64, -1 where the environment wrote and after the end."""
    task: Tensor | None = None
    """[B] int64."""
    success: Tensor | None = None
    """[B] bool."""
    rewards: Tensor | None = None
    """[B, K] float32 outcome by channel."""
    answer: Tensor | None = None
    """[B] int64."""
    void: Tensor | None = None
    """[B, T] bool."""
    solution: Tensor | None = None
    """[B, T] int64 optimal action at each position, -1 where there is none to choose."""
    support: Tensor | None = None
    """[B, T, K] bool: actions that were allowed."""

    def returns(self) -> Tensor:
        """[B] undiscounted return."""
        return self.reward_t.sum(1)


def concatenate(parts: list[Episodes]) -> Episodes:
    """Rows of all ``parts``, padded to the longest; group ids stay as they are."""
    if len(parts) == 1:
        return parts[0]
    longest = max(p.mask.shape[1] for p in parts)
    timed = {"obs", "action", "mask", "reward_t", "terminated_t", "truncated_t", "logp_behaviour", "turn", "void",
             "solution", "support"}  # fmt: skip

    def join(name: str) -> Any:
        values = [getattr(p, name) for p in parts]
        if name == "simulation_s":
            return sum(values)
        if any(v is None for v in values):
            return None
        fill = -1 if name in ("turn", "solution") else 0

        def stack(tensors: list[Tensor]) -> Tensor:
            return torch.cat([pad(t, longest, fill) for t in tensors] if name in timed else tensors)

        if isinstance(values[0], dict):
            return {k: stack([v[k] for v in values]) for k in values[0]}
        return stack(values)

    return Episodes(*(join(name) for name in Episodes._fields))


def take(episodes: Episodes, index: Tensor) -> Episodes:
    """The rows at ``index`` [M]."""

    def pick(x: Any) -> Any:
        if isinstance(x, dict):
            return {k: v[index] for k, v in x.items()}
        return x[index] if isinstance(x, Tensor) else x

    return Episodes(*(pick(x) for x in episodes))


def pad(x: Tensor, length: int, fill: float = 0) -> Tensor:
    """[B, T, ...] to [B, length, ...] with ``fill`` at the end."""
    missing = length - x.shape[1]
    if missing <= 0:
        return x
    return torch.cat([x, x.new_full((x.shape[0], missing, *x.shape[2:]), fill)], 1)
