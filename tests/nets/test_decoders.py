"""Decoders: the identity at the start, their samplers against closed forms and diffusers, their fit."""

import math
from itertools import product

import numpy as np
import pytest
import torch
from helpers.decoders import DENOISING, IDENTITIES, KINDS, build, inputs
from helpers.policies import gen
from torch import nn

from ctrlrl.nets.decoders import CLIP, DecoderConfig
from ctrlrl.nets.diffusion_decoder import ddim, noise_levels

# -- the start --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", IDENTITIES)
def test_an_unfitted_decoder_is_the_identity_in_every_state(kind):
    decoder = build(kind)
    features, noise = inputs(500)
    decoder.fit_scaling(5.0 + 3.0 * features)
    assert decoder.initial_gain == 1.0
    for size in (0.0, 1.0, 100.0):
        assert (decoder(size * features, noise) - noise).abs().max() < 1e-6


@pytest.mark.parametrize(
    ("prediction", "schedule", "gain", "within"),
    [
        ("epsilon", "linear", 1.052, 1e-3),
        ("epsilon", "cosine", 204.0, 1.0),
        ("epsilon", "released", 6.4, 0.05),
        ("v", "cosine", 0.884, 1e-3),
    ],
)
def test_ten_plain_ddim_steps_of_a_zero_network_multiply_the_noise(prediction, schedule, gain, within):
    keep, _ = ddim(noise_levels(schedule, 10), prediction)
    assert abs(keep.prod().item() - gain) < within


def test_the_released_schedule_is_not_an_identity_and_says_so():
    decoder = build("released")
    features, noise = inputs()
    torch.testing.assert_close(decoder(features, noise), decoder.initial_gain * noise)
    assert abs(decoder.initial_gain - 6.4) < 0.05
    assert len(decoder.steps) == 9 and len(decoder.times) == 10
    levels = noise_levels("released", 10)
    assert abs(levels[0] - 0.024) < 1e-3 and levels[-1] == 1.0
    torch.testing.assert_close(decoder.times, torch.arange(9, -1, -1) / 10)


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_noise_levels_rise_from_noise_to_none(schedule):
    levels = noise_levels(schedule, 10)
    assert levels.shape == (11,) and levels[-1] == 1.0 and (levels.diff() > 0).all()
    # beta_1 of the linear schedule, and Nichol and Dhariwal's capped last beta
    assert schedule == "cosine" or abs(levels[-2] - 0.9999) < 1e-12
    assert schedule == "linear" or abs(levels[0] / levels[1] - 0.001) < 1e-12


# -- the sampler ------------------------------------------------------------------------------------


def plain(decoder, features, x, time):
    """The decoder's network as one ordinary MLP over (scaled features, x, sines, cosines)."""
    angle = time.unsqueeze(-1) * torch.tensor([1.0, 2.0, 4.0, 8.0])
    hidden = torch.cat([decoder.scaling(features).clamp(-CLIP, CLIP), x, angle.sin(), angle.cos()], -1)
    *layers, last = decoder.net.linears
    for layer in layers:
        hidden = nn.functional.silu(layer(hidden))
    return last(hidden)


@pytest.mark.parametrize("kind", DENOISING)
def test_the_sampler_takes_the_written_steps_with_an_ordinary_network(kind):
    decoder = build(kind, scale=0.3)
    features, x = inputs()
    decoder.fit_scaling(2.0 * features + 1.0)
    got = decoder(features, x)
    for k, (keep, move) in enumerate(decoder.steps):
        x = keep * x + move * plain(decoder, features, x, decoder.times[k].expand(len(x)))
    assert (got - inputs()[1]).abs().max() > 0.05
    torch.testing.assert_close(got, x, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_sampler_is_forward_bit_for_bit(kind, dtype):
    decoder = build(kind, scale=0.3).to(dtype)
    features, noise = (x.to(dtype) for x in inputs(40))
    with torch.inference_mode():
        action = decoder(features, noise)
        assert torch.equal(decoder.sampler()(features, noise), action) and action.dtype == dtype
    assert torch.equal(decoder(features, noise), action)  # and so with gradients
    one = decoder(features[:1], noise)  # one state, many draws of noise
    torch.testing.assert_close(one, decoder(features[:1].expand(40, -1), noise))


def test_the_flow_takes_the_steps_of_the_euler_scheduler_of_diffusers():
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000)
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 0.1, 10))
    decoder, (_, noise) = build(), inputs()
    torch.testing.assert_close(decoder.times, scheduler.timesteps / 1000)

    def velocity(x, t):
        return torch.sin(2.0 * x) - 3.0 * t * x.flip(-1)

    x = noise
    for t in scheduler.timesteps:
        x = scheduler.step(velocity(x, t / 1000), t, x).prev_sample
    torch.testing.assert_close(decoder.integrate(lambda x, k: velocity(x, decoder.times[k]), noise), x)


