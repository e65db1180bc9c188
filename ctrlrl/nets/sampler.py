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

_FUNCTIONS: dict[type[nn.Module], Callable[[Tensor], Tensor]] = {
    nn.Tanh: torch.tanh, nn.ReLU: torch.relu, nn.SiLU: torch.nn.functional.silu
}  # fmt: skip
Sampler: TypeAlias = Callable[[Obs, Tensor], tuple[Tensor, Tensor]]


def sampler(policy: ActorCritic) -> Sampler:
    """``(obs, noise) -> (action, environment's action)``, equal to ``act`` and ``to_env`` bit for bit.

    Valid until the parameters change. One environment step costs as much as the forward pass of a small network,
    and two thirds of that pass is Python: a plain vector through an MLP to a Gaussian therefore has a path of
    its own.
    """
    choose, head = chooser(policy), policy.head
    if choose is None or not isinstance(head, GaussianHead) or len(head.env_shape) != 1:
        return lambda obs, noise: (action := policy.act(obs, noise), policy.to_env(obs, action))
    if head.action_map == "tanh":
        return lambda obs, noise: (action := choose(obs, noise), head.to_env(action))
    low, high, bounded = head.low, head.high, head.bounded

    def sample(obs: Obs, noise: Tensor) -> tuple[Tensor, Tensor]:
        action = choose(obs, noise)
        return action, (torch.clamp(action, low, high) if bounded else action)

    return sample


def chooser(policy: ActorCritic) -> Callable[[Obs, Tensor], Tensor] | None:
    """``act`` without the frames of nn.Module; None where the policy has no path of its own."""
    head, preprocess = policy.head, policy.preprocess
    known = all(isinstance(layer, nn.Linear | nn.Tanh | nn.ReLU | nn.SiLU) for layer in policy.actor)
    if not (isinstance(head, GaussianHead) and known and preprocess.plain and policy.plain_encoder):
        return None
    steps: list[Callable[[Tensor], Tensor]] = []
    linear = torch.nn.functional.linear
    for layer in policy.actor:
        if isinstance(layer, nn.Linear):
            steps.append(lambda x, w=layer.weight, b=layer.bias: linear(x, w, b))
        else:
            steps.append(_FUNCTIONS[type(layer)])
    weight, bias = head.linear.weight, head.linear.bias
    normalizer = preprocess.normalizer
    if isinstance(normalizer, ObsNormalizer):
        shift, scale, clip = normalizer.shift, normalizer.scale, normalizer.clip
        steps.insert(0, lambda x: torch.addcmul(shift, x, scale).clamp(-clip, clip))
    std = None if head.spread is not None else head.log_std.detach().exp()

    def choose(obs: Obs, noise: Tensor) -> Tensor:
        x = obs
        assert isinstance(x, Tensor)
        for step in steps:
            x = step(x)
        return torch.addcmul(linear(x, weight, bias), head.log_deviation(x).exp() if std is None else std, noise)

    return choose
