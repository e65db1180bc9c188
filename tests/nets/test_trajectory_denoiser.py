"""The networks of trajectory diffusion: any length, one answer per trajectory, and diffusers' own EDM beside ours."""

import math
import sys

import gymnasium as gym
import numpy as np
import pytest
import torch
from diffusers import EDMEulerScheduler
from torch import nn

from ctrlrl.nets.edm import Preconditioned, SamplerConfig, sample
from ctrlrl.nets.trajectory_denoiser import DenoiserConfig, TrajectoryModel, UNet, make_denoiser

SMALL = DenoiserConfig(denoiser_channels=(8, 16, 16), denoiser_width=16, denoiser_blocks=2)


def network(length, channels=5, config=SMALL):
    torch.manual_seed(0)
    return make_denoiser(config, channels, length)


def inputs(length, batch=3, channels=5):
    g = torch.Generator().manual_seed(1)
    return torch.randn(batch, channels, length, generator=g), torch.linspace(-1.5, 1.0, batch)


@pytest.mark.parametrize("length", [1, 2, 5, 8])
def test_the_answer_has_the_shape_of_the_trajectories_and_is_each_ones_own(length):
    net, (x, c_noise) = network(length), inputs(length)
    with torch.no_grad():
        found = net(x, c_noise)
        assert found.shape == x.shape
        torch.testing.assert_close(torch.cat([net(x[k : k + 1], c_noise[k : k + 1]) for k in range(3)]), found)
        assert ((net(x, c_noise + 0.3) - found).abs().amax((1, 2)) > 1e-3).all()
        assert ((net(x + 0.3, c_noise) - found).abs().amax((1, 2)) > 1e-3).all()


def test_lengths_that_the_levels_halve_are_not_padded_and_others_are_with_zeros_and_cropped():
    (x, c_noise), kept = inputs(8), {}
    whole, padded = network(8), network(6)
    padded.load_state_dict(whole.state_dict())
    assert whole.missing == 0 and padded.missing == 2 and network(5).missing == 3 and network(7).missing == 1
    forward = padded.net.forward
    padded.net.forward = lambda sample, t, **named: (kept.update(sample=sample, t=t), forward(sample, t, **named))[1]
    with torch.no_grad():
        assert whole(x, c_noise).equal(whole.net(x, 100 * c_noise, return_dict=False)[0])
        found = padded(x[..., :6], c_noise)
        assert kept["sample"].shape[-1] == 8 and kept["sample"][..., 6:].abs().max() == 0
        zeroed = torch.cat([x[..., :6], torch.zeros(3, 5, 2)], -1)
        assert found.equal(whole(zeroed, c_noise)[..., :6])


def test_the_u_net_is_shown_25_times_the_logarithm_of_the_level():
    net, seen, levels = network(8), [], torch.tensor([0.002, 1.0, 80.0])
    forward = net.net.forward
    net.net.forward = lambda sample, t, **named: (seen.append(t), forward(sample, t, **named))[1]
    with torch.no_grad():
        Preconditioned(net)(inputs(8)[0], levels)
    torch.testing.assert_close(seen[0], torch.tensor([25 * math.log(0.002), 0.0, 25 * math.log(80.0)]))


def test_the_default_network_has_about_a_million_parameters():
    assert sum(p.numel() for p in make_denoiser(DenoiserConfig(), 6, 32).parameters()) == pytest.approx(1e6, rel=0.05)


def test_single_transitions_need_no_diffusers_and_trajectories_say_what_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    assert not isinstance(network(1), UNet)
    with pytest.raises(ImportError, match=r"pip install 'ctrlrl\[diffusion\]'"):
        network(8)


@pytest.mark.parametrize(
    "settings, word",
    [({"denoiser_channels": ()}, "multiples of 8"), ({"denoiser_channels": (8, 12)}, "multiples of 8"),
     ({"denoiser_blocks": 0}, "denoiser_blocks=0"), ({"denoiser_width": 0}, "denoiser_width=0"),
     ({"denoiser_layers": 0}, "denoiser_layers=0")],
)  # fmt: skip
def test_impossible_shapes_are_refused(settings, word):
    with pytest.raises(ValueError, match=word):
        DenoiserConfig(**settings)


def test_spaces_other_than_flat_floats_are_refused():
    vector, actions = gym.spaces.Box(-1, 1, (3,), np.float32), gym.spaces.Box(-1, 1, (2,), np.float32)
    assert TrajectoryModel(vector, actions, SMALL, 1).codec.channels == 3 + 2 + 2 + 3
    for space in (gym.spaces.Discrete(3), gym.spaces.Box(0, 255, (3,), np.uint8), gym.spaces.Box(-1, 1, (2, 2)),
                  gym.spaces.Dict({"a": vector})):  # fmt: skip
        with pytest.raises(TypeError, match="flat Box of floats"):
            TrajectoryModel(space, actions, SMALL, 4)
    with pytest.raises(TypeError, match="Box actions of floats"):
        TrajectoryModel(vector, gym.spaces.Discrete(3), SMALL, 4)
    with pytest.raises(ValueError, match="finite bounds"):
        TrajectoryModel(vector, gym.spaces.Box(-np.inf, np.inf, (2,), np.float32), SMALL, 4)


# -- diffusers' EDM --------------------------------------------------------------------------------


class Toy(nn.Module):
    """Neither linear nor of one scale."""

    def forward(self, x, c_noise):
        return torch.tanh(1.7 * x) + c_noise.view(-1, 1, 1) * x.roll(1, -1)


@pytest.fixture
def scheduler():
    found = EDMEulerScheduler(sigma_min=0.002, sigma_max=80.0, sigma_data=1.0, rho=7.0)
    found.set_timesteps(18)
    return found


def test_levels_and_preconditioning_are_those_of_diffusers(scheduler):
    levels = SamplerConfig(sampler_steps=18).levels()
    torch.testing.assert_close(scheduler.sigmas, torch.tensor(levels), rtol=1e-5, atol=1e-9)
    x, _ = inputs(8)
    for level in levels[:-1]:
        sigma = torch.tensor(level)
        answer = Toy()(scheduler.precondition_inputs(x, sigma), scheduler.precondition_noise(sigma).expand(3))
        expected = scheduler.precondition_outputs(x, answer, sigma)
        torch.testing.assert_close(Preconditioned(Toy())(x, sigma), expected, rtol=1e-4, atol=1e-5)


def test_a_sample_of_eulers_method_without_churn_is_that_of_diffusers(scheduler):
    start = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(2))
    x = start * 80.0
    for t, sigma in zip(scheduler.timesteps, scheduler.sigmas[:-1], strict=True):
        answer = Toy()(scheduler.scale_model_input(x, t), scheduler.precondition_noise(sigma).expand(3))
        x = scheduler.step(answer, t, x, return_dict=False)[0]
    config = SamplerConfig(sampler_steps=18, s_churn=0.0, sampler_order="euler")
    found = sample(Preconditioned(Toy()), start, config, torch.Generator())
    torch.testing.assert_close(found, x, rtol=1e-3, atol=1e-3)
    assert x.std() > 0.1
