"""Risk-based policy optimisation: bundles of prompts, scored by how they fare against tracked quantiles."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ctrlrl.core import advantage as adv
from ctrlrl.core import outcome, reduce
from ctrlrl.losses.base import Knobs, Memory, Start, register
from ctrlrl.losses.group import ClippedGroupLoss
from ctrlrl.losses.needs import Need, Slot
from ctrlrl.types import SequenceBatch

ALIKE = 1e-3
"""Deviation below which outcomes count as equal and nothing is divided by it."""


@register
@dataclass(frozen=True)
class RiskPO(ClippedGroupLoss):
    """A(S) = ([(S - qa)^+ - (S - qb)^+ + qa - qb] / (beta - alpha) - w (qa - S)^+ / alpha) / (1 + w)

    S_j sums the scores of the j-th responses to the prompts of a bundle; qa and qb are tracked quantiles of S at the
    levels alpha and beta, q <- q + rate (level - mean_j 1[S_j < q]). A is divided by the deviation of S in the bundle
    and credited to each response. With the natural baseline A is never positive: the lower tail is pushed down.
    """

    paper: ClassVar[str] = "RiskPO: Risk-based Policy Optimization via Verifiable Reward, arXiv:2510.00911"
    differs: ClassVar[str] = (
        "The released code starts both quantiles at 0 (option); here they start at those of the first iteration, as "
        "the advantage is zero for everything above both. They move once per bundle, and a bundle is judged by the "
        "quantiles before it. Prompts that fill no whole bundle form a smaller one; responses beyond the smallest "
        "group of a bundle are not used. The released credit by share of R - mean is left out."
    )
    slots: ClassVar[Mapping[Slot, str]] = {
        "mask": "clip",
        "ratio": "token",
        "advantage": "mixed value at risk of a bundle",
    }
    needs: ClassVar[frozenset[Need]] = frozenset({"groups", "score"})

    bundle: int = 5
    """Prompts per bundle."""
    level_low: float = 0.2
    """Level alpha of the lower quantile."""
    level_high: float = 0.8
    """Level beta of the upper quantile; 0.9 for easy sets of prompts."""
    tail_coef: float = 1.5
    """Weight w of the lower tail."""
    quantile_rate: float = 0.1
    """Step of the quantile trackers, in units of the score."""
    quantile_start: Literal["first", "zero"] = "first"
    """Start the trackers at the quantiles of the first iteration, or at 0 (released)."""
    credit: Literal["std", "uniform", "score"] = "std"
    """How a response is credited: divide by the deviation of its prompt's scores; alike; or half for right responses
    (score at least 1/2) and one and a half for wrong ones."""
    baseline: Literal["natural", "mean"] = "natural"
    """Take A as it is, or less its mean in the bundle."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 <= self.level_low < self.level_high <= 1.0:
            raise ValueError(
                f"level_low={self.level_low}, level_high={self.level_high}: expected 0 <= level_low < level_high <= 1"
            )
        if self.bundle < 1:
            raise ValueError(f"bundle={self.bundle} must be at least 1")

    def memory(self) -> Memory:
        return {"quantiles": torch.zeros(2), "known": torch.tensor(self.quantile_start == "zero")}

    def begin(self, batch: SequenceBatch, knobs: Knobs, memory: Memory) -> Start:
        assert batch.score is not None and batch.group is not None
        score = batch.score
        bundles = self._bundles(batch.group)
        totals = [score[index].sum(0) for index in bundles]
        level = torch.tensor([self.level_low, self.level_high], dtype=score.dtype, device=score.device)
        quantiles = memory["quantiles"].to(score)
        quantiles = torch.where(memory["known"].to(score.device), quantiles, torch.cat(totals).quantile(level))
        advantage = torch.zeros_like(score)
        for index, total in zip(bundles, totals, strict=True):
            advantage[index] = self._bundle_advantage(total, quantiles).expand(index.shape)
            quantiles = outcome.track_quantile(quantiles, level, total, self.quantile_rate)
        advantage = (advantage * self._credit(score, batch.group)).unsqueeze(-1).expand(batch.mask.shape)
        batch = batch._replace(advantage=torch.where(batch.mask, advantage, torch.zeros_like(advantage)))
        stats = {"quantile_low": quantiles[0], "quantile_high": quantiles[1]}
        return Start(batch, {"quantiles": quantiles, "known": torch.ones_like(memory["known"])}, stats)

    def _bundles(self, group: Tensor) -> list[Tensor]:
        """Rows of each bundle, [prompts, papers]: a column holds one response to each prompt."""
        rank = reduce.dense_ids(group)
        members = [(rank == k).nonzero().squeeze(-1) for k in range(int(rank.max()) + 1)]
        parts = [members[k : k + self.bundle] for k in range(0, len(members), self.bundle)]
        return [torch.stack([m[: min(map(len, part))] for m in part]) for part in parts]

    def _bundle_advantage(self, total: Tensor, quantiles: Tensor) -> Tensor:
        """[papers] advantage of each paper, from its total score."""
        advantage = outcome.mixed_value_at_risk(
            total, quantiles[0], quantiles[1], self.level_low, self.level_high, self.tail_coef
        )
        one_group = torch.zeros(total.shape, dtype=torch.long, device=total.device)
        if self.baseline == "mean":
            advantage = adv.center_scale(advantage, one_group, "group", "none")
        return advantage / _or_one(adv.group_std(total, one_group))

    def _credit(self, score: Tensor, group: Tensor) -> Tensor:
        """[B] factor of each response."""
        if self.credit == "std":
            return 1.0 / _or_one(adv.group_std(score, group))
        one = torch.ones_like(score)
        return one if self.credit == "uniform" else torch.where(score >= 0.5, 0.5 * one, 1.5 * one)


def _or_one(deviation: Tensor) -> Tensor:
    return torch.where(deviation < ALIKE, torch.ones_like(deviation), deviation)
