"""Several critics at once: batched linear layers over observation and action."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable
from typing import Any

import gymnasium as gym
import torch
from torch import Tensor, nn

from ctrlrl.nets.actors import Features, QNetworkConfig
from ctrlrl.nets.mlp import ACTIVATIONS, NORM_EPS
from ctrlrl.types import Obs

CACHED_ROWS = 512
"""Rows that go through the layers at once on a CPU: more leave its cache, and their memory is the system's each time
anew, which cost CQL a quarter of its speed."""


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


class EnsembleNorm(nn.Module):
    """E layer normalisations side by side, [E, B, width] to the same; each has a scale and a shift of its own."""

    def __init__(self, members: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(members, 1, width))
        self.bias = nn.Parameter(torch.zeros(members, 1, width))

    def forward(self, x: Tensor, members: int | None = None) -> Tensor:
        weight, bias = (self.weight, self.bias) if members is None else (self.weight[:members], self.bias[:members])
        return torch.addcmul(bias, nn.functional.layer_norm(x, x.shape[-1:], eps=NORM_EPS), weight)


_BY_MEMBER = (EnsembleLinear, EnsembleNorm)  # a union made in every call would cost as much as the check again


class QEnsemble(nn.Module):
    """``n_critics`` action values from one vector of features and action, each by layers of its own.

    Args:
        observation_space: Of one environment.
        inputs: Size of what is joined to the features: the action, and parameters where a critic sees them; 0 gives
            state values.
        network: Widths, activation, layer normalisation, members.
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
            layers += [EnsembleNorm(self.members, after)] if network.layer_norm != "none" else []
        self.body = nn.Sequential(*layers, EnsembleLinear(self.members, widths[-1], outputs))

    def forward(
        self, obs: Obs, *inputs: Tensor, members: int | None = None, many: bool = False, slopes: bool = False
    ) -> Any:
        """[E, B] values at observations [B, ...] and further inputs, each [B, k]; [E, B, outputs] if there are many.

        ``members`` asks only that many of the ensemble; ``many`` and ``slopes`` are the methods of these names.
        """
        if many or slopes:
            return self.many(obs, *inputs) if many else self.slopes(obs, *inputs)
        x = torch.cat([self.features(obs), *inputs], -1) if inputs else self.features(obs)
        return self._values(x, members)

    def many(self, obs: Obs, actions: Tensor) -> Tensor:
        """[E, B, n] values of n actions [B, n, A] in each observation [B, ...], whose features are computed once."""
        # computing the observation's part of the first layer once, too, costs more in the backward pass than it saves
        features = self.features(obs).unsqueeze(1)
        eager_cpu = actions.device.type == "cpu" and not torch.compiler.is_compiling()
        size = max(1, CACHED_ROWS // len(actions)) if eager_cpu else actions.shape[1]
        found: list[Tensor] = []
        for some in actions.split(size, 1):
            rows = torch.cat([features.expand(-1, some.shape[1], -1), some], -1).flatten(0, 1)
            found.append(self._values(rows).unflatten(1, some.shape[:2]))
        return torch.cat(found, -1)

    def slopes(self, obs: Obs, action: Tensor) -> tuple[Tensor, Tensor]:
        """[E, B] values at observations [B, ...] and actions [B, A], and their gradients [E, B, A] by the action.

        Both can be differentiated by the parameters.
        """
        features = self.features(obs).expand(self.members, -1, -1)

        def total(each: Tensor) -> tuple[Tensor, Tensor]:
            values = self._values(torch.cat([features, each], -1))
            return values.sum(), values

        gradients, values = torch.func.grad(total, has_aux=True)(action.expand(self.members, -1, -1))
        return values, gradients

    def _values(self, x: Tensor, members: int | None = None) -> Tensor:
        for layer in self.body:
            x = layer(x, members) if isinstance(layer, _BY_MEMBER) else layer(x)
        return x.squeeze(-1) if self.outputs == 1 else x


@torch.no_grad()
def start_flat(layers: Iterable[nn.Module], bound: float) -> None:
    """Begin with near-constant outputs: the last of ``layers`` uniform in +-``bound``, the biases before it 0.1."""
    *hidden, last = (layer for layer in layers if isinstance(layer, nn.Linear | EnsembleLinear))
    for layer in hidden:
        layer.bias.fill_(0.1)
    for parameter in last.parameters():
        parameter.uniform_(-bound, bound)
