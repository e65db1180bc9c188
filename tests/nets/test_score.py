"""Scores whose value is known: the standard normal's, EDM's denoiser, the loss in closed form; and units."""

import math

import gymnasium as gym
import numpy as np
import pytest
import torch
from torch import nn

from ctrlrl.nets.actors import QNetworkConfig
from ctrlrl.nets.edm import Preconditioned
from ctrlrl.nets.score import LEVELS, CorrectionModel, ScoreNetwork, denoising_loss

SIGMAS = (0.03, 0.1, 0.3, 1.0)
OBS, ACTIONS = gym.spaces.Box(-np.inf, np.inf, (2,), np.float32), gym.spaces.Box(-2.0, 6.0, (1,), np.float32)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def network(size=3, given=0):
    """One whose F is not 0."""
    torch.manual_seed(0)
    net = ScoreNetwork(size, (16,), "silu", given)
    nn.init.normal_(net.out.weight)
    return net


@pytest.mark.parametrize("sigma", SIGMAS)
def test_it_starts_as_the_score_of_a_standard_normal(sigma):
    x = normal(5, 3)
    found = ScoreNetwork(3, (8,), "silu")(x, torch.tensor(sigma))
    torch.testing.assert_close(found, -x / (1 + sigma**2))


@pytest.mark.parametrize("sigma", SIGMAS)
def test_x_plus_sigma_squared_times_the_score_is_the_denoiser_of_edm(sigma):
    """D = x + sigma^2 S (Tweedie), with the same F in both."""
    net, x, level = network(), normal(5, 3), torch.tensor(sigma)

    class F(nn.Module):
        def forward(self, scaled, c_noise):
            s = (4.0 * c_noise).exp()
            own = net(scaled * torch.sqrt(1 + s[:, None] ** 2), s)
            total = 1 + s[:, None] ** 2
            return (own + scaled * total.sqrt() / total) * s[:, None] * total.sqrt()

    torch.testing.assert_close(x + sigma**2 * net(x, level), Preconditioned(F())(x, level), rtol=1e-4, atol=1e-5)
    # F itself is of the size of its input at every level, and S of 1 / sigma
    f = F()(x / math.sqrt(1 + sigma**2), level.log().expand(5) / 4)
    plain = net.out(net.body(torch.cat([x / math.sqrt(1 + sigma**2), *(w.expand(5, 1) for w in (
        level.log(), level.log().sin(), level.log().cos(), (2 * level.log()).sin(), (2 * level.log()).cos()
    ))], 1)))  # fmt: skip
    torch.testing.assert_close(f, plain, rtol=1e-3, atol=1e-4)


def test_every_row_has_its_own_level_and_condition():
    net, x, given, sigma = network(given=2), normal(4, 3), normal(4, 2, seed=1), torch.tensor(SIGMAS)
    whole = net(x, sigma, given)
    for i in range(4):
        torch.testing.assert_close(whole[i], net(x[i : i + 1], sigma[i], given[i : i + 1])[0])
    assert not torch.allclose(whole, net(x, sigma, given + 1.0))


@pytest.mark.parametrize("sigma", SIGMAS)
@pytest.mark.parametrize("factor", [1.0, -1.0, 1.3])
def test_the_loss_of_a_multiple_of_the_score_is_known(sigma, factor):
    """x ~ N(0, 1), S = -c x / (1 + sigma^2), q = sigma^2 / (1 + sigma^2): (1 - c q)^2 + c^2 q (1 - q) by dimension."""
    n = 200_000
    score = lambda x, s, given: -factor * x / (1 + s[:, None] ** 2)  # noqa: E731
    found = denoising_loss(score, normal(n, 2), torch.full((n,), sigma), normal(n, 2, seed=1))
    q = sigma**2 / (1 + sigma**2)
    expected = 2 * ((1 - factor * q) ** 2 + factor**2 * q * (1 - q))  # summed over two dimensions
    assert found.shape == (n,) and float(found.mean()) == pytest.approx(expected, abs=0.02)


def test_losses_noise_what_they_name_and_leave_conditions_alone():
    seen = {}

    def noted(name):
        def score(x, sigma, given=None):
            seen[name] = (x, given)
            return torch.zeros_like(x)

        return score

    model = CorrectionModel(OBS, ACTIONS, QNetworkConfig(actor_hidden=(8,)))
    model.fit("obs", torch.tensor([1.0, 2.0]), torch.tensor([2.0, 4.0]))
    model.fit("action", torch.tensor([0.5]), torch.tensor([0.25]))
    for name in ("joint", "conditional", "marginal"):
        delattr(model, name)
        setattr(model, name, noted(name))
    obs, action, noise = normal(6, 2), normal(6, 1, seed=1).tanh(), normal(6, 3, seed=2)
    losses = model(obs, action, obs + 1.0, torch.tensor([0.0, 1.0, 0.5] * 2), noise)
    s, a = (obs - torch.tensor([1.0, 2.0])) / torch.tensor([2.0, 4.0]), (action - 0.5) / 0.25
    sigma = torch.tensor([[0.03], [1.0], [math.sqrt(0.03)]] * 2)
    torch.testing.assert_close(seen["joint"][0], torch.cat([s, a], 1) + sigma * noise)
    torch.testing.assert_close(seen["marginal"][0], s + sigma * noise[:, :2])
    torch.testing.assert_close(seen["conditional"][0], a + sigma * noise[:, 2:])
    torch.testing.assert_close(seen["conditional"][1], s)
    torch.testing.assert_close(losses["joint_loss"], noise.square().sum(1).mean())
    torch.testing.assert_close(losses["marginal_loss"], noise[:, :2].square().sum(1).mean())


