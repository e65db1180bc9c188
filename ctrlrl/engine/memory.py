"""Policies that remember: taking back the ``state`` that ``predict`` gave out."""

from __future__ import annotations

from typing import Any, TypeVar

import numpy as np
import torch

M = TypeVar("M", bound=tuple)


def recalled(
    nothing: M, state: tuple[np.ndarray, ...] | None, episode_start: np.ndarray | None, device: torch.device
) -> M:
    """The memory at this step.

    Args:
        nothing: That of a beginning: a NamedTuple of tensors [N, ...] with ``there``, [N, ...] bool.
        state: What ``predict`` returned at the step before; None is ``nothing``.
        episode_start: [N] bool: where an episode begins, and nothing is there.
        device: Of the tensors.

    Raises:
        ValueError: ``state`` or ``episode_start`` is of another batch.
    """
    before: Any = nothing
    n = len(before.there)
    if state is not None:
        shapes = [np.shape(part) for part in state]
        if shapes != [tuple(part.shape) for part in nothing]:
            raise ValueError(f"state has arrays of shapes {shapes}; give what predict returned for a batch of {n}")
        before = type(nothing)(*(torch.as_tensor(np.asarray(part), device=device) for part in state))
    if episode_start is not None:
        started = np.asarray(episode_start, dtype=bool)
        if started.shape not in ((), (n,)):
            raise ValueError(f"episode_start has shape {started.shape}; expected ({n},)")
        going_on = torch.as_tensor(~started, device=device).expand(n)
        before = before._replace(there=before.there & going_on.view(n, *[1] * (before.there.dim() - 1)))
    return before
