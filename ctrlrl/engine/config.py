"""The settings of the training loops, and how flat names find their place in them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Protocol, TypeVar

from ctrlrl import names
from ctrlrl.nets.actor_critic import NetworkConfig
from ctrlrl.types import check_types


class Configured(Protocol):
    """A method: a frozen dataclass of settings of its own, with a name and defaults for the loop."""

    name: ClassVar[str]
    loop_defaults: ClassVar[Mapping[str, Any]]
    presets: ClassVar[Mapping[str, Mapping[str, Any]]]


T = TypeVar("T")
M = TypeVar("M", bound=Configured)
C = TypeVar("C", bound="RunConfig")


class ConfigError(ValueError):
    """A setting is unknown, has a wrong value, or contradicts another one."""


@dataclass(frozen=True)
class EpisodesConfig:
    """How whole episodes are drawn, for losses that compare them and for token sequences."""

    n_groups: int = 16
    """Groups of episodes per iteration; those of a group start from the same reset seed (prompt)."""
    group_size: int = 8
    """Episodes per group."""
    seed_pool: int | None = None
    """Number of reset seeds to return to; None takes new ones in every iteration."""
    horizon: int | None = None
    """Longest episode, in steps; None is the environment's own limit."""
    success_return: float | None = None
    """Return from which an episode counts as solved, where the environment does not say; None: above its group's
    mean."""
    reference: str | None = None
    """Run whose policy is the reference (or the teacher); None is this policy as it starts, its observation statistics
    included."""
    tempered_share: float = 0.25
    """Share of the groups that is sampled again at another temperature, for losses that ask for it."""
    replay_rows: int = 2048
    """Most episodes kept from earlier iterations, for losses that use them."""
    replay_age: int = 10
    """Iterations after which a kept episode is dropped."""
    behaviour_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Precision in which the sampler computes, for losses that correct for it."""
    kl_reward_coef: float = 0.0
    """Weight of log(policy / reference) taken off each reward, and so off the return that sequences are compared by."""

    def __post_init__(self) -> None:
        check_types(self)
        for name in ("n_groups", "group_size", "seed_pool", "horizon", "replay_rows", "replay_age"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} must be at least 1")
        if not 0.0 < self.tempered_share <= 1.0:
            raise ValueError(f"tempered_share={self.tempered_share} must lie in (0, 1]")
        if not self.kl_reward_coef >= 0.0:
            raise ValueError(f"kl_reward_coef={self.kl_reward_coef} must not be negative")


EPISODE_DEFAULTS: dict[str, Any] = {
    "batch_size": 64,
    "epochs": 2,
    "learning_rate": 3e-3,
    "normalize_reward": False,
}
"""What differs from OnPolicyConfig's defaults where rows are whole episodes."""
TOKEN_DEFAULTS: dict[str, Any] = EPISODE_DEFAULTS | {
    "learning_rate": 1e-3,
    "gamma": 1.0,
    "gae_lambda": 1.0,
    "normalize_obs": False,
}
"""The same for token sequences."""


@dataclass(frozen=True)
class RunConfig:
    """What every training loop has: checkpoints, evaluations, where to compute."""

    checkpoint_every: int = 50_000
    """Environment steps between checkpoints, rounded up to whole iterations and at least ten of them. The
    environments are recreated at each, which is what makes a resumed run equal to an uninterrupted one."""
    eval_every: int | None = 50_000
    """Environment steps between evaluations; None never evaluates."""
    eval_episodes: int = 10
    """Deterministic episodes per evaluation."""
    device: str = "auto"
    """cpu, cuda, cuda:1, ...; auto takes the GPU where there is one."""
    threads: int | None = None
    """Torch threads on the CPU; None picks one for small networks and all cores for large ones."""
    compile: bool = False
    """Compile the update with torch.compile: ten to sixty seconds at the start, then faster updates."""
    cudagraphs: bool = False
    """Replay the update as a CUDA graph; needs a GPU. Not yet run on one: compare with a run without."""

    def __post_init__(self) -> None:
        try:
            check_types(self)
        except ValueError as error:
            raise ConfigError(str(error)) from None
        self._positive("checkpoint_every eval_every eval_episodes threads")

    def _positive(self, names: str) -> None:
        for name in names.split():
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ConfigError(f"{name}={value} must be positive")

    def _at_least_zero(self, names: str) -> None:
        for name in names.split():
            value = getattr(self, name)
            if value is not None and not 0 <= value < math.inf:
                raise ConfigError(f"{name}={value} must not be negative, nor infinite")

    def _fractions(self, names: str) -> None:
        for name in names.split():
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ConfigError(f"{name}={getattr(self, name)} must lie in [0, 1]")


