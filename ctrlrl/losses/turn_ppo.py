"""PPO with one ratio per turn: the geometric mean over the turn's positions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from ctrlrl.core import gate, head, penalty, ratio, reduce
from ctrlrl.losses.base import Knobs, Prepared, register
from ctrlrl.losses.needs import Need, Slot
from ctrlrl.losses.ppo import PPO
from ctrlrl.types import PolicyOutput, SequenceBatch


@register
@dataclass(frozen=True)
class TurnPPO(PPO):
    """-mean_i mean_t min(w A_t, clip(w, 1 - eps, 1 + eps) A_t),  w = exp(mean over the turn of log(pi / pi_old))

    With turns of one position this is PPO; with one turn per sequence, GSPO's ratio.
    """

    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {}  # PPO's is for control
    paper: ClassVar[str] = (
        "ST-PPO: Stabilized Off-Policy Proximal Policy Optimization for Multi-Turn Agents Training, arXiv:2511.20718"
    )
    slots: ClassVar[Mapping[Slot, str]] = {"mask": "clip", "ratio": "turn, geometric mean", "advantage": "GAE"}
    needs: ClassVar[frozenset[Need]] = frozenset({"values", "turns"})
    level: ClassVar[ratio.Level] = "turn"
    """Where the ratio is formed."""

    def prepare(self, batch: SequenceBatch, knobs: Knobs) -> Prepared:
        weight, denominator = reduce.sequence_mean_token_mean(batch.mask, batch.advantage.dtype)
        return Prepared({"advantage": self.advantage(batch)}, weight, denominator)

    def importance(self, batch: SequenceBatch, out: PolicyOutput) -> Tensor:
        """[B, T] ratio at this loss's level."""
        return ratio.ratio(ratio.log_ratio(out.logp, batch.logp_old, batch.mask, self.level, batch.turn))

    def per_token(self, batch: SequenceBatch, out: PolicyOutput, knobs: Knobs) -> Tensor:
        assert batch.coef is not None
        return -head.clipped_surrogate(self.importance(batch, out), batch.coef["advantage"], self.eps, self.eps)

    def metrics(self, batch: SequenceBatch, out: PolicyOutput, knobs: Knobs) -> dict[str, Tensor]:
        r = self.importance(batch, out)
        token = ratio.log_ratio(out.logp, batch.logp_old, batch.mask)
        return {"approx_kl": penalty.kl_k3(token), "clip_fraction": gate.clipped(r, self.eps, self.eps).to(r.dtype)}
