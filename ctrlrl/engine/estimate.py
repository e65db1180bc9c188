"""From what was collected to what a loss sees: values, log-probabilities, scaled rewards, advantages."""

from __future__ import annotations

from typing import Any

import torch

from ctrlrl.core import advantage
from ctrlrl.engine.collected import Collected, next_values
from ctrlrl.engine.config import OnPolicyConfig
from ctrlrl.losses.base import PolicyLoss
from ctrlrl.nets.normalizer import RewardNormalizer
from ctrlrl.types import SequenceBatch


@torch.no_grad()
def estimate(
    policy: Any,
    loss: PolicyLoss,
    config: OnPolicyConfig,
    reward_normalizer: RewardNormalizer,
    collected: Collected,
    likelihood: bool = True,
) -> SequenceBatch:
    """The update batch [T * N, 1] of a rollout, under the policy that collected it.

    Without ``likelihood`` the log-probabilities are left out, for policies whose stored action is a whole chain.
    """
    c = collected
    if "value" in loss.critics:
        value, value_t = next_values(lambda obs: policy.values(obs)["value"], c)
    else:
        value = value_t = torch.zeros_like(c.reward_t)
    cut_t = c.terminated_t | c.truncated_t | ~c.valid_t
    reward_t = reward_normalizer(c.reward_t, cut_t, c.valid_t) if config.normalize_reward else c.reward_t
    discount_t = config.gamma * (~c.terminated_t).to(value.dtype)
    gain = advantage.gae(reward_t, discount_t, cut_t, value, value_t, config.gae_lambda)
    estimates = {"value": value, "value_t": value_t, "advantage": gain, "value_target": gain + value}
    if likelihood:
        out = policy(c.obs, c.action)
        estimates["logp_old"] = out.logp
        if "dist_old" in loss.needs | loss.uses:
            return c.rollout(**estimates, dist_old=out.dist.params()).flat()
    return c.rollout(**estimates).flat()
