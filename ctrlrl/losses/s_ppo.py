"""PPO, its gradient divided by the norm of what the clip takes away."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from ctrlrl.core import ratio
from ctrlrl.losses.base import register
from ctrlrl.losses.needs import Need, Slot
from ctrlrl.losses.st_ppo import STPPO


@register
@dataclass(frozen=True)
class SPPO(STPPO):
    """grad J / max(norm_floor, |C|),  C = mean_i mean_t 1[clipped] r A_t grad log pi_t

    J is PPO with a ratio per position: ST-PPO without its turns.
    """

    slots: ClassVar[Mapping[Slot, str]] = {
        "mask": "clip, and division by the clipping bias",
        "ratio": "token",
        "advantage": "GAE",
    }
    needs: ClassVar[frozenset[Need]] = frozenset({"values"})
    level: ClassVar[ratio.Level] = "token"
