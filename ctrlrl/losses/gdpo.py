"""Group reward-decoupled normalisation: every reward channel is standardised before they are added."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ctrlrl.core import advantage as adv
from ctrlrl.losses.base import register
from ctrlrl.losses.group import ClippedGroupLoss
from ctrlrl.losses.needs import Need, Slot
from ctrlrl.types import SequenceBatch


@register
@dataclass(frozen=True)
class GDPO(ClippedGroupLoss):
    """A = S / (std over the batch of S + floor),  S = sum_k w_k (R_k - group mean of R_k) / (group std of R_k + floor)

    S has mean zero over the batch already. One channel is GRPO with its advantages whitened.
    """

    paper: ClassVar[str] = "GDPO: Group reward-Decoupled Normalization Policy Optimization, arXiv:2601.05242"
    slots: ClassVar[Mapping[Slot, str]] = {
        "mask": "clip",
        "ratio": "token",
        "advantage": "group-standardised by channel, whitened over the batch",
    }
    needs: ClassVar[frozenset[Need]] = frozenset({"groups", "rewards"})

    weights: str | None = None
    """Weight of each channel, separated by commas; None weighs all alike."""
    whiten: Literal["rows", "tokens"] = "rows"
    """Over which samples the last standardisation runs: sequences (paper), or valid positions (released, in verl)."""
    std_floor: float = 1e-4
    """Added to the deviations of a channel in its group and of the sum in the batch."""

    def __post_init__(self) -> None:
        super().__post_init__()
        try:
            self._weights()
        except ValueError:
            raise ValueError(f"weights={self.weights!r}: expected numbers separated by commas, like '1,0.5'") from None

    def _weights(self) -> list[float] | None:
        return None if self.weights is None else [float(x) for x in self.weights.split(",")]

    def outcome_advantage(self, batch: SequenceBatch) -> Tensor:
        assert batch.rewards is not None and batch.group is not None
        channels, weights = batch.rewards.shape[-1], self._weights()
        weights = [1.0] * channels if weights is None else weights
        if len(weights) != channels:
            raise ValueError(f"weights={self.weights!r} names {len(weights)} weights for {channels} reward channels")
        total = torch.zeros_like(batch.rewards[:, 0])
        for w, x in zip(weights, batch.rewards.unbind(-1), strict=True):
            total = total + w * adv.center_scale(x, batch.group, eps=self.std_floor)
        if self.whiten == "tokens":
            return adv.standardise(total.unsqueeze(-1).expand(batch.mask.shape), batch.mask, self.std_floor)
        return adv.center_scale(total, None, "none", "batch", eps=self.std_floor)
