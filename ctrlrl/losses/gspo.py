"""Group sequence policy optimisation: one ratio per sequence, clipped as a whole."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from ctrlrl.core import ratio
from ctrlrl.losses.base import register
from ctrlrl.losses.group import ClippedGroupLoss
from ctrlrl.losses.needs import Slot


@register
@dataclass(frozen=True)
class GSPO(ClippedGroupLoss):
    """-mean_i min(s_i A_i, clip(s_i, 1 - eps_low, 1 + eps_high) A_i),  s_i = exp(mean_t log(pi / pi_old))

    A = (R - group mean) / group std. The gradient of s_i spreads evenly over its positions: s_i A_i / L_i each.
    """

    paper: ClassVar[str] = "Group Sequence Policy Optimization, arXiv:2507.18071, eq. 5 and 7"
    slots: ClassVar[Mapping[Slot, str]] = {
        "mask": "clip of the whole sequence",
        "ratio": "sequence, geometric mean",
        "advantage": "(R - group mean) / group std",
    }
    level: ClassVar[ratio.Level] = "sequence"

    eps_low: float = 3e-4
    """Distance below one at which a negative advantage stops earning a gradient. Means over sequences move little."""
    eps_high: float = 4e-4
    """Distance above one at which a positive advantage stops earning a gradient."""
