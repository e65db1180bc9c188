"""QR-DQN: DQN on the quantiles of the return, of which the greedy policy takes the mean."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from ctrlrl.core.quantiles import quantile_loss
from ctrlrl.data.transitions import Transitions
from ctrlrl.engine.algorithm import Networks, Spaces, register
from ctrlrl.engine.value_based import CLEANRL, ValueBased
from ctrlrl.nets.discrete import DiscreteActor, chosen

if TYPE_CHECKING:
    from ctrlrl.engine.learner import Nets
    from ctrlrl.engine.transition_config import TransitionConfig


@register
@dataclass(frozen=True)
class QRDQN(ValueBased):
    """Quantiles of the return for each Discrete action, regressed on those of the action with the best mean."""

    paper: ClassVar[str] = "Distributional Reinforcement Learning with Quantile Regression, arXiv:1710.10044"
    differs: ClassVar[str] = (
        "Defaults are for small tasks: 50 quantiles, 120-84, an update of 128 rows every tenth step at a learning rate "
        "of 1e-3, a target copied every 500 steps. The preset sb3 has those of sb3-contrib, which are the paper's. The "
        "Huber loss is divided by kappa, as in IQN, so that kappa = 0 is the quantile loss itself."
    )
    loop_defaults: ClassVar[Mapping[str, Any]] = {
        **CLEANRL,
        "learning_rate": 1e-3,
        "replay_size": 100_000,
        "adam_eps": 0.01 / 128,
    }
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "sb3": {
            "learning_rate": 5e-5, "replay_size": 1_000_000, "learning_starts": 100, "batch_size": 32,
            "replay_ratio": 0.25, "target_steps": 10_000, "epsilon_end": 0.01, "epsilon_share": 0.005,
            "quantiles": 200, "adam_eps": 0.01 / 32, "critic_hidden": (64, 64),
        },
    }  # fmt: skip

    quantiles: int = 50
    """Quantiles per action, at the midpoints of as many equal parts of [0, 1]."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.quantiles < 2:
            raise ValueError(f"quantiles={self.quantiles} must be at least 2; dqn has one number per action")

    def networks(self, spaces: Spaces, config: TransitionConfig, encoder: Callable[..., nn.Module] | None) -> Networks:
        actor = DiscreteActor(spaces.observation, spaces.action, config.network, encoder, outputs=self.quantiles)
        return Networks(actor, {}, {"actor_target": "actor"})

    def update(
        self, nets: Nets, batch: Transitions, noise: Mapping[str, Tensor], knobs: Mapping[str, Tensor], phase: int
    ) -> dict[str, Tensor]:
        with torch.no_grad():
            following = nets["actor_target"](batch.next_obs)
            best = chosen(following, following.mean(2).argmax(1))
            going_on = knobs["gamma"] * (1.0 - batch.terminated_t)
            target = batch.reward_t.unsqueeze(1) + going_on.unsqueeze(1) * best

        def loss(actor: Callable[..., Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
            found = chosen(actor(batch.obs), batch.action)
            value = quantile_loss(found, target, self.kappa).mean()
            return value, {"critic_loss": value.detach(), "q": found.detach().mean()}

        metrics = nets.descend("actor", loss)
        self.follow(nets, knobs)
        return metrics
