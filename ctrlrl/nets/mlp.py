"""Fully connected networks."""

from __future__ import annotations

import math

from torch import nn

ACTIVATIONS: dict[str, type[nn.Module]] = {
    "tanh": nn.Tanh,
    "relu": nn.ReLU,
    "elu": nn.ELU,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
}


NORM_EPS = 1e-6
"""Added to the variance in layer normalisation, as Flax has it, in which the methods that use it were published."""


def mlp(inputs: int, hidden: tuple[int, ...], activation: str, layer_norm: bool = False) -> nn.Sequential:
    """Linear layers of the given widths, each followed by the activation; empty ``hidden`` is the identity.

    ``layer_norm`` puts layer normalisation behind every activation.
    """
    layers: list[nn.Module] = []
    for width in hidden:
        layers += [nn.Linear(inputs, width), ACTIVATIONS[activation]()]
        layers += [nn.LayerNorm(width, NORM_EPS)] if layer_norm else []
        inputs = width
    return nn.Sequential(*layers)


def orthogonal(module: nn.Module, gain: float = math.sqrt(2.0)) -> None:
    """Orthogonal weights and zero biases for every linear and convolutional layer of ``module``."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            nn.init.orthogonal_(layer.weight, gain)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
