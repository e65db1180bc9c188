"""Acting with the least overhead: the policy's own operations without the frames of nn.Module around them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeAlias

import torch
from torch import Tensor, nn

from ctrlrl.nets.heads import GaussianHead
from ctrlrl.nets.normalizer import ObsNormalizer
from ctrlrl.types import Obs

if TYPE_CHECKING:
    from ctrlrl.nets.actor_critic import ActorCritic

Sampler: TypeAlias = Callable[[Obs, Tensor], tuple[Tensor, Tensor]]


def sampler(policy: ActorCritic) -> Sampler:
    """``(obs, noise) -> (action, environment's action)``, equal to ``act`` and ``to_env`` bit for bit.

    Valid until the parameters change. One environment step costs as much as the forward pass of a small network,
    and two thirds of that pass is Python: a plain vector through an MLP to a Gaussian therefore has a path of
    its own.
    """
    head, preprocess = policy.head, policy.preprocess
    simple = isinstance(head, GaussianHead) and head.action_map == "clip" and len(head.env_shape) == 1
    known = all(isinstance(layer, nn.Linear | nn.Tanh | nn.ReLU) for layer in policy.actor)
    if not (simple and known and preprocess.plain and policy.plain_encoder):
        return lambda obs, noise: (action := policy.act(obs, noise), policy.to_env(obs, action))
    assert isinstance(head, GaussianHead)
    steps: list[Callable[[Tensor], Tensor]] = []
    linear = torch.nn.functional.linear
    for layer in policy.actor:
        if isinstance(layer, nn.Linear):
            steps.append(lambda x, w=layer.weight, b=layer.bias: linear(x, w, b))
        else:
            steps.append(torch.tanh if isinstance(layer, nn.Tanh) else torch.relu)
    weight, bias, std = head.linear.weight, head.linear.bias, head.log_std.detach().exp()
    low, high, bounded = head.low, head.high, head.bounded
    normalizer = preprocess.normalizer
    if isinstance(normalizer, ObsNormalizer):
        shift, scale, clip = normalizer.shift, normalizer.scale, normalizer.clip
        steps.insert(0, lambda x: torch.addcmul(shift, x, scale).clamp(-clip, clip))

    def sample(obs: Obs, noise: Tensor) -> tuple[Tensor, Tensor]:
        x = obs
        assert isinstance(x, Tensor)
        for step in steps:
            x = step(x)
        action = torch.addcmul(linear(x, weight, bias), std, noise)
        return action, (torch.clamp(action, low, high) if bounded else action)

    return sample
