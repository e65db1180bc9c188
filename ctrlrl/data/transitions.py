"""Single transitions in a ring: what off-policy methods draw their batches from."""

from __future__ import annotations

import contextlib
import math
import mmap
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import gymnasium as gym
import torch
from torch import Tensor

from ctrlrl.data.rollout import torch_dtype
from ctrlrl.types import Obs


class Transitions(NamedTuple):
    """``B`` transitions. Tensors may be windows into one matrix: rows are strided, the last dimension is dense."""

    obs: Obs
    """[B, ...] observation before the transition."""
    action: Tensor
    """[B, ...] action as the policy's density and the critic see it."""
    reward_t: Tensor
    """[B] float32."""
    terminated_t: Tensor
    """[B] float32: 1 where the episode ended here, 0 elsewhere, also where it was only cut: it enters
    ``gamma * (1 - terminated_t)``."""
    next_obs: Obs
    """[B, ...] true next observation: where an episode stops its final one, never the first of the next."""
    extras: dict[str, Tensor] = {}  # noqa: RUF012 - never written to
    """Further columns by name, each [B, ...]."""


class ReplaySizeError(MemoryError):
    """A replay buffer would not fit; nothing was allocated."""


class Column(NamedTuple):
    """One stored quantity."""

    shape: tuple[int, ...]
    """Shape of one row's entry."""
    dtype: torch.dtype
    """Type it is stored in."""

    @property
    def width(self) -> int:
        """Numbers per row."""
        return math.prod(self.shape)


class _Layout:
    """How columns of one type lie side by side in the rows of a matrix."""

    def __init__(self, columns: Mapping[str, Column]) -> None:
        self.widths = [column.width for column in columns.values()]
        self._shapes = [(name, column.shape) for name, column in columns.items()]

    def windows(self, matrix: Tensor) -> dict[str, Tensor]:
        """The columns [rows, ...] of a matrix, without a copy."""
        found: dict[str, Tensor] = {}
        for (name, shape), part in zip(self._shapes, matrix.split_with_sizes(self.widths, 1), strict=True):
            if not shape:
                found[name] = part.squeeze(1)
            else:
                found[name] = part if len(shape) == 1 else part.unflatten(1, shape)
        return found


def columns_of(
    observation_space: gym.Space,
    action_shape: tuple[int, ...],
    action_dtype: torch.dtype,
    extras: Mapping[str, Column | tuple[tuple[int, ...], torch.dtype]] | None = None,
) -> dict[str, Column]:
    """What one row of a :class:`TransitionReplay` holds, by name; a Dict's entries are ``obs/<key>``.

    Raises:
        TypeError: An observation space that tensors cannot hold.
    """
    if isinstance(observation_space, gym.spaces.Dict):
        parts = {f"/{key}": _column(space) for key, space in observation_space.spaces.items()}
    else:
        parts = {"": _column(observation_space)}
    scalar = Column((), torch.float32)
    return {
        # neighbours here are neighbours in memory
        **{f"obs{key}": column for key, column in parts.items()},
        "action": Column(tuple(action_shape), action_dtype),
        **{f"next_obs{key}": column for key, column in parts.items()},
        "reward": scalar,
        "terminated": scalar,
        "truncated": scalar,
        **{f"extras/{key}": Column(tuple(shape), dtype) for key, (shape, dtype) in (extras or {}).items()},
    }


def bytes_needed(
    observation_space: gym.Space,
    action_shape: tuple[int, ...],
    action_dtype: torch.dtype,
    capacity: int,
    extras: Mapping[str, Column | tuple[tuple[int, ...], torch.dtype]] | None = None,
) -> int:
    """Bytes that a full :class:`TransitionReplay` of these arguments takes."""
    return capacity * _row_bytes(columns_of(observation_space, action_shape, action_dtype, extras))


