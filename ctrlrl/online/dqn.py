"""DQN: Q-learning with a network of action values, a replay buffer and a target network."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from ctrlrl.core.quantiles import huber
from ctrlrl.data.transitions import Transitions
from ctrlrl.engine.algorithm import Networks, Spaces, register
from ctrlrl.engine.value_based import CLEANRL, ValueBased
from ctrlrl.nets.discrete import DiscreteActor, chosen

if TYPE_CHECKING:
    from ctrlrl.engine.learner import Nets
    from ctrlrl.engine.transition_config import TransitionConfig


@register
@dataclass(frozen=True)
class DQN(ValueBased):
    """One value per Discrete action, regressed on the reward and the value of the best next action."""

    paper: ClassVar[str] = "Human-level control through deep reinforcement learning (Mnih et al. 2015)"
    differs: ClassVar[str] = (
        "Defaults for vector observations are those of CleanRL's dqn.py (Adam, 120-84, an update of 128 rows every "
        "tenth step, a target copied every 500 steps), but with the paper's clipped error, which is the Huber loss. "
        "The target is copied by environment steps, not by updates. The preset sb3 has Stable-Baselines3's defaults, "
        "atari those of its zoo; frames are stacked and rewards clipped by the environment, if at all."
    )
    loop_defaults: ClassVar[Mapping[str, Any]] = CLEANRL
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "sb3": {
            "learning_rate": 1e-4, "replay_size": 1_000_000, "learning_starts": 100, "batch_size": 32,
            "replay_ratio": 0.25, "target_steps": 10_000, "epsilon_share": 0.1, "max_grad_norm": 10.0,
            "critic_hidden": (64, 64),
        },
        "atari": {
            "learning_rate": 1e-4, "replay_size": 100_000, "learning_starts": 100_000, "batch_size": 32,
            "replay_ratio": 0.25, "target_steps": 1_000, "epsilon_end": 0.01, "epsilon_share": 0.1,
            "max_grad_norm": 10.0, "critic_hidden": (),
        },
    }  # fmt: skip

    double: bool = False
    """Choose the next action by the network itself and only value it by the target (Double DQN, arXiv:1509.06461)."""

    def networks(self, spaces: Spaces, config: TransitionConfig, encoder: Callable[..., nn.Module] | None) -> Networks:
        actor = DiscreteActor(spaces.observation, spaces.action, config.network, encoder)
        return Networks(actor, {}, {"actor_target": "actor"})

    def update(
        self, nets: Nets, batch: Transitions, noise: Mapping[str, Tensor], knobs: Mapping[str, Tensor], phase: int
    ) -> dict[str, Tensor]:
        with torch.no_grad():
            values = nets["actor_target"](batch.next_obs)
            best = (nets["actor"](batch.next_obs) if self.double else values).argmax(1)
            target = batch.reward_t + knobs["gamma"] * (1.0 - batch.terminated_t) * chosen(values, best)

        def loss(actor: Callable[..., Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
            q = chosen(actor(batch.obs), batch.action)
            value = huber(target - q, self.kappa).mean()
            return value, {"critic_loss": value.detach(), "q": q.detach().mean()}

        metrics = nets.descend("actor", loss)
        self.follow(nets, knobs)
        return metrics
