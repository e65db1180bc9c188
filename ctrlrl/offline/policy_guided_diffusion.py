"""Policy-guided diffusion: a diffusion model of the data's trajectories, which a policy can guide."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from ctrlrl.data.dataset import Dataset
from ctrlrl.data.transitions import Transitions
from ctrlrl.engine.algorithm import Networks, OfflineAlgorithm, Spaces, register
from ctrlrl.engine.config import ConfigError
from ctrlrl.engine.offline_config import OfflineConfig
from ctrlrl.nets.edm import training_sigma
from ctrlrl.nets.trajectory_codec import Steps
from ctrlrl.nets.trajectory_denoiser import DenoiserConfig, TrajectoryModel

if TYPE_CHECKING:
    from ctrlrl.engine.learner import Nets
    from ctrlrl.engine.transition_agent import TransitionAgent
    from ctrlrl.engine.transition_config import TransitionConfig

NOISE, LEVEL = "noise", "level"
"""Columns of a batch: standard normal numbers by channel [B * T, C], and by window, the same in all of its rows."""


@dataclass(frozen=True)
class PolicyGuidedDiffusionConfig(OfflineConfig):
    """The offline loop's settings with those of the denoiser."""

    denoiser: DenoiserConfig = field(default_factory=DenoiserConfig)
    """Shape of the network."""


