"""Off-policy actors: densities against torch's distributions, scaling, bounds, exploration."""

import math

import gymnasium as gym
import numpy as np
import pytest
import torch
from torch.distributions import Normal, TanhTransform, TransformedDistribution

from ctrlrl.nets.actors import DeterministicActor, QNetworkConfig, SquashedGaussian, SquashedGaussianActor

OBS = gym.spaces.Box(-np.inf, np.inf, (3,), np.float32)
LOPSIDED = gym.spaces.Box(np.float32([-0.1, -2.0]), np.float32([0.3, 7.0]))
SMALL = QNetworkConfig(actor_hidden=(8,), critic_hidden=(8,), image_features=8)
F64 = torch.float64


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


# -- density --------------------------------------------------------------------------------------


def test_the_density_equals_that_of_torchs_squashed_normal():
    mean, log_std, noise = (torch.randn(200, 3, generator=gen(i), dtype=F64) for i in range(3))
    dist = SquashedGaussian(mean, log_std)
    u = dist.pre_tanh(noise)
    torch.testing.assert_close(u, mean + log_std.exp() * noise)
    tanh = TanhTransform(cache_size=1)
    theirs = TransformedDistribution(Normal(mean, log_std.exp()), [tanh])
    expected = theirs.log_prob(tanh(u))
    torch.testing.assert_close(dist.log_density(u), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(dist.log_prob(u), expected.sum(-1), rtol=1e-12, atol=1e-12)


def test_the_density_integrates_to_one_over_the_actions():
    dist = SquashedGaussian(torch.tensor([0.4], dtype=F64), torch.tensor([-0.2], dtype=F64))
    action = torch.linspace(-1, 1, 200_002, dtype=F64)[1:-1, None]
    density = dist.log_prob(torch.atanh(action)).exp()
    assert torch.trapezoid(density, action[:, 0]).item() == pytest.approx(1.0, abs=1e-4)


def test_the_density_is_finite_and_right_far_out_in_float32():
    """At |u| = 30, tanh is 1 in float32; log(1 - tanh^2) is 2 (log 2 - |u|) there."""
    u = torch.tensor([[-30.0], [30.0]], requires_grad=True)
    dist = SquashedGaussian(torch.zeros(2, 1), torch.full((2, 1), 2.0))
    logp = dist.log_prob(u)
    normal = -0.5 * (30 * math.exp(-2.0)) ** 2 - 2.0 - 0.5 * math.log(2 * math.pi)
    assert logp.tolist() == pytest.approx([normal - 2 * (math.log(2) - 30)] * 2, rel=1e-5)
    (slope,) = torch.autograd.grad(logp.sum(), u)
    assert slope.flatten().tolist() == pytest.approx([30 * math.exp(-4) - 2, -30 * math.exp(-4) + 2], rel=1e-4)


# -- the Gaussian ---------------------------------------------------------------------------------


def test_log_deviations_are_cut_as_in_sacs_code():
    actor = SquashedGaussianActor(OBS, LOPSIDED, SMALL)
    for bias, expected in ((50.0, 2.0), (-50.0, -20.0), (0.5, 0.5)):
        with torch.no_grad():
            actor.log_std.weight.zero_()
            actor.log_std.bias.fill_(bias)
            assert (actor(torch.randn(5, 3)).log_std == expected).all()


def test_the_gaussian_acts_by_its_noise_and_deploys_its_mode():
    actor = SquashedGaussianActor(OBS, LOPSIDED, SMALL)
    obs, noise = torch.randn(9, 3, generator=gen()), torch.randn(9, 2, generator=gen(1))
    with torch.no_grad():
        dist = actor(obs)
        torch.testing.assert_close(actor.act(obs, noise), torch.tanh(dist.mean + dist.log_std.exp() * noise))
        torch.testing.assert_close(actor.mode(obs), torch.tanh(dist.mean))
        torch.testing.assert_close(actor.act(obs, torch.zeros(9, 2)), actor.mode(obs))
        assert torch.equal(actor.deterministic(obs), actor.to_env(obs, actor.mode(obs)))


def test_noise_is_standard_normal_and_comes_from_the_generator():
    actor = SquashedGaussianActor(OBS, LOPSIDED, SMALL)
    noise = actor.noise(500, 4, gen(3))
    assert noise.shape == (500, 4, 2) and torch.equal(noise, actor.noise(500, 4, gen(3)))
    assert noise.mean().abs() < 0.05 and (noise.std() - 1.0).abs() < 0.05


# -- the deterministic one ------------------------------------------------------------------------


def test_the_deterministic_actor_explores_with_noise_of_its_size_cut_at_the_bounds():
    actor = DeterministicActor(OBS, LOPSIDED, SMALL, exploration_noise=0.3)
    obs = torch.randn(9, 3, generator=gen())
    with torch.no_grad():
        mode = actor.mode(obs)
        assert torch.equal(mode, actor(obs)) and (mode.abs() < 1).all()
        torch.testing.assert_close(actor.act(obs, torch.ones(9, 2)), (mode + 0.3).clamp(max=1.0))
        assert (actor.act(obs, torch.full((9, 2), -100.0)) == -1.0).all()
        assert torch.equal(actor.act(obs, torch.zeros(9, 2)), mode)
        torch.testing.assert_close(mode, torch.tanh(actor.out(actor.body(obs))))


# -- the environment's actions --------------------------------------------------------------------


def test_actions_are_scaled_onto_each_bound():
    actor = DeterministicActor(OBS, LOPSIDED, SMALL)
    inner = torch.tensor([[-1.0, -1.0], [1.0, 1.0], [0.0, 0.0], [0.5, -0.5]])
    expected = torch.tensor([[-0.1, -2.0], [0.3, 7.0], [0.1, 2.5], [0.2, 0.25]])
    torch.testing.assert_close(actor.to_env(torch.zeros(4, 3), inner), expected)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("low,high", [(-0.1, 0.1), (0.1, 0.7), (-0.7, -0.1), (-1e6, 1e-3), (2.3, 2.4)])
def test_no_action_is_outside_its_space_by_rounding(dtype, low, high):
    space = gym.spaces.Box(dtype(low), dtype(high), (1,), dtype)
    actor = DeterministicActor(OBS, space, SMALL)
    inner = torch.rand(500, generator=gen()) * 2.0 - 1.0
    inner = torch.cat([torch.tensor([-1.0, 1.0, 0.0, 1.0 - 6e-8, -1.0 + 6e-8]), inner])
    for action in actor.to_env(torch.zeros(1), inner[:, None]).numpy().astype(dtype):
        assert space.contains(action), action


@pytest.mark.parametrize("shape", [(), (3,), (2, 2)])
def test_actions_have_the_spaces_shape(shape):
    space = gym.spaces.Box(-2.0, 2.0, shape, np.float32)
    actor = SquashedGaussianActor(OBS, space, SMALL)
    size = max(1, math.prod(shape))
    inner = torch.linspace(-1, 1, 5 * size).view(5, size)
    with torch.no_grad():
        sent = actor.to_env(torch.zeros(5, 3), inner)
        assert sent.shape == (5, *shape) and torch.equal(sent.flatten(), 2.0 * inner.flatten())
        assert actor.deterministic(torch.zeros(5, 3)).shape == (5, *shape)


@pytest.mark.parametrize(
    "space,error,message",
    [
        (gym.spaces.Discrete(3), TypeError, "Box.*ppo"),
        (gym.spaces.MultiDiscrete([2, 3]), TypeError, "Box.*ppo"),
        (gym.spaces.Box(0, 5, (2,), np.int64), TypeError, "floats"),
        (gym.spaces.Box(-np.inf, np.inf, (2,)), ValueError, "finite.*RescaleAction"),
        (gym.spaces.Box(np.float32([-1, -1]), np.float32([1, np.inf])), ValueError, "finite.*RescaleAction"),
    ],
    ids=["discrete", "multidiscrete", "integers", "infinite", "half infinite"],
)
@pytest.mark.parametrize("kind", [SquashedGaussianActor, DeterministicActor])
def test_actions_that_cannot_be_squashed_are_refused_with_a_way_out(kind, space, error, message):
    with pytest.raises(error, match=f"(?s){message}"):
        kind(OBS, space, SMALL)


def test_a_network_without_critics_is_refused():
    with pytest.raises(ValueError, match="n_critics=0"):
        QNetworkConfig(n_critics=0)
