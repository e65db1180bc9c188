"""Rollouts: what the collector records, and the batches that the losses see."""

from __future__ import annotations

from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
import torch
from torch import Tensor

from ctrlrl.types import Obs, SequenceBatch


class Rollout(NamedTuple):
    """``T`` transitions of ``N`` environments (or of ``N`` episodes), time first, with their estimates."""

    obs: Obs
    """[T, N, ...] observation before each transition."""
    action: Tensor
    """[T, N, ...] action as the policy's density sees it."""
    reward_t: Tensor
    """[T, N] float32."""
    terminated_t: Tensor
    """[T, N] bool: the episode ended here."""
    truncated_t: Tensor
    """[T, N] bool: the episode was cut here without having ended (never together with ``terminated_t``)."""
    valid_t: Tensor
    """[T, N] bool: False where no action was taken (reset steps, positions after an episode's end)."""
    logp_old: Tensor | None = None
    """[T, N] log-probability of ``action`` under the collecting policy."""
    value: Tensor | None = None
    """[T, N] value of ``obs``."""
    value_t: Tensor | None = None
    """[T, N] value of the true next observation, zero where terminated."""
    advantage: Tensor | None = None
    """[T, N] advantage estimate."""
    value_target: Tensor | None = None
    """[T, N] regression target of the value function."""
    dist_old: dict[str, Tensor] | None = None
    """Parameters of the collecting action distribution, each [T, N, ...]."""
    group: Tensor | None = None
    """[N] int group of each column, where columns are episodes collected in groups."""

    def flat(self) -> SequenceBatch:
        """Every transition as a sequence of one: [T * N, 1, ...], row ``t * N + n``, ``mask`` = ``valid_t``."""
        return SequenceBatch(
            obs=_map(self.obs, _column),
            action=_column(self.action),
            mask=_column(self.valid_t),
            logp_old=_column(self._filled("logp_old")),
            advantage=_column(self._filled("advantage")),
            value_target=_column(self._filled("value_target")),
            value_old=_column(self._filled("value")),
            dist_old=None if self.dist_old is None else {k: _column(v) for k, v in self.dist_old.items()},
        )

    def episodes(self, group: Tensor | None = None, task: Tensor | None = None) -> SequenceBatch:
        """One row per episode, or per part of an episode that lies in this rollout: [B, Tmax, ...].

        Rows are ordered by column, then by time. Positions past a row's end have ``mask`` False, zeros in the
        scalar entries, and repeat the row's last observation and action, so that log-probabilities stay finite.
        ``sequence_return`` [B] is the undiscounted sum of the row's rewards.

        Args:
            group: [N] int group of each column; ``self.group`` by default.
            task: [N] int task of each column.
        """
        n = self.valid_t.shape[1]
        starts, lengths, columns = _fragments((self.terminated_t | self.truncated_t).cpu(), self.valid_t.cpu())
        if not len(starts):
            raise ValueError("this rollout holds no valid transition, so there is no episode to return")
        position = torch.arange(int(lengths.max()))
        mask = position < lengths.unsqueeze(1)
        time = starts.unsqueeze(1) + torch.minimum(position, lengths.unsqueeze(1) - 1)
        device = self.valid_t.device
        index = (time * n + columns.unsqueeze(1)).to(device)
        mask, columns = mask.to(device), columns.to(device)

        def rows(x: Tensor) -> Tensor:
            return x.flatten(0, 1)[index]

        def scalars(name: str) -> Tensor:
            return rows(self._filled(name)).masked_fill(~mask, 0)

        group = self.group if group is None else group
        return SequenceBatch(
            obs=_map(self.obs, rows),
            action=rows(self.action),
            mask=mask,
            logp_old=scalars("logp_old"),
            advantage=scalars("advantage"),
            value_target=scalars("value_target"),
            value_old=scalars("value"),
            dist_old=None if self.dist_old is None else {k: rows(v) for k, v in self.dist_old.items()},
            sequence_return=rows(self.reward_t).masked_fill(~mask, 0).sum(1),
            group=None if group is None else group.to(device)[columns],
            task=None if task is None else task.to(device)[columns],
        )

    def _filled(self, name: str) -> Tensor:
        # methods without a critic leave these out; the losses that need them say so in ``needs``
        value = getattr(self, name)
        return torch.zeros_like(self.reward_t) if value is None else value


def _column(x: Tensor) -> Tensor:
    return x.flatten(0, 1).unsqueeze(1)


def _map(obs: Obs, fn: Any) -> Obs:
    return {k: fn(v) for k, v in obs.items()} if isinstance(obs, dict) else fn(obs)


