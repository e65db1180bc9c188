"""Shared values: batches, policy outputs, environment specification and protocols.

Glossary of names, used with one meaning everywhere
---------------------------------------------------
``*_t``          lives on the far side of the transition ``t`` (reward, discount, next value)
``discount_t``   gamma x (1 - terminated): zero only where the episode truly ended
``cut_t``        terminated or truncated: where a sum over time must stop
``logp``         log-probability of the stored action under the current policy
``logp_old``     the same under the policy that collected the data
``eps_*``        a distance from one (``eps=0.2`` allows ratios in [0.8, 1.2])
``ratio_*``      a bound on the ratio itself
``*_coef``       multiplies a term of the objective
``*_temp``       divides an exponent
``lam``          a temperature of bounded-ratio methods, in units of the return
"""

from __future__ import annotations

import ast
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol, TypeAlias, runtime_checkable

import torch
from torch import Tensor

if TYPE_CHECKING:
    import numpy as np

Obs: TypeAlias = Tensor | dict[str, Tensor]
Backend: TypeAlias = Literal["auto", "sync", "async", "envpool"]


World: TypeAlias = Literal["tokens", "discrete", "continuous", "flow"]
"""What a policy acts in: token sequences, Discrete or MultiDiscrete actions, Box actions, Box actions by denoising."""

ON_POLICY, TEMPERED, RETRIED, DEMONSTRATION, REPLAYED, HINTED = range(6)
"""Values of ``SequenceBatch.source``: sampled as is, at another temperature, from a prefix of another sequence,
given by an expert, kept from an earlier iteration, or sampled after a part of the solution."""


class SequenceBatch(NamedTuple):
    """What every policy-optimisation loss sees: ``B`` sequences of ``T`` positions.

    A rollout of control becomes one by ``Rollout.flat()`` (``T = 1``) or by
    ``Rollout.episodes()`` (padded and masked); token sequences are one already.
    """

    obs: Obs
    """[B, T, ...] observations as the environment gave them, not normalised."""
    action: Tensor
    """[B, T, ...] the action as the policy's density sees it."""
    mask: Tensor
    """[B, T] bool: positions that exist and were chosen by the policy."""
    logp_old: Tensor
    """[B, T] log-probability under the collecting policy."""
    advantage: Tensor
    """[B, T] advantage estimate, not normalised."""
    value_target: Tensor
    """[B, T] regression target of the value function (advantage + old value)."""
    value_old: Tensor
    """[B, T] value of the collecting critic."""
    weight: Tensor | None = None
    """[B, T] weight of each position in the policy objective, filled in by ``prepare``."""
    coef: dict[str, Tensor] | None = None
    """[B, T] stop-gradient coefficients, filled in by ``prepare``."""
    dist_old: dict[str, Tensor] | None = None
    """Parameters of the collecting policy's action distribution, each [B, T, ...]."""
    logp_ref: Tensor | None = None
    """[B, T] log-probability under a frozen reference policy."""
    logp_behaviour: Tensor | None = None
    """[B, T] log-probability as the sampler computed it, where that differs from ``logp_old``."""
    sequence_return: Tensor | None = None
    """[B] undiscounted return (or outcome reward) of the whole sequence."""
    group: Tensor | None = None
    """[B] int: sequences that started from the same reset seed or prompt."""
    task: Tensor | None = None
    """[B] int: task of the sequence."""
    turn: Tensor | None = None
    """[B, T] int: turn (option, action chunk) of each position, -1 where there is none."""
    entropy_old: Tensor | None = None
    """[B, T] entropy of the collecting policy."""
    dist_ref: dict[str, Tensor] | None = None
    """Parameters of the reference policy's (or teacher's) action distribution, each [B, T, ...]."""
    score: Tensor | None = None
    """[B] outcome mapped to [0, 1]: the verifier's reward, or the return between its known or running bounds."""
    success: Tensor | None = None
    """[B] bool: the sequence solved its task."""
    rewards: Tensor | None = None
    """[B, K] outcome by reward channel."""
    answer: Tensor | None = None
    """[B] int id of the final answer or terminal outcome; equal ids agree."""
    preference: Tensor | None = None
    """[B] int: +1 the chosen and -1 the rejected sequence of its group, 0 neither."""
    source: Tensor | None = None
    """[B] int: where the row comes from, see ``ON_POLICY`` and its neighbours; None means all on-policy."""
    pivot: Tensor | None = None
    """[B] int: first position that a retried sequence did not take over; 0 where nothing was retried."""
    void: Tensor | None = None
    """[B, T] bool: position of a turn that did nothing."""
    support: Tensor | None = None
    """[B, T, K] bool: actions that were allowed when the sequence was sampled."""
    route: Tensor | None = None
    """[B, T, ...] int: branches that a mixture policy chose; it gets them back as ``policy(obs, action, route)``."""

    def came_from(self, source: int) -> Tensor:
        """[B] bool: rows of that ``source``; without sources all are on-policy."""
        return torch.full_like(self.mask[:, 0], source == ON_POLICY) if self.source is None else self.source == source

    def rows(self, index: Tensor | slice) -> SequenceBatch:
        """The sequences at ``index``."""

        def pick(x: Any) -> Any:
            if isinstance(x, dict):
                return {k: v[index] for k, v in x.items()}
            return None if x is None else x[index]

        return SequenceBatch(*(pick(x) for x in self))