@pytest.mark.parametrize(("prediction", "schedule"), list(product(["v", "epsilon"], ["cosine", "linear"])))
def test_diffusion_takes_the_steps_of_the_ddim_scheduler_of_diffusers(prediction, schedule):
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DDIMScheduler(
        num_train_timesteps=10,
        beta_schedule={"cosine": "squaredcos_cap_v2", "linear": "linear"}[schedule],
        prediction_type={"v": "v_prediction", "epsilon": "epsilon"}[prediction],
        clip_sample=False,
        set_alpha_to_one=True,
    )
    scheduler.set_timesteps(10)
    decoder, (_, noise) = build(f"{prediction} {schedule}"), inputs()

    def predict(x, k):
        return 0.9 * x + 0.1 * torch.sin(x.flip(-1) + k)

    x = noise
    for k, t in enumerate(scheduler.timesteps):
        x = scheduler.step(predict(x, k), int(t), x).prev_sample
    # the network predicts what is left of the prediction after its share of x
    got = decoder.integrate(lambda x, k: predict(x, k) - decoder.skip[k] * x, noise)
    torch.testing.assert_close(got, x, atol=1e-4, rtol=1e-4)
    trained = torch.tensor([scheduler.alphas_cumprod[int(t)] for t in scheduler.timesteps])
    torch.testing.assert_close(decoder.alpha, trained.sqrt(), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("kind", ["v cosine", "v linear", "epsilon cosine", "epsilon linear", "released"])
def test_ddim_with_the_prediction_of_one_action_lands_on_it(kind):
    decoder = build(kind).double()
    action, noise = torch.tensor([0.7, -1.2]).double(), inputs()[1].double()

    def field(x, k):
        alpha, sigma = decoder.alpha[k], decoder.sigma[k]
        epsilon = (x - alpha * action) / sigma
        wanted = alpha * epsilon - sigma * action if kind.startswith("v") else epsilon
        return wanted - decoder.skip[k] * x

    torch.testing.assert_close(decoder.integrate(field, noise), action.expand(6, 2), atol=2e-5, rtol=0)


def test_eulers_error_halves_when_the_steps_double():
    """Check G4e: the exact velocity of N(m, s^2) should carry eps to m + s eps."""
    m, s = 0.8, 0.3

    def error(count):
        decoder = build(DecoderConfig(decoder_steps=count), size=1).double()

        def velocity(x, k):
            t = decoder.times[k]
            return -m + (t - (1 - t) * s**2) / ((1 - t) ** 2 * s**2 + t**2) * (x - (1 - t) * m)

        noise = torch.tensor([[-1.0], [0.5], [2.0]]).double()
        return (decoder.integrate(velocity, noise) - (m + s * noise)).abs().max().item()

    assert error(10) < 0.2
    assert 1.7 < error(10) / error(20) < 2.3


def test_a_decoder_exports():
    decoder = build(scale=0.3).eval()
    features, noise = inputs(5)
    rows = torch.export.Dim("n")
    program = torch.export.export(decoder, (features, noise), dynamic_shapes=({0: rows}, {0: rows}))
    wide, more = inputs(9)
    torch.testing.assert_close(program.module()(wide, more), decoder(wide, more))


# -- the loss ---------------------------------------------------------------------------------------


def test_draws_are_reproducible_and_cover_their_range():
    flow = build().draws(2000, gen(5))
    assert flow["noise"].shape == (2000, 8, 2) and flow["time"].shape == (2000, 8)
    assert torch.equal(flow["noise"], build().draws(2000, gen(5))["noise"])
    assert flow["time"].min() < 0.001 and 0.999 < flow["time"].max() < 1.0
    assert abs(flow["noise"].std() - 1.0) < 0.02
    for kind in ("v cosine", "released"):
        level = build(kind).draws(2000, gen(5))["level"]
        assert level.shape == (2000, 8) and level.unique().tolist() == list(range(10))
    assert build("gaussian").draws(5, gen()) == {}


def test_the_flow_loss_is_the_mean_squared_error_of_the_velocity():
    decoder = build(scale=0.3)
    features, action = inputs()
    draws = decoder.draws(6, gen(3))
    noise, time = draws["noise"], draws["time"]
    for i in range(6):
        t, a = time[i].unsqueeze(-1), action[i]
        found = plain(decoder, features[i].expand(8, 3), (1 - t) * a + t * noise[i], time[i])
        wanted = (found - (noise[i] - a)).square().sum() / (8 * 2)
        torch.testing.assert_close(decoder.loss(features, action, draws)[i], wanted)


@pytest.mark.parametrize("kind", [k for k in DENOISING if k != "flow"])
def test_the_diffusion_loss_is_the_mean_squared_error_of_the_prediction(kind):
    decoder = build(kind, scale=0.3)
    features, action = inputs()
    draws = decoder.draws(6, gen(3))
    levels = noise_levels(KINDS[kind].decoder_schedule, 10)
    loss = decoder.loss(features, action, draws)
    for i in range(6):
        total = 0.0
        for noise, k in zip(draws["noise"][i], draws["level"][i].tolist(), strict=True):
            angle = torch.arccos(levels[k].sqrt()).item()
            x = math.cos(angle) * action[i] + math.sin(angle) * noise
            share = 0.0
            if kind != "released":  # the x-share that makes the step x' = x, from DDIM's x0 and eps of a prediction s x
                after = torch.arccos(levels[k + 1].sqrt()).item()
                share = (1 - math.cos(angle - after)) / -math.sin(angle - after)
                if kind.startswith("epsilon"):
                    ratio = math.cos(after) / math.cos(angle)
                    share = (1 - ratio) / (math.sin(after) - ratio * math.sin(angle))
            time = (9 - k if kind == "released" else 10 - k) / 10
            found = plain(decoder, features[i], x, torch.tensor(time)) + share * x
            wanted = math.cos(angle) * noise - math.sin(angle) * action[i] if kind.startswith("v") else noise
            total += (found - wanted).square().mean().item() / 8
        assert abs(loss[i].item() - total) < 1e-4 * (1 + total)


def test_the_gaussian_loss_is_the_negative_log_density():
    decoder = build("gaussian", scale=0.1)
    features, action = inputs()
    zero, one = torch.zeros(6, 2), torch.ones(6, 2)
    mean = decoder(features, zero)
    normal = torch.distributions.Normal(mean, decoder(features, one) - mean)
    torch.testing.assert_close(decoder.loss(features, action, {}), -normal.log_prob(action).sum(-1))


@pytest.mark.parametrize("kind", KINDS)
def test_every_parameter_learns(kind):
    decoder = build(kind, scale=0.3)
    features, action = inputs()
    decoder.loss(features, action, decoder.draws(6, gen())).sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in decoder.parameters())


