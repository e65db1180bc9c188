"""Utilities of stock plus return, on tensors, and how actions are compared by them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

from torch import Tensor

Objective: TypeAlias = Literal["cvar", "mean_cvar", "target", "exceedance", "mean"]


@dataclass(frozen=True)
class Utility:
    """f(x) of x = stock + return-to-go, to be maximised in the mean over x.

    ==========  =============================================================  ==================
    objective   f(x)                                                           initial stock
    ==========  =============================================================  ==================
    cvar        min(x, 0)                                                      found by a scan
    mean_cvar   w min(x, 0) + mean_weight max(x, 0),                           found by a scan
                w = (1 - mean_weight) / level + mean_weight
    target      -abs(x)                                                        minus the target
    exceedance  1 where x >= 0, else 0                                         minus the threshold
    mean        x                                                              any
    ==========  =============================================================  ==================

    All are positively homogeneous, so that x may be given in the money of step 0: gamma^t x orders actions as x does.
    Source: Avila Pires et al. (arXiv 2501.13028), section 5.
    """

    objective: Objective
    level: float = 1.0
    """Of the conditional value at risk in ``mean_cvar``; ``cvar`` serves every level by its initial stock."""
    mean_weight: float = 0.0
    """Weight of the mean in ``mean_cvar``."""
    margin: float = 0.0
    """Added to the return-to-go before it is judged."""
    tolerance: float = 0.0
    """Actions whose utilities differ by no more count as equal."""

    def __call__(self, x: Tensor) -> Tensor:
        if self.objective == "mean":
            return x
        if self.objective == "target":
            return -x.abs()
        if self.objective == "exceedance":
            return (x >= 0.0).to(x.dtype)
        low = x.clamp(max=0.0)
        if self.objective == "cvar":
            return low
        weight = (1.0 - self.mean_weight) / self.level + self.mean_weight
        return weight * low + self.mean_weight * x.clamp(min=0.0)

    def of(self, returns: Tensor, stock: Tensor, discount: Tensor) -> Tensor:
        """Mean utility [..., n] of laws of returns-to-go ``returns`` [..., n, m], each of m equally likely atoms.

        Args:
            returns: In the money of the step they begin at.
            stock: [...] gamma^t C_t.
            discount: [...] gamma^t.
        """
        discount = discount[..., None, None]
        return self(stock[..., None, None] + discount * (returns + self.margin)).mean(-1)

    def ties(self, utilities: Tensor) -> Tensor:
        """[..., n] bool: the actions that count as best."""
        return utilities >= utilities.amax(-1, keepdim=True) - self.tolerance
