"""SAC: soft actor-critic with a learned temperature."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

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
        return self.sac_update(nets, batch, noise, knobs)
