"""Decision Transformer: actions by a causal transformer, given the return that is still to be reached."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, cast

import gymnasium as gym
import numpy as np
import torch
from torch import Tensor, nn

from ctrlrl.data.dataset import Dataset
from ctrlrl.data.transitions import Transitions
from ctrlrl.engine.algorithm import Networks, OfflineAlgorithm, Spaces, register
from ctrlrl.engine.config import ConfigError
from ctrlrl.engine.offline_config import OfflineConfig
from ctrlrl.engine.wrappers import space_told, told
from ctrlrl.nets.causal import TIMESTEP, Kept, TrajectoryActor

if TYPE_CHECKING:
    from ctrlrl.engine.learner import Nets
    from ctrlrl.engine.transition_agent import TransitionAgent
    from ctrlrl.engine.transition_config import TransitionConfig


@register
@dataclass(frozen=True)
class DecisionTransformer(OfflineAlgorithm):
    """Regression of the data's actions on the last steps and on the return that followed; acts towards a target return.

    The environment it acts in is wrapped by :class:`ctrlrl.engine.wrappers.ReturnToGo`. Returns are the raw ones, not
    discounted: gamma and the settings of the rewards are of no effect.
    """

    paper: ClassVar[str] = "Decision Transformer: Reinforcement Learning via Sequence Modeling, arXiv:2106.01345"
    differs: ClassVar[str] = (
        "Settings are those of the released code for D4RL locomotion. The transformer is written here, with GPT-2's "
        "layers; all weights but an image encoder's begin as in GPT-2, there only those inside the transformer do. "
        "Observations are divided by their deviation plus 1e-3 (there 1e-6). Actions are in units of half their range. "
        "Weight decay 1e-4 at a learning rate of 1e-4 is, there as here, too small to change a float32: 1 - 1e-8 is 1."
    )
    loop_defaults: ClassVar[Mapping[str, Any]] = {
        "batch_size": 64, "learning_rate": 1e-4, "max_grad_norm": 0.25, "normalize_obs": True,
    }  # fmt: skip

    context: int = 20
    """Steps that an action is chosen by, the present one included."""
    width: int = 128
    """Features of a token."""
    layers: int = 3
    """Layers of the transformer."""
    heads: int = 1
    """Attention heads; must divide the width."""
    dropout: float = 0.1
    """Share of features and of attention weights that an update leaves out."""
    return_scale: float = 1000.0
    """Divides returns-to-go; of the order of the returns."""
    timesteps: int = 1000
    """Steps of an episode that are told apart; later ones count as the last of them."""
    weight_decay: float = 1e-4
    """Share of every parameter, times the learning rate, that an update takes away (AdamW)."""
    warmup_updates: int = 10_000
    """Updates over which the learning rate rises linearly."""
    target_return: float | None = None
    """Return to aim at when acting; None is the highest one in the data."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("context", "width", "layers", "heads", "timesteps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.width % self.heads:
            raise ValueError(f"heads={self.heads} must divide width={self.width}")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout={self.dropout} must lie in [0, 1)")
        if not 0.0 < self.return_scale < math.inf:
            raise ValueError(f"return_scale={self.return_scale} must be positive")
        if not self.weight_decay >= 0.0 or self.warmup_updates < 0:
            raise ValueError(
                f"weight_decay={self.weight_decay} and warmup_updates={self.warmup_updates} must not be negative"
            )
        if self.target_return is not None and not math.isfinite(self.target_return):
            raise ValueError(f"target_return={self.target_return} must be finite")

    @classmethod
    def agent_class(cls) -> type[TransitionAgent]:
        from ctrlrl.offline.decision_transformer_agent import DecisionTransformerAgent

        return DecisionTransformerAgent

    def select(self, data: Dataset) -> Dataset:
        """All episodes, as ReturnToGo would have shown them to a policy that aimed at what it then reached."""
        found = told(data.observations, return_to_go(data)[:, None], timestep(data)[:, None])
        return dataclasses.replace(
            data,
            observations=found,
            # nothing is learned from next observations, so that every step counts and none is missing
            next_observations=found,
            next_known=np.ones(len(data), bool),
            observation_space=space_told(data.observation_space),
        )

    def noise(
        self, n: int, batch_size: int, action_size: int, generator: torch.Generator, params: int = 0
    ) -> dict[str, Tensor]:
        """What dropout leaves (see nets.causal.Kept), nothing where there is none."""
        if self.dropout == 0.0:
            return {}
        size = 3 * self.context - 1
        shapes = Kept(
            (n, batch_size, 1 + 2 * self.layers, size, self.width),  # type: ignore[arg-type]
            (n, batch_size, self.layers, self.heads, size, size),  # type: ignore[arg-type]
        )
        return {
            name: torch.rand(shape, generator=generator, device=generator.device) >= self.dropout
            for name, shape in shapes._asdict().items()
        }

    def networks(self, spaces: Spaces, config: TransitionConfig, encoder: Callable[..., nn.Module] | None) -> Networks:
        if not isinstance(config, OfflineConfig):
            raise ConfigError(
                f"{self.name} learns from whole recorded episodes: it cannot go on in an environment. Train it on a "
                "dataset, or go on with another method"
            )
        actor = TrajectoryActor(
            cast(gym.spaces.Dict, spaces.observation), spaces.action, config.network, encoder, context=self.context,
            width=self.width, layers=self.layers, heads=self.heads, dropout=self.dropout,
            return_scale=self.return_scale, timesteps=self.timesteps,
        )  # fmt: skip
        return Networks(actor, {})

    def update(
        self, nets: Nets, batch: Transitions, noise: Mapping[str, Tensor], knobs: Mapping[str, Tensor], phase: int
    ) -> dict[str, Tensor]:
        """``batch`` is [B * K, ...]: windows one after the other, padded on the left by repeating their first step."""
        there = existing(cast(dict[str, Tensor], batch.obs)[TIMESTEP].unflatten(0, (-1, self.context)).squeeze(-1))
        wanted = batch.action.unflatten(0, there.shape)
        kept = Kept(**noise) if noise else None

        def squared_error(actor: Callable[..., Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
            error = (actor(batch.obs, batch.action, there, kept) - wanted).square().mean(-1)
            value = (error * there).sum() / there.sum()
            return value, {"actor_loss": value.detach()}

        return nets.descend("actor", squared_error, self.weight_decay)


def existing(timestep: Tensor) -> Tensor:
    """[B, K] bool: which steps of windows with ``timestep`` [B, K] are no padding. Those count up to the last one."""
    last = torch.ones_like(timestep[:, :1], dtype=torch.bool)
    return torch.cat([timestep[:, 1:] == timestep[:, :-1] + 1, last], 1)


def return_to_go(data: Dataset) -> np.ndarray:
    """[N] float32: sum of the rewards from each step to its episode's end, not discounted."""
    sums = np.cumsum(data.rewards, dtype=np.float64)
    stops = np.asarray([e.stop for e in data.episodes])
    lengths = np.diff(stops, prepend=0)
    return (np.repeat(sums[stops - 1], lengths) - sums + data.rewards).astype(np.float32)


def timestep(data: Dataset) -> np.ndarray:
    """[N] int64: number of each step in its episode, from 0 on."""
    starts = np.asarray([e.start for e in data.episodes])
    return np.arange(len(data)) - np.repeat(starts, np.diff(np.append(starts, len(data))))
