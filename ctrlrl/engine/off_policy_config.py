"""The settings of the off-policy loop."""

from __future__ import annotations

from dataclasses import dataclass, field

from ctrlrl.engine.config import ConfigError, RunConfig
from ctrlrl.nets.actors import QNetworkConfig


@dataclass(frozen=True)
class OffPolicyConfig(RunConfig):
    """Step, remember, update: everything but the method."""

    replay_size: int = 1_000_000
    """Transitions kept; the oldest make room for new ones."""
    memory_map: bool = False
    """Keep the replay in unnamed files of the run's folder instead of memory. Checkpoints hold it as ever."""
    batch_size: int = 256
    """Transitions per update."""
    learning_starts: int = 10_000
    """Environment steps of uniformly random actions before the first update, and transitions that the replay must
    hold: training on from a checkpoint without replay acts for as long before it updates."""
    collect_steps: int = 1
    """Steps per environment between updates."""
    replay_ratio: float = 1.0
    """Updates per environment step."""
    learning_rate: float = 3e-4
    """Adam's learning rate."""
    critic_learning_rate: float | None = None
    """Adam's learning rate for the critics and what else is learned of the environment; None is the same."""
    gamma: float = 0.99
    """Discount per environment step."""
    tau: float = 0.005
    """Part of the way that target networks go towards the trained ones in an update."""
    adam_eps: float = 1e-8
    """Adam's epsilon."""
    max_grad_norm: float | None = None
    """Largest norm of each network's gradient; None is off."""
    network: QNetworkConfig = field(default_factory=QNetworkConfig)
    """Shape of the networks."""
    iteration_steps: int = 1_000
    """Environment steps per line of the log, rounded up to whole rounds; checkpoints and evaluations fall between two
    of these iterations."""
    updates_per_graph: int = 1
    """Updates unrolled into one compiled graph or CUDA graph, where that many are due at once."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._positive(
            "replay_size batch_size collect_steps replay_ratio adam_eps max_grad_norm iteration_steps updates_per_graph"
        )
        self._fractions("gamma tau")
        self._at_least_zero("learning_starts learning_rate critic_learning_rate")
        if self.learning_starts > self.replay_size:
            raise ConfigError(
                f"learning_starts={self.learning_starts} is more than replay_size={self.replay_size} holds"
            )
