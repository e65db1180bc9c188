"""Supervised iterative learning from feedback: imitate the best of each group, near the prior."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ctrlrl.core import pairs, penalty, reduce
from ctrlrl.losses.base import Knobs, Memory, PolicyLoss, Prepared, Start, register
from ctrlrl.losses.needs import Need, Slot
from ctrlrl.types import PolicyOutput, SequenceBatch


@register
@dataclass(frozen=True)
class SuperHF(PolicyLoss):
    """-log pi(a_t) + c KL(pi_ref || pi)(s_t), averaged over the positions of the best of each group

    In one state and with best-of-n probabilities p_n the minimum is (p_n + c pi_ref) / (1 + c).
    """

    paper: ClassVar[str] = "SuperHF: Supervised Iterative Learning from Human Feedback, arXiv:2310.16763"
    differs: ClassVar[str] = (
        "The KL runs from the prior to the policy, as released. The paper's groups are of 16. Among equals the first "
        "is kept, so a group whose outcomes agree is still imitated. Length and loss penalties are left out."
    )
    slots: ClassVar[Mapping[Slot, str]] = {
        "ratio": "none",
        "advantage": "1",
        "regulariser": "exact KL from the reference to the policy",
        "selection": "best of the group",
    }
    needs: ClassVar[frozenset[Need]] = frozenset({"dist", "groups", "score", "logp_ref"})
    critics: ClassVar[tuple[str, ...]] = ()

    keep_best: int = 1
    """Sequences of each group that are imitated."""
    ref_kl_coef: float = 0.35
    """Weight of the KL from the reference."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.keep_best < 1:
            raise ValueError(f"keep_best={self.keep_best} must be at least 1, or nothing is imitated")

    def begin(self, batch: SequenceBatch, knobs: Knobs, memory: Memory) -> Start:
        assert batch.score is not None and batch.group is not None
        kept = pairs.rank_within(batch.score, batch.group) < self.keep_best
        return Start(batch._replace(coef={"kept": kept.unsqueeze(-1).expand(batch.mask.shape)}), memory, {})

    def prepare(self, batch: SequenceBatch, knobs: Knobs) -> Prepared:
        assert batch.coef is not None
        kept = batch.coef["kept"]
        return Prepared({"kept": kept}, *reduce.token_mean(batch.mask & kept, batch.advantage.dtype))

    def per_token(self, batch: SequenceBatch, out: PolicyOutput, knobs: Knobs) -> Tensor:
        assert batch.dist_ref is not None
        return self.ref_kl_coef * penalty.kl_between(batch.dist_ref, out.dist.params(), batch.mask) - out.logp
