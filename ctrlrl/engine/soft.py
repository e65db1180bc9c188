"""The coefficient of a policy's entropy, fixed or learned, for every method that has one."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ctrlrl.data.transitions import Transitions
from ctrlrl.engine.algorithm import Algorithm
from ctrlrl.types import Obs

if TYPE_CHECKING:
    from ctrlrl.engine.learner import Loss, Nets


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

    def soft_target(self, nets: Nets, batch: Transitions, noise: Tensor, gamma: Tensor, alpha: Tensor) -> Tensor:
        """[B] reward and discounted smallest value of the policy's next action, with its entropy's bonus.

        Haarnoja et al. (2018b), eq. 3 and 5, with the smallest of the target critics.
        """
        policy = nets["actor"](batch.next_obs)
        u = policy.pre_tanh(noise)
        soft_value = nets["critic_target"](batch.next_obs, u.tanh()).amin(0) - alpha * policy.log_prob(u)
        return batch.reward_t + gamma * (1.0 - batch.terminated_t) * soft_value

    def soft_policy_loss(self, nets: Nets, obs: Obs, noise: Tensor, alpha: Tensor) -> Loss:
        """The policy's loss, alpha log pi - Q of the smallest critic (eq. 7); "logp" [B] is among what it returns."""

        def loss(actor: Callable[..., Any]) -> tuple[Tensor, dict[str, Tensor]]:
            policy = actor(obs)
            u = policy.pre_tanh(noise)
            q = nets["critic"](obs, u.tanh()).amin(0)
            logp = policy.log_prob(u)
            value = (alpha * logp - q).mean()
            return value, {"actor_loss": value.detach(), "logp": logp.detach()}

        return loss

    def sac_update(
        self, nets: Nets, batch: Transitions, noise: Mapping[str, Tensor], knobs: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """SAC's whole update: critics, policy, coefficient, target critics."""
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