class TransitionReplay:
    """The last ``capacity`` transitions, overwritten oldest first.

    Row number ``r`` (counted from the first row ever added) lies at ``r % capacity``, so that :attr:`added` alone says
    what is where. Columns of one type lie side by side in one matrix, which makes a sample one gather per type: for
    vector observations one in all. Memory is taken only as it fills, but refused at once where it could not.

    Args:
        observation_space: Space of one environment: Box, Discrete, MultiDiscrete, MultiBinary, or a flat Dict of
            these. Floating-point observations are stored as float32, others in their own type.
        action_shape: Shape of one action as the density sees it.
        action_dtype: Its type.
        capacity: Rows.
        device: Where :meth:`draw` and :meth:`sample` deliver; the rows lie there too, except in a file.
        extras: Further columns: name to shape of one entry and type.
        folder: Keep the rows in memory-mapped files in this folder, which is made if need be. They are working storage
            without a name there: the system frees them with :meth:`close`, or when the process ends in any way.

    Raises:
        ReplaySizeError: More than the free memory of the device, or than the free space on the folder's disk.
        TypeError: An observation space that tensors cannot hold.
        ValueError: A capacity below 1.
    """

    def __init__(
        self,
        observation_space: gym.Space,
        action_shape: tuple[int, ...],
        action_dtype: torch.dtype,
        capacity: int,
        device: torch.device | str = "cpu",
        *,
        extras: Mapping[str, Column | tuple[tuple[int, ...], torch.dtype]] | None = None,
        folder: Path | str | None = None,
    ) -> None:
        if capacity < 1:
            raise ValueError(f"a replay buffer of {capacity} rows was asked for, expected at least 1")
        self.capacity, self.device = capacity, torch.device(device)
        self.added = 0
        """Rows ever added."""
        described = columns_of(observation_space, action_shape, action_dtype, extras)
        self.row_bytes = _row_bytes(described)
        """Bytes of one row."""
        if folder is not None:
            folder = Path(folder)
            folder.mkdir(parents=True, exist_ok=True)
        _refuse_too_large(capacity, self.row_bytes, self.device, folder)
        self._home = self.device if folder is None else torch.device("cpu")
        self.columns: dict[str, Tensor] = {}
        """The whole ring by column, each [capacity, ...] (windows into the matrices); empty once closed."""
        self._matrices: list[tuple[Tensor, _Layout]] = []
        for dtype in dict.fromkeys(column.dtype for column in described.values()):
            layout = _Layout({name: column for name, column in described.items() if column.dtype is dtype})
            if folder is None:
                matrix = torch.empty((capacity, sum(layout.widths)), dtype=dtype, device=self.device)
            else:
                matrix = _mapped(folder, capacity, sum(layout.widths), dtype)
            self._matrices.append((matrix, layout))
            self.columns |= layout.windows(matrix)
        self.columns = {name: self.columns[name] for name in described}
        self._obs_keys = list(observation_space.spaces) if isinstance(observation_space, gym.spaces.Dict) else None
        self._extras = list(extras or {})

    def __len__(self) -> int:
        """Rows that are filled."""
        return min(self.added, self.capacity)

    @property
    def position(self) -> int:
        """Where the next row goes."""
        return self.added % self.capacity

    @property
    def oldest(self) -> int:
        """Number of the oldest row still here."""
        return max(0, self.added - self.capacity)

    def add(
        self,
        obs: Obs,
        action: Tensor,
        reward: Tensor,
        terminated: Tensor,
        truncated: Tensor,
        next_obs: Obs,
        extras: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Store ``n`` rows, each argument [n, ...], on any device; see :class:`Transitions` for what they mean.

        ``truncated`` (the episode was cut here) is kept apart from ``terminated``, and is not part of a sample.

        Raises:
            ValueError: A column missing, unknown, or of another shape or kind; more rows than the capacity; closed.
                Nothing was stored.
        """
        rows = {**_named("obs", obs), **_named("next_obs", next_obs), **_named("extras", dict(extras or {}))}
        rows |= {"action": action, "reward": reward, "terminated": terminated, "truncated": truncated}
        self.put(self.added, rows)

    def draw(self, n_batches: int, batch_size: int, generator: torch.Generator) -> Tensor:
        """[n_batches, batch_size] int64 places, uniform over the filled ones, with replacement.

        Args:
            n_batches: Rows of the result, each the index of one :meth:`sample`.
            batch_size: Places in each.
            generator: On ``device``.

        Raises:
            ValueError: Nothing has been added yet.
        """
        if not self.added:
            raise ValueError("cannot draw from an empty replay buffer; add transitions first")
        return torch.randint(len(self), (n_batches, batch_size), generator=generator, device=self.device)

    def sample(self, index: Tensor) -> Transitions:
        """The rows at places ``index`` [B] int64 below ``len(self)``, which is not checked, on ``device``."""
        self._refuse_closed()
        found: dict[str, Tensor] = {}
        for matrix, layout in self._matrices:
            found |= layout.windows(self._gather(matrix, index))
        return Transitions(
            obs=self._joined(found, "obs"),
            action=found["action"],
            reward_t=found["reward"],
            terminated_t=found["terminated"],
            next_obs=self._joined(found, "next_obs"),
            extras={key: found[f"extras/{key}"] for key in self._extras},
        )

    def rows(self, first: int, last: int) -> dict[str, Tensor]:
        """Every column of the rows numbered ``first`` to ``last - 1``, in order; windows unless they wrap around.

        Raises:
            ValueError: Rows that are no longer, or not yet, here; closed.
        """
        self._refuse_closed()
        if not self.oldest <= first <= last <= self.added:
            raise ValueError(f"rows {first} to {last} were asked for, there are rows {self.oldest} to {self.added}")
        start, stop = first % self.capacity, first % self.capacity + last - first
        if stop <= self.capacity:
            return {name: column[start:stop] for name, column in self.columns.items()}
        stop -= self.capacity
        return {name: torch.cat([column[start:], column[:stop]]) for name, column in self.columns.items()}

    def put(self, first: int, rows: Mapping[str, Tensor]) -> None:
        """Store ``rows`` (named as in :attr:`columns`, each [n, ...]) as the rows numbered from ``first`` on.

        They become the newest; that those before them are here is the caller's affair.

        Raises:
            ValueError: As :meth:`add`.
        """
        self._refuse_closed()
        if rows.keys() != self.columns.keys():
            raise ValueError(f"rows have the columns {sorted(rows)}, expected {sorted(self.columns)}")
        n = rows["reward"].numel()
        if n > self.capacity:
            raise ValueError(f"{n} rows at once do not fit into a replay buffer of {self.capacity}; use a larger one")
        for name, value in rows.items():
            column = self.columns[name]
            # assigning alone would broadcast, and cut fractions off
            if value.shape != (n, *column.shape[1:]) or not torch.can_cast(value.dtype, column.dtype):
                raise ValueError(
                    f"column {name!r} is {value.dtype} {list(value.shape)}, "
                    f"expected {column.dtype} {[n, *column.shape[1:]]}"
                )
        start = first % self.capacity
        head = min(n, self.capacity - start)
        with torch.no_grad():
            for name, value in rows.items():
                column = self.columns[name]
                if head == n:
                    column[start : start + n] = value
                else:
                    column[start:], column[: n - head] = value[:head], value[head:]
        self.added = first + n

    def close(self) -> None:
        """Give the memory, or the files, back; what was sampled stays valid."""
        self.columns, self._matrices = {}, []

    def _gather(self, matrix: Tensor, index: Tensor) -> Tensor:
        if self._home == self.device:
            return matrix.index_select(0, index)
        shape, pinned = (len(index), matrix.shape[1]), self.device.type == "cuda"
        rows = torch.empty(shape, dtype=matrix.dtype, pin_memory=pinned)
        torch.index_select(matrix, 0, index.to(self._home), out=rows)
        return rows.to(self.device, non_blocking=pinned)

    def _joined(self, found: Mapping[str, Tensor], name: str) -> Obs:
        return found[name] if self._obs_keys is None else {key: found[f"{name}/{key}"] for key in self._obs_keys}

    def _refuse_closed(self) -> None:
        if not self._matrices:
            raise ValueError("this replay buffer is closed; make a new one")


def free_bytes(device: torch.device, folder: Path | None = None) -> int | None:
    """Bytes that may still be taken on the folder's disk, else on the device; None where the system does not say.

    In main memory that is what the system calls available, and no more than the process's control groups leave.
    """
    if folder is not None:
        return shutil.disk_usage(folder).free
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    known = [room for room in (_system_room(), _group_room()) if room is not None]
    return min(known) if known else None


def _column(space: gym.Space) -> Column:
    if space.shape is None or space.dtype is None or isinstance(space, gym.spaces.Dict):
        raise TypeError(
            f"observations of type {type(space).__name__} cannot be replayed; expected Box, Discrete, MultiDiscrete, "
            "MultiBinary or a flat Dict of these (gymnasium.wrappers.FlattenObservation makes a Box of the others)"
        )
    return Column(tuple(space.shape), torch_dtype(space.dtype))


def _row_bytes(columns: Mapping[str, Column]) -> int:
    return sum(column.width * column.dtype.itemsize for column in columns.values())


def _refuse_too_large(capacity: int, row_bytes: int, device: torch.device, folder: Path | None) -> None:
    free = free_bytes(device, folder)
    if free is None or capacity * row_bytes <= free:
        return
    where, other = f"in memory ({device})", "a memory-mapped file on a disk with room (slower)"
    if folder is not None:
        where, other = f"on the disk of {folder}", "a folder on another disk"
    elif device.type == "cuda":
        where, other = f"on {device}", "a memory-mapped file (slower)"
    raise ReplaySizeError(
        f"a replay buffer of {capacity:,} rows of {row_bytes:,} bytes needs {capacity * row_bytes / 2**30:.2f} GiB, "
        f"but {free / 2**30:.2f} GiB are free {where}: use a smaller replay_size ({free // row_bytes:,} rows would "
        f"fit), or {other}"
    )


def _system_room() -> int | None:
    with contextlib.suppress(OSError, ValueError, StopIteration), open("/proc/meminfo") as file:
        return int(next(line for line in file if line.startswith("MemAvailable:")).split()[1]) * 1024
    with contextlib.suppress(OSError, ValueError, AttributeError):
        # not Linux: all memory there is, an upper bound
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return None


def _group_room(mount: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> int | None:
    """What the limits of the process's control groups (version 1 or 2) and of those above them leave."""
    rooms = []
    with contextlib.suppress(OSError):
        for line in own.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if not controllers:
                base, limit, usage = mount, "memory.max", "memory.current"
            elif "memory" in controllers.split(","):
                base, limit, usage = mount / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
            else:
                continue
            group = base / path.strip("/")
            for folder in (group, *group.parents):
                # no limit reads "max"; a group seen from inside a container may not be there
                with contextlib.suppress(OSError, ValueError, KeyError):
                    taken = int((folder / usage).read_text())
                    stat = dict(entry.split() for entry in (folder / "memory.stat").read_text().splitlines())
                    # file pages not in use are counted as taken, but given up on demand
                    rooms.append(int((folder / limit).read_text()) - taken + int(stat["inactive_file"]))
                if folder == base:
                    break
    return max(0, min(rooms)) if rooms else None


def _mapped(folder: Path, rows: int, width: int, dtype: torch.dtype) -> Tensor:
    """[rows, width] in a file without a name, whose space is reserved: writing cannot fail later."""
    size = rows * width * dtype.itemsize
    with tempfile.TemporaryFile(dir=folder) as file:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, size)
        else:
            file.truncate(size)
        memory = mmap.mmap(file.fileno(), size)
    return torch.frombuffer(memory, dtype=dtype).view(rows, width)


def _named(name: str, value: Obs) -> dict[str, Tensor]:
    return {f"{name}/{key}": part for key, part in value.items()} if isinstance(value, dict) else {name: value}
