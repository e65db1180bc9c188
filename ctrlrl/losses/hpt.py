"""Hybrid post-training: each prompt learns from its demonstration until the policy can solve it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ctrlrl.core import advantage as adv
from ctrlrl.core import head, ratio, reduce
from ctrlrl.losses.base import Knobs, Memory, PolicyLoss, Prepared, Start, register
from ctrlrl.losses.needs import Need, Slot
from ctrlrl.types import DEMONSTRATION, PolicyOutput, SequenceBatch

SOFT_RL = (0.0, 0.125, 0.25, 0.5, 1.0, 1.0, 1.0, 1.0)
SOFT_SFT = (1.0, 0.5, 0.25, 0.125, 0.0, 0.0, 0.0, 0.0)
"""Shares for 1, ..., 8 solved sequences of 8, as released; none solved counts as one."""


@register
@dataclass(frozen=True)
class HPT(PolicyLoss):
    """a_g L_RL + b_g ``sft_coef`` L_SFT,  (a_g, b_g) = (0, 1) if g was solved at most ``gate`` times, else (1, 0)

    L_RL is -r A with the return less its group's mean, neither clipped nor scaled, summed over the sequence and
    divided by the padded length; L_SFT is -log pi at the demonstrations' positions. Each is a mean over what the gate
    lets through.
    """

    paper: ClassVar[str] = "Towards a Unified View of Large Language Model Post-Training, arXiv:2509.04419"
    differs: ClassVar[str] = (
        "The soft table is made for 8 sequences per group; other sizes take the entry of their share solved, "
        "rounded up to eighths. Groups without a demonstration learn nothing below the gate."
    )
    slots: ClassVar[Mapping[Slot, str]] = {
        "ratio": "token; none on demonstrations",
        "advantage": "R - group mean; 1 on demonstrations",
        "selection": "own sequences or the demonstration, by what the policy solves",
    }
    needs: ClassVar[frozenset[Need]] = frozenset({"groups", "sequence_return", "success", "demonstrations"})
    critics: ClassVar[tuple[str, ...]] = ()

    gate: int = 0
    """Solved sequences of a group up to which it learns from its demonstration; -1 never does."""
    sft_coef: float = 1.0
    """Weight of the demonstrations."""
    mix: Literal["switch", "soft"] = "switch"
    """Switch at the gate, or pass from one to the other by the released table, which knows no gate."""

    def begin(self, batch: SequenceBatch, knobs: Knobs, memory: Memory) -> Start:
        assert batch.sequence_return is not None and batch.group is not None
        shown = batch.came_from(DEMONSTRATION)
        # demonstrations form groups of their own, so that they do not enter the policy's mean
        centred = adv.center_scale(batch.sequence_return, 2 * batch.group + shown.long(), scale="none")
        share = self.share(batch, shown).to(centred.dtype)
        wide = {"share": share.unsqueeze(-1).expand(batch.mask.shape)}
        advantage = torch.where(batch.mask, centred.unsqueeze(-1), torch.zeros_like(batch.advantage))
        return Start(
            batch._replace(advantage=advantage, coef=wide),
            memory,
            {"demonstrated_share": reduce.masked_mean(share, shown)},
        )

    def share(self, batch: SequenceBatch, shown: Tensor) -> Tensor:
        """[B] a_g where the policy acted, b_g at demonstrations."""
        assert batch.success is not None and batch.group is not None
        solved = reduce.segment_sum((batch.success & ~shown).long(), batch.group)
        tried = reduce.segment_sum((~shown).long(), batch.group).clamp(min=1)
        if self.mix == "switch":
            return ((solved <= self.gate) == shown).float()
        eighths = ((8 * solved + tried - 1) // tried).clamp(min=1) - 1
        rl, sft = (torch.tensor(x, device=shown.device)[eighths] for x in (SOFT_RL, SOFT_SFT))
        return torch.where(shown, sft, rl)

    def prepare(self, batch: SequenceBatch, knobs: Knobs) -> Prepared:
        assert batch.coef is not None
        share = batch.coef["share"]
        shown = batch.came_from(DEMONSTRATION).unsqueeze(-1)
        counted = batch.mask & (share > 0)
        length = knobs.get("horizon", batch.mask.shape[-1])
        rows = (counted & ~shown).any(-1).sum().clamp(min=1)
        positions = (counted & shown).sum().clamp(min=1)
        scaled = torch.where(shown, self.sft_coef * share / positions, share / (rows * length))
        weight = torch.where(counted, scaled, torch.zeros_like(share))
        return Prepared({"advantage": batch.advantage, "share": share}, weight, torch.ones_like(weight[0, 0]))

    def per_token(self, batch: SequenceBatch, out: PolicyOutput, knobs: Knobs) -> Tensor:
        assert batch.coef is not None
        r = ratio.ratio(ratio.log_ratio(out.logp, batch.logp_old, batch.mask))
        gain = head.ratio_advantage(r, batch.coef["advantage"])
        return -torch.where(batch.came_from(DEMONSTRATION).unsqueeze(-1), out.logp, gain)
