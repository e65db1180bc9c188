"""MOPO: SAC on short rollouts in a learned world model, which pay less the less sure of them the model is."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import gymnasium as gym
import numpy as np
from torch import Tensor, nn

from ctrlrl.data.dataset import Dataset
from ctrlrl.data.transitions import Transitions
from ctrlrl.engine.algorithm import Networks, OfflineAlgorithm, Spaces, register
from ctrlrl.engine.offline_config import OfflineConfig
from ctrlrl.engine.soft import Soft
from ctrlrl.engine.world_model import WorldModelConfig
from ctrlrl.nets.actors import SquashedGaussianActor
from ctrlrl.nets.q_ensemble import QEnsemble

if TYPE_CHECKING:
    from ctrlrl.engine.learner import Nets
    from ctrlrl.engine.transition_agent import TransitionAgent
    from ctrlrl.engine.transition_config import TransitionConfig

_RELEASED = {  # length of a rollout and penalty, of D4RL's v0 sets
    "halfcheetah-random": (5, 0.5), "halfcheetah-medium": (1, 1.0),
    "halfcheetah-medium-replay": (5, 1.0), "halfcheetah-medium-expert": (5, 5.0),
    "hopper-random": (5, 1.0), "hopper-medium": (5, 5.0),
    "hopper-medium-replay": (5, 1.0), "hopper-medium-expert": (5, 1.0),
    "walker2d-random": (1, 1.0), "walker2d-medium": (5, 5.0),
    "walker2d-medium-replay": (1, 1.0), "walker2d-medium-expert": (1, 2.0),
}  # fmt: skip


@dataclass(frozen=True)
class MOPOConfig(OfflineConfig):
    """The offline loop's settings with those of the world model."""

    world_model: WorldModelConfig = field(default_factory=WorldModelConfig)
    """The ensemble, and how it is fitted."""


@register
@dataclass(frozen=True)
class MOPO(Soft, OfflineAlgorithm):
    """SAC on steps in an ensemble of dynamics networks from recorded observations, and on a few recorded ones.

    The ensemble is fitted first, an epoch to an iteration, and then stays as it is. Flat observations only.
    """

    paper: ClassVar[str] = "MOPO: Model-based Offline Policy Optimization, arXiv:2005.13239"
    differs: ClassVar[str] = (
        "Rollouts are 10,000 in each set, and a set replaces the one before: there are 50,000, and five sets are kept. "
        "The presets, those of the released code for D4RL's v0 sets, make 50,000. The target entropy is minus the "
        "number of action dimensions, which that code sets to -3 on all of them. An epoch of the fit is at most 1,000 "
        "optimiser steps. The networks' targets are standardised, too, so that held-out errors are in deviations; the "
        "uncertainty is in the data's own units. Each network has its own bounds of the variance, and keeps them with "
        "its best epoch. Implausible steps are left out, and rollouts stop there."
    )
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        name: {"rollout_length": length, "penalty": penalty, "rollouts": 50_000, "target_entropy": -3.0}
        for name, (length, penalty) in _RELEASED.items()
    }
    capabilities: ClassVar[frozenset[str]] = frozenset(["resume", "vector", "box", "gpu", "compile"])

    rollout_length: int = 5
    """Steps of a rollout (h); the paper has 1 or 5."""
    penalty: float = 1.0
    """Reward taken off for each unit of the model's uncertainty (lambda); the paper has 0.5 to 5."""
    rollouts: int = 10_000
    """Rollouts of a set, from recorded observations drawn with replacement."""
    rollouts_every: int = 1_000
    """Updates between two sets, each by the policy of the moment."""
    real_share: float = 0.05
    """Share of each batch that is recorded steps, rounded to whole rows."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("rollout_length", "rollouts", "rollouts_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if not 0.0 <= self.penalty < math.inf:
            raise ValueError(f"penalty={self.penalty} must not be negative, nor infinite")
        if not 0.0 <= self.real_share < 1.0:
            raise ValueError(f"real_share={self.real_share} must lie in [0, 1)")

    @classmethod
    def agent_class(cls) -> type[TransitionAgent]:
        from ctrlrl.offline.mopo_agent import MOPOAgent

        return MOPOAgent

    def usable(self, data: Dataset) -> np.ndarray:
        """[N] bool: steps whose next observation is known, of ends too: it is what the networks learn to predict."""
        return data.next_known

    def networks(self, spaces: Spaces, config: TransitionConfig, encoder: Callable[..., nn.Module] | None) -> Networks:
        space = spaces.observation
        if (
            not isinstance(space, gym.spaces.Box)
            or len(space.shape) != 1
            or not np.issubdtype(space.dtype, np.floating)
        ):
            raise TypeError(
                f"mopo predicts flat observations of floats, found {space}; "
                "gymnasium.wrappers.FlattenObservation makes one of others, or try iql"
            )
        actor = SquashedGaussianActor(space, spaces.action, config.network, encoder=encoder)
        critic = QEnsemble(space, actor.action_shape[0], config.network, encoder)
        return Networks(actor, {"critic": critic, **self.temperature()}, {"critic_target": "critic"})

    def update(
        self, nets: Nets, batch: Transitions, noise: Mapping[str, Tensor], knobs: Mapping[str, Tensor], phase: int
    ) -> dict[str, Tensor]:
        return self.sac_update(nets, batch, noise, knobs)
