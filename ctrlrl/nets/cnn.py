"""A small convolutional encoder for image observations."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class NatureCNN(nn.Module):
    """Three convolutions and a linear layer (Mnih et al. 2015), for images [B, C, H, W] in [0, 1].

    Images smaller than 36 pixels a side, which the original strides would shrink to nothing, get 3x3
    kernels with strides 2, 2, 1.
    """

    def __init__(self, shape: tuple[int, int, int], out_features: int) -> None:
        super().__init__()
        channels, height, width = shape
        if min(height, width) >= 36:
            layers = [(32, 8, 4, 0), (64, 4, 2, 0), (64, 3, 1, 0)]
        else:
            layers = [(32, 3, 2, 1), (64, 3, 2, 1), (64, 3, 1, 1)]
        modules: list[nn.Module] = []
        for out, kernel, stride, padding in layers:
            modules += [nn.Conv2d(channels, out, kernel, stride, padding), nn.ReLU()]
            channels = out
        self.convolutions = nn.Sequential(*modules, nn.Flatten())
        with torch.no_grad():
            flat = self.convolutions(torch.zeros(1, *shape)).shape[1]
        self.linear = nn.Sequential(nn.Linear(flat, out_features), nn.ReLU())
        self.out_features = out_features

    def forward(self, image: Tensor) -> Tensor:
        return self.linear(self.convolutions(image))
