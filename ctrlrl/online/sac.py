"""SAC: soft actor-critic with a learned temperature."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn

from ctrlrl.data.transitions import Transitions
from ctrlrl.engine.algorithm import Networks, Spaces, register
from ctrlrl.engine.soft import Soft as Soft
from ctrlrl.nets.actors import SquashedGaussianActor
from ctrlrl.nets.q_ensemble import QEnsemble

if TYPE_CHECKING:
    from ctrlrl.engine.learner import Nets
    from ctrlrl.engine.transition_config import TransitionConfig


@register
@dataclass(frozen=True)
class SAC(Soft):
    """Maximise the entropy-regularised return with two critics, their smaller value as target."""

    paper: ClassVar[str] = "Soft Actor-Critic Algorithms and Applications, arXiv:1812.05905"
    differs: ClassVar[str] = (
        "The coefficient of the entropy is learned through its logarithm, as in the released code. One update per "
        "environment step after 10,000 random ones."
    )

    def networks(self, spaces: Spaces, config: TransitionConfig, encoder: Callable[..., nn.Module] | None) -> Networks:
        actor = SquashedGaussianActor(spaces.observation, spaces.action, config.network, encoder=encoder)
        critic = QEnsemble(spaces.observation, actor.action_shape[0], config.network, encoder)
        return Networks(actor, {"critic": critic, **self.temperature()}, {"critic_target": "critic"})

    def update(
        self, nets: Nets, batch: Transitions, noise: Mapping[str, Tensor], knobs: Mapping[str, Tensor], phase: int
    ) -> dict[str, Tensor]:
        alpha = self.alpha(nets, batch.reward_t)
        with torch.no_grad():
            target = self.soft_target(nets, batch, noise["next_action"], knobs["gamma"], alpha)

        def critic_loss(critic: Callable[..., Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
            q = critic(batch.obs, batch.action)
            value = 0.5 * (q - target).square().mean(1).sum()
            return value, {"critic_loss": value.detach(), "q": q.detach().mean()}

        metrics = nets.descend("critic", critic_loss)
        metrics |= nets.descend("actor", self.soft_policy_loss(nets, batch.obs, noise["action"], alpha))
        logp = metrics.pop("logp")
        metrics |= self.adapt(nets, logp, batch.action.shape[-1])
        nets.track("critic_target", "critic", knobs["tau"])
        return metrics | {"ent_coef": alpha, "entropy": -logp.mean()}
