"""Decoders: densities by the change of variables, what they see of an observation, errors."""

import math
from itertools import pairwise

import gymnasium as gym
import numpy as np
import pytest
import torch
from helpers.decoders import BOX, KINDS, build, inputs
from helpers.policies import gen

from ctrlrl.nets.decoders import DecoderConfig, make_decoder

# -- density ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_invert_finds_the_noise_and_the_jacobian(kind):
    decoder = build(kind, size=3, scale=0.3).double()
    features, noise = (x.double() for x in inputs(20, 3))
    found, log_det = decoder.invert(features, decoder(features, noise))
    torch.testing.assert_close(found, noise, atol=1e-6, rtol=0)
    jacobian = torch.func.vmap(torch.func.jacrev(lambda z, s: decoder(s[None], z[None])[0]))(noise, features)
    torch.testing.assert_close(log_det, torch.linalg.slogdet(jacobian).logabsdet, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(decoder.log_det(features, noise), log_det, atol=1e-6, rtol=1e-6)
    assert log_det.std() > 1e-3  # so that a constant would not do
    normal = torch.distributions.Normal(torch.zeros(3).double(), 1.0)
    density = decoder.log_prob(features, decoder(features, noise))
    torch.testing.assert_close(density, normal.log_prob(noise).sum(-1) - log_det, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_the_density_works_in_single_precision_without_gradients(kind):
    decoder = build(kind, scale=0.2)
    features, noise = inputs(20)
    with torch.inference_mode():
        found, _ = decoder.invert(features, decoder(features, noise))
        density = decoder.log_prob(features, noise)
    torch.testing.assert_close(found, noise, atol=1e-4, rtol=1e-4)
    assert density.dtype == found.dtype == torch.float32 and density.shape == (20,)
    assert not decoder.log_prob(features, noise).requires_grad


@pytest.mark.parametrize("kind", ["flow", "v cosine", "epsilon linear", "gaussian"])
def test_the_density_integrates_to_one(kind):
    decoder = build(kind, size=1, scale=0.3)
    state = inputs()[0][:1]
    grid = torch.linspace(-15.0, 15.0, 3001).double().unsqueeze(-1)
    density = decoder.double().log_prob(state.double().expand(3001, 3), grid).exp()
    assert abs(torch.trapezoid(density, grid[:, 0]).item() - 1.0) < 1e-3
    assert (density - density.flip(0)).abs().max() > 0.01  # which the standard normal would not show


def affine(slope, constant):
    """A flow whose velocity is exactly slope x + constant: silu(z) - silu(-z) = z."""
    size = len(constant)
    decoder = build(DecoderConfig(decoder_hidden=(2 * size,)), size=size).double()
    first, last = decoder.net.linears
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.zero_()
        first.weight[:, 3 : 3 + size] = torch.cat([slope, -slope])
        last.weight.copy_(torch.cat([torch.eye(size), -torch.eye(size)], 1))
        last.bias.copy_(constant)
    return decoder


def test_an_affine_flow_has_its_closed_form_density():
    slope, constant = torch.tensor([[1.0, 0.5], [-0.3, 2.0]]).double(), torch.tensor([0.4, -0.7]).double()
    decoder, (features, action) = affine(slope, constant), inputs()
    once = torch.eye(2).double() - slope / 10
    full = torch.linalg.matrix_power(once, 10)
    mean = -sum(torch.linalg.matrix_power(once, j) for j in range(10)) @ constant / 10
    normal = torch.distributions.MultivariateNormal(mean, full @ full.T)
    got = decoder.log_prob(features.double(), action.double())
    torch.testing.assert_close(got, normal.log_prob(action.double()))


def test_the_gaussian_density_is_the_closed_form():
    decoder = build("gaussian", scale=0.1)
    features, action = inputs()
    torch.testing.assert_close(decoder.log_prob(features, action), -decoder.loss(features, action, {}).detach())


def test_a_step_that_is_nearly_flat_in_places_can_be_undone():
    """x' = .05 x + 6 (ramp from 4.5 to 5.5): from x = 3, Newton's full steps go to +-60 for ever."""
    decoder = build(DecoderConfig(decoder_hidden=(4,), decoder_steps=1), size=1).double()
    first, last = decoder.net.linears
    with torch.no_grad():
        first.weight.zero_()
        first.weight[:, 3] = torch.tensor([1.0, -1.0, 8.0, 8.0])
        first.bias.copy_(torch.tensor([0.0, 0.0, -36.0, -44.0]))
        last.weight.copy_(torch.tensor([[0.95, -0.95, -6 / 8, 6 / 8]]))
    features, action = torch.zeros(3, 3).double(), torch.tensor([[3.0], [-1.0], [7.0]]).double()
    noise, _ = decoder.invert(features, action)
    torch.testing.assert_close(decoder(features, noise), action)
    assert 4.5 < noise[0].item() < 5.5


def test_an_action_out_of_reach_is_an_error_with_its_residual():
    collapsed = affine(10.0 * torch.eye(1), torch.zeros(1))  # one step of 1/10 maps every x to 0
    with pytest.raises(RuntimeError, match=r"step 9 .* 1 of 2 actions: the residual is 1 "):
        collapsed.invert(torch.zeros(2, 3).double(), torch.tensor([[0.0], [1.0]]).double())
    with pytest.raises(RuntimeError, match="the residual is nan"):
        build(scale=0.3).log_prob(torch.zeros(2, 3), torch.tensor([[0.0, 0.0], [math.nan, 0.0]]))


# -- observations -----------------------------------------------------------------------------------


def test_scaling_normalises_and_leaves_constant_features_harmless():
    decoder = build()
    features = torch.randn(1000, 3, generator=gen(1)) * torch.tensor([10.0, 1e-3, 0.0]) + torch.tensor([3.0, 0.0, 0.3])
    decoder.fit_scaling(features)
    scaled = decoder.scaling(features)
    torch.testing.assert_close(scaled[:, :2].std(0, correction=0), torch.ones(2), atol=1e-4, rtol=0)
    assert scaled.mean(0).abs().max() < 1e-4
    # what never varied is only centred: a first change of .5 stays .5
    torch.testing.assert_close(decoder.scaling(features[:1] + 0.5)[0, 2], torch.tensor(0.5), atol=1e-5, rtol=0)
    assert {"scaling.scale", "scaling.shift"} <= set(decoder.state_dict())
    # far away is only far away
    decoder = build(scale=0.3)
    noise = inputs()[1]
    assert torch.equal(decoder(torch.full((6, 3), 1e3), noise), decoder(torch.full((6, 3), 1e6), noise))


def test_saved_and_loaded_it_is_the_same_generator():
    decoder, (features, noise) = build("v cosine", scale=0.3), inputs()
    decoder.fit_scaling(4.0 * features + 1.0)
    other = make_decoder(KINDS["v cosine"], BOX, 2)
    other.load_state_dict(decoder.state_dict())
    assert torch.equal(other(features, noise), decoder(features, noise))


def test_dictionaries_and_integers_become_flat_features():
    space = gym.spaces.Dict({"a": BOX, "choice": gym.spaces.Discrete(4, start=3)})
    decoder = make_decoder(DecoderConfig(), space, 2)
    obs = {"a": torch.randn(2, 3), "choice": torch.tensor([3, 5])}
    features = decoder.features(obs)
    assert features.shape == (2, decoder.feature_size) == (2, 7)
    assert torch.equal(features[:, :3], obs["a"])
    assert features[:, 3:].tolist() == [[1.0, 0.0, 0.0, 0.0], [0.0, 0.0, 1.0, 0.0]]
    assert decoder.double().features(obs).dtype == torch.float64
    assert torch.equal(build().features(obs["a"]), obs["a"])


def test_images_are_refused():
    image = gym.spaces.Box(0, 255, (8, 8, 3), np.uint8)
    with pytest.raises(TypeError, match=r"needs vector observations, found images .*camera"):
        make_decoder(DecoderConfig(), gym.spaces.Dict({"camera": image, "x": BOX}), 2)


@pytest.mark.parametrize("kind", ["flow", "gaussian"])
def test_wrong_shapes_and_values_are_errors(kind):
    decoder, (features, noise) = build(kind), inputs()
    with pytest.raises(ValueError, match=r"expected features \[N, 3\] and noise \[N, 2\], found \[6, 3\] and \[6, 1\]"):
        decoder(features, noise[:, :1])
    with pytest.raises(ValueError, match="expected features"):
        decoder(features[:, :2], noise)
    draws = decoder.draws(6, gen())
    with pytest.raises(ValueError, match=r"action \[N, 2\], found \[1, 3\] and \[6, 2\]"):
        decoder.loss(features[:1], noise, draws)
    with pytest.raises(ValueError, match="expected features"):
        decoder.log_prob(features, noise[:, :1])
    features[2, 1] = math.inf
    with pytest.raises(ValueError, match=r"features \[1\] .* not finite"):
        decoder.fit_scaling(features)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"decoder": "gan"}, "decoder='gan' is unknown"),
        ({"decoder_schedule": "sigmoid"}, "decoder_schedule='sigmoid' is unknown"),
        ({"decoder_prediction": "x0"}, "decoder_prediction='x0' is unknown"),
        ({"decoder_hidden": ()}, "no layer"),
        ({"decoder_hidden": (32, 0)}, "decoder_hidden"),
        ({"decoder_time_features": 7}, "must be even"),
        ({"decoder_time_features": 0}, "must be even"),
        ({"decoder_steps": 0}, "at least 1 for 'flow'"),
        ({"decoder": "diffusion", "decoder_steps": 1}, "at least 2 for 'diffusion'"),
        ({"decoder_draws": 0}, "at least 1"),
    ],
)
def test_bad_settings_are_errors(settings, message):
    with pytest.raises(ValueError, match=message):
        DecoderConfig(**settings)


def test_the_defaults_are_those_of_the_paper():
    config = DecoderConfig()
    assert (config.decoder_hidden, config.decoder_steps, config.decoder_draws) == ((32,) * 4, 10, 8)
    widths = [layer.weight.shape for layer in build().net.linears]
    assert widths == [(b, a) for a, b in pairwise((3 + 2 + 8, 32, 32, 32, 32, 2))]
