"""From whole episodes to the batch that a loss sees: likelihoods, values, outcomes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ctrlrl.core import advantage
from ctrlrl.core.support import restricted_logp
from ctrlrl.data.episodes import Episodes
from ctrlrl.engine.config import OnPolicyConfig
from ctrlrl.losses.needs import Need
from ctrlrl.types import TEMPERED, Obs, SequenceBatch

ROWS = 256
"""Episodes per forward pass here, which bounds its memory."""


@torch.no_grad()
def outputs(policy: Any, obs: Obs, action: Tensor, values: bool) -> dict[str, Any]:
    """``logp``, ``entropy``, ``dist`` (parameters) and ``value`` of ``policy``, in slices of rows."""
    parts = []
    for start in range(0, action.shape[0], ROWS):
        piece = slice(start, start + ROWS)
        some = {k: v[piece] for k, v in obs.items()} if isinstance(obs, dict) else obs[piece]
        out = policy(some, action[piece])
        value = out.values["value"] if values else torch.zeros_like(out.logp)
        parts.append((out.logp, out.entropy, value, out.dist.params()))
    logp, entropy, value = (torch.cat([p[k] for p in parts]) for k in range(3))
    dist = {k: torch.cat([p[3][k] for p in parts]) for k in parts[0][3]}
    return {"logp": logp, "entropy": entropy, "value": value, "dist": dist}


def estimate_episodes(
    policy: Any,
    reference: Any,
    wanted: frozenset[Need],
    config: OnPolicyConfig,
    episodes: Episodes,
    source: Tensor,
    pivot: Tensor,
    score: Tensor,
    last_value: Tensor | None,
    likelihood: bool = True,
) -> SequenceBatch:
    """The batch [B, T] of ``episodes`` under the policy that collected them.

    Without ``likelihood`` the log-probabilities are left out, for policies whose stored action is a whole chain.

    Args:
        policy: It.
        reference: The frozen reference policy; None where nothing asks for one.
        wanted: What the loss needs or uses.
        config: Of the loop.
        episodes: Whole episodes.
        source: [B] see ``SequenceBatch.source``.
        pivot: [B] see ``SequenceBatch.pivot``.
        score: [B] outcomes in [0, 1].
        last_value: [B] value of the final observations, for losses with a value function.
    """
    e = episodes
    if likelihood:
        found = outputs(policy, e.obs, e.action, last_value is not None)
    else:
        found = _values_only(policy, e, last_value is not None)
        reference = None
    logp, value = found["logp"], found["value"]
    plain = logp
    if e.support is not None:
        logp = restricted_logp(found["dist"]["logits"], e.support, e.action)
    exists = torch.arange(e.mask.shape[1], device=e.mask.device) < e.length.unsqueeze(1)
    zero = torch.zeros_like(logp)
    ref = None if reference is None else outputs(reference, e.obs, e.action, False)
    gain = zero
    if last_value is not None:
        reward = e.reward_t
        if ref is not None and config.episodes.kl_reward_coef:
            reward = reward - config.episodes.kl_reward_coef * torch.where(e.mask, plain - ref["logp"], zero)
        gain = _advantage(config, e, reward, value, last_value, exists)
    returns = e.returns()
    # who is compared with whom where outcomes are ranked: what is tempered is not the policy's own doing
    peers = torch.where(source == TEMPERED, e.group + e.group.max() + 1, e.group)
    regularised = returns
    if ref is not None and config.episodes.kl_reward_coef:
        drift = torch.where(e.mask, plain - ref["logp"], zero).sum(1)
        regularised = returns - config.episodes.kl_reward_coef * drift
    return SequenceBatch(
        obs=e.obs,
        action=e.action,
        mask=e.mask,
        logp_old=torch.where(e.mask, logp, zero),
        advantage=torch.where(e.mask, gain, zero),
        value_target=torch.where(e.mask, gain + value, zero),
        value_old=torch.where(e.mask, value, zero),
        dist_old=found["dist"],
        logp_ref=None if ref is None else torch.where(e.mask, ref["logp"], zero),
        dist_ref=None if ref is None else ref["dist"],
        logp_behaviour=None if e.logp_behaviour is None else torch.where(e.mask, e.logp_behaviour, zero),
        entropy_old=torch.where(e.mask, found["entropy"], zero),
        sequence_return=regularised,
        group=e.group,
        task=torch.zeros_like(e.group) if e.task is None else e.task,
        turn=e.turn,
        score=score,
        success=success_of(e._replace(group=peers), config.episodes.success_return),
        rewards=returns.unsqueeze(-1) if e.rewards is None else e.rewards,
        answer=(score * 10.0).floor().long() if e.answer is None else e.answer,
        preference=preference_of(returns, peers) if "preferences" in wanted else None,
        source=source,
        pivot=pivot,
        void=e.void if e.void is not None else torch.zeros_like(e.mask),
        support=e.support,
        route=policy.route(e.obs) if "routes" in wanted and hasattr(policy, "route") else None,
    )


@torch.no_grad()
def _values_only(policy: Any, e: Episodes, values: bool) -> dict[str, Any]:
    zero = torch.zeros(e.mask.shape, device=e.mask.device)
    value = zero
    if values:
        flat = {k: v.flatten(0, 1) for k, v in e.obs.items()} if isinstance(e.obs, dict) else e.obs.flatten(0, 1)
        value = policy.values(flat)["value"].view(e.mask.shape)
    return {"logp": zero, "entropy": zero, "value": value, "dist": None}


def success_of(episodes: Episodes, threshold: float | None) -> Tensor:
    """[B] what the environment said; else returns from ``threshold`` on; else above the mean of the group."""
    if episodes.success is not None:
        return episodes.success
    returns = episodes.returns()
    if threshold is not None:
        return returns >= threshold
    return advantage.center_scale(returns, episodes.group, scale="none") > 0


def preference_of(returns: Tensor, group: Tensor) -> Tensor:
    """[B] +1 for the best of each group, -1 for its worst (the first of equals), 0 elsewhere and where all agree."""
    found = torch.zeros_like(group)
    for one in group.unique():
        members = (group == one).nonzero().flatten()
        best, worst = members[returns[members].argmax()], members[returns[members].argmin()]
        if returns[best] > returns[worst]:
            found[best], found[worst] = 1, -1
    return found


def _advantage(
    config: OnPolicyConfig, e: Episodes, reward_t: Tensor, value: Tensor, last_value: Tensor, exists: Tensor
) -> Tensor:
    """[B, T] GAE along each row's own decisions.

    Positions that the policy did not choose (the environment's, hints, copied prefixes) cost no time and have no value
    of their own, which the value function would not have learned: they stand for the next decision, or for what
    follows the row's end. What lies behind that end takes no part.
    """
    final = torch.arange(value.shape[1], device=value.device) == (e.length - 1).unsqueeze(1)
    passed = exists & ~e.mask
    through = (passed & ~final).to(value.dtype)
    own = torch.where(e.mask, value, torch.where(final, last_value.unsqueeze(1), torch.zeros_like(value)))
    value = torch.where(passed, advantage.linear_recurrence(through, own, dim=1, reverse=True), value)
    ahead = torch.cat([value[:, 1:], torch.zeros_like(value[:, :1])], 1)
    ahead = torch.where(final, last_value.unsqueeze(1), ahead)
    cut = e.terminated_t | e.truncated_t | ~exists
    one = torch.ones_like(value)
    discount = torch.where(passed, one, config.gamma * one) * (~e.terminated_t & exists)
    trace = torch.where(passed, one, config.gae_lambda * one)
    return advantage.gae(reward_t.T, discount.T, cut.T, value.T, ahead.T, trace.T).T