def _fragments(cut_t: Tensor, valid_t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Start, length and column of every run of valid transitions up to a cut, by column and then time."""
    valid = valid_t.T.numpy()
    cut = cut_t.T.numpy()
    before = np.zeros_like(valid)
    before[:, 1:] = valid[:, :-1] & ~cut[:, :-1]
    after = np.zeros_like(valid)
    after[:, :-1] = valid[:, 1:]
    columns, starts = np.nonzero(valid & ~before)
    _, ends = np.nonzero(valid & (cut | ~after))
    return torch.from_numpy(starts), torch.from_numpy(ends - starts + 1), torch.from_numpy(columns)


def torch_dtype(dtype: Any) -> torch.dtype:
    """The type an observation of NumPy type ``dtype`` is stored in: its own, but float64 and float16 as float32."""
    kind = np.dtype(dtype)
    if kind.kind == "f":
        return torch.float32
    if kind.kind == "u" and kind.itemsize > 1:
        return torch.int64
    return torch.from_numpy(np.empty(0, kind)).dtype


class RowBuffer:
    """A tensor [rows, N, ...] that is filled row by row from NumPy arrays [N, ...].

    On the CPU the arrays are written straight into the tensor's memory; for a GPU they go through pinned memory
    and copies that do not wait.
    """

    def __init__(self, rows: int, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
        self.tensor = torch.empty((rows, *shape), dtype=dtype, device=device)
        self.copies = device.type != "cpu"
        pinned = device.type == "cuda"
        host = torch.empty((rows, *shape), dtype=dtype, pin_memory=pinned) if self.copies else self.tensor
        self.host = host.numpy()
        self.views = self.tensor.unbind(0)
        self._host_views = host.unbind(0) if self.copies else ()

    def write(self, row: int, value: Any) -> Tensor:
        """Store ``value`` and return the row as a tensor on the device."""
        self.host[row] = value
        view = self.views[row]
        if self.copies:
            view.copy_(self._host_views[row], non_blocking=True)
        return view


class RolloutStorage:
    """Memory for one rollout, allocated once, filled step by step.

    Observations have ``n_steps + 1`` rows: the last is the observation after the last step. Rewards and flags
    stay in NumPy (rewards in float64, for exact episode returns) until the rollout is complete.

    Args:
        obs_space: Space of one environment: Box, Discrete, MultiDiscrete, MultiBinary, or a flat Dict of these.
        action_shape: Shape of one action as the density sees it.
        action_dtype: Its type.
        n_steps: Transitions per environment.
        n_envs: Environments.
        device: Where observations and actions live.

    Raises:
        TypeError: An observation space that tensors cannot hold.
    """

    def __init__(
        self,
        obs_space: gym.Space,
        action_shape: tuple[int, ...],
        action_dtype: torch.dtype,
        n_steps: int,
        n_envs: int,
        device: torch.device | str = "cpu",
    ) -> None:
        self.device = torch.device(device)
        self.n_steps, self.n_envs = n_steps, n_envs
        self._parts: dict[str, RowBuffer] | None = None
        if isinstance(obs_space, gym.spaces.Dict):
            self._parts = {k: self._buffer(s) for k, s in obs_space.spaces.items()}
        else:
            self._single = self._buffer(obs_space)
        self.action = torch.empty((n_steps, n_envs, *action_shape), dtype=action_dtype, device=self.device)
        self._actions = self.action.unbind(0)
        self.reward = np.zeros((n_steps, n_envs))
        self.terminated, self.truncated = (np.zeros((n_steps, n_envs), dtype=np.bool_) for _ in range(2))
        self.valid = np.ones((n_steps, n_envs), dtype=np.bool_)

    def _buffer(self, space: gym.Space) -> RowBuffer:
        if space.shape is None or space.dtype is None or isinstance(space, gym.spaces.Dict):
            raise TypeError(
                f"observations of type {type(space).__name__} cannot be stored; expected Box, Discrete, MultiDiscrete, "
                "MultiBinary or a flat Dict of these (gymnasium.wrappers.FlattenObservation makes a Box of the others)"
            )
        shape = (self.n_envs, *space.shape)
        return RowBuffer(self.n_steps + 1, shape, torch_dtype(space.dtype), self.device)

    def write_obs(self, t: int, obs: Any) -> Obs:
        """Store the observations [N, ...] before step ``t`` and return them as tensors on the device."""
        if self._parts is None:
            return self._single.write(t, obs)
        return {k: buffer.write(t, obs[k]) for k, buffer in self._parts.items()}

    def write_action(self, t: int, action: Tensor) -> None:
        """Store the actions [N, ...] of step ``t``."""
        self._actions[t].copy_(action)

    def obs(self, start: int = 0, stop: int | None = None) -> Obs:
        """Observations of rows ``start`` to ``stop`` [rows, N, ...]; row ``n_steps`` follows the last step."""
        if self._parts is None:
            return self._single.tensor[start:stop]
        return {k: buffer.tensor[start:stop] for k, buffer in self._parts.items()}

    def host_obs(self) -> dict[str, np.ndarray]:
        """The observations [n_steps + 1, N, ...] as NumPy arrays by key (``""`` where there is only one)."""
        parts = {"": self._single} if self._parts is None else self._parts
        return {k: buffer.host for k, buffer in parts.items()}
