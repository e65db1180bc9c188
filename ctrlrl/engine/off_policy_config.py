"""The settings of the off-policy loop."""

from __future__ import annotations

from dataclasses import dataclass

from ctrlrl.engine.config import ConfigError
from ctrlrl.engine.transition_config import TransitionConfig


@dataclass(frozen=True)
class OffPolicyConfig(TransitionConfig):
    """Step, remember, update: everything but the method."""

    replay_size: int = 1_000_000
    """Transitions kept; the oldest make room for new ones."""
    memory_map: bool = False
    """Keep the replay in unnamed files of the run's folder instead of memory. Checkpoints hold it as ever."""
    learning_starts: int = 10_000
    """Environment steps of uniformly random actions before the first update, and transitions that the replay must
    hold: training on from a checkpoint without replay acts for as long before it updates."""
    collect_steps: int = 1
    """Steps per environment between updates."""
    replay_ratio: float = 1.0
    """Updates per environment step."""
    iteration_steps: int = 1_000
    """Environment steps per line of the log, rounded up to whole rounds; checkpoints and evaluations fall between two
    of these iterations."""
    start_from: str | None = None
    """Offline run whose networks to go on with (--from). Discount, rewards and shape of the networks are then its own
    unless set, and its policy acts from the first step."""
    offline_share: float = 0.0
    """With start_from: share of each batch that is drawn from that run's dataset."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._positive("replay_size collect_steps replay_ratio iteration_steps")
        self._fractions("offline_share")
        self._at_least_zero("learning_starts")
        if self.offline_share > 0.0 and self.start_from is None:
            raise ConfigError("offline_share needs start_from, the offline run whose dataset to draw from")
        if self.learning_starts > self.replay_size:
            raise ConfigError(
                f"learning_starts={self.learning_starts} is more than replay_size={self.replay_size} holds"
            )
