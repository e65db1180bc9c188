"""Episodes of earlier iterations, kept as rows of tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ctrlrl.data.episodes import pad
from ctrlrl.data.rows import rows
from ctrlrl.types import REPLAYED, SequenceBatch

NO_TIME = frozenset(
    ["sequence_return", "group", "task", "score", "success", "rewards", "answer", "preference", "source", "pivot"]
)
"""Fields of a batch without a dimension of time."""


class Replay:
    """The last ``capacity`` rows that were kept, none older than ``max_age`` iterations.

    A row keeps what it was sampled under (``logp_old``, returns, advantages). It comes back with
    ``source == REPLAYED`` and a group of its own below zero.
    """

    def __init__(self, capacity: int, max_age: int) -> None:
        self.capacity, self.max_age = capacity, max_age
        self.batch: SequenceBatch | None = None
        self.age = torch.zeros(0, dtype=torch.int64)

    def extend(self, batch: SequenceBatch) -> SequenceBatch:
        """``batch`` with the kept rows behind it."""
        if self.batch is None or not len(self.age):
            return batch
        kept = self.batch
        count = len(self.age)
        device = batch.mask.device
        kept = kept._replace(
            source=torch.full((count,), REPLAYED, dtype=torch.int64, device=device),
            group=-1 - torch.arange(count, device=device),
        )
        return join(batch, kept)

    def update(self, batch: SequenceBatch, keep: Tensor) -> None:
        """Age what is there by one iteration and take in the rows of ``batch`` where ``keep`` [B]."""
        fresh = rows(batch, keep.nonzero().flatten())
        age = torch.zeros(fresh.mask.shape[0], dtype=torch.int64)
        if self.batch is not None:
            young = (self.age + 1 < self.max_age).nonzero().flatten()
            old = rows(self.batch, young.to(self.batch.mask.device))
            fresh, age = join(old, fresh), torch.cat([self.age[young] + 1, age])
        size = len(age)
        self.batch, self.age = rows(fresh, slice(max(0, size - self.capacity), size)), age[-self.capacity :]

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint must hold."""
        found: dict[str, Tensor] = {}
        if self.batch is not None:
            for name, value in self.batch._asdict().items():
                if isinstance(value, Tensor):
                    found[name] = value
                elif isinstance(value, dict):
                    found |= {f"{name}/{k}": v for k, v in value.items()}
            found["age"] = self.age
        return found

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over what :meth:`tensors` gave."""
        fields: dict[str, Any] = {}
        for name, value in tensors.items():
            field, _, key = name.partition("/")
            if key:
                fields.setdefault(field, {})[key] = value
            else:
                fields[field] = value
        self.age = fields.pop("age", torch.zeros(0, dtype=torch.int64)).cpu()
        self.batch = SequenceBatch(**fields) if fields else None


def join(a: SequenceBatch, b: SequenceBatch) -> SequenceBatch:
    """Rows of ``a``, then of ``b``, padded to the longer; fields that one of them lacks are dropped."""
    length = max(a.mask.shape[1], b.mask.shape[1])

    def one(name: str, x: Any, y: Any) -> Any:
        if x is None or y is None:
            return None
        if isinstance(x, dict):
            return {k: one(name, x[k], y[k]) for k in x if k in y}
        if name in NO_TIME:
            return torch.cat([x, y])
        fill = -1 if name == "turn" else 0
        return torch.cat([pad(x, length, fill), pad(y, length, fill)])

    return SequenceBatch(*(one(name, getattr(a, name), getattr(b, name)) for name in SequenceBatch._fields))
