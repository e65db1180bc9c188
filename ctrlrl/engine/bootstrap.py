"""Confidence intervals of estimates from independent episodes."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ctrlrl.core.off_policy_estimate import Estimate
from ctrlrl.engine.seeding import derive

_CELLS = 1 << 22
"""Numbers that are drawn at once, which bounds the memory."""


class Bounds:
    """Confidence intervals over episodes."""

    def __init__(self, confidence: float, replications: int, seed: int) -> None:
        self.confidence, self.replications = confidence, replications
        self.seed = derive(seed, "bootstrap")

    def bootstrap(
        self, value: Callable[..., Estimate], inputs: tuple[Tensor, ...], whole: Estimate
    ) -> tuple[float | None, float | None]:
        """Efron's BCa interval (1987) with the acceleration of a mean; without acceleration for what is none."""
        n = len(inputs[0])
        if n < 2:
            return None, None
        rng = torch.Generator().manual_seed(self.seed)
        size = max(1, _CELLS // (inputs[0].numel() if whole.parts is None else n))
        pieces = []
        for left in range(self.replications, 0, -size):
            index = torch.randint(n, (min(size, left), n), generator=rng)
            picked = value(*(x[index] for x in inputs)).value if whole.parts is None else whole.parts[index].mean(-1)
            pieces.append(picked)
        drawn = torch.cat(pieces)
        acceleration = 0.0 if whole.parts is None else _skew(whole.parts)
        drawn = drawn[drawn.isfinite()]
        if len(drawn) < 2:
            return None, None
        level = _bias_corrected(drawn, whole.value, acceleration, self.confidence)
        low, high = torch.quantile(drawn, torch.tensor(level, dtype=drawn.dtype)).tolist()
        return low, high

    def student(self, parts: Tensor) -> tuple[float, float] | None:
        """Student's interval of a mean."""
        n = len(parts)
        if n < 2:
            return None
        half = student_quantile(self.confidence, n - 1) * float(parts.std()) / n**0.5
        mean = float(parts.mean())
        return mean - half, mean + half


def _bias_corrected(drawn: Tensor, value: Tensor, acceleration: float, confidence: float) -> list[float]:
    """Levels of the replications at which the interval ends."""
    below = float(((drawn < value).double() + 0.5 * (drawn == value)).mean())
    edge = 1.0 / (2.0 * len(drawn))
    z0, z = torch.special.ndtri(
        torch.tensor([min(max(below, edge), 1.0 - edge), 0.5 + confidence / 2], dtype=torch.float64)
    ).tolist()
    shifted = [z0 + (z0 + s) / max(1.0 - acceleration * (z0 + s), 1e-3) for s in (-z, z)]
    return torch.special.ndtr(torch.tensor(shifted, dtype=torch.float64)).tolist()


def _skew(parts: Tensor) -> float:
    """BCa's acceleration of a mean: a sixth of the skewness of its parts over the root of their number."""
    u = parts - parts.mean()
    u = u / u.abs().max().clamp(min=torch.finfo(u.dtype).tiny)
    spread = float(u.square().sum())
    return float(u.pow(3).sum()) / (6.0 * spread**1.5) if spread > 0 else 0.0


def student_quantile(confidence: float, freedom: int) -> float:
    """How many deviations an interval of that confidence reaches to each side."""
    from scipy import stats

    return float(stats.t.ppf(0.5 + confidence / 2, freedom))
