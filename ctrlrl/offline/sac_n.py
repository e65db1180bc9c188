"""SAC-N: soft actor-critic whose target is the smallest of many critics."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from ctrlrl.data.transitions import Transitions
from ctrlrl.engine.algorithm import Networks, OfflineAlgorithm, Spaces, register
from ctrlrl.engine.soft import Soft
from ctrlrl.nets.actors import SquashedGaussianActor
from ctrlrl.nets.q_ensemble import QEnsemble, start_flat
from ctrlrl.types import Obs

if TYPE_CHECKING:
    from ctrlrl.engine.learner import Nets
    from ctrlrl.engine.transition_config import TransitionConfig


@register
@dataclass(frozen=True)
class SACN(Soft, OfflineAlgorithm):
    """The more critics, the lower the smallest of them where the data says little.

    Policy, temperature and critics all take their step from the networks before the update, as in the released code.
    """

    paper: ClassVar[str] = (
        "Uncertainty-Based Offline Reinforcement Learning with Diversified Q-Ensemble, arXiv:2110.01548"
    )
    differs: ClassVar[str] = (
        "n_critics is 10, the paper's number on HalfCheetah; it has 500 on Hopper and 20 on Walker2d. The policy's "
        "hidden weights start uniform in +-1/sqrt(inputs); the released code takes the outputs of the layer."
    )
    loop_defaults: ClassVar[Mapping[str, Any]] = {
        "n_critics": 10, "actor_hidden": (256, 256, 256), "critic_hidden": (256, 256, 256),
        "log_std_min": -5.0,
    }  # fmt: skip

    def networks(self, spaces: Spaces, config: TransitionConfig, encoder: Callable[..., nn.Module] | None) -> Networks:
        actor = SquashedGaussianActor(spaces.observation, spaces.action, config.network, encoder=encoder)
        critic = QEnsemble(spaces.observation, actor.action_shape[0], config.network, encoder)
        start_flat([*actor.body, actor.mean], 1e-3)
        start_flat([actor.log_std], 1e-3)
        start_flat(critic.body, 3e-3)
        return Networks(actor, {"critic": critic, **self.temperature()}, {"critic_target": "critic"})

    def values(self, critic: Callable[..., Tensor], obs: Obs, action: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Values [E, B] of the data, and what to add to the critics' loss, by name."""
        return critic(obs, action), {}

    def update(
        self, nets: Nets, batch: Transitions, noise: Mapping[str, Tensor], knobs: Mapping[str, Tensor], phase: int
    ) -> dict[str, Tensor]:
        alpha = self.alpha(nets, batch.reward_t)
        with torch.no_grad():
            target = self.soft_target(nets, batch, noise["next_action"], knobs["gamma"], alpha)

        def critic_loss(critic: Callable[..., Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
            q, further = self.values(critic, batch.obs, batch.action)
            value = (q - target).square().mean(1).sum()
            found = {
                "critic_loss": value.detach(),
                "q": q.detach().mean(),
                "q_spread": q.detach().std(0, correction=0).mean(),
            }
            found |= {name: term.detach() for name, term in further.items()}
            return sum(further.values(), value), found

        metrics = nets.descend("actor", self.soft_policy_loss(nets, batch.obs, noise["action"], alpha))
        logp = metrics.pop("logp")
        metrics |= self.adapt(nets, logp, batch.action.shape[-1])
        metrics |= nets.descend("critic", critic_loss)
        nets.track("critic_target", "critic", knobs["tau"])
        return metrics | {"ent_coef": alpha, "entropy": -logp.mean()}
