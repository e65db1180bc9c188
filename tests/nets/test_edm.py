"""EDM's sampler and loss against distributions whose denoiser is known exactly."""

import math

import pytest
import torch
from helpers.linear_gaussian import LinearGaussian

from ctrlrl.nets.edm import Preconditioned, SamplerConfig, sample, training_sigma

DRAWS = 4000


@pytest.fixture(scope="module")
def system():
    return LinearGaussian()


def drawn(system, seed=0, guide=None, n=DRAWS, **settings):
    generator = torch.Generator().manual_seed(seed + 1)
    return sample(system.denoise, system.start(n, seed), SamplerConfig(**settings), generator, guide)


def test_the_exact_draws_set_the_floor_of_the_covariance_error(system):
    """What 4,000 perfect samples show: nothing below can be asked of a sampler."""
    g = torch.Generator().manual_seed(0)
    root = torch.linalg.cholesky(system.covariance + 1e-12 * torch.eye(len(system.covariance)))
    exact = torch.randn(DRAWS, len(root), generator=g, dtype=torch.float64) @ root.T
    assert system.covariance_error(exact.view(DRAWS, system.steps, 3).transpose(1, 2)) < 0.06


@pytest.mark.parametrize("steps", [32, 64])
def test_heun_with_churn_draws_from_the_right_distribution(system, steps):
    """Check P1 of the method's notes: at most 0.08 from 32 steps on."""
    assert system.covariance_error(drawn(system, sampler_steps=steps)) <= 0.08


def test_the_released_predictor_does_not(system):
    """Its error exceeds 0.3 at 32 steps, since variances are too large; at 128 it is a quarter of that."""
    few = drawn(system, sampler_steps=32, legacy_predictor=True)
    assert system.covariance_error(few) > 0.3
    assert few.square().mean() > 1.3 and drawn(system).square().mean() < 1.1
    assert 0.06 < system.covariance_error(drawn(system, sampler_steps=128, legacy_predictor=True)) < 0.2


def test_samples_obey_the_dynamics_exactly(system):
    """The support of the data is a subspace, which no step leaves."""
    assert system.residual(drawn(system, n=200)) <= 1e-12


@pytest.mark.parametrize("order", ["heun", "euler"])
def test_without_churn_the_sampler_is_a_function_of_its_start(system, order):
    first, second = (drawn(system, n=20, s_churn=0.0, sampler_order=order) for _ in range(2))
    generator = torch.Generator().manual_seed(99)
    config = SamplerConfig(s_churn=0.0, sampler_order=order)
    third = sample(system.denoise, system.start(20, 0), config, generator)
    assert first.equal(second) and first.equal(third)


def test_levels_are_those_of_the_paper():
    """Eq. 5 with N = 18, sigma from 80 to 0.002: its second level is 57.6 (80^(1/7) is 1.8701, 0.002^(1/7) 0.4116)."""
    levels = SamplerConfig(sampler_steps=18).levels()
    assert len(levels) == 19 and levels[0] == pytest.approx(80.0) and levels[17] == pytest.approx(0.002)
    assert levels[18] == 0.0
    assert levels[1] == pytest.approx((80 ** (1 / 7) + (0.002 ** (1 / 7) - 80 ** (1 / 7)) / 17) ** 7)
    assert levels[1] == pytest.approx(57.586, abs=1e-2)


def test_churn_is_bounded_and_only_between_its_levels():
    config = SamplerConfig(sampler_steps=256, s_churn=80.0)
    assert config.churn(1.0) == pytest.approx(80 / 256)
    assert config.churn(51.0) == config.churn(0.04) == 0.0
    assert SamplerConfig(sampler_steps=32).churn(1.0) == pytest.approx(math.sqrt(2) - 1)


@pytest.mark.parametrize(
    "settings, word",
    [({"sampler_steps": 0}, "sampler_steps=0"), ({"sigma_min": 90.0}, "sigma_max"), ({"s_noise": -1.0}, "s_noise"),
     ({"rho": 0.0}, "rho=0.0")],
)  # fmt: skip
def test_impossible_settings_are_refused(settings, word):
    with pytest.raises(ValueError, match=word):
        SamplerConfig(**settings)