@register
@dataclass(frozen=True)
class PolicyGuidedDiffusion(OfflineAlgorithm):
    """A model of whole trajectories (observations, actions, rewards, ends), trained by denoising as in EDM.

    It is no policy: ``generate`` draws trajectories, as the data are or pushed towards what a policy would do, for
    other methods to learn from. With ``window_length=1`` it models single transitions, as SynthER does
    (arXiv:2303.06614). The setting ``tau`` is the rate of the moving average of the weights, which is what generates.
    Rewards are the raw ones; gamma and the settings of critics, rewards, observations and evaluations are of no effect.
    """

    paper: ClassVar[str] = "Policy-Guided Diffusion, arXiv:2404.06356"
    differs: ClassVar[str] = (
        "The network is diffusers' U-Net (kernel 5, Mish, strided convolutions; in the released code kernel 3, ReLU, "
        "pooling), and by default small enough for a CPU: about a million parameters, where the released one has 178. "
        "Batches are of 64, the peak learning rate 1e-3. The moving average follows by 5e-4 at every update, there by "
        "5e-3 at every tenth, and faster at first. Windows that end in a timeout are kept: it matters to none of their "
        "steps. The preset 'released' has that code's numbers, a network of its size, its windows and no faster start; "
        "its stride is counted there over the whole data, here from the start of each episode. Statistics are of the "
        "windows that are learned from, not of those held out. The preset 'synther' is of single transitions, as large "
        "and trained as that paper's."
    )
    loop_defaults: ClassVar[Mapping[str, Any]] = {
        "batch_size": 64, "learning_rate": 1e-3, "actor_schedule": "cosine", "tau": 5e-4, "iteration_steps": 100,
        "checkpoint_every": 1_000, "eval_every": None,
    }  # fmt: skip
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "released": {
            "batch_size": 32, "learning_rate": 2e-3, "denoiser_channels": (424, 848, 1696), "drop_timeouts": True,
            "ema_rampup": False,
        },
        "synther": {
            "window_length": 1, "batch_size": 256, "learning_rate": 3e-4, "warmup_share": 0.0, "held_out": 0.0,
            "denoiser_width": 2048, "denoiser_blocks": 6, "ema_rampup": False,
        },
    }  # fmt: skip
    capabilities: ClassVar[frozenset[str]] = frozenset(["resume", "vector", "box", "gpu", "compile"])

    window_length: int = 32
    """Steps of a trajectory; 1 is single transitions."""
    window_stride: int = 8
    """Steps between the beginnings of two windows of an episode (see ctrlrl.data.windows)."""
    drop_timeouts: bool = False
    """Leave out windows of several steps whose last one is a timeout."""
    held_out: float = 0.05
    """Share of the episodes that are not learned from but show the loss on data not seen (train/validation_loss); at
    least one where it is above 0 and there are two."""
    warmup_share: float = 0.1
    """Share of the updates over which the learning rate rises from a tenth; after them ``actor_schedule`` begins."""
    ema_rampup: bool = True
    """Let the moving average follow by 9 / (10 + updates) where that is more than tau, so that short runs leave their
    first weights behind."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("window_length", "window_stride"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        for name in ("held_out", "warmup_share"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ValueError(f"{name}={getattr(self, name)} must lie in [0, 1)")

    @classmethod
    def agent_class(cls) -> type[TransitionAgent]:
        from ctrlrl.offline.policy_guided_diffusion_agent import PolicyGuidedDiffusionAgent

        return PolicyGuidedDiffusionAgent

    def select(self, data: Dataset) -> Dataset:
        """All steps; those of windows need no next observation, which is that of the next step.

        A single transition that ends an episode keeps its observation where the next one is not known: an end has to
        be generated, and no learner looks beyond it.
        """
        if self.window_length == 1:
            if data.next_known.all() or isinstance(data.next_observations, Mapping):
                return data
            known = np.reshape(data.next_known, (-1, *[1] * (data.next_observations.ndim - 1)))
            return dataclasses.replace(
                data, next_observations=np.where(known, data.next_observations, np.asarray(data.observations))
            )
        return dataclasses.replace(data, next_observations=data.observations, next_known=np.ones(len(data), bool))

    def noise(
        self, n: int, batch_size: int, action_size: int, generator: torch.Generator, params: int = 0
    ) -> dict[str, Tensor]:
        """Nothing: noise has a number for every channel, and comes with the batch (:data:`NOISE`, :data:`LEVEL`)."""
        return {}

    def networks(self, spaces: Spaces, config: TransitionConfig, encoder: Callable[..., nn.Module] | None) -> Networks:
        if not isinstance(config, PolicyGuidedDiffusionConfig):
            raise ConfigError(
                f"{self.name} is a model of recorded data and no policy: it cannot go on in an environment. Train it "
                "on a dataset, and another method on what it generates"
            )
        if encoder is not None or config.network.encoder is not None:
            raise ConfigError(f"{self.name} has no encoder: it generates observations as they are; leave encoder out")
        model = TrajectoryModel(spaces.observation, spaces.action, config.denoiser, self.window_length)
        return Networks(model, {}, {"actor_ema": "actor"})

    def update(
        self, nets: Nets, batch: Transitions, noise: Mapping[str, Tensor], knobs: Mapping[str, Tensor], phase: int
    ) -> dict[str, Tensor]:
        """``batch`` is [B * T, ...]: windows one after the other."""
        inputs = self.inputs(batch)

        def denoising(actor: Callable[..., Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
            value = actor(*inputs).mean()
            return value, {"actor_loss": value.detach()}

        metrics = nets.descend("actor", denoising)
        nets.track("actor_ema", "actor", knobs["tau"])
        return metrics

    def inputs(self, batch: Transitions) -> tuple[Steps, Tensor, Tensor]:
        """Steps [B, T, ...] of ``batch`` [B * T, ...], their noise levels [B] and their noise [B, C, T]."""
        shape = (-1, self.window_length)
        level, noise = (batch.extras[name].unflatten(0, shape) for name in (LEVEL, NOISE))
        return windowed(batch, self.window_length), training_sigma(level[:, 0]), noise.transpose(1, 2)


def windowed(batch: Transitions, length: int) -> Steps:
    """Windows [B, T, ...] that lie one after the other in ``batch`` [B * T, ...]."""
    assert isinstance(batch.obs, Tensor) and isinstance(batch.next_obs, Tensor)  # TrajectoryModel takes no others
    rows = (batch.obs, batch.action, batch.reward_t, batch.terminated_t, batch.next_obs)
    return Steps(*(x.unflatten(0, (-1, length)) for x in rows))
