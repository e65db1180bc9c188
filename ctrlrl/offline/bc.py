"""Behaviour cloning, of all episodes or of the best ones only."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn

from ctrlrl.data.dataset import Dataset
from ctrlrl.data.transitions import Transitions
from ctrlrl.engine.algorithm import Networks, OfflineAlgorithm, Spaces, register
from ctrlrl.nets.actors import DeterministicActor, DiagonalGaussian, GaussianActor

if TYPE_CHECKING:
    from ctrlrl.engine.learner import Nets
    from ctrlrl.engine.transition_config import TransitionConfig


@register
@dataclass(frozen=True)
class BC(OfflineAlgorithm):
    """Regression of the data's actions on the observations; ``best_share`` below 1 keeps the best episodes only.

    An episode's rank is its (discounted) return, over its whole length; of equal ones the earlier is the better. One
    stays at least.
    """

    paper: ClassVar[str] = "ALVINN: An Autonomous Land Vehicle in a Neural Network (Pomerleau 1988)"
    differs: ClassVar[str] = (
        "Settings, network and loss of CORL's BC, whose scores are the published ones on D4RL. The preset top10 is its "
        "10 % BC: it, too, keeps a share of the episodes and not of the steps (as Decision Transformer's comparison "
        "does), and ranks them by returns discounted at 0.99. That code finds an episode's end by terminals or a count "
        "of 1,000 rows in data whose timed-out steps are left out before, so that its episodes run over timeouts; here "
        "they are the recorded ones. Equal returns are ordered there by chance."
    )
    loop_defaults: ClassVar[Mapping[str, Any]] = {"normalize_obs": True}
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {"top10": {"best_share": 0.1, "rank_discount": 0.99}}

    fit: Literal["squared_error", "likelihood"] = "squared_error"
    """Fit a deterministic policy, or a normal one by its log-likelihood (mean squashed by tanh, deviation free of the
    state)."""
    best_share: float = 1.0
    """Share of the episodes, from the best one on, that is learned from; rounded down to whole ones."""
    rank_discount: float = 1.0
    """Discount of the returns by which episodes are ranked."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 < self.best_share <= 1.0:
            raise ValueError(f"best_share={self.best_share} must lie in (0, 1]")
        if not 0.0 <= self.rank_discount <= 1.0:
            raise ValueError(f"rank_discount={self.rank_discount} must lie in [0, 1]")

    def select(self, data: Dataset) -> Dataset:
        """The best episodes, in the data's order."""
        if self.best_share == 1.0:
            return data
        returns = data.returns if self.rank_discount == 1.0 else discounted_returns(data, self.rank_discount)
        count = max(1, math.floor(self.best_share * len(returns) + 1e-9))  # 0.29 x 100 is 28.99... in floats
        return data.take(np.sort(np.argsort(-returns, kind="stable")[:count]))

    def noise(
        self, n: int, batch_size: int, action_size: int, generator: torch.Generator, params: int = 0
    ) -> dict[str, Tensor]:
        return {}

    def networks(self, spaces: Spaces, config: TransitionConfig, encoder: Callable[..., nn.Module] | None) -> Networks:
        build = DeterministicActor if self.fit == "squared_error" else GaussianActor
        return Networks(build(spaces.observation, spaces.action, config.network, encoder=encoder), {})

    def update(
        self, nets: Nets, batch: Transitions, noise: Mapping[str, Tensor], knobs: Mapping[str, Tensor], phase: int
    ) -> dict[str, Tensor]:
        def squared_error(actor: Callable[..., Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
            value = (actor(batch.obs) - batch.action).square().mean()
            return value, {"actor_loss": value.detach()}

        def likelihood(actor: Callable[..., DiagonalGaussian]) -> tuple[Tensor, dict[str, Tensor]]:
            policy = actor(batch.obs)
            value = -policy.log_prob(batch.action).mean()
            return value, {"actor_loss": value.detach(), "std": policy.log_std.detach().exp().mean()}

        return nets.descend("actor", squared_error if self.fit == "squared_error" else likelihood)


def discounted_returns(data: Dataset, discount: float) -> np.ndarray:
    """[episodes] float64: sums of discount^t r_t from each episode's first step on."""
    starts = np.asarray([e.start for e in data.episodes])
    steps = np.arange(len(data)) - np.repeat(starts, np.diff(np.append(starts, len(data))))
    return np.add.reduceat(np.power(discount, steps) * np.asarray(data.rewards, np.float64), starts)
