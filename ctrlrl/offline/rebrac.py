"""ReBRAC: TD3+BC with a penalty in the critic, too, and layer normalisation."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from ctrlrl.data.dataset import Dataset
from ctrlrl.data.transitions import Transitions
from ctrlrl.engine.algorithm import Networks, OfflineAlgorithm, Spaces, register
from ctrlrl.engine.delayed import Delayed
from ctrlrl.engine.offline_rows import to_unit
from ctrlrl.nets.actors import DeterministicActor
from ctrlrl.nets.q_ensemble import QEnsemble, start_flat

if TYPE_CHECKING:
    from ctrlrl.engine.learner import Nets
    from ctrlrl.engine.transition_config import TransitionConfig


@register
@dataclass(frozen=True)
class ReBRAC(Delayed, OfflineAlgorithm):
    """TD3 whose policy and whose targets are penalised by the squared distance to the data's action.

    The target's penalty is at the action that the data took next. Steps of which that is not known (the last one of an
    episode that was cut) are left out: without a penalty they would be worth more than all others.
    """

    paper: ClassVar[str] = "Revisiting the Minimalist Approach to Offline Reinforcement Learning, arXiv:2305.09836"
    differs: ClassVar[str] = (
        "Targets follow the policy as it is after its step, as in TD3; in the released code as it was before. The "
        "policy moves at every second update, there at the first of each two. Adam's and the networks' start are those "
        "of that code, where layer normalisation is behind the activation. The coefficients were chosen by dataset in "
        "the paper; the defaults are the medians over the nine medium locomotion sets (that code's are 1)."
    )
    loop_defaults: ClassVar[Mapping[str, Any]] = {
        "batch_size": 1024, "learning_rate": 1e-3, "actor_hidden": (256, 256, 256), "critic_hidden": (256, 256, 256),
        "layer_norm": "critic",
    }  # fmt: skip

    actor_bc_coef: float = 0.01
    """Weight of the policy's penalty against the critic, whose values are divided by their mean size."""
    critic_bc_coef: float = 0.01
    """Weight of the targets' penalty, in units of the reward."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._not_negative("actor_bc_coef critic_bc_coef")

    def select(self, data: Dataset) -> Dataset:
        return dataclasses.replace(data, next_known=data.next_known & ~data.ends)

    def columns(self, data: Dataset, gamma: float) -> Mapping[str, np.ndarray]:
        """``next_action`` [N, A] in [-1, 1]; zero where the episode ends, whose target has no next value."""
        following = to_unit(data.actions, data.action_space)
        following[:-1] = following[1:]
        following[data.ends] = 0.0
        return {"next_action": following}

    def networks(self, spaces: Spaces, config: TransitionConfig, encoder: Callable[..., nn.Module] | None) -> Networks:
        actor = DeterministicActor(spaces.observation, spaces.action, config.network, encoder=encoder)
        critic = QEnsemble(spaces.observation, actor.action_shape[0], config.network, encoder)
        start_flat([*actor.body, actor.out], 1e-3)
        start_flat(critic.body, 3e-3)
        return Networks(actor, {"critic": critic}, {"actor_target": "actor", "critic_target": "critic"})

    def update(
        self, nets: Nets, batch: Transitions, noise: Mapping[str, Tensor], knobs: Mapping[str, Tensor], phase: int
    ) -> dict[str, Tensor]:
        with torch.no_grad():
            action = self.smoothed(nets["actor_target"](batch.next_obs), noise["next_action"])
            distance = (action - batch.extras["next_action"]).square().sum(-1)
            value = nets["critic_target"](batch.next_obs, action).amin(0) - self.critic_bc_coef * distance
            target = batch.reward_t + knobs["gamma"] * (1.0 - batch.terminated_t) * value

        def critic_loss(critic: Callable[..., Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
            q = critic(batch.obs, batch.action)
            value = (q - target).square().mean(1).sum()
            return value, {"critic_loss": value.detach(), "q": q.detach().mean()}

        def actor_loss(actor: Callable[..., Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
            chosen = actor(batch.obs)
            q = nets["critic"](batch.obs, chosen).amin(0)
            penalty = (chosen - batch.action).square().sum(-1).mean()
            # as in TD3+BC the mean size is a number, not part of the objective
            value = self.actor_bc_coef * penalty - q.mean() / q.detach().abs().mean().clamp(min=1e-8)
            return value, {"actor_loss": value.detach(), "bc_loss": penalty.detach()}

        metrics = nets.descend("critic", critic_loss)
        return metrics | self.move(nets, actor_loss, knobs, phase)
