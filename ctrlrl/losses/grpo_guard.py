"""GRPO-Guard: the log-ratio of a denoising step, centred and rescaled before it is clipped."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ctrlrl.core import gate, ratio, reduce
from ctrlrl.losses.base import Knobs, Prepared, register
from ctrlrl.losses.flow_grpo import FlowGRPO
from ctrlrl.losses.needs import Need, Slot
from ctrlrl.types import PolicyOutput, SequenceBatch


@register
@dataclass(frozen=True)
class GRPOGuard(FlowGRPO):
    """Flow-GRPO with log r~ = s (logp - logp_old) + |mu - mu_old|^2 / (2 s) = e . (mu - mu_old)

    s is the step's deviation and e = (x' - mu_old) / s its noise, standard normal under the collecting policy. So
    log r~ has mean 0 and deviation |mu - mu_old| at every step, however small its noise: one clip range fits all.
    For log-probabilities averaged over the D dimensions both sides carry 1/D.
    """

    paper: ClassVar[str] = (
        "GRPO-Guard: Mitigating Implicit Over-Optimization in Flow Matching via Regulated Clipping, arXiv:2510.22319"
    )
    differs: ClassVar[str] = (
        "Sums over dimensions by default, the paper's mean is an option. The bounds are ours: without the drift a "
        "log-ratio is about as large as the change of an action, so the clip of other losses would never act. "
        "equal_steps divides by the gain of a step's mean on the velocity, where the released code divides by the "
        "step's length alone, and is scaled to mean one."
    )
    slots: ClassVar[Mapping[Slot, str]] = {**FlowGRPO.slots, "ratio": "denoising step, centred and rescaled"}
    needs: ClassVar[frozenset[Need]] = frozenset({*FlowGRPO.needs, "dist_old"})

    eps_low: float = 0.01
    """Distance below one at which a negative advantage stops earning a gradient."""
    eps_high: float = 0.01
    """Distance above one at which a positive advantage stops earning a gradient."""
    reduce: Literal["sum", "mean"] = "sum"
    """How the dimensions of an action enter the log-ratio; independent of what the policy does."""
    equal_steps: bool = True
    """Weigh each step's surrogate by one over its gain |d mu / d v|, so that none moves the velocity more than others.
    On an even grid of times only the first step has another gain."""

    def log_ratio(self, batch: SequenceBatch, out: PolicyOutput) -> Tensor:
        old = batch.dist_old
        assert old is not None
        valid = batch.mask.unsqueeze(-1)
        gap = out.dist.params()["mean"] - old["mean"]
        zero = torch.zeros_like(gap)
        noise = torch.where(valid, (batch.action - old["mean"]) * torch.exp(-old["log_std"]), zero)
        moved = noise * torch.where(valid, gap, zero)
        return moved.sum(-1) if self.reduce == "sum" else moved.mean(-1)

    def prepare(self, batch: SequenceBatch, knobs: Knobs) -> Prepared:
        prepared = super().prepare(batch, knobs)
        if not self.equal_steps:
            return prepared
        if batch.coef is None or "velocity_gain" not in batch.coef:
            raise ValueError("equal_steps needs batch.coef['velocity_gain'] [B, T]; engine.denoise.unfold fills it in")
        inverse = 1.0 / batch.coef["velocity_gain"]
        inverse = inverse / reduce.masked_mean(inverse, batch.mask)
        return prepared._replace(coef=prepared.coef | {"advantage": prepared.coef["advantage"] * inverse})

    def metrics(self, batch: SequenceBatch, out: PolicyOutput, knobs: Knobs) -> dict[str, Tensor]:
        r = ratio.ratio(self.log_ratio(batch, out))
        clipped = gate.clipped(r, self.eps_low, self.eps_high).to(r.dtype)
        return super().metrics(batch, out, knobs) | {"clip_fraction": clipped}
