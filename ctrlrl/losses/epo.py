"""Entropy-regularised policy optimisation: an entropy bonus, and a band around the entropy of earlier iterations."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ctrlrl.core.control import Controller, LinearSchedule
from ctrlrl.losses.base import Knobs, Memory, Prepared, Start, register
from ctrlrl.losses.group import Aggregation, ClippedGroupLoss
from ctrlrl.losses.needs import Need, Slot
from ctrlrl.types import PolicyOutput, SequenceBatch

SMALLEST = 1e-3
"""Entropy below which a past mean no longer divides: the band of an almost certain policy would have no width."""


@register
@dataclass(frozen=True)
class EPO(ClippedGroupLoss):
    """L_GRPO - b mean[ H - c w(u) D ],  D = [(H - kr h)^+ + (kl h - H)^+] / h

    h is the mean entropy at the same turn (or position) in earlier iterations, kl = 1 - eps_band_low and
    kr = 1 + eps_band_high; w(u) weighs the phases of the run, u its progress.
    """

    paper: ClassVar[str] = (
        "EPO: Entropy-regularized Policy Optimization for LLM Agents Reinforcement Learning, arXiv:2509.22576"
    )
    differs: ClassVar[str] = (
        "The released penalty is a constant outside the band and has no gradient at all; here it grows with the "
        "distance from the band, in units of h. Where there is no past, h is this iteration's own mean. For "
        "densities, whose entropy may be negative, the band is h - eps_band_low |h| to h + eps_band_high |h|. The "
        "code's rule to penalise only batches with long episodes is left out."
    )
    slots: ClassVar[Mapping[Slot, str]] = {
        "mask": "clip",
        "ratio": "token",
        "advantage": "(R - group mean) / group std",
        "regulariser": "entropy, kept in a band around its history",
    }
    needs: ClassVar[frozenset[Need]] = frozenset({"step_dist", "groups", "sequence_return"})
    uses: ClassVar[frozenset[Need]] = frozenset({"turns"})
    aggregation: ClassVar[Aggregation] = "token_mean"

    bonus_coef: float = 0.001
    """b, weight of the entropy and its smoothing together."""
    smooth_coef: float = 0.1
    """c, weight of the smoothing against the entropy."""
    eps_band_low: float = 0.2
    """Part of the past entropy that may be lost; 1 for no lower bound."""
    eps_band_high: float = 0.2
    """Part of it that may be gained."""
    phase: Literal["constant", "released"] = "released"
    """w(u): 1, or the code's 1 - (1 - exp(-4u)) / 5 in the first half of the run and 4/5 exp(3 - 6u) after."""

    def memory(self) -> Memory:
        return {"entropy": torch.zeros(0), "count": torch.zeros(0)}

    def controllers(self) -> dict[str, Controller]:
        return {"phase": LinearSchedule("phase", 0.0, 1.0)} if self.phase == "released" else {}

    def begin(self, batch: SequenceBatch, knobs: Knobs, memory: Memory) -> Start:
        assert batch.entropy_old is not None
        start = super().begin(batch, knobs, memory)
        mask, place = batch.mask, torch.arange(batch.mask.shape[1], device=batch.mask.device).expand(batch.mask.shape)
        if batch.turn is not None:
            place = batch.turn.clamp(min=0)
        entropy = torch.where(mask, batch.entropy_old, torch.zeros_like(batch.entropy_old))
        longest = max(int(place.max()) + 1, len(memory["count"]))
        past, seen = (_longer(memory[k].to(entropy), longest) for k in ("entropy", "count"))
        number = past.new_zeros(longest).index_add(0, place.flatten(), mask.flatten().to(past.dtype))
        total = past.new_zeros(longest).index_add(0, place.flatten(), entropy.flatten())
        now = total / number.clamp(min=1.0)
        count = torch.where(number > 0, seen + 1.0, seen)
        mean = torch.where(number > 0, past + (now - past) / count.clamp(min=1.0), past)
        history = torch.where(seen > 0, past, now)[place]
        return Start(start.batch._replace(coef={"history": history}), {"entropy": mean, "count": count}, {})

    def prepare(self, batch: SequenceBatch, knobs: Knobs) -> Prepared:
        assert batch.coef is not None
        prepared = super().prepare(batch, knobs)
        return prepared._replace(coef=prepared.coef | {"history": batch.coef["history"]})

    def per_token(self, batch: SequenceBatch, out: PolicyOutput, knobs: Knobs) -> Tensor:
        assert batch.coef is not None
        entropy = torch.where(batch.mask, out.entropy, torch.zeros_like(out.entropy))
        departure = self.departure(entropy, batch.coef["history"])
        if self.phase == "released":
            u = knobs["phase"].to(entropy)
            first, second = 1.0 - 0.2 * (1.0 - torch.exp(-4.0 * u)), 0.8 * torch.exp(3.0 - 6.0 * u)
            departure = departure * torch.where(u <= 0.5, first, second)
        return super().per_token(batch, out, knobs) - self.bonus_coef * (entropy - self.smooth_coef * departure)

    def departure(self, entropy: Tensor, history: Tensor) -> Tensor:
        """[B, T] distance of the entropy from its band, in units of the past entropy; zero inside."""
        size = history.abs().clamp(min=SMALLEST)
        above = torch.relu(entropy - history - self.eps_band_high * size)
        return (above + torch.relu(history - self.eps_band_low * size - entropy)) / size


def _longer(x: Tensor, length: int) -> Tensor:
    return torch.cat([x, x.new_zeros(length - len(x))])
