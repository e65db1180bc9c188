"""The contract of a policy-optimisation loss, and the registry of all of them.

A loss is a frozen dataclass: its fields are its hyper-parameters. The runner

1. asks what it ``needs`` and ``uses``, and draws episodes accordingly;
2. calls ``begin`` once per iteration on all of them: advantages of whole sequences, statistics with a memory;
3. calls ``prepare`` on each update batch (everything one optimiser step sees) and gets stop-gradient
   coefficients, the weight of every position and the denominator;
4. splits the batch into micro-batches, never inside the rows that ``together`` ties;
5. calls ``loss`` on each and adds up: sums, never means, so that a split changes nothing;
6. divides by the denominator, differentiates, lets ``grad_transform`` act on the flat gradient.

File name = registry key. Nothing outside this folder compares a loss's name.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, TypeAlias

import torch
from torch import Tensor

from ctrlrl.core import advantage as adv
from ctrlrl.core import gate, ratio, reduce
from ctrlrl.core.control import Controller
from ctrlrl.core.select import Selector
from ctrlrl.losses.needs import Need, Slot
from ctrlrl.names import Registry
from ctrlrl.types import PolicyOutput, SequenceBatch, check_types

Knobs: TypeAlias = Mapping[str, Tensor]
Memory: TypeAlias = dict[str, Tensor]


class Start(NamedTuple):
    """What ``begin`` makes of an iteration's episodes."""

    batch: SequenceBatch
    """The batch to update on: advantages filled in, rows dropped or added as the method says."""
    memory: Memory
    """What to remember until the next iteration; saved with the run."""
    stats: dict[str, Tensor]
    """Scalars to log; controllers see them in the next iteration."""


class Prepared(NamedTuple):
    """What ``prepare`` found out about the whole update batch; all of it without gradient."""

    coef: dict[str, Tensor]
    """[B, T] coefficients that ``loss`` will find in ``batch.coef``."""
    weight: Tensor
    """[B, T] non-negative weight of each position; zero where masked."""
    denominator: Tensor
    """Scalar that divides the sum of the whole update batch."""


class LossSum(NamedTuple):
    """Sums over one micro-batch."""

    policy: Tensor
    """Scalar: weighted sum of the policy objective, to be divided by ``Prepared.denominator``."""
    critics: dict[str, Tensor]
    """Masked sums of extra critic terms, coefficients included, to be divided by the number of valid positions."""
    metrics: dict[str, Tensor]
    """Masked sums of quantities to log, divided likewise."""


GradientOf: TypeAlias = Callable[[Callable[[SequenceBatch, PolicyOutput], Tensor]], Tensor]


