"""SAC: soft actor-critic with a learned temperature."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from ctrlrl.data.transitions import Transitions
from ctrlrl.engine.algorithm import Algorithm, Networks, Spaces, register
from ctrlrl.nets.actors import SquashedGaussianActor
from ctrlrl.nets.q_ensemble import QEnsemble

if TYPE_CHECKING:
    from ctrlrl.engine.learner import Nets
    from ctrlrl.engine.off_policy_config import OffPolicyConfig


class Temperature(nn.Module):
    """The entropy coefficient, exp of one parameter; calling it gives the log."""

    def __init__(self, initial: float) -> None:
        super().__init__()
        self.log = nn.Parameter(torch.tensor(initial).log())

    def forward(self) -> Tensor:
        return self.log


@dataclass(frozen=True)
class Soft(Algorithm):
    """What the soft methods share: the coefficient of the entropy, fixed or learned."""

    entropy_temp: float | None = None
    """Coefficient of the policy's entropy (alpha); None learns it so that the entropy meets the target."""
    entropy_temp_init: float = 1.0
    """Where a learned coefficient starts."""
    target_entropy: float | None = None
    """Entropy in nats, of the squashed action, that a learned coefficient aims at; None is minus the number of
    action dimensions."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.target_entropy is not None and not math.isfinite(self.target_entropy):
            raise ValueError(f"target_entropy={self.target_entropy} must be finite")
        if self.entropy_temp is not None and not self.entropy_temp >= 0.0:
            raise ValueError(f"entropy_temp={self.entropy_temp} must not be negative")
        if not self.entropy_temp_init > 0.0:
            raise ValueError(f"entropy_temp_init={self.entropy_temp_init} must be positive")

    def temperature(self) -> dict[str, nn.Module]:
        """The network of a learned coefficient."""
        return {"temperature": Temperature(self.entropy_temp_init)} if self.entropy_temp is None else {}

    def alpha(self, nets: Nets, like: Tensor) -> Tensor:
        """The coefficient as it stands, a scalar of the type and device of ``like``."""
        return nets["temperature"]().exp() if self.entropy_temp is None else like.new_full((), self.entropy_temp)

    def adapt(self, nets: Nets, logp: Tensor, dims: int) -> dict[str, Tensor]:
        """One step of a learned coefficient on -log(alpha) (logp + target).

        Haarnoja et al. (2018b), eq. 18, with log(alpha) in place of alpha as their released code has it. ``logp`` [B]
        is that of the policy before its own step.
        """
        if self.entropy_temp is not None:
            return {}
        target = -float(dims) if self.target_entropy is None else self.target_entropy
        excess = (logp + target).detach()

        def loss(log_alpha: Callable[[], Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
            value = -(log_alpha() * excess).mean()
            return value, {"ent_coef_loss": value.detach()}

        return nets.descend("temperature", loss)


@register
@dataclass(frozen=True)
class SAC(Soft):
    """Maximise the entropy-regularised return with two critics, their smaller value as target."""

    paper: ClassVar[str] = "Soft Actor-Critic Algorithms and Applications, arXiv:1812.05905"
    differs: ClassVar[str] = (
        "The coefficient of the entropy is learned through its logarithm, as in the released code. One update per "
        "environment step after 10,000 random ones."
    )

    def networks(self, spaces: Spaces, config: OffPolicyConfig, encoder: Callable[..., nn.Module] | None) -> Networks:
        actor = SquashedGaussianActor(spaces.observation, spaces.action, config.network, encoder=encoder)
        critic = QEnsemble(spaces.observation, actor.action_shape[0], config.network, encoder)
        return Networks(actor, {"critic": critic, **self.temperature()}, {"critic_target": "critic"})

    def update(
        self, nets: Nets, batch: Transitions, noise: Mapping[str, Tensor], knobs: Mapping[str, Tensor], phase: int
    ) -> dict[str, Tensor]:
        alpha = self.alpha(nets, batch.reward_t)
        with torch.no_grad():
            policy = nets["actor"](batch.next_obs)
            u = policy.pre_tanh(noise["next_action"])
            soft_value = nets["critic_target"](batch.next_obs, u.tanh()).amin(0) - alpha * policy.log_prob(u)
            target = batch.reward_t + knobs["gamma"] * (1.0 - batch.terminated_t) * soft_value

        def critic_loss(critic: Callable[..., Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
            q = critic(batch.obs, batch.action)
            value = 0.5 * (q - target).square().mean(1).sum()
            return value, {"critic_loss": value.detach(), "q": q.detach().mean()}

        def actor_loss(actor: Callable[..., Any]) -> tuple[Tensor, dict[str, Tensor]]:
            policy = actor(batch.obs)
            u = policy.pre_tanh(noise["action"])
            q = nets["critic"](batch.obs, u.tanh()).amin(0)
            logp = policy.log_prob(u)
            value = (alpha * logp - q).mean()
            return value, {"actor_loss": value.detach(), "logp": logp.detach()}

        metrics = nets.descend("critic", critic_loss)
        metrics |= nets.descend("actor", actor_loss)
        logp = metrics.pop("logp")
        metrics |= self.adapt(nets, logp, batch.action.shape[-1])
        nets.track("critic_target", "critic", knobs["tau"])
        return metrics | {"ent_coef": alpha, "entropy": -logp.mean()}