# -- the model ------------------------------------------------------------------------------------


def test_parts_of_the_joint_score_and_what_never_changes():
    model = CorrectionModel(OBS, ACTIONS, QNetworkConfig(actor_hidden=(8,)))
    s, a, sigma = normal(5, 2), normal(5, 1, seed=1), torch.tensor(0.5)
    torch.testing.assert_close(model.score(s, a, sigma, "joint", "state"), -s / 1.25)
    torch.testing.assert_close(model.score(s, a, sigma, "joint", "action"), -a / 1.25)
    torch.testing.assert_close(model.score(s, a, sigma, "conditional", "state"), -s / 1.25)
    model.fit("obs", torch.tensor([0.1, 3.0]), torch.tensor([1e-9, 2.0]))
    assert model.obs_std.tolist() == [1.0, 2.0]
    for score_on in ("joint", "conditional"):
        torch.testing.assert_close(model.score(s, a, sigma, score_on, "state"), s * torch.tensor([0.0, -1 / 1.25]))
    noise = {}
    model.joint.forward = lambda x, sigma, given=None: noise.setdefault("x", x) * 0.0
    obs = torch.tensor([[0.1, 5.0]]).expand(4, 2)
    model(obs, torch.zeros(4, 1), obs, torch.ones(4), normal(4, 3))
    torch.testing.assert_close(noise["x"][:, 0], torch.zeros(4))
    assert noise["x"][:, 1].std() > 0.1


def test_dynamics_are_in_units_of_the_state():
    """With networks that return d = 10 a and a = d / 10: a change of 10 change_std a + change_mean, and back."""
    model = CorrectionModel(OBS, ACTIONS, QNetworkConfig(actor_hidden=(8,)))
    model.fit("obs", torch.tensor([1.0, 2.0]), torch.tensor([2.0, 4.0]))
    model.fit("change", torch.tensor([0.5, -0.5]), torch.tensor([0.1, 0.2]))
    del model.inverse, model.forward_dynamics
    model.forward_dynamics = lambda x: 10.0 * x[:, 2:].expand(-1, 2)
    model.inverse = lambda x: x[:, 2:3] / 10.0
    s, a = normal(5, 2), normal(5, 1, seed=1)
    change = model.change(s, a)
    raw = 10.0 * a * torch.tensor([[0.1, 0.2]]) + torch.tensor([0.5, -0.5])
    torch.testing.assert_close(change * torch.tensor([2.0, 4.0]), raw)
    torch.testing.assert_close(model.action_for(s, change), a)


def test_the_typical_size_is_the_quantile_of_the_datas_scores():
    """Standard normal data, whose score is -x / (1 + sigma^2) without training: |x| of one dimension has 1.645."""
    model = CorrectionModel(OBS, ACTIONS, QNetworkConfig(actor_hidden=(8,)))
    model.fit_typical(normal(100_000, 2), normal(100_000, 1, seed=1))
    for sigma in (0.03, 0.2, 1.0):
        for score_on in ("joint", "conditional"):
            found = [model.typical_norm(sigma, score_on, of) * (1 + sigma**2) for of in ("action", "state")]
            # two dimensions: sqrt(-2 ln 0.1); between two levels the line is a little off
            assert found == pytest.approx([1.6449, 2.1460], rel=0.02)
    assert model.levels().shape == (LEVELS,)


def test_what_is_not_flat_or_not_bounded_is_refused():
    for space in (gym.spaces.Box(0, 255, (4, 4), np.uint8), gym.spaces.Box(-1, 1, (2, 2)), gym.spaces.Discrete(3)):
        with pytest.raises(TypeError, match="flat observations"):
            CorrectionModel(space, ACTIONS, QNetworkConfig())
    with pytest.raises(TypeError, match="Box actions"):
        CorrectionModel(OBS, gym.spaces.Discrete(3), QNetworkConfig())
    with pytest.raises(ValueError, match="finite bounds"):
        CorrectionModel(OBS, OBS, QNetworkConfig())


def test_it_is_no_policy():
    model = CorrectionModel(OBS, ACTIONS, QNetworkConfig(actor_hidden=(8,)))
    for ask in (lambda: model.mode(torch.zeros(1, 2)), lambda: model.act(torch.zeros(1, 2), torch.zeros(1, 1))):
        with pytest.raises(ValueError, match=r"agent\.correct\(policy\)"):
            ask()


def test_a_density_that_was_not_learned_is_refused():
    model = CorrectionModel(OBS, ACTIONS, QNetworkConfig(actor_hidden=(8,)), "joint")
    with pytest.raises(ValueError, match="densities='both'"):
        model.score(torch.zeros(1, 2), torch.zeros(1, 1), torch.tensor(0.1), "conditional", "action")
