"""Windows of whole episodes: where pieces of a fixed length begin that never cross an episode's end."""

from __future__ import annotations

import numpy as np

from ctrlrl.data.dataset import Dataset, DatasetError


def windows(data: Dataset, length: int, stride: int = 1, drop_timeouts: bool = False) -> np.ndarray:
    """Rows [W] int64, in order, at which windows of ``length`` steps of ``data`` begin.

    In every episode: each ``stride``-th row from its first one on, and the window that ends with its termination,
    whatever the stride. All steps of a window belong to one episode; shorter episodes have none, as nothing is padded.
    A window of one step is a transition: every usable step (see ``Dataset.usable``) is one, whatever the stride.

    Policy-guided diffusion's released code also leaves out windows whose last step is a timeout. Here they are kept by
    default: that the observation after the last step is not known matters to no window longer than a step, and a cut
    is no end.

    Args:
        data: Whole episodes.
        length: Steps of a window.
        stride: Rows from one window to the next.
        drop_timeouts: Leave out windows of several steps whose last one is a timeout, as the released code does.

    Raises:
        DatasetError: No window is left.
        ValueError: A length or a stride below 1.
    """
    if length < 1 or stride < 1:
        raise ValueError(f"length={length} and stride={stride} must be at least 1")
    if length == 1:
        found = np.flatnonzero(data.usable)
        if len(found) == 0:
            raise DatasetError(f"{data.info.id} has no step whose next observation is known")
        return found
    last = np.flatnonzero(data.ends)
    first = np.r_[0, last[:-1] + 1]
    room = last - first + 1 - length
    fits = room >= 0
    counts = room[fits] // stride + 1
    number = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    grid = np.repeat(first[fits], counts) + stride * number
    found = np.union1d(grid, (first + room)[fits & data.terminals[last]])
    if drop_timeouts:
        end = found + length - 1
        found = found[data.terminals[end] | ~data.timeouts[end]]
    if len(found) == 0:
        longest = int((last - first).max()) + 1
        why = f"the longest episode has {longest}. Set window_length to at most that; 1 is single transitions"
        if longest >= length:
            why = "all of them end in a timeout. Set drop_timeouts to False"
        raise DatasetError(f"{data.info.id} has no window of {length} steps: {why}")
    return found