# -- guidance ------------------------------------------------------------------------------------


def test_the_guide_acts_before_every_step_but_the_last_and_sees_the_level(system):
    seen = []

    def guide(x, sigma, i):
        assert torch.is_grad_enabled() and not x.requires_grad
        seen.append((i, float(sigma)))
        return torch.zeros_like(x)

    guided = drawn(system, n=10, sampler_steps=8, guide=guide)
    levels = SamplerConfig(sampler_steps=8).levels()
    assert seen == [(i, pytest.approx(levels[i])) for i in range(7)]
    assert guided.equal(drawn(system, n=10, sampler_steps=8)), "an increment of zero changes nothing"


def test_what_the_guide_adds_is_carried_on(system):
    """Exact for a linear denoiser: of a push along an eigenvector at level s, sqrt(lambda / (lambda + s^2)) is left."""
    value, vector = system._values[-1], system._vectors[:, -1].view(system.steps, 3).T
    config = {"sampler_steps": 64, "s_churn": 0.0, "n": 1}
    at = 50
    sigma = SamplerConfig(sampler_steps=64).levels()[at]
    pushed = drawn(system, guide=lambda x, s, i: vector.unsqueeze(0) * float(i == at), **config)
    change = pushed - drawn(system, **config)
    expected = vector * (value / (value + sigma**2)).sqrt()
    torch.testing.assert_close(change[0], expected, atol=2e-3, rtol=0)


# -- training -------------------------------------------------------------------------------------


class Linear(torch.nn.Module):
    """F of data N(0, 1): the exact denoiser is x / (1 + sigma^2), which is c_skip x, so that F is 0."""

    def __init__(self, gain):
        super().__init__()
        self.gain = gain

    def forward(self, x, c_noise):
        return self.gain * x


def test_the_zero_network_is_the_exact_denoiser_of_standard_normal_data():
    x, sigma = torch.randn(5, 3, 4), torch.tensor([0.01, 0.5, 1.0, 7.0, 80.0])
    torch.testing.assert_close(
        Preconditioned(Linear(0.0))(x, sigma), x / (1 + sigma.square()).view(-1, 1, 1), atol=1e-6, rtol=1e-5
    )


def test_the_loss_of_every_level_is_one_where_nothing_is_learned():
    """The weights make it so: for N(0, 1) data and F = 0 the expected weighted error is 1 at every sigma."""
    g = torch.Generator().manual_seed(0)
    x, noise = torch.randn(2, 20_000, 4, generator=g)
    for level in (0.05, 0.4, 3.0, 40.0):
        loss = Preconditioned(Linear(0.0)).loss(x, torch.full((len(x),), level), noise)
        assert loss.shape == (len(x),)
        assert loss.mean() == pytest.approx(1.0, abs=0.03)


def test_the_network_sees_inputs_of_deviation_one_and_a_quarter_of_the_log_level():
    seen = []

    class Spy(torch.nn.Module):
        def forward(self, x, c_noise):
            seen.append((x.std(), c_noise))
            return torch.zeros_like(x)

    x = torch.randn(20_000, 2, generator=torch.Generator().manual_seed(0))
    sigma = torch.full((20_000,), 3.0)
    Preconditioned(Spy())(x + 3.0 * torch.randn_like(x), sigma)
    assert seen[0][0] == pytest.approx(1.0, abs=0.02)
    torch.testing.assert_close(seen[0][1], torch.full((20_000,), math.log(3.0) / 4))


def test_a_single_level_serves_a_whole_batch():
    model, x = Preconditioned(Linear(0.3)), torch.randn(4, 2)
    assert model(x, torch.tensor(2.0)).equal(model(x, torch.full((4,), 2.0)))


def test_levels_to_train_at_are_log_normal():
    sigma = training_sigma(torch.tensor([-1.0, 0.0, 2.0], dtype=torch.float64))
    torch.testing.assert_close(sigma.log(), torch.tensor([-2.4, -1.2, 1.2], dtype=torch.float64))
