"""How far a policy may move: bands found by search, and the price of leaving one."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from ctrlrl.core.control import Knobs, State

Count: TypeAlias = Literal["value", "gradient"]


def positive_share(
    ratio: Tensor,
    advantage: Tensor,
    weight: Tensor,
    ratio_low: Tensor,
    ratio_high: Tensor,
    count: Count = "value",
) -> Tensor:
    """What positive advantages contribute to PPO's clipped objective, as a share of all (BAPO, arXiv 2510.18927).

    P / (P + N),  P = sum_{A > 0} w A min(r, c_h),  N = sum_{A < 0} w |A| max(r, c_l);  1 if both are zero

    Counting gradients, a clipped position contributes nothing: P sums w A r over r <= c_h, N sums w |A| r over
    r >= c_l. By value the share rises with c_h and *falls* with c_l; by gradient it rises with both.

    ==========  ======  ========================================
    ratio       [B, T]  r
    advantage   [B, T]  A
    weight      [B, T]  w >= 0, zero where masked
    ratio_low   [K]     c_l; or [1]
    ratio_high  [K]     c_h; or [1]
    count               what a clipped position contributes
    return      [K]     share
    ==========  ======  ========================================
    """
    valid = (weight > 0).flatten()
    r, a, w = (torch.where(valid, x.detach().flatten(), 0.0) for x in (ratio, advantage, weight))
    low, high = ratio_low.unsqueeze(-1), ratio_high.unsqueeze(-1)
    if count == "value":
        up, down = r.clamp(max=high), r.clamp(min=low)
    elif count == "gradient":
        up, down = torch.where(r <= high, r, 0.0), torch.where(r >= low, r, 0.0)
    else:
        raise ValueError(f"count must be value or gradient, not {count!r}")
    positive = (w * a.clamp(min=0.0) * up).sum(-1)
    total = positive + (w * (-a).clamp(min=0.0) * down).sum(-1)
    return torch.where(total > 0, positive / total, 1.0)


def balanced_band(
    ratio: Tensor,
    advantage: Tensor,
    weight: Tensor,
    lows: Tensor,
    highs: Tensor,
    share: float,
    count: Count = "value",
    high_first: bool = True,
) -> tuple[Tensor, Tensor]:
    """Narrowest band in which positive advantages contribute their share (BAPO, arXiv 2510.18927).

    From the first bounds of both lists, move one bound along its list until ``positive_share >= share``; if it
    never is, leave that bound at its last value and move the other one.

    ==========  ======  ======================================================
    ratio       [B, T]  r
    advantage   [B, T]  A
    weight      [B, T]  w >= 0, zero where masked
    lows        [L]     lower bounds in the order in which they are tried
    highs       [H]     upper bounds in the order in which they are tried
    share               share to reach
    count               what a clipped position contributes
    high_first          move the upper bound first
    return      [], []  lower and upper bound
    ==========  ======  ======================================================
    """
    low, high = lows[:1], highs[:1]
    for upper in (high_first, not high_first):
        bounds = highs if upper else lows
        tried = (low, bounds) if upper else (bounds, high)
        short = positive_share(ratio, advantage, weight, *tried, count) < share
        # the number of bounds before the first that will do
        index = short.long().cumprod(-1).sum().clamp(max=len(bounds) - 1)
        found = bounds.gather(0, index.unsqueeze(0))
        low, high = (low, found) if upper else (found, high)
    return low.squeeze(0), high.squeeze(0)


@dataclass(frozen=True)
class DualAscent:
    """The price of a constraint ``stat <= target``: it rises while the constraint is broken, and falls to zero.

    k <- max(0, k + rate (stat - target))

    A statistic that is not a finite number changes nothing.
    """

    knob: str
    """Name of the knob."""
    stat: str
    """Name of the statistic that is bounded."""
    target: float
    """The bound."""
    rate: float
    """Step size."""
    start: float
    """Price before the first measurement."""

    def initial(self) -> State:
        """State before the first step."""
        return {self.knob: self.start}

    def step(self, state: Mapping[str, float], stats: Mapping[str, float]) -> tuple[State, Knobs]:
        """Price after looking at the last statistic."""
        value, stat = state[self.knob], stats.get(self.stat, math.nan)
        if math.isfinite(stat):
            value = max(0.0, value + self.rate * (stat - self.target))
        return {self.knob: value}, {self.knob: value}