def fit(decoder, action, epochs, lr, batch=512):
    """Adam on a buffer without informative observations; a fixed seed."""
    features, random = torch.zeros(len(action), 3), gen(11)
    optimizer = torch.optim.Adam(decoder.parameters(), lr)
    for _ in range(epochs):
        for rows in torch.randperm(len(action), generator=random).split(batch):
            draws = decoder.draws(len(rows), random)
            optimizer.zero_grad()
            decoder.loss(features[rows], action[rows], draws).mean().backward()
            optimizer.step()


@pytest.mark.parametrize("kind", ["flow", "v cosine", "epsilon cosine", "gaussian"])
def test_a_buffer_of_one_action_teaches_that_action(kind):
    decoder, action = build(kind), torch.tensor([0.5, -1.5])
    fit(decoder, action.expand(256, 2), epochs=150 if kind == "gaussian" else 60, lr=1e-2, batch=64)
    _, noise = inputs(200)
    error = (decoder(torch.zeros(1, 3), noise) - action).abs()
    assert error.mean() < 0.1 and error.max() < 0.5


@pytest.mark.slow
def test_a_flow_learns_both_modes_where_a_gaussian_cannot():
    """Check G2: four tries at a hidden +-1, won by any within .2. Two modes could win .9375, any Gaussian .5."""
    action = torch.where(torch.rand(10_000, 1, generator=gen(4)) < 0.5, -1.0, 1.0)
    win = {}
    for kind in ("flow", "gaussian"):
        decoder = build(kind, size=1)
        fit(decoder, action, epochs=60, lr=1e-3)
        with torch.no_grad():
            found = decoder(torch.zeros(1, 3), torch.randn(20_000, 1, generator=gen(9)))
        hit = [((found - b).abs() < 0.2).float().mean().item() for b in (-1.0, 1.0)]
        win[kind] = sum(1 - (1 - p) ** 4 for p in hit) / 2
    assert win["flow"] >= 0.90
    assert win["gaussian"] <= 0.52
