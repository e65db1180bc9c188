"""Mirror descent policy optimisation, on-policy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from ctrlrl.core import head, ratio
from ctrlrl.core.control import Controller, LinearSchedule
from ctrlrl.losses.base import Knobs, PolicyLoss, register, standardised
from ctrlrl.losses.needs import Need, Slot
from ctrlrl.types import PolicyOutput, SequenceBatch


@register
@dataclass(frozen=True)
class MDPO(PolicyLoss):
    """-(r A) + KL(pi || pi_old) / t_k, with the step size t_k falling linearly from 1 to 0.

    A few gradient steps on the whole batch approximate one step of mirror descent; at the first of them the
    KL has no gradient and the step is a plain policy gradient.
    """

    paper: ClassVar[str] = "Mirror Descent Policy Optimization (ICLR 2022), arXiv:2005.09814, eq. 10"
    differs: ClassVar[str] = (
        "t_k starts at 1, not 1 + 1/K, and is floored at step_size_min so that 1/t_k stays finite; the first batch "
        "comes from the policy itself, not from a separately initialised one. The value function has Adam moments "
        "of its own and is trained for 5 passes, as released."
    )
    slots: ClassVar[Mapping[Slot, str]] = {
        "ratio": "token",
        "advantage": "GAE",
        "regulariser": "KL to the old policy, growing",
    }
    needs: ClassVar[frozenset[Need]] = frozenset({"values", "dist_old"})
    loop_defaults: ClassVar[Mapping[str, Any]] = {
        "batch_size": None,
        "epochs": 10,
        "value_epochs": 5,
        "value_batch_size": 128,
        "value_clip": 0.2,
    }

    step_size: float = 1.0
    """t_0, the mirror-descent step at the start of training."""
    step_size_end: float = 0.0
    """t_K, the step at the end of training."""
    step_size_min: float = 1e-3
    """Floor of t_k."""
    standardize_advantage: bool = True
    """Bring the advantages of each update batch to mean 0 and deviation 1."""

    def controllers(self) -> dict[str, Controller]:
        return {"step_size": LinearSchedule("step_size", self.step_size, self.step_size_end, self.step_size_min)}

    def advantage(self, batch: SequenceBatch) -> Tensor:
        return standardised(batch) if self.standardize_advantage else batch.advantage

    def per_token(self, batch: SequenceBatch, out: PolicyOutput, knobs: Knobs) -> Tensor:
        assert batch.coef is not None and batch.dist_old is not None
        r = ratio.ratio(ratio.log_ratio(out.logp, batch.logp_old, batch.mask))
        gain = head.ratio_advantage(r, batch.coef["advantage"])
        return out.dist.kl(batch.dist_old) / knobs["step_size"] - gain

    def metrics(self, batch: SequenceBatch, out: PolicyOutput, knobs: Knobs) -> dict[str, Tensor]:
        assert batch.dist_old is not None
        return {**super().metrics(batch, out, knobs), "kl": out.dist.kl(batch.dist_old)}
