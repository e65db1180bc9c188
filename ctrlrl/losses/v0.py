"""V_0: GRPO with group sizes from a predicted chance of success, before anything is played."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from ctrlrl.core.select import Selector, StartValue, StartValueBudget
from ctrlrl.losses.base import register
from ctrlrl.losses.group import ClippedGroupLoss
from ctrlrl.losses.needs import Need, Slot
from ctrlrl.names import load


@register
@dataclass(frozen=True)
class V0(ClippedGroupLoss):
    """L_GRPO;  sizes greedily by U(n, p) = n (1 - p) [1 - (1 - p)^(n - 1)],  sum_g n_g = n_groups group_size

    p(s_0) is predicted from the first observation and the last ``context`` episodes' outcomes.
    """

    paper: ClassVar[str] = "V_0: A Generalist Value Model for Any Policy at State Zero, arXiv:2602.03584"
    differs: ClassVar[str] = (
        "The predictor is a Bayesian logistic regression on the first observation; the paper's is a frozen text "
        "encoder under a frozen in-context classifier, trained across policies. The prediction sets group sizes only, "
        "not the baseline, and nothing is routed between policies. U is not concave, so the greedy rule is the "
        "paper's and not always the best."
    )
    slots: ClassVar[Mapping[Slot, str]] = {
        "mask": "clip",
        "ratio": "token",
        "advantage": "(R - group mean) / group std",
        "selection": "group sizes by predicted success",
    }
    needs: ClassVar[frozenset[Need]] = frozenset({"groups", "sequence_return", "score"})
    loop_defaults: ClassVar[Mapping[str, Any]] = {"seed_pool": 64}

    size_min: int = 2
    """Fewest episodes of a group."""
    size_max: int = 32
    """Most episodes of a group; without a bound the hardest seeds would take all."""
    context: int = 256
    """Episodes whose outcomes the prediction rests on, the last ones."""
    start_value: str = "ctrlrl.core.select:LogisticStartValue"
    """What predicts: ``package.module:Class``, made with ``context`` (see ``core.select.StartValue``)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 2 <= self.size_min <= self.size_max:
            raise ValueError(f"size_min={self.size_min}, size_max={self.size_max}: expected 2 <= size_min <= size_max")
        if self.context < 1:
            raise ValueError(f"context={self.context} must be at least 1")

    def selector(self) -> Selector:
        value = load(self.start_value, "value of the first observation")(self.context)
        if not isinstance(value, StartValue):
            raise ValueError(
                f"start_value={self.start_value!r} lacks a method of ctrlrl.core.select.StartValue: "
                "initial, probability, learn"
            )
        return StartValueBudget(value, self.size_min, self.size_max)
