"""Every random stream of a run is a function of its seed and of where the run stands.

Nothing but counters has to be saved to continue a stream, and no two streams share numbers.
"""

from __future__ import annotations

import zlib

import numpy as np
import torch


def derive(seed: int, *keys: int | str) -> int:
    """A seed below 2^31 for the stream named by ``keys`` (words and counters)."""
    words = [zlib.crc32(k.encode()) if isinstance(k, str) else int(k) for k in keys]
    return int(np.random.SeedSequence([int(seed), *words]).generate_state(1)[0] >> 1)


def generator(seed: int, *keys: int | str) -> torch.Generator:
    """A CPU generator of the stream named by ``keys``."""
    return torch.Generator().manual_seed(derive(seed, *keys))
