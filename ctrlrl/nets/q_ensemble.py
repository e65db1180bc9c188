"""Several critics at once: batched linear layers over observation and action."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import gymnasium as gym
import torch
from torch import Tensor, nn

from ctrlrl.nets.actors import Features, QNetworkConfig
from ctrlrl.nets.mlp import ACTIVATIONS
from ctrlrl.types import Obs


class EnsembleLinear(nn.Module):
    """E linear layers side by side: [E, B, in] (or [B, in], shared) to [E, B, out].

    Every member starts as ``nn.Linear`` does: weights and biases uniform in +-1/sqrt(in).
    """

    def __init__(self, members: int, inputs: int, outputs: int) -> None:
        super().__init__()
        bound = 1.0 / math.sqrt(inputs)
        self.weight = nn.Parameter(torch.empty(members, inputs, outputs).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(members, 1, outputs).uniform_(-bound, bound))

    def forward(self, x: Tensor, members: int | None = None) -> Tensor:
        weight, bias = (self.weight, self.bias) if members is None else (self.weight[:members], self.bias[:members])
        if x.dim() == 2:
            x = x.expand(weight.shape[0], *x.shape)
        if weight.shape[-1] == 1:  # a batched product with a single column costs four times this
            return (x * weight.mT).sum(-1, keepdim=True) + bias
        return torch.baddbmm(bias, x, weight)


class QEnsemble(nn.Module):
    """``n_critics`` action values from one vector of features and action, each by layers of its own.

    Args:
        observation_space: Of one environment.
        inputs: Size of what is joined to the features: the action, and parameters where a critic sees them; 0 gives
            state values.
        network: Widths, activation, members.
        encoder: The user's own, built once for all members.
        outputs: Values per member; 1 is dropped from the result's shape.
    """

    def __init__(
        self,
        observation_space: gym.Space,
        inputs: int,
        network: QNetworkConfig,
        encoder: Callable[..., nn.Module] | None = None,
        *,
        members: int | None = None,
        outputs: int = 1,
        extra_layers: int = 0,
    ) -> None:
        super().__init__()
        self.features = Features(observation_space, network, encoder)
        self.members, self.outputs = members or network.n_critics, outputs
        hidden = network.critic_hidden + network.critic_hidden[-1:] * extra_layers
        widths = (self.features.out_features + inputs, *hidden)
        layers: list[nn.Module] = []
        for before, after in itertools.pairwise(widths):
            layers += [EnsembleLinear(self.members, before, after), ACTIVATIONS[network.activation]()]
        self.body = nn.Sequential(*layers, EnsembleLinear(self.members, widths[-1], outputs))

    def forward(self, obs: Obs, *inputs: Tensor, members: int | None = None) -> Tensor:
        """[E, B] values at observations [B, ...] and further inputs, each [B, k]; [E, B, outputs] if there are many.

        ``members`` asks only that many of the ensemble.
        """
        x = torch.cat([self.features(obs), *inputs], -1) if inputs else self.features(obs)
        for layer in self.body:
            x = layer(x, members) if isinstance(layer, EnsembleLinear) else layer(x)
        return x.squeeze(-1) if self.outputs == 1 else x
