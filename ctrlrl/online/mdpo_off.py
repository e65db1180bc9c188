"""Off-policy mirror descent policy optimisation: SAC with a proximity to the policy of a while ago."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from ctrlrl.core import penalty
from ctrlrl.data.transitions import Transitions
from ctrlrl.engine.algorithm import Networks, Spaces, register
from ctrlrl.nets.actors import SquashedGaussian, SquashedGaussianActor
from ctrlrl.nets.q_ensemble import QEnsemble
from ctrlrl.online.sac import Soft

if TYPE_CHECKING:
    from ctrlrl.engine.learner import Learner, Nets
    from ctrlrl.engine.transition_config import TransitionConfig


def log_q(logp: Tensor, q: float, floor: float | None = None) -> Tensor:
    """Tsallis logarithm of a probability given by its log: ``(x^(q-1) - 1) / (q - 1)``, log x at q = 1.

    MDPO writes it log_q'(x) = (x^(1-q') - 1) / (1 - q') with q' = 2 - q; q = 2 gives x - 1.

    Args:
        logp: [...] log x.
        q: Entropic index.
        floor: Smallest x; below it the value is constant and the gradient zero, as the released code has it.
    """
    if floor is not None:
        logp = logp.clamp_min(math.log(floor))
    return logp if q == 1.0 else torch.expm1((q - 1.0) * logp) / (q - 1.0)


@register
@dataclass(frozen=True)
class MDPOOff(Soft):
    """Each step trades the value against the distance to the policy of some steps ago."""

    paper: ClassVar[str] = "Mirror Descent Policy Optimization, arXiv:2005.09814"
    differs: ClassVar[str] = (
        "Collects with the sampled action; the released code acts by the mode (deterministic_rollout). "
        "Log-probabilities are not floored; the released code cuts every dimension's at log(1e-6), which bounds the "
        "divergence silently (probability_floor). The preset released has both. The copy of the old Q kept there is "
        "never used, and not kept here. The state value is fitted to the critics just updated. In the forward "
        "direction the divergence is in closed form, and the entropy that of the new policy."
    )
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "released": {"deterministic_rollout": True, "probability_floor": 1e-6},
        "sac": {
            "entropy_temp": None, "kl_coef": None, "value_network": False, "actor_critic": "min",
            "mean_penalty": 0.0, "log_std_penalty": 0.0,
        },
    }  # fmt: skip

    entropy_temp: float | None = 0.2
    """Coefficient of the policy's entropy (lambda); None learns it so that the entropy meets the target."""
    kl_coef: float | None = 1.0
    """Weight of the distance to the old policy, one over the step size of mirror descent (c = 1/t); None is the
    entropy's own coefficient, with which the policy's objective is SAC's but for penalties and floor."""
    proximity: Literal["reverse", "forward"] = "reverse"
    """KL(new || old), which is mirror descent, or KL(old || new), as exploratory conservative policy optimisation."""
    tsallis_q: float = 1.0
    """Entropic index of divergence and entropy, in [1, 2]: 1 is Kullback-Leibler and Shannon."""
    refresh_steps: int = 1_000
    """Environment steps after which the old policy is set to the present one."""
    value_network: bool = True
    """Learn a state value, whose slow copy is in the critics' target (SAC's first version); False takes the slow
    critics at a fresh action (SAC's later version)."""
    actor_critic: Literal["first", "min"] = "first"
    """Critic that the policy climbs: the first, or the smallest."""
    mean_penalty: float = 1e-3
    """Weight of the squared mean of the unsquashed action."""
    log_std_penalty: float = 1e-3
    """Weight of its squared log-deviation."""
    deterministic_rollout: bool = False
    """Collect data with the mode of the policy instead of a sample."""
    probability_floor: float | None = None
    """Smallest density per action dimension; None is no floor."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("kl_coef", "mean_penalty", "log_std_penalty"):
            value = getattr(self, name)
            if value is not None and not value >= 0.0:
                raise ValueError(f"{name}={value} must not be negative")
        if not 1.0 <= self.tsallis_q <= 2.0:
            raise ValueError(f"tsallis_q={self.tsallis_q} must lie in [1, 2]")
        if self.refresh_steps < 1:
            raise ValueError(f"refresh_steps={self.refresh_steps} must be at least 1")
        if self.probability_floor is not None and not 0.0 < self.probability_floor < 1.0:
            raise ValueError(f"probability_floor={self.probability_floor} must lie in (0, 1)")
        if self.proximity == "forward" and self.tsallis_q != 1.0:
            raise ValueError("proximity='forward' is defined here for tsallis_q=1 only")
        if self.kl_coef is None and self.proximity == "forward":
            raise ValueError("kl_coef=None is SAC's update, without a proximity; proximity='forward' has no part in it")
        if self.kl_coef is None and self.tsallis_q != 1.0:
            raise ValueError("kl_coef=None is SAC's update, which is defined for tsallis_q=1 only")

    @property
    def deterministic_collection(self) -> bool:
        return self.deterministic_rollout

    def networks(self, spaces: Spaces, config: TransitionConfig, encoder: Callable[..., nn.Module] | None) -> Networks:
        actor = SquashedGaussianActor(spaces.observation, spaces.action, config.network, encoder=encoder)
        critic = QEnsemble(spaces.observation, actor.action_shape[0], config.network, encoder)
        trained: dict[str, nn.Module] = {"critic": critic, **self.temperature()}
        copies = {"actor_old": "actor"}
        if self.value_network:
            trained["value"] = QEnsemble(spaces.observation, 0, config.network, encoder, members=1)
            return Networks(actor, trained, copies | {"value_target": "value"})
        return Networks(actor, trained, copies | {"critic_target": "critic"})

    def after_steps(self, learner: Learner, before: int, after: int) -> None:
        if after // self.refresh_steps > before // self.refresh_steps:
            learner.copy("actor_old", "actor")

    def _log(self, policy: SquashedGaussian, u: Tensor) -> Tensor:
        """[B] Tsallis log-probability of tanh(u), summed over the action's dimensions."""
        return log_q(policy.log_density(u), self.tsallis_q, self.probability_floor).sum(-1)

    def policy_objective(
        self, policy: SquashedGaussian, old: SquashedGaussian, u: Tensor, q: Tensor, alpha: Tensor
    ) -> Tensor:
        """The actor's loss, without the penalties: a scalar.

        With c = ``kl_coef`` and lambda = ``alpha``: ``c log pi + (lambda - c) log pi_old - Q`` in the reverse
        direction, both logarithms Tsallis' and the second with a further factor q; ``lambda log pi - Q +
        c KL(old || new)`` in the forward one.

        Args:
            policy: The policy under training, batch of B.
            old: The policy of the last refresh.
            u: [B, A] actions before squashing.
            q: [B] their value.
            alpha: Entropy coefficient.
        """
        logp = self._log(policy, u)
        if self.kl_coef is None:
            return (alpha * logp - q).mean()
        if self.proximity == "forward":
            # invariant under the squashing, which both share
            distance = penalty.gaussian_kl(old.mean, old.log_std, policy.mean, policy.log_std)
            return (alpha * logp - q + self.kl_coef * distance).mean()
        proximal = self.tsallis_q * (alpha - self.kl_coef) * self._log(old, u)
        return (self.kl_coef * logp + proximal - q).mean()

    def update(
        self, nets: Nets, batch: Transitions, noise: Mapping[str, Tensor], knobs: Mapping[str, Tensor], phase: int
    ) -> dict[str, Tensor]:
        alpha = self.alpha(nets, batch.reward_t)
        with torch.no_grad():
            if self.value_network:
                following = nets["value_target"](batch.next_obs)[0]
            else:
                policy = nets["actor"](batch.next_obs)
                u = policy.pre_tanh(noise["next_action"])
                following = nets["critic_target"](batch.next_obs, u.tanh()).amin(0) - alpha * self._log(policy, u)
            target = batch.reward_t + knobs["gamma"] * (1.0 - batch.terminated_t) * following

        def critic_loss(critic: Callable[..., Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
            q = critic(batch.obs, batch.action)
            value = 0.5 * (q - target).square().mean(1).sum()
            return value, {"critic_loss": value.detach(), "q": q.detach().mean()}

        def actor_loss(actor: Callable[..., Any]) -> tuple[Tensor, dict[str, Tensor]]:
            policy, old = actor(batch.obs), nets["actor_old"](batch.obs)
            u = policy.pre_tanh(noise["action"])
            values = nets["critic"](batch.obs, u.tanh())
            q = values[0] if self.actor_critic == "first" else values.amin(0)
            value = self.policy_objective(policy, old, u, q, alpha)
            if self.mean_penalty:
                value = value + self.mean_penalty * policy.mean.square().mean()
            if self.log_std_penalty:
                value = value + self.log_std_penalty * policy.log_std.square().mean()
            soft_value = values.amin(0) - alpha * self._log(policy, u)
            logp = policy.log_prob(u)
            distance = penalty.gaussian_kl(policy.mean, policy.log_std, old.mean, old.log_std)
            kept = {"actor_loss": value, "kl_old": distance.mean(), "logp": logp, "soft_value": soft_value}
            return value, {k: v.detach() for k, v in kept.items()}

        metrics = nets.descend("critic", critic_loss)
        metrics |= nets.descend("actor", actor_loss)
        logp, soft_value = metrics.pop("logp"), metrics.pop("soft_value")
        metrics |= self.adapt(nets, logp, batch.action.shape[-1])

        def value_loss(state_value: Callable[..., Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
            value = 0.5 * (state_value(batch.obs)[0] - soft_value).square().mean()
            return value, {"value_loss": value.detach()}

        if self.value_network:
            metrics |= nets.descend("value", value_loss)
            nets.track("value_target", "value", knobs["tau"])
        else:
            nets.track("critic_target", "critic", knobs["tau"])
        return metrics | {"ent_coef": alpha, "entropy": -logp.mean()}