@dataclass(frozen=True)
class OnPolicyConfig(RunConfig):
    """Collect, estimate, update: everything but the loss."""

    n_steps: int = 2048
    """Steps per environment and iteration, where single transitions are collected."""
    batch_size: int | None = 64
    """Rows (transitions, or whole episodes) per optimiser step; None takes all."""
    epochs: int = 10
    """Passes over each rollout."""
    learning_rate: float = 3e-4
    """Adam's learning rate."""
    learning_rate_schedule: Literal["constant", "linear"] = "constant"
    """Keep the learning rate, or let it fall linearly to 0 at the last step."""
    gamma: float = 0.99
    """Discount per environment step."""
    gae_lambda: float = 0.95
    """Decay of the advantage estimator: 0 is one-step TD, 1 is Monte Carlo."""
    value_coef: float = 0.5
    """Weight of the value function's squared error."""
    value_clip: float | None = None
    """Largest change of a value prediction that earns a gradient, in (normalised) return units; None is off."""
    value_epochs: int | None = None
    """Passes of a separate value update, after the policy's; None trains both in one objective."""
    value_batch_size: int | None = None
    """Rows per step of the separate value update; None takes the whole rollout."""
    entropy_coef: float = 0.0
    """Weight of the entropy bonus."""
    moment_coef: float = 0.0
    """Weight of the mean squares of a Gaussian policy's mean and deviation (lambda_z of GoRL's released code)."""
    max_grad_norm: float | None = 0.5
    """Largest norm of the whole gradient; None is off."""
    target_kl: float | None = None
    """Stop an iteration's update (critics trained together with the policy included) once the estimated KL from the
    old policy passes 1.5 times this; None is off."""
    adam_eps: float = 1e-5
    """Adam's epsilon."""
    normalize_obs: bool = True
    """Bring float observations to mean 0 and deviation 1 by running statistics, saved with the policy."""
    normalize_reward: bool = True
    """Divide rewards by the running deviation of the discounted return."""
    clip_obs: float = 10.0
    """Bound on normalised observations."""
    clip_reward: float = 10.0
    """Bound on normalised rewards."""
    network: NetworkConfig = field(default_factory=NetworkConfig)
    """Shape of the policy network."""
    episodes: EpisodesConfig = field(default_factory=EpisodesConfig)
    """How whole episodes are drawn."""
    diagnose_every: int | None = 10
    """Iterations between diagnoses of the update (``diagnose/...`` in the logs, entropy to gradient weights); None
    never diagnoses. Training is the same with and without."""
    steps_per_graph: int = 4
    """Optimiser steps unrolled into one compiled graph or CUDA graph."""
    micro_batches: int = 1
    """Split every optimiser step's batch into this many parts, to save memory; the result is the same."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._positive(
            "n_steps batch_size epochs value_epochs value_batch_size value_clip max_grad_norm target_kl adam_eps "
            "clip_obs clip_reward diagnose_every steps_per_graph micro_batches"
        )
        self._fractions("gamma gae_lambda")
        self._at_least_zero("learning_rate value_coef entropy_coef moment_coef")
        if self.value_batch_size is not None and self.value_epochs is None:
            raise ConfigError("value_batch_size is set but value_epochs is not: there is no separate value update")


def field_names(cls: type) -> list[str]:
    """Names of a dataclass's fields."""
    return [f.name for f in dataclasses.fields(cls)]


def nested(loop: type[RunConfig]) -> dict[str, type]:
    """Fields of ``loop`` that are dataclasses of settings themselves (network, episodes), with their classes."""
    return {f.name: f.default_factory for f in dataclasses.fields(loop) if isinstance(f.default_factory, type)}


def flat(config: Any) -> dict[str, Any]:
    """The settings of a loop by name, those of its nested groups among them; the inverse of :func:`build`."""
    found: dict[str, Any] = {}
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        found |= flat(value) if dataclasses.is_dataclass(value) else {f.name: value}
    return found


def build(
    method: type[M],
    settings: Mapping[str, Any],
    preset: str | None = None,
    defaults: Mapping[str, Any] | None = None,
    loop: type[C] = OnPolicyConfig,
) -> tuple[C, M]:
    """Sort flat ``settings`` into the fields of the loop, of its nested groups and of the method.

    Later wins: the fields' own defaults, ``defaults`` of the kind of rows, then of the method, of the preset, then
    ``settings``. Unknown names raise :class:`ConfigError` with the nearest known ones.
    """
    inner = nested(loop)
    groups: list[type] = [loop, *inner.values(), method]
    known = [n for group in groups for n in field_names(group)]
    # an offline method that goes on in an environment has defaults that mean nothing there
    merged: dict[str, Any] = {**(defaults or {}), **{k: v for k, v in method.loop_defaults.items() if k in known}}
    if preset is not None:
        if preset not in method.presets:
            choices = ", ".join(method.presets) or "none"
            raise ConfigError(f"{method.name} has no preset {preset!r}; known: {choices}")
        merged |= method.presets[preset]
    merged |= settings
    parts: list[dict[str, Any]] = [{} for _ in groups]
    taken = set(field_names(method)) & {n for group in groups[:-1] for n in field_names(group)}
    if taken:
        raise ConfigError(f"{method.name} names its field {', '.join(sorted(taken))} like a setting of the loop")
    for name, value in merged.items():
        for part, group in zip(parts, groups, strict=True):
            if name in field_names(group):
                # JSON turns tuples into lists
                part[name] = tuple(value) if isinstance(value, list) else value
                break
        else:
            raise ConfigError(f"{method.name} has no setting {name!r}.{names.hint(name, known)}")
    outer, own = parts[0], parts[-1]
    try:
        for (name, group), part in zip(inner.items(), parts[1:-1], strict=True):
            if part:
                outer[name] = dataclasses.replace(outer.get(name, group()), **part)
        return loop(**outer), method(**own)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{method.name}: {error}") from error


def to_dict(config: Any) -> dict[str, Any]:
    """A dataclass as JSON-able nested dictionaries."""
    return dataclasses.asdict(config)


def from_dict(cls: type[T], data: Mapping[str, Any]) -> T:
    """The inverse of :func:`to_dict`."""
    known = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    unknown = sorted(set(data) - set(known))
    if unknown:
        raise ConfigError(f"{cls.__name__} has no field {', '.join(unknown)}: written by another version of ctrlrl?")
    values: dict[str, Any] = {}
    for name, value in data.items():
        inner = known[name].default_factory
        if isinstance(inner, type) and isinstance(value, Mapping):
            values[name] = from_dict(inner, value)
        else:
            values[name] = tuple(value) if isinstance(value, list) else value
    return cls(**values)
