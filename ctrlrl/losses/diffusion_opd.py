"""On-policy distillation: at the states the student visits, close the distance to a teacher's distribution."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ctrlrl.core import penalty
from ctrlrl.losses.base import Knobs, PolicyLoss, register
from ctrlrl.losses.needs import Need, Slot
from ctrlrl.types import PolicyOutput, SequenceBatch


@register
@dataclass(frozen=True)
class DiffusionOPD(PolicyLoss):
    """mean_t KL(N(mu, s^2) || N(mu_T, s_T^2)) / D  =  mean_t mean_d (mu - mu_T)^2 / (2 s^2)  for equal deviations

    The states are the student's own, the divergence is exact: a policy gradient of it would have the same mean and
    a variance of 2 d^2 / s^4 + d^4 / (4 s^6) at d = mu - mu_T. Where the teacher has no noise (the steps of an ODE),
    (mu - mu_T)^2 / 2. Denoising steps and Gaussian actions are treated alike.
    """

    paper: ClassVar[str] = (
        "DiffusionOPD: A Unified Perspective of On-Policy Distillation in Diffusion Models, arXiv:2605.15055"
    )
    differs: ClassVar[str] = (
        "Where student and teacher have deviations of their own, the whole KL is taken: the student's learns as well. "
        "One teacher; the paper has one per task and lets batches of the tasks take turns."
    )
    slots: ClassVar[Mapping[Slot, str]] = {"regulariser": "exact KL to the teacher, alone"}
    needs: ClassVar[frozenset[Need]] = frozenset({"gaussian", "teacher"})
    critics: ClassVar[tuple[str, ...]] = ()

    reduce: Literal["mean", "sum"] = "mean"
    """Over the action's dimensions; the sum is the KL itself."""

    def per_token(self, batch: SequenceBatch, out: PolicyOutput, knobs: Knobs) -> Tensor:
        student, teacher = out.dist.params(), batch.dist_ref
        assert teacher is not None
        silent = torch.isneginf(teacher["log_std"])

        def noisy(params: Mapping[str, Tensor]) -> dict[str, Tensor]:
            # where there is no noise, deviations of one leave half the squared distance
            return {"mean": params["mean"], "log_std": params["log_std"].masked_fill(silent, 0.0)}

        kl = penalty.kl_between(noisy(student), noisy(teacher), batch.mask)
        return kl if self.reduce == "sum" else kl / silent.shape[-1]