@dataclass(frozen=True)
class PolicyLoss:
    """Base of all losses. A variant overrides ``per_token`` and little else."""

    name: ClassVar[str]
    """Registry key; set by :func:`register` from the file name."""
    paper: ClassVar[str]
    """Authors' title and identifier."""
    differs: ClassVar[str] = ""
    """Where this differs from the paper or from the released code."""
    slots: ClassVar[Mapping[Slot, str]] = {}
    """Which parts of the estimator the method fills, and with what, in a few words each."""
    needs: ClassVar[frozenset[Need]] = frozenset()
    """What the runner must provide (see ``needs.NEEDS``)."""
    uses: ClassVar[frozenset[Need]] = frozenset()
    """What the runner provides where it can."""
    critics: ClassVar[tuple[str, ...]] = ("value",)
    """Names of the scalar critics that the policy network must have."""
    loop_defaults: ClassVar[Mapping[str, Any]] = {}
    """Fields of the loop's configuration in which this method's defaults differ."""
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    """Named settings: fields of the loss or of the loop."""

    def __post_init__(self) -> None:
        check_types(self)
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if not isinstance(value, int | float) or isinstance(value, bool):
                continue
            if (field.name.startswith("eps") or field.name == "lam" or field.name.endswith("_temp")) and not value > 0:
                raise ValueError(f"{field.name}={value} must be positive")
            if field.name.endswith("_coef") and not value >= 0:
                raise ValueError(f"{field.name}={value} must not be negative")

    # -- the contract -------------------------------------------------------------------------

    def required(self) -> frozenset[Need]:
        """What this instance needs: ``needs``, unless a setting lifts one."""
        return self.needs

    def memory(self) -> Memory:
        """What ``begin`` remembers, before the first iteration."""
        return {}

    def begin(self, batch: SequenceBatch, knobs: Knobs, memory: Memory) -> Start:
        """See all episodes of an iteration once, before they are cut into update batches. Pure."""
        return Start(batch, memory, {})

    def keep(self, batch: SequenceBatch) -> Tensor:
        """[B] bool: rows to keep for later iterations, for losses that use "replay"."""
        return torch.ones(batch.mask.shape[0], dtype=torch.bool, device=batch.mask.device)

    def selector(self) -> Selector | None:
        """What chooses the reset seeds and the number of episodes of each; None takes new seeds, all alike."""
        return None

    hint_ratios: ClassVar[tuple[float, ...]] = ()
    """Shares of the solution to show in turn, for losses that need "hints"."""

    def hard(self, score: Tensor, group: Tensor) -> Tensor:
        """[B] bool: rows to sample again with a hint; by default those of groups that score [B] nothing."""
        return adv.group_mean(score, group) <= 0

    def lag(self) -> int:
        """Iterations between refreshments of the lagged policy, for losses that need "support"."""
        return 1

    def allowed(self, logits: Tensor) -> Tensor:
        """[..., K] bool: actions that the lagged policy's ``logits`` allow, for losses that need "support"."""
        raise NotImplementedError(f"{type(self).__name__} needs support and must define allowed")

    def prepare(self, batch: SequenceBatch, knobs: Knobs) -> Prepared:
        """See the whole update batch once. Default: advantages as they are, mean over valid positions."""
        weight, denominator = reduce.token_mean(batch.mask, batch.advantage.dtype)
        return Prepared({"advantage": self.advantage(batch)}, weight, denominator)

    def together(self, batch: SequenceBatch) -> Tensor | None:
        """[B] ids of rows that must share an update batch and a micro-batch; None if rows are independent."""
        return None

    def loss(self, batch: SequenceBatch, out: PolicyOutput, knobs: Knobs) -> LossSum:
        """Sums over a micro-batch. Losses that couple rows override this; the others ``per_token``."""
        weight = batch.weight
        if weight is None:
            raise ValueError("batch.weight is missing: call prepare() and batch._replace(weight=...) first")
        mask = batch.mask
        # metrics first: their memory is free again before the objective keeps what its gradient needs
        metrics = {k: reduce.masked_sum(v.detach(), mask) for k, v in self.metrics(batch, out, knobs).items()}
        return LossSum(
            reduce.weighted_sum(self.per_token(batch, out, knobs), weight),
            {k: reduce.masked_sum(v, mask) for k, v in self.critic_terms(batch, out, knobs).items()},
            metrics,
        )

    def grad_transform(self, grad: Tensor, gradient_of: GradientOf, knobs: Knobs) -> Tensor:
        """Act on the flat gradient [P]. ``gradient_of(f)`` is the gradient of ``sum f(batch, out) / denominator``."""
        return grad

    def controllers(self) -> dict[str, Controller]:
        """Small state machines, run once per iteration; their knobs reach ``prepare`` and ``loss`` as scalars."""
        return {}

    # -- parts a variant fills in -------------------------------------------------------------

    def per_token(self, batch: SequenceBatch, out: PolicyOutput, knobs: Knobs) -> Tensor:
        """[B, T] objective to be minimised at each position; never masked or averaged here."""
        raise NotImplementedError(f"{type(self).__name__} must define per_token or loss")

    def advantage(self, batch: SequenceBatch) -> Tensor:
        """[B, T] the advantage that ``per_token`` will find in ``batch.coef["advantage"]``."""
        return batch.advantage

    def log_ratio(self, batch: SequenceBatch, out: PolicyOutput) -> Tensor:
        """[B, T] or [B, 1] logarithm of the ratio that a clip looks at: that of each position."""
        return ratio.log_ratio(out.logp, batch.logp_old, batch.mask)

    def critic_terms(self, batch: SequenceBatch, out: PolicyOutput, knobs: Knobs) -> dict[str, Tensor]:
        """[B, T] losses of critics beside the value function, each times its coefficient."""
        return {}

    def metrics(self, batch: SequenceBatch, out: PolicyOutput, knobs: Knobs) -> dict[str, Tensor]:
        """[B, T] quantities worth logging, averaged over valid positions.

        Fields ``eps``, or ``eps_low`` and ``eps_high``, add the share of ratios beyond them.
        """
        log_ratio = ratio.log_ratio(out.logp.detach(), batch.logp_old, batch.mask)
        excess = ratio.ratio_minus_one(log_ratio)
        found = {"approx_kl": excess - log_ratio}  # penalty.kl_k3, and its exponential serves the clip as well
        low, high = (getattr(self, name, getattr(self, "eps", None)) for name in ("eps_low", "eps_high"))
        if low is not None and high is not None:
            found["clip_fraction"] = gate.clipped(excess.add_(1.0), low, high).to(log_ratio.dtype)
        return found


def standardised(batch: SequenceBatch) -> Tensor:
    """[B, T] advantages with mean 0 and deviation 1 over the valid positions of the update batch."""
    return adv.standardise(batch.advantage, batch.mask)


# -- registry -------------------------------------------------------------------------------------

_REGISTRY = Registry("loss", PolicyLoss, "ctrlrl.losses", skip=frozenset({"base", "needs", "group"}))
register, names, get = _REGISTRY.enter, _REGISTRY.names, _REGISTRY.get
