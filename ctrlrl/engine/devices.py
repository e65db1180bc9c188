"""Where to compute, and with how many threads."""

from __future__ import annotations

import os

import torch
from torch import nn

SMALL_NETWORK = 300_000
"""Parameters below which one CPU thread is faster than several."""


def resolve(name: str) -> torch.device:
    """``auto`` is the GPU where there is one. Raises ``ValueError`` for a GPU that is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            f"device={name!r} was asked for, but torch {torch.__version__} finds no CUDA device; use 'cpu'"
        )
    return device


LARGE_BATCH, LARGE_BATCH_NETWORK, ENOUGH = 128, 100_000, 4
"""With batches of at least so many rows, several threads pay from so many parameters on, up to so many threads."""


def threads(policy: nn.Module, batch_size: int = 1) -> int:
    """Torch threads for ``policy`` on the CPU: one for a small network without convolutions, else all cores.

    Never more than OMP_NUM_THREADS where it is set: beside other work, threads that wait for each other are many times
    slower than one.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    said = os.environ.get("OMP_NUM_THREADS", "")
    cores = min(cores, int(said)) if said.isdigit() and int(said) > 0 else cores
    trained = sum(p.numel() for p in policy.parameters() if p.requires_grad)
    size = trained or sum(p.numel() for p in policy.parameters())
    if batch_size >= LARGE_BATCH and LARGE_BATCH_NETWORK <= size < SMALL_NETWORK:
        return min(cores, ENOUGH)
    small = size < SMALL_NETWORK
    return 1 if small and not any(isinstance(m, nn.Conv2d) for m in policy.modules()) else cores
