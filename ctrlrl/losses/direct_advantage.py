"""Direct advantage policy optimisation: regress the log-ratio on the advantage."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from ctrlrl.core import head, ratio, reduce
from ctrlrl.losses.base import Knobs, PolicyLoss, Prepared, register
from ctrlrl.losses.needs import Need, Slot
from ctrlrl.types import PolicyOutput, SequenceBatch


@register
@dataclass(frozen=True)
class DirectAdvantage(PolicyLoss):
    """(A / c - log(pi / pi_ref))^2 / 2,  A centred,  c = ``kl_temp``

    The gradient is that of REINFORCE with an advantage that shrinks as the log-ratio nears A / c, so nothing is
    clipped. The minimiser improves E[A] - c KL(pi || pi_ref), but is not the tilt pi_ref exp(A / c): the targets
    lack the log of its normaliser.
    """

    paper: ClassVar[str] = "Direct Advantage Policy Optimization (December 2024), arXiv:2412.18279"
    differs: ClassVar[str] = (
        "A rollout holds one action per state, not several candidates from a critic trained on Monte-Carlo success "
        "rates. So the advantage is the generalised estimate, centred over the update batch in place of the "
        "candidates of a state, and there is no filter that drops states whose candidates lie within 0.1 of each "
        "other, nor one for equal candidates. The reference is the policy that collected the data, renewed with every "
        "iteration."
    )
    slots: ClassVar[Mapping[Slot, str]] = {
        "ratio": "inside the regression, token or turn's sum",
        "advantage": "GAE less its mean",
        "likelihood": "regression of the log-ratio",
    }
    needs: ClassVar[frozenset[Need]] = frozenset({"values"})
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {"control": {"kl_temp": 1.0}}

    kl_temp: float = 0.02
    """Advantage that is worth one nat, in units of the return: the paper's 0.02 is for success rates, and normalised
    rewards want about 1."""
    level: Literal["token", "turn"] = "token"
    """What an action is: a position, or a whole turn, with the sum of its log-ratios and its first advantage."""

    def required(self) -> frozenset[Need]:
        turns: frozenset[Need] = frozenset({"turns"})
        return self.needs | turns if self.level == "turn" else self.needs

    def prepare(self, batch: SequenceBatch, knobs: Knobs) -> Prepared:
        starts = self.starts(batch)
        weight, denominator = reduce.token_mean(starts, batch.advantage.dtype)
        # measured from the smallest, equal advantages centre to exact zeros
        low = torch.where(starts, batch.advantage, torch.inf).amin()
        above = torch.where(starts, batch.advantage - low, torch.zeros_like(batch.advantage))
        centred = torch.where(starts, above - reduce.masked_mean(above, starts), torch.zeros_like(above))
        return Prepared({"advantage": centred / self.kl_temp}, weight, denominator)

    def starts(self, batch: SequenceBatch) -> Tensor:
        """[B, T] bool: positions at which an action begins."""
        if self.level == "token":
            return batch.mask
        assert batch.turn is not None
        valid = batch.mask & (batch.turn >= 0)
        length = valid.shape[-1]
        place = torch.where(valid, torch.arange(length, device=valid.device), length)
        turn = reduce.dense_ids(batch.turn)
        first = torch.full_like(place, length).scatter_reduce(-1, turn, place, "amin").gather(-1, turn)
        return valid & (place == first)

    def per_token(self, batch: SequenceBatch, out: PolicyOutput, knobs: Knobs) -> Tensor:
        assert batch.coef is not None
        log_ratio = ratio.log_ratio(out.logp, batch.logp_old, batch.mask)
        if self.level == "turn":
            assert batch.turn is not None
            log_ratio = reduce.segment_sum(log_ratio, batch.turn)
        return 0.5 * head.regression(batch.coef["advantage"], log_ratio)
