"""Decoders of every kind, and inputs for them."""

import gymnasium as gym
import numpy as np
import torch

from ctrlrl.nets.decoders import DecoderConfig, make_decoder
from helpers.policies import gen

BOX = gym.spaces.Box(-np.inf, np.inf, (3,), np.float32)
KINDS = {
    "flow": DecoderConfig(),
    "v cosine": DecoderConfig(decoder="diffusion"),
    "v linear": DecoderConfig(decoder="diffusion", decoder_schedule="linear"),
    "epsilon cosine": DecoderConfig(decoder="diffusion", decoder_prediction="epsilon"),
    "epsilon linear": DecoderConfig(decoder="diffusion", decoder_prediction="epsilon", decoder_schedule="linear"),
    "released": DecoderConfig(decoder="diffusion", decoder_prediction="epsilon", decoder_schedule="released"),
    "gaussian": DecoderConfig(decoder="gaussian"),
}
IDENTITIES = [k for k in KINDS if k != "released"]
DENOISING = [k for k in KINDS if k != "gaussian"]


def build(kind="flow", size=2, space=BOX, scale=0.0):
    """A decoder; ``scale`` > 0 moves its last layer away from the start, but not so far that a step folds."""
    scale /= 30.0 if kind == "epsilon cosine" else 1.0  # whose first step moves by 30 times what f says
    torch.manual_seed(0)
    decoder = make_decoder(KINDS[kind] if isinstance(kind, str) else kind, space, size)
    last = decoder.net[-1] if kind == "gaussian" else decoder.net.linears[-1]
    with torch.no_grad():
        for parameter in last.parameters():
            parameter += scale * torch.randn(parameter.shape, generator=gen(7))
    return decoder


def inputs(n=6, size=2):
    return torch.randn(n, 3, generator=gen(1)), torch.randn(n, size, generator=gen(2))
