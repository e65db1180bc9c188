"""IQL: values by expectile regression, so that no action outside the data is ever asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from ctrlrl.data.transitions import Transitions
from ctrlrl.engine.algorithm import Networks, OfflineAlgorithm, Spaces, register
from ctrlrl.nets.actors import GaussianActor
from ctrlrl.nets.q_ensemble import QEnsemble

if TYPE_CHECKING:
    from ctrlrl.engine.learner import Nets
    from ctrlrl.engine.transition_config import TransitionConfig


@register
@dataclass(frozen=True)
class IQL(OfflineAlgorithm):
    """V is an expectile of Q over the data's actions, Q the reward plus V; the policy imitates, weighted by exp(Q - V).

    One update is, as in the released code: V on the target critics, the policy with the new V and the target critics,
    the critics on the new V, the targets.
    """

    paper: ClassVar[str] = "Offline Reinforcement Learning with Implicit Q-Learning, arXiv:2110.06169"
    differs: ClassVar[str] = (
        "Networks start as torch's layers do, not orthogonal, and the policy has no dropout, which the released code "
        "has on Adroit and kitchen. What depends on the data is left to the settings: scale_by_returns on locomotion, "
        "reward_shift=-1, expectile=0.9 and beta=10 on antmaze, beta=0.5 on Adroit and kitchen. The density of an "
        "action is that of the uncut Gaussian."
    )
    loop_defaults: ClassVar[Mapping[str, Any]] = {"actor_schedule": "cosine"}

    expectile: float = 0.7
    """Which expectile of Q over the data's actions V is: 0.5 is their mean, towards 1 the best of them."""
    beta: float = 3.0
    """Factor on the advantage in the policy's weights: 0 is cloning, the larger the greedier."""
    max_weight: float = 100.0
    """Largest weight of an action in the policy's loss."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 < self.expectile < 1.0:
            raise ValueError(f"expectile={self.expectile} must lie between 0 and 1")
        if not self.beta >= 0.0:
            raise ValueError(f"beta={self.beta} must not be negative")
        if not self.max_weight > 0.0:
            raise ValueError(f"max_weight={self.max_weight} must be positive")

    def noise(
        self, n: int, batch_size: int, action_size: int, generator: torch.Generator, params: int = 0
    ) -> dict[str, Tensor]:
        return {}

    def networks(self, spaces: Spaces, config: TransitionConfig, encoder: Callable[..., nn.Module] | None) -> Networks:
        actor = GaussianActor(spaces.observation, spaces.action, config.network, encoder=encoder)
        critic = QEnsemble(spaces.observation, actor.action_shape[0], config.network, encoder)
        value = QEnsemble(spaces.observation, 0, config.network, encoder, members=1)
        return Networks(actor, {"value": value, "critic": critic}, {"critic_target": "critic"})

    def update(
        self, nets: Nets, batch: Transitions, noise: Mapping[str, Tensor], knobs: Mapping[str, Tensor], phase: int
    ) -> dict[str, Tensor]:
        with torch.no_grad():
            q_data = nets["critic_target"](batch.obs, batch.action).amin(0)

        def value_loss(value: Callable[..., Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
            v = value(batch.obs)[0]
            loss = expectile_loss(q_data - v, self.expectile)
            return loss, {"value_loss": loss.detach(), "v": v.detach().mean()}

        metrics = nets.descend("value", value_loss)
        with torch.no_grad():
            advantage = q_data - nets["value"](batch.obs)[0]
            weight = (self.beta * advantage).exp().clamp(max=self.max_weight)
            target = batch.reward_t + knobs["gamma"] * (1.0 - batch.terminated_t) * nets["value"](batch.next_obs)[0]

        def actor_loss(actor: Callable[..., Any]) -> tuple[Tensor, dict[str, Tensor]]:
            loss = -(weight * actor(batch.obs).log_prob(batch.action)).mean()
            return loss, {"actor_loss": loss.detach()}

        def critic_loss(critic: Callable[..., Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
            q = critic(batch.obs, batch.action)
            loss = (q - target).square().mean(1).sum()
            return loss, {"critic_loss": loss.detach(), "q": q.detach().mean()}

        metrics |= nets.descend("actor", actor_loss)
        metrics |= nets.descend("critic", critic_loss)
        nets.track("critic_target", "critic", knobs["tau"])
        return metrics | {"advantage": advantage.mean(), "weight": weight.mean()}


def expectile_loss(error: Tensor, expectile: float) -> Tensor:
    """Mean of |expectile - 1(error < 0)| error^2, a scalar (Kostrikov et al. 2021, eq. 5).

    Args:
        error: [B] target minus prediction.
        expectile: In (0, 1); 0.5 is half the mean square.
    """
    return torch.where(error < 0.0, 1.0 - expectile, expectile).mul(error.square()).mean()
