"""Supervised fine-tuning: maximum likelihood of the demonstrations."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from ctrlrl.core import reduce
from ctrlrl.losses.base import Knobs, PolicyLoss, Prepared, register
from ctrlrl.losses.needs import Need, Slot
from ctrlrl.types import DEMONSTRATION, PolicyOutput, SequenceBatch


@register
@dataclass(frozen=True)
class SFT(PolicyLoss):
    """-mean_t log pi(a_t) over all positions of the demonstrations; other sequences play no part.

    As a policy gradient: advantage one, and the policy itself as the denominator of the ratio.
    """

    paper: ClassVar[str] = (
        "Training language models to follow instructions with human feedback, arXiv:2203.02155, step 1; "
        "behaviour cloning in control"
    )
    slots: ClassVar[Mapping[Slot, str]] = {"ratio": "none", "advantage": "1", "selection": "demonstrations"}
    needs: ClassVar[frozenset[Need]] = frozenset({"demonstrations"})
    critics: ClassVar[tuple[str, ...]] = ()
    # there is one demonstration to a group: small update batches would hold few of them, or none
    loop_defaults: ClassVar[Mapping[str, Any]] = {"batch_size": None}

    def prepare(self, batch: SequenceBatch, knobs: Knobs) -> Prepared:
        taught = batch.mask & batch.came_from(DEMONSTRATION).unsqueeze(-1)
        return Prepared({}, *reduce.token_mean(taught, batch.advantage.dtype))

    def per_token(self, batch: SequenceBatch, out: PolicyOutput, knobs: Knobs) -> Tensor:
        return -out.logp
