"""TD3: twin critics, delayed deterministic policy, smoothed targets."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn

from ctrlrl.data.transitions import Transitions
from ctrlrl.engine.algorithm import Networks, Spaces, register
from ctrlrl.engine.delayed import Delayed
from ctrlrl.nets.actors import DeterministicActor
from ctrlrl.nets.q_ensemble import QEnsemble

if TYPE_CHECKING:
    from ctrlrl.engine.learner import Nets
    from ctrlrl.engine.transition_config import TransitionConfig


@register
@dataclass(frozen=True)
class TD3(Delayed):
    """Deterministic policy gradient on the first of two critics, every second update."""

    paper: ClassVar[str] = "Addressing Function Approximation Error in Actor-Critic Methods, arXiv:1802.09477"
    differs: ClassVar[str] = (
        "Noise and its bounds are in units of half the action's range, as in the released code on tasks whose actions "
        "lie in [-1, 1]; networks of 256-256, batch 256 and learning rate 3e-4 as in that code's later versions. "
        "10,000 random steps at first."
    )

    exploration_noise: float = 0.1
    """Deviation of the noise on collected actions, in half-ranges of the action."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._not_negative("exploration_noise")

    def networks(self, spaces: Spaces, config: TransitionConfig, encoder: Callable[..., nn.Module] | None) -> Networks:
        actor = DeterministicActor(
            spaces.observation, spaces.action, config.network, encoder=encoder, exploration_noise=self.exploration_noise
        )
        critic = QEnsemble(spaces.observation, actor.action_shape[0], config.network, encoder)
        return Networks(actor, {"critic": critic}, {"actor_target": "actor", "critic_target": "critic"})

    def update(
        self, nets: Nets, batch: Transitions, noise: Mapping[str, Tensor], knobs: Mapping[str, Tensor], phase: int
    ) -> dict[str, Tensor]:
        with torch.no_grad():
            action = self.smoothed(nets["actor_target"](batch.next_obs), noise["next_action"])
            value = nets["critic_target"](batch.next_obs, action).amin(0)
            target = batch.reward_t + knobs["gamma"] * (1.0 - batch.terminated_t) * value

        def critic_loss(critic: Callable[..., Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
            q = critic(batch.obs, batch.action)
            value = (q - target).square().mean(1).sum()
            return value, {"critic_loss": value.detach(), "q": q.detach().mean()}

        def actor_loss(actor: Callable[..., Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
            value = -nets["critic"](batch.obs, actor(batch.obs), members=1).mean()
            return value, {"actor_loss": value.detach()}

        metrics = nets.descend("critic", critic_loss)
        return metrics | self.move(nets, actor_loss, knobs, phase)
