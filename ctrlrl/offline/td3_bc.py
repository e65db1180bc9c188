"""TD3+BC: TD3 whose policy is also regressed on the data's actions."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from ctrlrl.data.transitions import Transitions
from ctrlrl.engine.algorithm import Networks, OfflineAlgorithm, Spaces, register
from ctrlrl.engine.delayed import Delayed
from ctrlrl.nets.actors import DeterministicActor
from ctrlrl.nets.q_ensemble import QEnsemble

if TYPE_CHECKING:
    from ctrlrl.engine.learner import Nets
    from ctrlrl.engine.transition_config import TransitionConfig


@register
@dataclass(frozen=True)
class TD3BC(Delayed, OfflineAlgorithm):
    """Deterministic policy gradient, scaled by the size of the values, plus the squared distance to the data's actions.

    alpha = 0 is behaviour cloning (see bc).
    """

    paper: ClassVar[str] = "A Minimalist Approach to Offline Reinforcement Learning, arXiv:2106.06860"
    differs: ClassVar[str] = (
        "The critic's mean size is taken at the policy's actions, as in the released code; eq. 5 has it at the data's. "
        "Noise and actions are in units of half the action's range. Steps whose next observation was not recorded are "
        "left out; D4RL's loader, which that code uses, drops the last step of every timed-out episode in any case."
    )
    loop_defaults: ClassVar[Mapping[str, Any]] = {"normalize_obs": True}

    alpha: float = 2.5
    """Weight of the critic against the regression, after the critic's values are divided by their mean size."""
    exploration_noise: float = 0.1
    """Deviation of the noise on collected actions when training goes on in an environment."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._not_negative("alpha exploration_noise")

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
            chosen = actor(batch.obs)
            q = nets["critic"](batch.obs, chosen, members=1)
            regression = (chosen - batch.action).square().mean()
            # the mean size is a number, not part of the objective
            value = regression - self.alpha / q.detach().abs().mean().clamp(min=1e-8) * q.mean()
            return value, {"actor_loss": value.detach(), "bc_loss": regression.detach()}

        metrics = nets.descend("critic", critic_loss)
        return metrics | self.move(nets, actor_loss, knobs, phase)
