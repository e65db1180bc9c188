"""The settings that learning from transitions has in an environment and from recorded data alike."""

from __future__ import annotations

from dataclasses import dataclass, field

from ctrlrl.engine.config import RunConfig
from ctrlrl.nets.actors import QNetworkConfig


@dataclass(frozen=True)
class TransitionConfig(RunConfig):
    """Batches, learning rates, discount, networks."""

    batch_size: int = 256
    """Transitions per update."""
    learning_rate: float = 3e-4
    """Adam's learning rate."""
    critic_learning_rate: float | None = None
    """Adam's learning rate for the critics and what else is learned of the environment; None is the same."""
    gamma: float = 0.99
    """Discount per environment step."""
    tau: float = 0.005
    """Part of the way that target networks go towards the trained ones in an update."""
    reward_scale: float = 1.0
    """Factor on the rewards that are learned from; evaluations show the environment's own."""
    reward_shift: float = 0.0
    """Added to them after that; -1 is customary on antmaze."""
    adam_eps: float = 1e-8
    """Adam's epsilon."""
    max_grad_norm: float | None = None
    """Largest norm of each network's gradient; None is off."""
    network: QNetworkConfig = field(default_factory=QNetworkConfig)
    """Shape of the networks."""
    updates_per_graph: int = 1
    """Updates unrolled into one compiled graph or CUDA graph, where that many are due at once."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._positive("batch_size reward_scale adam_eps max_grad_norm updates_per_graph")
        self._fractions("gamma tau")
        self._at_least_zero("learning_rate critic_learning_rate")
