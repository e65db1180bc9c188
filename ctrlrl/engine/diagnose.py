"""A look inside an update: how it moved the policy, and what it learnt from. Training never sees any of it."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ctrlrl.core import penalty, ratio
from ctrlrl.core.support import restricted_logp
from ctrlrl.data.rows import split
from ctrlrl.engine.log import Histogram
from ctrlrl.losses.base import Knobs, PolicyLoss
from ctrlrl.types import ON_POLICY, PolicyOutput, SequenceBatch

POSITIONS = 4096
"""Positions per forward pass, which bounds its memory."""
QUANTILES = {"q01": 0.01, "q05": 0.05, "q25": 0.25, "q50": 0.5, "q75": 0.75, "q95": 0.95, "q99": 0.99}
"""Of the ratio, by the end of their name in the log."""
_SIZES = tuple(2.0**k for k in range(-20, 7))
WEIGHT_EDGES = (*(-size for size in reversed(_SIZES)), *_SIZES)
"""Borders of the bins of gradient weights: each is twice the one before. The bin in the middle holds those that are
next to nothing, such as the clipped ones; the first and the last have no outer border."""


class Diagnosis(NamedTuple):
    """What :func:`diagnose` finds."""

    scalars: dict[str, Tensor]
    """By name; NaN is a mean over nothing."""
    histograms: dict[str, Tensor]
    """Counts by name: ``gradient_weight`` in the bins of ``WEIGHT_EDGES``."""


def diagnose(policy: Any, loss: PolicyLoss, batch: SequenceBatch, knobs: Knobs) -> Diagnosis:
    """Ask the updated ``policy`` once more about an iteration's ``batch``. Pure; draws nothing, changes nothing.

    ========================  =================================================================================
    entropy                   of the updated policy, in nats
    kl_k1, kl_k2, kl_k3       estimates of KL(collecting || updated) (see ``core.penalty``)
    ratio_q01 ... ratio_q99   quantiles of the ratio, at the level at which the loss forms it
    clip_share_positive       share of the positions with A > 0 whose ratio is above 1 + eps_high
    clip_share_negative       share of the positions with A < 0 whose ratio is below 1 - eps_low
    advantage_positive_share  sum of the positive advantages / sum of all their sizes, as estimated
    weight_positive_share     the same of the gradient weights
    zero_variance_share       share of the groups (of two or more) whose outcomes are all the same
    length_correct            mean number of positions of solved sequences
    length_incorrect          and of the others
    gradient_weight           histogram of -d objective / d logp at each position, times the denominator
    ========================  =================================================================================

    What says something about the policy or its outcomes (entropy, KL, groups, lengths) is taken over the sequences
    it sampled itself; what says something about the update, over all valid positions. The whole iteration is
    prepared as one update batch. A matching loss is no likelihood, so entropy and KL are left out there.

    For the weights, ``logp`` is replaced by a constant that takes a gradient while the rest of the policy's output
    takes none. So they are the part of the gradient that passes through ``logp``; where the objective then takes no
    gradient at all, nothing passes there (a loss on the distributions alone), and they are left out.

    Args:
        policy: Maps observations and actions to a PolicyOutput.
        loss: It.
        batch: After ``begin``, before ``prepare``.
        knobs: Of the iteration.
    """
    with torch.no_grad():
        prepared = loss.prepare(batch, knobs)
    batch = batch._replace(coef=prepared.coef, weight=prepared.weight)
    together = loss.together(batch)
    parts = min(
        math.ceil(batch.mask.numel() / POSITIONS), len(batch.mask if together is None else together.unique())
    )  # fmt: skip
    seen = [_look_at(policy, loss, b, knobs) for b in ([batch] if parts < 2 else split(batch, parts, together))]

    def all_of(name: str) -> Tensor:
        return torch.cat([part[name] for part in seen])

    r, own, used, estimated = (all_of(name) for name in ("ratio", "own", "used_advantage", "advantage"))
    scalars: dict[str, Tensor] = {}
    histograms: dict[str, Tensor] = {}
    if "matching" not in loss.needs:
        moved = all_of("log_ratio")[own]
        scalars = {
            "entropy": all_of("entropy")[own].mean(),
            "kl_k1": penalty.kl_k1(moved).mean(),
            "kl_k2": penalty.kl_k2(moved).mean(),
            "kl_k3": penalty.kl_k3(moved).mean(),
        }
    ordered = r.sort().values
    scalars |= {f"ratio_{name}": quantile(ordered, level) for name, level in QUANTILES.items()}
    low, high = (getattr(loss, name, getattr(loss, "eps", None)) for name in ("eps_low", "eps_high"))
    if low is not None and high is not None:
        scalars["clip_share_positive"] = (r > 1.0 + high)[used > 0].float().mean()
        scalars["clip_share_negative"] = (r < 1.0 - low)[used < 0].float().mean()
    scalars["advantage_positive_share"] = positive_share(estimated)
    if all("weight" in part for part in seen):
        weight = all_of("weight")
        scalars["weight_positive_share"] = positive_share(weight)
        histograms["gradient_weight"] = histogram(weight, WEIGHT_EDGES)
    rows = _own(batch)
    if batch.group is not None and batch.sequence_return is not None:
        scalars["zero_variance_share"] = zero_variance_share(batch.sequence_return[rows], batch.group[rows])
    if batch.success is not None:
        length = batch.mask.sum(-1).float()
        scalars["length_correct"] = length[rows & batch.success].mean()
        scalars["length_incorrect"] = length[rows & ~batch.success].mean()
    return Diagnosis(scalars, histograms)


def look(
    policy: Any, loss: PolicyLoss, batch: SequenceBatch, knobs: Knobs, every: int | None, iteration: int
) -> tuple[dict[str, float], dict[str, Histogram]]:
    """What an iteration adds to the log under ``diagnose/``; nothing between diagnoses, no mean over nothing."""
    if every is None or iteration % every:
        return {}, {}
    scalars, histograms = diagnose(policy, loss, batch, knobs)
    numbers = zip(scalars, torch.stack([v.float() for v in scalars.values()]).tolist(), strict=True)
    return (
        {f"diagnose/{name}": value for name, value in numbers if math.isfinite(value)},
        {f"diagnose/{name}": Histogram(WEIGHT_EDGES, counts.tolist()) for name, counts in histograms.items()},
    )


# -- parts ----------------------------------------------------------------------------------------


def quantile(ordered: Tensor, level: float) -> Tensor:
    """Quantile of sorted numbers [N], linear between them; NaN without any. (torch.quantile takes 16 million only.)"""
    if not len(ordered):
        return ordered.new_full((), torch.nan)
    place = level * (len(ordered) - 1)
    return torch.lerp(ordered[math.floor(place)], ordered[math.ceil(place)], place % 1.0)


def histogram(x: Tensor, edges: tuple[float, ...]) -> Tensor:
    """[E + 1] how many of ``x`` [N] lie below the first edge, from each edge to the next, and from the last on."""
    below = torch.searchsorted(x.sort().values, torch.tensor(edges, dtype=x.dtype, device=x.device))
    ends = below.new_tensor([0, len(x)])
    return torch.cat([ends[:1], below, ends[1:]]).diff()


def positive_share(x: Tensor) -> Tensor:
    """Sum of the positive numbers over the sum of all sizes; NaN if all are zero."""
    return x.clamp(min=0.0).sum() / x.abs().sum()


def zero_variance_share(outcome: Tensor, group: Tensor) -> Tensor:
    """Share of the groups of two or more sequences, ``group`` [B], whose ``outcome`` [B] does not vary."""
    ids, index, count = group.unique(return_inverse=True, return_counts=True)
    start = outcome.new_zeros(len(ids))
    high = start.scatter_reduce(0, index, outcome, "amax", include_self=False)
    low = start.scatter_reduce(0, index, outcome, "amin", include_self=False)
    return (high == low)[count > 1].float().mean()


def _own(batch: SequenceBatch) -> Tensor:
    """[B] bool: sequences that the collecting policy sampled by itself, in this iteration."""
    return batch.mask.any(-1) if batch.source is None else batch.mask.any(-1) & (batch.source == ON_POLICY)


def _look_at(policy: Any, loss: PolicyLoss, batch: SequenceBatch, knobs: Knobs) -> dict[str, Tensor]:
    """Numbers of each valid position of a slice of rows."""
    mask = batch.mask
    assert batch.coef is not None
    with torch.no_grad():
        inputs = (batch.obs, batch.action) if batch.route is None else (batch.obs, batch.action, batch.route)
        out = policy(*inputs)
        if "support" in loss.needs and batch.support is not None:  # as logp_old is
            logp = restricted_logp(out.dist.params()["logits"], batch.support, batch.action)
            out = out._replace(logp=logp)
        log_ratio = ratio.log_ratio(out.logp, batch.logp_old, mask)
        clipped = loss.log_ratio(batch, out)
    found = {
        "own": _own(batch).unsqueeze(-1).expand(mask.shape),
        "log_ratio": log_ratio,
        "ratio": ratio.ratio(clipped),
        "entropy": out.entropy,
        "advantage": batch.advantage,
        "used_advantage": batch.coef.get("advantage", batch.advantage),
    }
    weight = gradient_weight(loss, batch, out, knobs)
    if weight is not None:
        found["weight"] = weight
    return {name: value.expand(mask.shape)[mask] for name, value in found.items()}


def gradient_weight(loss: PolicyLoss, batch: SequenceBatch, out: PolicyOutput, knobs: Knobs) -> Tensor | None:
    """[B, T] weight on grad log-prob that the loss gives each position, before the denominator divides it.

    None where no gradient passes through ``out.logp``. The rest of ``out`` must take no gradient.
    """
    logp = out.logp.detach().requires_grad_()
    with torch.enable_grad():
        total = loss.loss(batch, out._replace(logp=logp), knobs).policy
    if not total.requires_grad:
        return None
    # a deviation that is a parameter of its own may take a gradient where logp takes none
    (gradient,) = torch.autograd.grad(total, logp, allow_unused=True)
    return None if gradient is None else -gradient
