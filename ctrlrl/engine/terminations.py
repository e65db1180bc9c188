"""Where episodes end, as a function of what is observed: for rollouts in a model, which has no simulator to ask."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from ctrlrl import names
from ctrlrl.types import EnvSpec

Terminal: TypeAlias = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Observation [N, O], action [N, A] in [-1, 1] and next observation [N, O] to [N] bool: the episode ended there."""


class Healthy(NamedTuple):
    """When a walker of MuJoCo is healthy, as Gymnasium's documentation of its "Episode End" has it."""

    left_out: int
    """Coordinates of the position that its observation leaves out by default."""
    ranges: dict[str, tuple[float, float]]
    """Argument of the environment to its default, in the order of what they bound: height, angle, all after them."""
    closed: bool = False
    """Whether the ends of the ranges are healthy."""


_WALKERS = {
    "Hopper": Healthy(
        1,
        {
            "healthy_z_range": (0.7, math.inf), "healthy_angle_range": (-0.2, 0.2),
            "healthy_state_range": (-100.0, 100.0),
        },
    ),
    "Walker2d": Healthy(1, {"healthy_z_range": (0.8, 2.0), "healthy_angle_range": (-1.0, 1.0)}),
    "Ant": Healthy(2, {"healthy_z_range": (0.2, 1.0)}, closed=True),
    "Humanoid": Healthy(2, {"healthy_z_range": (1.0, 2.0)}),
}  # fmt: skip
_ENDLESS = frozenset({"HalfCheetah", "HumanoidStandup", "Pusher", "Reacher", "Swimmer"})
_VERSIONS = frozenset({"2", "3", "4", "5"})


def known(env: EnvSpec | None) -> Terminal | None:
    """Where episodes of ``env`` end; None if that is not known here.

    Known are MuJoCo's walkers in versions 2 to 5 with their arguments, and those of its tasks that have no end. Of an
    environment with wrappers nothing is known: they may change what is observed.
    """
    if env is None or env.wrappers:
        return None
    base, _, version = env.id.rpartition(":")[2].rpartition("-v")
    if env.id == "Pendulum-v1" or (base in _ENDLESS and version in _VERSIONS):
        return never
    if base not in _WALKERS or version not in _VERSIONS:
        return None
    if not env.kwargs.get("terminate_when_unhealthy", True):
        return never
    walker = _WALKERS[base]
    first = 0 if env.kwargs.get("exclude_current_positions_from_observation", True) else walker.left_out
    ranges = [env.kwargs.get(name, default) for name, default in walker.ranges.items()]
    return partial(_unhealthy, first, [(float(low), float(high)) for low, high in ranges], walker.closed)


def chosen(setting: str, env: EnvSpec | None) -> Terminal | None:
    """What the setting ``model_ends`` says: "auto" is :func:`known`, "none" None, else ``package.module:function``.

    Raises:
        ValueError: The function cannot be imported.
    """
    if setting == "none":
        return None
    return known(env) if setting == "auto" else names.load(setting, "termination function")


def never(obs: Tensor, action: Tensor, next_obs: Tensor) -> Tensor:
    """[N] false."""
    return torch.zeros(len(obs), dtype=torch.bool, device=obs.device)


def _unhealthy(
    first: int, ranges: list[tuple[float, float]], closed: bool, obs: Tensor, action: Tensor, next_obs: Tensor
) -> Tensor:
    parts = next_obs[:, first : first + 1], next_obs[:, first + 1 : first + 2], next_obs[:, first + 1 :]
    healthy = next_obs.isfinite().all(-1)
    for part, (low, high) in zip(parts, ranges, strict=False):
        inside = (part >= low) & (part <= high) if closed else (part > low) & (part < high)
        healthy = healthy & inside.all(-1)
    return ~healthy
