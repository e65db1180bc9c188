"""Taking rows out of a batch: slices, micro-batches, shuffled orders."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ctrlrl.types import SequenceBatch


def rows(batch: SequenceBatch, index: Tensor | slice) -> SequenceBatch:
    """The batch's rows at ``index``."""
    return batch.rows(index)


def split(batch: SequenceBatch, parts: int, together: Tensor | None) -> Iterator[SequenceBatch]:
    """``batch`` in ``parts`` of about equal size; rows with equal ``together`` [B] ids stay in one part."""
    if together is None:
        for index in torch.arange(batch.mask.shape[0], device=batch.mask.device).tensor_split(parts):
            yield rows(batch, index)
        return
    for ids in together.unique().tensor_split(parts):
        yield rows(batch, torch.isin(together, ids).nonzero().squeeze(-1))


def shuffled(size: int, together: Tensor | None, batch_size: int, generator: torch.Generator) -> Tensor:
    """[B] a random order of rows in which rows of one ``together`` id are neighbours.

    Raises ``ValueError`` if cutting that order every ``batch_size`` rows would cut through a group.
    """
    if together is None:
        return torch.randperm(size, generator=generator)
    ids, inverse, counts = together.cpu().unique(return_inverse=True, return_counts=True)
    if (batch_size < size and (counts != counts[0]).any()) or batch_size % int(counts[0]):
        raise ValueError(
            f"batch_size={batch_size} would split groups of {counts.unique().tolist()} rows; "
            "use a multiple of the group size, or None for the whole rollout"
        )
    rank = torch.randperm(len(ids), generator=generator)
    return torch.argsort(rank[inverse], stable=True)
