"""Direct preference optimisation: the policy as its own reward model, fitted to one preference per group."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from torch.nn import functional

from ctrlrl.core import ratio, reduce
from ctrlrl.losses.base import Knobs, PolicyLoss, Prepared, register
from ctrlrl.losses.needs import Need, Slot
from ctrlrl.types import PolicyOutput, SequenceBatch


@register
@dataclass(frozen=True)
class DPO(PolicyLoss):
    """-log sigmoid(c [log(pi / pi_ref)(chosen) - log(pi / pi_ref)(rejected)]),  c = ``kl_temp``

    Log-probabilities are those of whole sequences. Mean over pairs; a group without one takes no part.
    """

    paper: ClassVar[str] = (
        "Direct Preference Optimization: Your Language Model is Secretly a Reward Model, arXiv:2305.18290, eq. 7"
    )
    differs: ClassVar[str] = "Pairs come from the iteration's own groups, by outcome, not from a fixed data set."
    slots: ClassVar[Mapping[Slot, str]] = {
        "ratio": "sequence sum to the reference",
        "advantage": "chosen or rejected",
        "likelihood": "logistic loss on the pair's log-ratios",
        "selection": "one pair per group",
    }
    needs: ClassVar[frozenset[Need]] = frozenset({"whole_rows", "groups", "preferences", "logp_ref"})
    critics: ClassVar[tuple[str, ...]] = ()

    kl_temp: float = 0.1
    """Temperature of the tilt pi_ref exp(reward / c) that the policy is taken to be; the smaller, the further it
    may go from the reference."""

    def together(self, batch: SequenceBatch) -> Tensor | None:
        return batch.group

    def prepare(self, batch: SequenceBatch, knobs: Knobs) -> Prepared:
        """The pair's loss is counted at its chosen row."""
        assert batch.preference is not None and batch.group is not None
        paired = reduce.segment_sum((batch.preference < 0).long(), batch.group) > 0
        chosen = batch.mask & ((batch.preference > 0) & paired).unsqueeze(-1)
        return Prepared({}, *reduce.sequence_mean_token_mean(chosen, batch.advantage.dtype))

    def per_token(self, batch: SequenceBatch, out: PolicyOutput, knobs: Knobs) -> Tensor:
        assert batch.preference is not None and batch.group is not None and batch.logp_ref is not None
        log_ratio = ratio.log_ratio(out.logp, batch.logp_ref, batch.mask).sum(-1)
        margin = reduce.segment_sum(batch.preference * log_ratio, batch.group)
        return functional.softplus(-self.kl_temp * margin).unsqueeze(-1).expand(batch.mask.shape)