class PolicyOutput(NamedTuple):
    """What the current policy says about a :class:`SequenceBatch`."""

    logp: Tensor
    """[B, T] log-probability of the stored actions."""
    entropy: Tensor
    """[B, T] entropy of the action distribution."""
    values: dict[str, Tensor]
    """Scalar critics by name, each [B, T]; ``"value"`` is the value function."""
    dist: Distribution
    """The action distribution itself."""


@runtime_checkable
class Distribution(Protocol):
    """An action distribution over a batch of any leading shape."""

    def log_prob(self, action: Tensor) -> Tensor:
        """Log-density of ``action``, summed over the action's own dimensions."""
        ...

    def entropy(self) -> Tensor:
        """Entropy in nats."""
        ...

    def kl(self, params: Mapping[str, Tensor]) -> Tensor:
        """KL(self || other), where ``params`` are the other one's :meth:`params`."""
        ...

    def params(self) -> dict[str, Tensor]:
        """The tensors that define it, as stored in ``SequenceBatch.dist_old``."""
        ...

    def sample(self, noise: Tensor) -> Tensor:
        """The action that ``noise`` (see ``noise_shape`` of the head) selects."""
        ...

    def mode(self) -> Tensor:
        """The deterministic action."""
        ...


@dataclass(frozen=True)
class EnvSpec:
    """The one serialisable description of an environment; saved with every run."""

    id: str
    """Gymnasium id; ``ctrlrl/...`` ids are found in ctrlrl_envs, ``module:Id`` imports the module first."""
    kwargs: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments of the environment's constructor; JSON values only."""
    wrappers: tuple[tuple[str, dict[str, Any]], ...] = ()
    """Wrappers applied to each environment in order: (``"package.module:Class"``, its keyword arguments)."""
    n_envs: int = 1
    """Environments stepped side by side."""
    backend: Backend = "auto"
    """``sync`` in this process, ``async`` one process each, ``envpool`` C++ threads; ``auto`` decides when resolved."""
    threads: int | None = None
    """Threads of EnvPool; None lets it choose. Ignored by the other backends."""


def check_types(config: Any) -> None:
    """Raise ``ValueError`` for a dataclass field that is not of its annotated plain type or none of its literals."""
    for f in fields(config):
        value, wanted = getattr(config, f.name), str(f.type).removesuffix(" | None")
        if value is None and str(f.type).endswith("| None"):
            continue
        if wanted.startswith("Literal["):
            choices = ast.literal_eval(wanted.removeprefix("Literal").replace("[", "(", 1)[:-1] + ",)")
            if value not in choices:
                raise ValueError(f"{f.name}={value!r} is unknown; expected one of {', '.join(map(repr, choices))}")
            continue
        number = isinstance(value, int | float) and not isinstance(value, bool)
        fine = {
            "int": number and isinstance(value, int),
            "float": number,
            "bool": isinstance(value, bool),
            "str": isinstance(value, str),
            "tuple[int, ...]": isinstance(value, tuple) and all(type(v) is int and v > 0 for v in value),
        }.get(wanted, True)
        if not fine:
            raise ValueError(f"{f.name}={value!r} is a {type(value).__name__}; expected {f.type}")


@runtime_checkable
class ParametricEnv(Protocol):
    """An environment whose physics can be set. Parameters stay across resets until set again."""

    parameter_space: Any
    nominal: Mapping[str, float]

    def set_params(self, params: Mapping[str, float]) -> None:
        """Set the named parameters; takes effect at once and holds across autoreset."""
        ...


@runtime_checkable
class DifferentiableSimulator(Protocol):
    """Batched torch dynamics, reached through ``env.unwrapped.simulator``."""

    problem: Any

    def reset(self, batch: int) -> Any:
        """Initial states of ``batch`` systems."""
        ...

    def step(self, state: Any, action: Tensor) -> tuple[Any, Tensor]:
        """Next state and cost [batch], differentiable in both arguments."""
        ...


@runtime_checkable
class TabularEnv(Protocol):
    """A finite environment that shows its transition table, as Gymnasium's toy-text ones do."""

    P: Mapping[int, Mapping[int, list[tuple[float, int, float, bool]]]]


class Feedback(NamedTuple):
    """Delayed rewards: what ``info["feedback"]`` of a FeedbackEnv holds."""

    ids: np.ndarray
    values: np.ndarray
