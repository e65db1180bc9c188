"""RARL: TD3 against a second TD3 that moves the environment's parameters at every step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import gymnasium as gym
import numpy as np
import torch
from torch import Tensor, nn

from ctrlrl.data.transitions import Transitions
from ctrlrl.engine.algorithm import Networks, Spaces, register
from ctrlrl.engine.learner import Learner
from ctrlrl.nets.actors import DeterministicActor
from ctrlrl.nets.q_ensemble import QEnsemble
from ctrlrl.online.adversarial import Adversarial
from ctrlrl.types import Obs

if TYPE_CHECKING:
    from ctrlrl.engine.learner import Nets
    from ctrlrl.engine.transition_config import TransitionConfig


@register
@dataclass(frozen=True)
class RARL(Adversarial):
    """Protagonist and adversary see the same observation, act at once, and take turns to learn a zero-sum game."""

    paper: ClassVar[str] = "Robust Adversarial Reinforcement Learning, arXiv:1703.02702"
    differs: ClassVar[str] = (
        "Both players learn by TD3 from one replay instead of TRPO, as in later comparisons (Zouitine et al. 2024), "
        "and take turns of a few updates instead of whole iterations; each treats the other as part of its "
        "environment, and learns from data against earlier opponents too. The adversary does not see the "
        "protagonist's action. It moves whatever parameters the environment lets be set: forces (the paper's own), "
        "masses, frictions. During the warm-up they are uniform at every step."
    )
    per_step: ClassVar[bool] = True

    adversary_every: int = 2
    """One turn of this many is the adversary's; with 1 both learn in every turn. A turn is one update of an actor,
    with the updates of its critics that go with it (policy_delay)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.adversary_every < 1:
            raise ValueError(f"adversary_every={self.adversary_every} must be at least 1")

    @property
    def period(self) -> int:
        return self.policy_delay * self.adversary_every

    def networks(self, spaces: Spaces, config: TransitionConfig, encoder: Callable[..., nn.Module] | None) -> Networks:
        box = gym.spaces.Box(-1.0, 1.0, (spaces.params,), np.float32)
        actor, adversary = (
            DeterministicActor(
                spaces.observation, space, config.network, encoder=encoder, exploration_noise=self.exploration_noise
            )
            for space in (spaces.action, box)
        )
        critic, adversary_critic = (
            QEnsemble(spaces.observation, player.action_shape[0], config.network, encoder)
            for player in (actor, adversary)
        )
        trained = {"critic": critic, "adversary": adversary, "adversary_critic": adversary_critic}
        return Networks(actor, trained, {f"{name}_target": name for name in ("actor", *trained)})

    def update(
        self, nets: Nets, batch: Transitions, noise: Mapping[str, Tensor], knobs: Mapping[str, Tensor], phase: int
    ) -> dict[str, Tensor]:
        turn, place = divmod(phase, self.policy_delay)
        adversarys = turn == self.adversary_every - 1
        delayed = place == self.policy_delay - 1
        metrics: dict[str, Tensor] = {}
        if not adversarys or self.adversary_every == 1:
            metrics |= self._td3(nets, "actor", "critic", batch, batch.action, noise["next_action"], knobs, delayed)
        if adversarys:
            paid = batch._replace(reward_t=-batch.reward_t)
            played = batch.extras["params"]
            found = self._td3(nets, "adversary", "adversary_critic", paid, played, noise["next_params"], knobs, delayed)
            metrics |= {f"adversary_{k}": v for k, v in found.items()}
        return metrics

    def _td3(
        self, nets: Nets, actor: str, critic: str, batch: Transitions, played: Tensor, noise: Tensor,
        knobs: Mapping[str, Tensor], delayed: bool,
    ) -> dict[str, Tensor]:  # fmt: skip
        """TD3's update of one player, who played ``played`` [B, k] and is paid the batch's reward."""
        with torch.no_grad():
            following = self.smoothed(nets[f"{actor}_target"](batch.next_obs), noise)
            value = nets[f"{critic}_target"](batch.next_obs, following).amin(0)
            target = batch.reward_t + knobs["gamma"] * (1.0 - batch.terminated_t) * value

        def actor_loss(network: Callable[..., Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
            value = -nets[critic](batch.obs, network(batch.obs), members=1).mean()
            return value, {"actor_loss": value.detach()}

        metrics = nets.descend(critic, self.regression(batch, (played,), target))
        if delayed:
            metrics |= nets.descend(actor, actor_loss)
            for network in (actor, critic):
                nets.track(f"{network}_target", network, knobs["tau"])
        return metrics

    def choose(
        self, learner: Learner, count: int, obs: Obs | None, generator: torch.Generator, progress: float
    ) -> Tensor:
        """The adversary's parameters at ``obs``, with exploration noise."""
        adversary = learner.modules["adversary"]
        assert isinstance(adversary, DeterministicActor) and obs is not None
        return adversary.act(obs, adversary.noise(1, count, generator)[0].to(learner.device))
