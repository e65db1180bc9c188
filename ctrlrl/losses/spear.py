"""Curriculum self-imitation: good sequences are replayed, judged against recent returns, ever more as training goes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ctrlrl.core import advantage as adv
from ctrlrl.core import outcome, reduce
from ctrlrl.core.control import Controller, State
from ctrlrl.losses.base import Knobs, Memory, Prepared, Start, register
from ctrlrl.losses.group import ClippedGroupLoss
from ctrlrl.losses.needs import Need, Slot
from ctrlrl.types import REPLAYED, SequenceBatch


@dataclass(frozen=True)
class CosineRamp:
    """A knob that rises from 0 to 1 over the first part of the run.

    k = (1 - cos(pi p / width)) / 2 for p < width, else 1;  p = ``stats["progress"]``
    """

    knob: str
    """Name of the knob."""
    width: float
    """Share of the run that the rise takes."""

    def initial(self) -> State:
        """State before the first step."""
        return {self.knob: 0.0}

    def step(self, state: Mapping[str, float], stats: Mapping[str, float]) -> tuple[State, dict[str, float]]:
        """Value at the present progress."""
        value = state[self.knob]
        if "progress" in stats:
            value = 0.5 * (1.0 - math.cos(math.pi * min(1.0, stats["progress"] / self.width)))
        return {self.knob: value}, {self.knob: value}


@register
@dataclass(frozen=True)
class SPEAR(ClippedGroupLoss):
    """J = J_new + g(t) J_replayed, both PPO's minimum, each over its own rows times the padded length

    new       A = R - group mean; only the groups of greatest deviation
    replayed  A = R - median of the last group means, where that and the advantage when kept are positive
    g(t) = (1 - cos(pi t / ramp)) / 2, then 1. Positions whose covariance (A - mean A)(log pi_old - mean log pi_old)
    lies in (cov_low, cov_high) are dropped, max(1, cov_share N) of them.
    """

    paper: ClassVar[str] = "Learn the Ropes, Then Trust the Wins (SPEAR), arXiv:2509.22601"
    differs: ClassVar[str] = (
        "The released code draws the positions to drop; here each keeps the share it has in expectation. It takes the "
        "covariance under the current policy and among unclipped positions; here it is the collecting one's, the same "
        "in a first epoch. Its buffer is emptied once used; here rows leave it by age alone. Groups of little spread "
        "leave nothing in it. The ramp is a share of the run, not a number of steps. The fading reward for tool calls "
        "and the removal of overlong or repetitive sequences are up to the environment."
    )
    slots: ClassVar[Mapping[Slot, str]] = {
        "mask": "clip and covariance",
        "ratio": "token",
        "advantage": "R - group mean; replayed: R - median of recent group means",
        "selection": "replay of sequences with positive advantage",
    }
    uses: ClassVar[frozenset[Need]] = frozenset({"replay"})

    eps_high: float = 0.28
    """Distance above one at which a positive advantage stops earning a gradient."""
    ramp: float = 0.5
    """Share of the run over which the weight of replayed sequences rises to one."""
    history: int = 10240
    """Group means that the median looks back on."""
    group_share: float = 0.75
    """Share of the groups, those of greatest deviation, that is trained on."""
    cov_share: float = 0.02
    """Share of all positions to drop among those of high covariance, at least one position; 0 drops none."""
    cov_low: float = 1.0
    """Covariance above which a position may be dropped."""
    cov_high: float = 40.0
    """Covariance above which it may not."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("ramp", "history"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)} must be positive")
        if not 0.0 < self.group_share <= 1.0:
            raise ValueError(f"group_share={self.group_share} must lie in (0, 1]")
        if not 0.0 <= self.cov_share <= 1.0:
            raise ValueError(f"cov_share={self.cov_share} must lie in [0, 1]")

    def controllers(self) -> dict[str, Controller]:
        return {"imitation": CosineRamp("imitation", self.ramp)}

    def memory(self) -> Memory:
        return {"means": torch.zeros(self.history), "count": torch.tensor(0)}

    def begin(self, batch: SequenceBatch, knobs: Knobs, memory: Memory) -> Start:
        assert batch.sequence_return is not None and batch.group is not None
        gain, group, new = batch.sequence_return, batch.group, ~batch.came_from(REPLAYED)
        first = outcome.first_of_group(group[new])
        spread = adv.group_std(gain[new], group[new])
        means, count = outcome.push(
            memory["means"].to(gain), memory["count"].to(gain.device), adv.group_mean(gain[new], group[new])[first]
        )
        median = outcome.queue_median(means, count)
        trained = torch.ones_like(new)
        groups = spread[first]
        if len(groups):
            trained[new] = spread >= groups.topk(math.ceil(self.group_share * len(groups))).values[-1]
        fresh = torch.zeros_like(gain)
        fresh[new] = adv.center_scale(gain[new], group[new], "group", "none")
        was_good = torch.where(batch.mask, batch.advantage, torch.zeros_like(batch.advantage)).amax(-1) > 0
        again = torch.where(was_good & (gain > median), gain - median, torch.zeros_like(gain))
        mask = batch.mask & trained.unsqueeze(-1)
        advantage = torch.where(new, fresh, again).unsqueeze(-1).expand(mask.shape)
        batch = batch._replace(mask=mask, advantage=torch.where(mask, advantage, torch.zeros_like(advantage)))
        stats = {"return_median": median, "replayed_share": (again[~new] > 0).to(gain.dtype).sum() / len(gain)}
        return Start(batch, {"means": means, "count": count}, stats)

    def keep(self, batch: SequenceBatch) -> Tensor:
        return (batch.advantage > 0).any(-1) & ~batch.came_from(REPLAYED)

    def prepare(self, batch: SequenceBatch, knobs: Knobs) -> Prepared:
        mask, dtype = batch.mask, batch.advantage.dtype
        replayed = batch.came_from(REPLAYED)
        used = (batch.advantage > 0).any(-1) & replayed
        n_new = (mask.any(-1) & ~replayed).sum().to(dtype).clamp(min=1.0)
        n_used = used.sum().to(dtype).clamp(min=1.0)
        again = torch.where(used, knobs["imitation"].to(dtype) * n_new / n_used, torch.zeros_like(n_new))
        row = torch.where(replayed, again, torch.ones_like(again))
        weight = torch.where(mask, row.unsqueeze(-1), torch.zeros_like(n_new))
        advantage = batch.advantage * self._kept(batch, weight > 0)
        return Prepared({"advantage": advantage}, weight, n_new * knobs.get("horizon", mask.shape[1]))

    def _kept(self, batch: SequenceBatch, valid: Tensor) -> Tensor:
        """[B, T] share of each position that is left once those of high covariance are thinned out."""
        one = torch.ones_like(batch.advantage)
        if self.cov_share == 0.0:
            return one
        cov = batch.advantage - reduce.masked_mean(batch.advantage, valid)
        cov = cov * (batch.logp_old - reduce.masked_mean(batch.logp_old, valid))
        high = valid & (cov > self.cov_low) & (cov < self.cov_high)
        drop = (self.cov_share * valid.sum()).floor().clamp(min=1.0)
        return torch.where(high, 1.0 - (drop / high.sum().clamp(min=1)).clamp(max=1.0), one)
