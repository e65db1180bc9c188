"""CQL: soft actor-critic whose critics are pushed down on actions that the data does not show."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from ctrlrl.data.transitions import Transitions
from ctrlrl.engine.algorithm import Networks, OfflineAlgorithm, Spaces, register
from ctrlrl.engine.soft import Soft, Temperature
from ctrlrl.nets.actors import SquashedGaussian, SquashedGaussianActor
from ctrlrl.nets.q_ensemble import QEnsemble

if TYPE_CHECKING:
    from ctrlrl.engine.learner import Loss, Nets
    from ctrlrl.engine.transition_config import TransitionConfig

MOST = 1e6
"""Largest factor of the Lagrange version."""
INSIDE = 1.0 - 1e-6
"""Largest size of an action whose density is asked for."""


@register
@dataclass(frozen=True)
class CQL(Soft, OfflineAlgorithm):
    """Two critics with log-sum-exp of their values minus the value of the data's action as a penalty: CQL(H).

    Policy, temperature and critics all take their step from the networks before the update, as in the released code.
    """

    paper: ClassVar[str] = "Conservative Q-Learning for Offline Reinforcement Learning, arXiv:2006.04779"
    differs: ClassVar[str] = (
        "Defaults are those of CORL on locomotion: a fixed weight of 10, no warm-up, observations normalised, and "
        "but networks start as torch's layers do. As in the released code, targets have no entropy, and the sum over "
        "the 3 cql_actions samples is not divided by their number, which matters to cql_gap alone: it lies "
        "log(3 cql_actions) above the paper's. max_backup takes the best of the smaller values, CORL's order."
    )
    loop_defaults: ClassVar[Mapping[str, Any]] = {
        "learning_rate": 3e-5, "critic_learning_rate": 3e-4, "normalize_obs": True,
        "actor_hidden": (256, 256, 256), "critic_hidden": (256, 256, 256),
    }  # fmt: skip

    cql_alpha: float = 10.0
    """Weight of the penalty."""
    cql_gap: float | None = None
    """Penalty that a learned factor on cql_alpha aims at (the Lagrange version); None leaves the factor at 1."""
    cql_actions: int = 10
    """Actions per state from each source: uniform, the policy here, and the policy at the next state."""
    penalty: Literal["logsumexp", "expectation"] = "logsumexp"
    """Compare the data's action with the soft maximum over all actions, or with the policy's mean value: CQL(H), or
    the paper's eq. 2 for the policy, which is zero where the policy is the data's."""
    max_backup: bool = False
    """Take the best of the policy's actions at the next state as target."""
    backup_entropy: bool = False
    """Add the entropy's bonus to the target, as SAC does."""
    bc_steps: int = 0
    """Updates of the policy, at first, that clone the data's actions instead of following the critics."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 <= self.cql_alpha < math.inf:
            raise ValueError(f"cql_alpha={self.cql_alpha} must not be negative, nor infinite")
        if self.cql_gap is not None and not math.isfinite(self.cql_gap):
            raise ValueError(f"cql_gap={self.cql_gap} must be finite")
        if self.cql_actions < 1:
            raise ValueError(f"cql_actions={self.cql_actions} must be at least 1")
        if self.bc_steps < 0:
            raise ValueError(f"bc_steps={self.bc_steps} must not be negative")
        if self.max_backup and self.backup_entropy:
            raise ValueError("max_backup has no entropy to add; leave backup_entropy off")

    def noise(
        self, n: int, batch_size: int, action_size: int, generator: torch.Generator, params: int = 0
    ) -> dict[str, Tensor]:
        """As in Algorithm, and samples [n, B, cql_actions, A] by source; "random" is uniform in [-1, 1]."""
        found = super().noise(n, batch_size, action_size, generator)
        shape = (n, batch_size, self.cql_actions, action_size)
        found["here"] = torch.randn(shape, generator=generator, device=generator.device)
        if self.penalty == "logsumexp" or self.max_backup:
            found["there"] = torch.randn(shape, generator=generator, device=generator.device)
        if self.penalty == "logsumexp":
            found["random"] = torch.rand(shape, generator=generator, device=generator.device) * 2.0 - 1.0
        return found

    def networks(self, spaces: Spaces, config: TransitionConfig, encoder: Callable[..., nn.Module] | None) -> Networks:
        actor = SquashedGaussianActor(spaces.observation, spaces.action, config.network, encoder=encoder)
        critic = QEnsemble(spaces.observation, actor.action_shape[0], config.network, encoder)
        factor = {} if self.cql_gap is None else {"cql_factor": Temperature(1.0)}
        return Networks(actor, {"critic": critic, **self.temperature(), **factor}, {"critic_target": "critic"})

    def update(
        self, nets: Nets, batch: Transitions, noise: Mapping[str, Tensor], knobs: Mapping[str, Tensor], phase: int
    ) -> dict[str, Tensor]:
        alpha = self.alpha(nets, batch.reward_t)
        with torch.no_grad():
            here, there = nets["actor"](batch.obs), nets["actor"](batch.next_obs)
            value = self._next_value(nets["critic_target"], batch, there, noise, alpha)
            target = batch.reward_t + knobs["gamma"] * (1.0 - batch.terminated_t) * value
            samples, logp_samples = self._samples(here, there, noise)
            actions = torch.cat([batch.action.unsqueeze(1), samples], 1)

        metrics = nets.descend("actor", self._actor_loss(nets, batch, noise["action"], alpha))
        logp = metrics.pop("logp")
        metrics |= self.adapt(nets, logp, batch.action.shape[-1])
        factor = 1.0 if self.cql_gap is None else nets["cql_factor"]().exp().clamp(max=MOST)

        def critic_loss(critic: Callable[..., Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
            q, q_samples = critic(batch.obs, actions, many=True).split([1, samples.shape[1]], -1)
            value = (q.squeeze(-1) - target).square().mean(1).sum()
            over = soft_maximum(q_samples, logp_samples) if self.penalty == "logsumexp" else q_samples.mean(-1)
            gap = (over - q.squeeze(-1)).mean(1)
            penalty = self.cql_alpha * gap.sum() * factor
            found = {"critic_loss": value.detach(), "q": q.detach().mean(), "cql_penalty": gap.detach().mean()}
            return value + penalty, found

        metrics |= nets.descend("critic", critic_loss)
        if self.cql_gap is not None:
            metrics |= self._adapt_factor(nets, metrics["cql_penalty"] - self.cql_gap)
            metrics["cql_factor"] = torch.as_tensor(factor)
        nets.track("critic_target", "critic", knobs["tau"])
        return metrics | {"ent_coef": alpha, "entropy": -logp.mean()}

    def _samples(
        self, here: SquashedGaussian, there: SquashedGaussian, noise: Mapping[str, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Actions [B, n, A] to compare the data's with, and the log-density [B, n] of each where it came from."""
        drawn, logp = several(here, noise["here"])
        if self.penalty == "expectation":
            return drawn, logp
        others, others_logp = several(there, noise["there"])
        uniform = noise["random"]
        uniform_logp = torch.full_like(logp, -uniform.shape[-1] * math.log(2.0))
        return torch.cat([uniform, drawn, others], 1), torch.cat([uniform_logp, logp, others_logp], 1)

    def _next_value(
        self, critic: Callable[..., Tensor], batch: Transitions, policy: SquashedGaussian, noise: Mapping[str, Tensor],
        alpha: Tensor,
    ) -> Tensor:  # fmt: skip
        """[B] value of the next state."""
        if self.max_backup:
            return critic(batch.next_obs, several(policy, noise["there"])[0], many=True).amin(0).amax(-1)
        u = policy.pre_tanh(noise["next_action"])
        value = critic(batch.next_obs, u.tanh()).amin(0)
        return value - alpha * policy.log_prob(u) if self.backup_entropy else value

    def _actor_loss(self, nets: Nets, batch: Transitions, noise: Tensor, alpha: Tensor) -> Loss:
        # by the count of the policy's own steps: the number of this update is not part of a compiled graph
        (done,) = nets.memory("actor/clock")

        def loss(actor: Callable[..., Any]) -> tuple[Tensor, dict[str, Tensor]]:
            policy = actor(batch.obs)
            u = policy.pre_tanh(noise)
            logp = policy.log_prob(u)
            good = nets["critic"](batch.obs, u.tanh()).amin(0)
            if self.bc_steps > 0:
                # at a bound no u gives the action
                stored = batch.action.clamp(-INSIDE, INSIDE).atanh()
                good = torch.where(done < self.bc_steps, policy.log_prob(stored), good)
            value = (alpha * logp - good).mean()
            return value, {"actor_loss": value.detach(), "logp": logp.detach()}

        return loss

    def _adapt_factor(self, nets: Nets, excess: Tensor) -> dict[str, Tensor]:
        """One step of the factor, up where the penalty is above its aim (Kumar et al. 2020, appendix F)."""

        def loss(log_factor: Callable[[], Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
            value = -log_factor().exp().clamp(max=MOST) * self.cql_alpha * excess
            return value, {"cql_factor_loss": value.detach()}

        return nets.descend("cql_factor", loss)


def several(policy: SquashedGaussian, noise: Tensor) -> tuple[Tensor, Tensor]:
    """The actions [B, n, A] that ``noise`` [B, n, A] selects of a policy over [B], and their log-densities [B, n]."""
    wide = SquashedGaussian(policy.mean.unsqueeze(1), policy.log_std.unsqueeze(1))
    u = wide.pre_tanh(noise)
    return u.tanh(), wide.log_prob(u)


def soft_maximum(q: Tensor, logp: Tensor) -> Tensor:
    """log of the sum over samples of exp(q) / density: less log(n), it estimates log of the integral of exp(Q).

    Kumar et al. (2020), appendix F, without the division by the number of samples, as in the released code.

    Args:
        q: [E, B, n] values of sampled actions.
        logp: [B, n] log-density with which each was sampled.

    Returns:
        [E, B].
    """
    return torch.logsumexp(q - logp, -1)
