"""The quantile forecaster against demand whose quantiles are known."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from scipy.stats import gamma

from ctrlrl.inventory.forecaster import LEVELS, QuantileForecaster

WINDOW = 16


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def fitted(values, horizons, time=None, steps=300, batch=256, seed=0, **options):
    """A forecaster trained on series [K, W + T]; features [T, F]."""
    torch.manual_seed(seed)
    forecaster = QuantileForecaster(WINDOW, 0 if time is None else time.shape[1], horizons, **options)
    forecaster.fit(values[:, WINDOW:], values[:, :WINDOW], time, generator(seed), steps=steps, batch=batch)
    return forecaster


def gamma_demand(series, periods, shape, seed=0):
    return torch._standard_gamma(torch.full((series, periods), shape), generator=generator(seed))


@pytest.fixture(scope="module")
def of_gamma():
    return fitted(3.0 * gamma_demand(300, 100, 2.0), (1, 4), steps=300)


def test_the_quantiles_of_gamma_demand_and_of_its_sums_are_recovered(of_gamma):
    """Sums of h independent gamma(2) are gamma(2 h); nothing is to be read off the past."""
    forecast = of_gamma(3.0 * gamma_demand(500, WINDOW, 2.0, seed=1))
    for horizon, quantiles in zip((1, 4), forecast.unbind(1), strict=True):
        for level in (0.1, 0.5, 0.9):
            exact = 3.0 * gamma.ppf(level, 2.0 * horizon)
            found = quantiles[:, LEVELS.index(level)]
            assert found.mean() == pytest.approx(exact, rel=0.05), (horizon, level)
            assert found.std() < 0.1 * exact + 0.2, "it reads something off a past that says nothing"


def test_nineteen_twentieths_are_forecast():
    assert pytest.approx([0.05 + 0.05 * k for k in range(19)]) == LEVELS


def test_one_network_serves_series_of_very_different_sizes():
    """Sizes from 0.1 to 10,000: of each, demand is below the forecast quantile as often as that says."""
    sizes = 10.0 ** torch.linspace(-1.0, 4.0, 250)[:, None]
    forecaster = fitted(sizes * gamma_demand(250, 90, 6.0) / 6.0, (2,), steps=400)
    fresh = sizes * gamma_demand(250, 60 * (WINDOW + 2), 6.0, seed=1).div(6.0)
    blocks = fresh.unflatten(1, (60, WINDOW + 2))
    total = blocks[..., WINDOW:].sum(-1, keepdim=True)
    below = (total <= forecaster(blocks[..., :WINDOW])[:, :, 0]).float()
    for group in below.chunk(5):  # a factor of ten each
        torch.testing.assert_close(group.mean((0, 1)), torch.tensor(LEVELS), atol=0.06, rtol=0.0)


def test_horizons_begin_with_the_period_after_the_past():
    """Demand of 0, 10, 0, 10, ...: what a horizon adds up to is known."""
    values = 10.0 * ((torch.arange(60) + torch.arange(2)[:, None]) % 2)
    forecaster = fitted(values, (1, 2, 3), steps=200)
    median = forecaster(values[:, :WINDOW])[..., LEVELS.index(0.5)]  # the first row ends with 10, the second with 0
    torch.testing.assert_close(median, torch.tensor([[0.0, 10.0, 10.0], [10.0, 10.0, 20.0]]), atol=0.5, rtol=0.0)


def test_features_are_those_of_the_first_period_to_come():
    """Demand that nothing foretells but the feature of its own period."""
    coin = (torch.rand(200, 1, generator=generator()) < 0.5).float()
    values = (8.0 + 4.0 * coin[:, 0]).expand(4, -1)
    forecaster = fitted(values, (1,), coin[WINDOW:], steps=300)
    past = values[:1, 20 : 20 + WINDOW].expand(2, -1)
    median = forecaster(past, torch.tensor([[0.0], [1.0]]))[:, 0, LEVELS.index(0.5)]
    torch.testing.assert_close(median, torch.tensor([8.0, 12.0]), atol=0.5, rtol=0.0)


def test_quantiles_never_cross_whatever_the_weights():
    torch.manual_seed(0)
    forecaster = QuantileForecaster(WINDOW, 1, (1, 3))
    for weight in forecaster.parameters():
        weight.data.normal_()
    forecast = forecaster(20.0 * torch.randn(200, WINDOW), torch.randn(200, 1))
    assert forecast.shape == (200, 2, 19)
    assert (forecast.diff(dim=-1) >= 0.0).all()
    assert (forecast.diff(dim=-1) > 0.0).any()


def test_between_the_known_levels_are_straight_lines_and_so_beyond_them():
    forecaster = QuantileForecaster(WINDOW, 0, (1,), levels=(0.2, 0.4, 0.8))
    quantiles = torch.tensor([1.0, 3.0, 11.0]).expand(7, 3)
    level = torch.tensor([0.2, 0.4, 0.8, 0.3, 0.6, 0.1, 0.95], requires_grad=True)
    found = forecaster.at(quantiles, level)
    torch.testing.assert_close(found, torch.tensor([1.0, 3.0, 11.0, 2.0, 7.0, 0.0, 14.0]))
    (slope,) = torch.autograd.grad(found.sum(), level)
    torch.testing.assert_close(slope[3:], torch.tensor([10.0, 20.0, 10.0, 20.0]))


def test_series_without_demand_are_no_trouble():
    values = torch.cat([torch.zeros(3, 60), gamma_demand(3, 60, 2.0)])
    forecaster = fitted(values, (2,), steps=100)
    forecast = forecaster(torch.zeros(1, WINDOW))
    assert forecast.isfinite().all()
    assert forecast.abs().max() < 0.5


def test_held_out_series_keep_few_series_from_being_learned_by_heart():
    """Thirty series: on fresh ones the pinball loss stays near that of the true quantiles."""
    forecaster = fitted(gamma_demand(30, 30, 4.0), (1,), steps=400)
    fresh = gamma_demand(4000, WINDOW + 1, 4.0, seed=1)
    levels = torch.tensor(LEVELS)

    def pinball(quantiles):
        error = fresh[:, WINDOW:] - quantiles
        return torch.maximum(levels * error, (levels - 1.0) * error).mean()

    exact = torch.from_numpy(gamma.ppf(levels.numpy(), 4.0)).float()
    assert pinball(forecaster(fresh[:, :WINDOW])[:, 0]) < 1.06 * pinball(exact)


def test_training_is_repeatable_and_leaves_no_gradients():
    values = gamma_demand(20, 60, 2.0)
    one, two, other = (fitted(values, (1, 2), steps=20, seed=seed) for seed in (0, 0, 1))
    for key, weight in one.state_dict().items():
        assert torch.equal(weight, two.state_dict()[key]), key
    assert not torch.equal(one.net[0].weight, other.net[0].weight)
    assert not any(weight.requires_grad or weight.grad is not None for weight in one.parameters())
    assert not one(values[:, :WINDOW]).requires_grad


def test_what_is_saved_is_loaded_with_all_it_needs(of_gamma, tmp_path):
    save_file(of_gamma.state_dict(), tmp_path / "forecaster.safetensors")
    fresh = QuantileForecaster(WINDOW, 0, (1, 4))
    assert of_gamma.ready
    assert not fresh.ready
    fresh.load_state_dict(load_file(tmp_path / "forecaster.safetensors"))
    assert fresh.ready
    past = 3.0 * gamma_demand(5, WINDOW, 2.0)
    assert torch.equal(fresh(past), of_gamma(past))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"window": 0}, "window 0"),
        ({"horizons": ()}, "horizons"),
        ({"horizons": (0, 2)}, "horizons"),
        ({"levels": (0.5,)}, "levels"),
        ({"levels": (0.5, 0.2)}, "rising"),
        ({"levels": (0.0, 0.2)}, "between 0 and 1"),
    ],
)
def test_forecasters_that_make_no_sense_are_refused(options, said):
    with pytest.raises(ValueError, match=said):
        QuantileForecaster(**{"window": 4, "features": 0, "horizons": (1,), **options})


def test_too_few_periods_are_refused():
    values = gamma_demand(3, WINDOW + 5, 2.0)
    forecaster = QuantileForecaster(WINDOW, 0, (1, 6))
    with pytest.raises(ValueError, match="5 recorded periods are fewer than the 6"):
        forecaster.fit(values[:, WINDOW:], values[:, :WINDOW])
    forecaster = QuantileForecaster(WINDOW, 0, (1, 5))
    with pytest.raises(ValueError, match="15 past periods are given, and 16 expected"):
        forecaster.fit(values[:, WINDOW:], values[:, : WINDOW - 1])
