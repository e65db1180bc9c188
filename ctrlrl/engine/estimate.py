"""From what was collected to what a loss sees: values, log-probabilities, scaled rewards, advantages."""

from __future__ import annotations

import torch

from ctrlrl.core import advantage
from ctrlrl.engine.collected import Collected, next_values
from ctrlrl.engine.config import OnPolicyConfig
from ctrlrl.losses.base import PolicyLoss
from ctrlrl.nets.actor_critic import ActorCritic
from ctrlrl.nets.normalizer import RewardNormalizer
from ctrlrl.types import SequenceBatch


@torch.no_grad()
def estimate(
    policy: ActorCritic,
    loss: PolicyLoss,
    config: OnPolicyConfig,
    reward_normalizer: RewardNormalizer,
    collected: Collected,
) -> SequenceBatch:
    """The update batch [T * N, 1] of a rollout, under the policy that collected it."""
    c = collected
    value, value_t = next_values(lambda obs: policy.values(obs)["value"], c)
    cut_t = c.terminated_t | c.truncated_t | ~c.valid_t
    reward_t = reward_normalizer(c.reward_t, cut_t, c.valid_t) if config.normalize_reward else c.reward_t
    discount_t = config.gamma * (~c.terminated_t).to(value.dtype)
    gain = advantage.gae(reward_t, discount_t, cut_t, value, value_t, config.gae_lambda)
    out = policy(c.obs, c.action)
    return c.rollout(
        value=value,
        value_t=value_t,
        logp_old=out.logp,
        advantage=gain,
        value_target=gain + value,
        dist_old=out.dist.params() if "dist_old" in loss.needs else None,
    ).flat()
