"""The contract of a method that learns from transitions, off-policy or offline, and the registry of those there are.

A method is a frozen dataclass: its fields are hyper-parameters, :meth:`Algorithm.networks` says what is trained, and
:meth:`Algorithm.update` is the paper's update, written with :class:`ctrlrl.engine.learner.Nets`::

    def update(self, nets, batch, noise, knobs, phase):
        target = ...                                   # nets["critic_target"](batch.next_obs, action)
        metrics = nets.descend("critic", lambda critic: (loss_of(critic(batch.obs, batch.action)), {}))
        nets.track("critic_target", "critic", knobs["tau"])
        return metrics
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import gymnasium as gym
import numpy as np
import torch
from torch import Tensor, nn

from ctrlrl.data.dataset import Dataset
from ctrlrl.data.transitions import Transitions
from ctrlrl.engine.explore import Explorer
from ctrlrl.names import Registry
from ctrlrl.types import check_types

if TYPE_CHECKING:
    from ctrlrl.engine.learner import Learner, Nets
    from ctrlrl.engine.transition_agent import TransitionAgent
    from ctrlrl.engine.transition_config import TransitionConfig


class Networks(NamedTuple):
    """What a method trains, and what it keeps copies of."""

    actor: nn.Module
    """The policy (see nets.actors.BoxActor, nets.discrete.DiscreteActor); trained under the name "actor"."""
    trained: Mapping[str, nn.Module]
    """Further networks by name, each with an optimiser of its own."""
    copies: Mapping[str, str] = {}
    """Copies that follow a trained network: name to whose."""


class Spaces(NamedTuple):
    """What the networks are built for."""

    observation: gym.Space
    action: gym.Space
    params: int = 0
    """Parameters of the environment, for methods that set them."""


@dataclass(frozen=True)
class Algorithm(ABC):
    """One method that learns from transitions; subclasses are registered under their file's name.

    Methods in ctrlrl/online act in an environment (OffPolicyAgent), those in ctrlrl/offline learn from recorded data
    (OfflineAgent).
    """

    name: ClassVar[str] = ""
    paper: ClassVar[str] = ""
    """Title and number of the paper."""
    differs: ClassVar[str] = ""
    """Where this differs from the paper or from released code."""
    loop_defaults: ClassVar[Mapping[str, Any]] = {}
    """Settings of the loop in which the method differs from the loop's own defaults."""
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    """Named settings."""
    capabilities: ClassVar[frozenset[str]] = frozenset(
        ["resume", "vector", "box", "dict_obs", "image_obs", "gpu", "compile"]
    )
    """What the method promises; the contract suite checks each."""

    @classmethod
    def agent_class(cls) -> type[TransitionAgent]:
        """The agent that runs the method."""
        from ctrlrl.engine.off_policy import OffPolicyAgent

        return OffPolicyAgent

    @abstractmethod
    def networks(self, spaces: Spaces, config: TransitionConfig, encoder: Callable[..., nn.Module] | None) -> Networks:
        """Build the networks, freshly initialised."""

    @abstractmethod
    def update(
        self, nets: Nets, batch: Transitions, noise: Mapping[str, Tensor], knobs: Mapping[str, Tensor], phase: int
    ) -> dict[str, Tensor]:
        """One update on ``batch``; returns scalars to log.

        Pure but for ``nets``: no printing, no ``.item()``, no branch on a tensor's value.

        Args:
            nets: The networks, and how to change them.
            batch: [B, ...] transitions.
            noise: What :meth:`noise` drew, without its first dimension.
            knobs: "gamma", "tau", and "lr/<network>" for each trained one.
            phase: Number of this update modulo :attr:`period`.
        """

    def __post_init__(self) -> None:
        check_types(self)

    @property
    def period(self) -> int:
        """Updates after which the pattern of what is updated repeats."""
        return 1

    def noise(
        self, n: int, batch_size: int, action_size: int, generator: torch.Generator, params: int = 0
    ) -> dict[str, Tensor]:
        """Standard normal noise of ``n`` updates, each tensor [n, B, A] on the generator's device.

        ``params`` is the number of parameters of the environment, for methods that set them.
        """
        shape = (n, batch_size, action_size)
        return {k: torch.randn(shape, generator=generator, device=generator.device) for k in ("action", "next_action")}

    def learning_rate(self, network: str, config: TransitionConfig) -> float:
        """Learning rate of a trained network."""
        critic = network not in ("actor", "temperature") and config.critic_learning_rate is not None
        return float(config.critic_learning_rate) if critic else config.learning_rate  # type: ignore[arg-type]

    def after_steps(self, learner: Learner, before: int, after: int) -> None:  # noqa: B027 - optional
        """Called when the environment steps went from ``before`` to ``after``, past the warm-up."""

    @property
    def deterministic_collection(self) -> bool:
        """Whether data is collected with the mode of the policy."""
        return False

    def explorer(self, policy: Any) -> Explorer:
        """How data is collected with ``policy``."""
        return Explorer(policy, self.deterministic_collection)


class OfflineAlgorithm(Algorithm):
    """One method that learns from recorded data; subclasses are frozen dataclasses, too."""

    def select(self, data: Dataset) -> Dataset:
        """The episodes to learn from: all of them."""
        return data

    def usable(self, data: Dataset) -> np.ndarray:
        """[N] bool: the steps of ``data`` to learn from; by default those from which a value can be learned.

        What comes after an end matters to no value, and need not be known. To methods that learn what comes next it
        does: they take ``data.next_known``.
        """
        return data.usable

    def columns(self, data: Dataset, gamma: float) -> Mapping[str, np.ndarray]:
        """Further columns of the batches (``batch.extras``), each [N, ...] with a row for every step of ``data``.

        ``data.action_space`` holds the bounds of the environment's actions (see ``offline_rows.to_unit``).
        A method that has some cannot go on in an environment (``start_from``), where nobody computes them.
        """
        return {}

    @classmethod
    def agent_class(cls) -> type[TransitionAgent]:
        from ctrlrl.engine.offline import OfflineAgent

        return OfflineAgent


_REGISTRY = Registry("method", Algorithm, "ctrlrl.online", "ctrlrl.offline")
register, names, get, is_one = _REGISTRY.enter, _REGISTRY.names, _REGISTRY.get, _REGISTRY.holds
