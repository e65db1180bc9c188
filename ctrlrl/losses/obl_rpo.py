"""Optimal baseline and learning rate: the baseline of least variance, and steps as long as the signal allows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ctrlrl.core import outcome, reduce
from ctrlrl.losses.base import GradientOf, Knobs, register
from ctrlrl.losses.group import ClippedGroupLoss
from ctrlrl.losses.needs import Need, Slot
from ctrlrl.types import PolicyOutput, SequenceBatch


@register
@dataclass(frozen=True)
class OBLRPO(ClippedGroupLoss):
    """A_i = R_i - sum_g n_j R_j / sum_g n_j,  n_i = |grad log pi(sequence i)|^2;  gradient times eta

    eta = g1.g2 / (g1.g2 + |g1 - g2|^2 / 4) clipped to [0, 1], with g1, g2 the gradients of two halves of the batch:
    the share of the squared gradient that is signal. Equal norms give GRPO's numerator.
    """

    paper: ClassVar[str] = "OBLR-PO: A Theoretical Framework for Stable Reinforcement Learning, arXiv:2511.23310"
    differs: ClassVar[str] = (
        "The norm is that of the score with respect to the head's own parameters (logits, or means), summed over "
        "positions. The step's factor is derived from a smoothness bound, the paper's own schedule was not seen; it "
        "is not averaged over steps, and Adam reacts to how it changes rather than to its size."
    )
    slots: ClassVar[Mapping[Slot, str]] = {
        "mask": "clip",
        "ratio": "token",
        "advantage": "R - mean weighted by squared score norms",
        "regulariser": "gradient scaled by its signal-to-noise ratio",
    }
    needs: ClassVar[frozenset[Need]] = frozenset({"plain_action", "groups", "sequence_return", "step_dist"})

    norm: Literal["score", "length"] = "score"
    """What stands for the squared score norm: the head's score, or the number of positions."""
    snr_step: bool = True
    """Scale each gradient by eta; costs two more gradients per step."""

    def required(self) -> frozenset[Need]:
        return self.needs - ({"step_dist"} if self.norm == "length" else set())

    def outcome_advantage(self, batch: SequenceBatch) -> Tensor:
        assert batch.sequence_return is not None and batch.group is not None
        each = torch.ones_like(batch.logp_old) if self.norm == "length" else self._score_norm(batch)
        norm = torch.where(batch.mask, each, torch.zeros_like(each)).sum(-1)
        return outcome.optimal_baseline_gap(batch.sequence_return, norm, batch.group)

    def _score_norm(self, batch: SequenceBatch) -> Tensor:
        """[B, T] squared norm of the score of each action, under the collecting policy."""
        assert batch.dist_old is not None
        if "mean" in batch.dist_old:
            distance = (batch.action - batch.dist_old["mean"]) * torch.exp(-2.0 * batch.dist_old["log_std"])
            return distance.square().sum(-1)
        if "logits" in batch.dist_old and batch.action.ndim == batch.mask.ndim:
            p = batch.dist_old["logits"].softmax(-1)
            chosen = p.gather(-1, batch.action.long().unsqueeze(-1)).squeeze(-1)
            return 1.0 - 2.0 * chosen + p.square().sum(-1)
        raise ValueError(
            f"norm='score' knows single discrete actions and Gaussians, not parameters {sorted(batch.dist_old)} with "
            f"actions of shape {tuple(batch.action.shape)}; use norm='length'"
        )

    def grad_transform(self, grad: Tensor, gradient_of: GradientOf, knobs: Knobs) -> Tensor:
        if not self.snr_step:
            return grad

        def half(which: int) -> Tensor:
            def objective(batch: SequenceBatch, out: PolicyOutput) -> Tensor:
                assert batch.weight is not None
                mine = (_halves(batch) == which).unsqueeze(-1) & (batch.weight > 0)
                share = torch.where(mine, batch.weight, torch.zeros_like(batch.weight)).sum() / batch.weight.sum()
                each = self.per_token(batch, out, knobs)
                return torch.where(mine, each, torch.zeros_like(each)) / share.clamp(min=1e-12)

            return gradient_of(objective)

        first, second = half(0), half(1)
        signal = (first * second).sum()
        total = signal + 0.25 * (first - second).square().sum()
        factor = torch.where(total > 0, signal / total, torch.zeros_like(total)).clamp(0.0, 1.0)
        return grad * factor


def _halves(batch: SequenceBatch) -> Tensor:
    """[B] 0 or 1: every other group, or every other row where there is one group only."""
    assert batch.group is not None
    rank = reduce.dense_ids(batch.group)
    place = torch.arange(len(rank), device=rank.device)
    return torch.where(rank.max() > 0, rank, place) % 2
