"""TD3+BC: TD3 whose policy is also regressed on the data's actions."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from ctrlrl.data.transitions import Transitions
from ctrlrl.engine.algorithm import Networks, OfflineAlgorithm, Spaces, register
from ctrlrl.nets.actors import DeterministicActor
from ctrlrl.nets.q_ensemble import QEnsemble

if TYPE_CHECKING:
    from ctrlrl.engine.learner import Nets
    from ctrlrl.engine.transition_config import TransitionConfig


@register
@dataclass(frozen=True)
class TD3BC(OfflineAlgorithm):
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
    policy_delay: int = 2
    """Updates of the critics for one of the policy and of the targets."""
    exploration_noise: float = 0.1
    """Deviation of the noise on collected actions when training goes on in an environment."""
    target_noise: float = 0.2
    """Deviation of the noise on the target policy's actions."""
    target_noise_clip: float = 0.5
    """Largest size of that noise."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.policy_delay < 1:
            raise ValueError(f"policy_delay={self.policy_delay} must be at least 1")
        for name in ("alpha", "exploration_noise", "target_noise", "target_noise_clip"):
            if not getattr(self, name) >= 0.0:
                raise ValueError(f"{name}={getattr(self, name)} must not be negative")

    @property
    def period(self) -> int:
        """Updates after which the pattern repeats."""
        return self.policy_delay

    def noise(
        self, n: int, batch_size: int, action_size: int, generator: torch.Generator, params: int = 0
    ) -> dict[str, Tensor]:
        shape = (n, batch_size, action_size)
        return {"next_action": torch.randn(shape, generator=generator, device=generator.device)}

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
            bound = self.target_noise_clip
            smoothing = (self.target_noise * noise["next_action"]).clamp(-bound, bound)
            action = (nets["actor_target"](batch.next_obs) + smoothing).clamp(-1.0, 1.0)
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
        if phase == self.policy_delay - 1:
            metrics |= nets.descend("actor", actor_loss)
            for network in ("actor", "critic"):
                nets.track(f"{network}_target", network, knobs["tau"])
        return metrics
