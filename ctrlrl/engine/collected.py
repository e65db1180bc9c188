"""What a collection returns, and how values are attached to it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ctrlrl.data.rollout import Rollout, RolloutStorage
from ctrlrl.types import Obs


class Collected(NamedTuple):
    """``T`` steps of ``N`` environments (or of ``N`` episodes, from ``collect_groups``), time first.

    Tensors are new for every rollout. Values and log-probabilities are the caller's to compute, in one batch.
    """

    obs: Obs
    """[T, N, ...] observation before each step."""
    last_obs: Obs
    """[N, ...] observation after the last step."""
    action: Tensor
    """[T, N, ...] action as the density sees it."""
    reward_t: Tensor
    """[T, N] float32, the environment's own."""
    terminated_t: Tensor
    """[T, N] bool."""
    truncated_t: Tensor
    """[T, N] bool; False where the step also terminated, since an episode that ended has no value beyond."""
    valid_t: Tensor
    """[T, N] bool: False for reset steps (NEXT_STEP) and after the end of a group's episode."""
    final_t: Tensor
    """[K] int64 time index of steps whose true next observation is not in ``obs``: truncated (and, where asked for,
    terminated), reset at once."""
    final_n: Tensor
    """[K] int64 their environment."""
    final_obs: Obs
    """[K, ...] their true next observation."""
    episodes: list[tuple[float, int]]
    """Undiscounted return and length of every episode that ended in this rollout, in order of time."""
    simulation_s: float
    """Seconds spent inside the environments."""
    group: Tensor | None = None
    """[N] int64 group of each episode, from ``collect_groups``."""
    free_t: Tensor | None = None
    """[T, N] bool: False where the action was prescribed (see ``Draw.forced``); None means all free."""
    logp_behaviour: Tensor | None = None
    """[T, N] log-probabilities as the sampler computed them, where asked for."""
    support: Tensor | None = None
    """[T, N, K] bool: actions that were allowed, where they were restricted."""
    success: Tensor | None = None
    """[N] bool: what the environment said of the episode at its end (``is_success`` or ``success``)."""
    rewards: Tensor | None = None
    """[N, K] float32: the outcome by channel, where the environment gives ``rewards`` at the end."""

    def rollout(self, **estimates: Any) -> Rollout:
        """This data with the caller's estimates (logp_old, value, value_t, advantage, value_target, dist_old)."""
        return Rollout(
            self.obs, self.action, self.reward_t, self.terminated_t, self.truncated_t, self.valid_t,
            **{"group": self.group, **estimates},
        )  # fmt: skip


def next_values(value_fn: Callable[[Obs], Tensor], collected: Collected) -> tuple[Tensor, Tensor]:
    """Values before and after every step, from one call of ``value_fn``.

    Args:
        value_fn: Observations [M, ...] to values [M].
        collected: A rollout.

    Returns:
        ``value`` [T, N] of ``obs``, and ``value_t`` [T, N] of the true next observation: the final observation where
        an episode was truncated, zero where it terminated, ``value`` of the next row elsewhere.
    """
    c = collected
    steps, n = c.reward_t.shape
    if isinstance(c.obs, dict):
        assert isinstance(c.last_obs, dict) and isinstance(c.final_obs, dict)
        merged: Obs = {k: torch.cat([c.obs[k].flatten(0, 1), c.last_obs[k], c.final_obs[k]]) for k in c.obs}
    else:
        assert isinstance(c.last_obs, Tensor) and isinstance(c.final_obs, Tensor)
        merged = torch.cat([c.obs.flatten(0, 1), c.last_obs, c.final_obs])
    # cloned, as value_fn may run in inference mode and these take part in losses
    values = value_fn(merged).detach().clone()
    value = values[: steps * n].view(steps, n)
    value_t = values[n : (steps + 1) * n].view(steps, n).clone()
    value_t[c.final_t, c.final_n] = values[(steps + 1) * n :]
    return value, value_t.masked_fill(c.terminated_t, 0.0)


def assemble(
    storage: RolloutStorage,
    finals: list[tuple[int, int, Any]],
    episodes: list[tuple[float, int]],
    simulation_s: float,
) -> Collected:
    """The record of a complete rollout as tensors on its device."""
    device, steps = storage.device, storage.n_steps
    place = torch.tensor([(t, n) for t, n, _ in finals], dtype=torch.int64, device=device).reshape(-1, 2)
    last = storage.obs(steps)
    if isinstance(last, dict):
        final: Obs = {k: _stack([o[k] for *_, o in finals], v[0]) for k, v in last.items()}
        last_obs: Obs = {k: v[0] for k, v in last.items()}
    else:
        final, last_obs = _stack([o for *_, o in finals], last[0]), last[0]
    terminated = torch.from_numpy(storage.terminated).to(device)
    return Collected(
        obs=storage.obs(0, steps),
        last_obs=last_obs,
        action=storage.action,
        reward_t=torch.from_numpy(storage.reward).to(device, torch.float32),
        terminated_t=terminated,
        truncated_t=torch.from_numpy(storage.truncated & ~storage.terminated).to(device),
        valid_t=torch.from_numpy(storage.valid).to(device),
        final_t=place[:, 0],
        final_n=place[:, 1],
        final_obs=final,
        episodes=episodes,
        simulation_s=simulation_s,
    )


def _stack(values: list[Any], like: Tensor) -> Tensor:
    if not values:
        return like[:0]
    return torch.from_numpy(np.stack([np.asarray(v) for v in values])).to(like.device, like.dtype)


def keep_finals(t: int, infos: Mapping[str, Any], wanted: Any, finals: list[Any]) -> None:
    """Note the final observations of the environments ``wanted`` [N], from the infos of a SAME_STEP environment."""
    if wanted.any():
        values = infos["final_obs"]
        finals += [(t, int(n), row_of(values, int(n))) for n in np.flatnonzero(wanted)]


def row_of(values: Any, n: int) -> Any:
    """A copy of row ``n`` of a (dict of) arrays, or of entry ``n`` of an object array."""
    if isinstance(values, Mapping):
        return {k: np.array(v[n]) for k, v in values.items()}
    entry = values[n]
    return {k: np.array(v) for k, v in entry.items()} if isinstance(entry, Mapping) else np.array(entry)


def copy_obs(obs: Any) -> Any:
    return {k: np.array(v) for k, v in obs.items()} if isinstance(obs, Mapping) else np.array(obs)
