"""The settings of the offline loop."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from ctrlrl.engine.augment import AugmentConfig
from ctrlrl.engine.config import ConfigError
from ctrlrl.engine.guidance import GuidanceConfig
from ctrlrl.engine.transition_config import TransitionConfig
from ctrlrl.nets.edm import SamplerConfig


@dataclass(frozen=True)
class OfflineConfig(TransitionConfig):
    """Draw from recorded data, update: everything but the method. A step is an update."""

    dataset: str = ""
    """D4RL or Minari id, or the path of a file."""
    like: str | None = None
    """D4RL id whose reference scores and environment are those of a file of your own."""
    unfinished: Literal["error", "cut"] = "error"
    """What to do with a last episode that has no end: refuse the data, or treat it as cut there. D4RL's own files end
    so, and are always cut."""
    memory_map: bool = False
    """Keep the data in unnamed files of the run's folder instead of memory."""
    checkpoint_every: int = 10_000
    """Updates between checkpoints, rounded up to whole iterations and at least ten of them."""
    eval_every: int | None = 50_000
    """Updates between evaluations; None never evaluates."""
    iteration_steps: int = 1_000
    """Updates per line of the log; checkpoints and evaluations fall between two of these iterations."""
    actor_schedule: Literal["constant", "cosine"] = "constant"
    """Keep the actor's learning rate, or let it fall to 0 at the last update along half a cosine, in steps of
    ``updates_per_graph``."""
    scale_by_returns: bool = False
    """Also divide rewards by the range of the episodes' returns and multiply by 1000, as IQL does on locomotion."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._positive("iteration_steps")


@dataclass(frozen=True)
class AugmentedConfig(OfflineConfig):
    """The offline loop's settings with those of generated rows, for learners of single transitions."""

    augmentation: AugmentConfig = field(default_factory=AugmentConfig)
    """Whether and when rows are generated."""
    guiding: GuidanceConfig = field(default_factory=GuidanceConfig)
    """How they are pushed towards the policy."""
    sampling: SamplerConfig = field(default_factory=SamplerConfig)
    """How the model turns noise into them, whatever the settings of its own run."""

    def __post_init__(self) -> None:
        super().__post_init__()
        groups, unset = (self.augmentation, self.guiding, self.sampling), (AugmentConfig, GuidanceConfig, SamplerConfig)
        if self.augmentation.augment is None and groups != tuple(group() for group in unset):
            raise ConfigError(
                "settings of augment_*, guidance and sampler are for generated rows: name their model (--augment RUN)"
            )
