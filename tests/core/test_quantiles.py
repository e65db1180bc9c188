"""The Huber loss and quantile regression against numbers worked out by hand, and against sums over single terms."""

import pytest
import torch

from ctrlrl.core.quantiles import huber, midpoints, quantile_loss


@pytest.mark.parametrize(
    "kappa,expected", [(0.0, [0.5, 2.0]), (1.0, [0.125, 1.5]), (0.5, [0.25, 1.75]), (4.0, [0.03125, 0.5])]
)
def test_huber_is_a_parabola_up_to_kappa_and_a_line_beyond(kappa, expected):
    assert huber(torch.tensor([0.5, -2.0]), kappa).tolist() == pytest.approx(expected)


def test_huber_with_kappa_one_is_torchs():
    x = torch.linspace(-3, 3, 25, dtype=torch.float64)
    wanted = torch.nn.functional.smooth_l1_loss(x, torch.zeros_like(x), reduction="none")
    torch.testing.assert_close(huber(x, 1.0), wanted)


def test_levels_are_the_midpoints():
    assert midpoints(4, torch.zeros(1)).tolist() == [0.125, 0.375, 0.625, 0.875]


@pytest.mark.parametrize("kappa,expected", [(1.0, 0.25), (0.0, 0.5), (0.5, 0.375)])
def test_the_loss_of_two_quantiles_around_one_atom(kappa, expected):
    """Quantiles 0 and 2 at levels 1/4 and 3/4 of an atom at 1: a quarter of huber(1) each."""
    assert quantile_loss(torch.tensor([0.0, 2.0]), torch.tensor([1.0]), kappa).item() == pytest.approx(expected)


def test_too_low_a_quantile_costs_its_level_and_too_high_a_one_the_rest():
    one = torch.tensor([0.0])
    low, high = (quantile_loss(torch.tensor([0.0, q]), one, 0.0) for q in (-1.0, 1.0))
    assert low.item() == pytest.approx(0.75) and high.item() == pytest.approx(0.25)


def test_weights_are_the_probabilities_of_the_atoms():
    g = torch.Generator().manual_seed(0)
    quantiles, atoms = torch.randn(3, 4, generator=g), torch.randn(3, 2, generator=g)
    whole = quantile_loss(quantiles, atoms[:, [0, 0, 0, 1]], 0.3)
    torch.testing.assert_close(quantile_loss(quantiles, atoms, 0.3, torch.tensor([0.75, 0.25])), whole)
    torch.testing.assert_close(
        quantile_loss(quantiles, atoms, 0.3, torch.tensor([1.0, 0.0])), quantile_loss(quantiles, atoms[:, :1], 0.3)
    )


@pytest.mark.parametrize("kappa", [1.0, 0.3])
def test_the_loss_is_the_sum_of_its_terms(kappa):
    """QR-DQN, algorithm 1, term by term; with kappa 1 also what sb3-contrib computes, summed over quantiles."""
    g = torch.Generator().manual_seed(1)
    quantiles, atoms = (torch.randn(2, k, generator=g, dtype=torch.float64) * 2 for k in (5, 3))
    for row in range(2):
        total = 0.0
        for i in range(5):
            for j in range(3):
                u = (atoms[row, j] - quantiles[row, i]).item()
                size = 0.5 * u * u if abs(u) <= kappa else kappa * (abs(u) - 0.5 * kappa)
                total += abs((2 * i + 1) / 10 - (u < 0)) * size / kappa / 3
        assert quantile_loss(quantiles, atoms, kappa)[row].item() == pytest.approx(total)
