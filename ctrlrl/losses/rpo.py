"""Regularised preference optimisation: DPO that also keeps up the likelihood of what was chosen."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ctrlrl.losses.base import Knobs, register
from ctrlrl.losses.dpo import DPO
from ctrlrl.losses.needs import Slot
from ctrlrl.types import PolicyOutput, SequenceBatch


@register
@dataclass(frozen=True)
class RPO(DPO):
    """DPO - ``sft_coef`` mean_t log pi(chosen_t)

    The weight on every position of the chosen sequence is positive, so its likelihood never falls by the loss's
    own doing, as it can under DPO. The sum is what a policy plays against the worst reward that fits the preferences.
    """

    paper: ClassVar[str] = (
        "Provably Mitigating Overoptimization in RLHF: Your SFT Loss is Implicitly an Adversarial Regularizer, "
        "arXiv:2405.16436"
    )
    slots: ClassVar[Mapping[Slot, str]] = {**DPO.slots, "regulariser": "log-likelihood of the chosen sequence"}

    kl_temp: float = 0.01
    """As in DPO."""
    sft_coef: float = 0.005
    """Weight of the chosen sequence's log-likelihood per position."""

    def per_token(self, batch: SequenceBatch, out: PolicyOutput, knobs: Knobs) -> Tensor:
        return super().per_token(batch, out, knobs) - self.sft_coef * out.logp
