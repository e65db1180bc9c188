"""Sparse laws against values by hand, exact in rationals."""

from fractions import Fraction as F
from itertools import pairwise

import numpy as np
import pytest

from ctrlrl.core.distribution import Law, categorical_projection, cramer, quantile_projection, wasserstein

LAW = Law.of([3, -1, 1, -1], [F(1, 4), F(1, 8), F(1, 2), F(1, 8)])
"""-1: 1/4, 1: 1/2, 3: 1/4"""


def random_law(rng, n):
    return Law.of(np.round(rng.normal(size=n), 1), rng.dirichlet(np.ones(n)))


def test_atoms_are_sorted_merged_and_stay_rational():
    assert LAW.atoms.tolist() == [-1, 1, 3] and LAW.probabilities.tolist() == [F(1, 4), F(1, 2), F(1, 4)]
    assert LAW.exact and all(isinstance(x, F) for x in LAW.atoms)
    assert not Law.of([1, 2]).exact and Law.of([1.0, F(1)], [F(1, 2)] * 2).probabilities.dtype == np.float64
    assert Law.of([5, 7], [0.0, 1.0]).atoms.tolist() == [7.0]


def test_vectors_are_sorted_and_merged_as_wholes():
    law = Law.of([(1, 2), (0, 5), (1, 2), (1, 0)], [F(1, 4)] * 4)
    assert law.atoms.tolist() == [[0, 5], [1, 0], [1, 2]] and law.probabilities.tolist() == [F(1, 4), F(1, 4), F(1, 2)]
    assert law.mean().tolist() == [F(3, 4), F(9, 4)]
    assert law.affine(2, (1, -1)).atoms.tolist() == [[1, 9], [3, -1], [3, 3]]
    with pytest.raises(ValueError, match="vectors"):
        law.quantile(F(1, 2))


@pytest.mark.parametrize(
    ("atoms", "weights", "match"),
    [
        ([1, 2], [0.5, 0.6], "sum to 1.1"),
        ([1, 2], [F(1, 2), F(1, 3)], "sum to 5/6"),
        ([1, 2], [1.5, -0.5], "least -0.5"),
        ([1, 2], [1.0], r"atoms \[2\], probabilities \[1\]"),
        ([], [], r"atoms \[0\]"),
        ([np.nan], [1.0], "NaN"),
    ],
)
def test_what_is_no_law_is_refused(atoms, weights, match):
    with pytest.raises(ValueError, match=match):
        Law.of(atoms, weights)


def test_statistics_by_hand():
    assert LAW.mean() == 1 and LAW.variance() == 2
    assert [LAW.cdf(x) for x in (-2, -1, 0, 1, 3)] == [0, F(1, 4), F(1, 4), F(3, 4), 1]
    assert [LAW.quantile(u) for u in (0, F(1, 4), F(26, 100), F(3, 4), 1)] == [-1, -1, 1, 1, 3]
    assert LAW.cvar(F(1, 4)) == -1 and LAW.cvar(F(1, 2)) == 0 and LAW.cvar(F(1)) == 1
    assert LAW.upper_cvar(F(1, 4)) == 3 and LAW.upper_cvar(F(3, 8)) == F(7, 3) and LAW.upper_cvar(F(1)) == 1
    assert LAW.expect(lambda x: np.maximum(x, 0)) == F(5, 4)
    assert LAW.entropic(-2.0) == pytest.approx(np.log((np.e**2 + 2 * np.e**-2 + np.e**-6) / 4) / -2)
    assert LAW.entropic(1e-7) == pytest.approx(1, abs=1e-5) and LAW.entropic(0) == 1
    assert LAW.entropic(-500.0) == pytest.approx(-1, abs=0.01)


def test_a_level_that_floats_miss_by_rounding_is_reached():
    assert Law.of([0, 1, 2], [0.7, 0.1, 0.2]).quantile(0.8) == 1.0


def test_mixture_and_affine_maps():
    mixed = Law.mixture([LAW, Law.at(F(3))], [F(1, 3), F(2, 3)])
    assert mixed == Law.of([-1, 1, 3], [F(1, 12), F(1, 6), F(3, 4)])
    assert LAW.affine(-2, 1) == Law.of([3, -1, -5], [F(1, 4), F(1, 2), F(1, 4)])
    assert LAW.affine(0, 7) == Law.at(F(7))
    with pytest.raises(ValueError, match="weights"):
        Law.mixture([LAW], [F(1, 2), F(1, 2)])


def test_distances_by_hand():
    point = Law.at(F(1))
    assert wasserstein(LAW, point) == 1 and wasserstein(LAW, point, 2) == pytest.approx(2**0.5)
    assert wasserstein(LAW, point, np.inf) == 2
    assert cramer(LAW, point) == pytest.approx((2 / 16 + 2 / 16) ** 0.5)
    assert wasserstein(Law.at(0.0), Law.at(3.0)) == 3 and cramer(Law.at(0.0), Law.at(3.0)) == pytest.approx(3**0.5)
    assert wasserstein(LAW, LAW) == 0 and cramer(LAW, LAW) == 0


def test_wasserstein_one_is_the_area_between_the_cdfs():
    rng = np.random.default_rng(0)
    for _ in range(10):
        a, b = random_law(rng, 7), random_law(rng, 4)
        x = np.unique(np.concatenate([a.atoms, b.atoms]))
        area = sum(abs(a.cdf(u) - b.cdf(u)) * (v - u) for u, v in pairwise(x))
        assert wasserstein(a, b) == pytest.approx(area) and wasserstein(a, b) <= wasserstein(a, b, 2) + 1e-12


def test_pruning_moves_rare_atoms_to_the_nearest():
    law = Law.of([0, 1, 5, 6], [F(1, 100), F(49, 100), F(1, 100), F(49, 100)])
    pruned, error = law.pruned(F(1, 50))
    assert pruned == Law.of([1, 6], [F(1, 2), F(1, 2)]) and error == F(1, 50) == wasserstein(law, pruned)


def test_the_categorical_projection_keeps_the_mean_inside_and_clips_outside():
    law = Law.of([F(1, 4), F(1)], [F(1, 2), F(1, 2)])
    projected, error = categorical_projection(law, [0, 1, 2])
    assert projected == Law.of([0, 1], [F(3, 8), F(5, 8)]) and projected.mean() == law.mean()
    assert error == F(1, 2) * 2 * F(1, 4) * F(3, 4) == wasserstein(law, projected)
    clipped, error = categorical_projection(Law.of([-5, 9], [F(1, 2), F(1, 2)]), [0, 2])
    assert clipped == Law.of([0, 2], [F(1, 2), F(1, 2)]) and error == 6
    with pytest.raises(ValueError, match="ascend"):
        categorical_projection(law, [1, 0])


@pytest.mark.parametrize("m", [1, 2, 7, 50])
def test_midpoint_quantiles_are_within_the_range_over_2m(m):
    rng, tight = np.random.default_rng(m), 0.0
    for n in (1, 2, 3, 30):
        law = random_law(rng, n)
        projected, error = quantile_projection(law, m)
        bound = (law.atoms[-1] - law.atoms[0]) / (2 * m)
        assert error <= bound + 1e-12 and error == wasserstein(law, projected)
        tight = max(tight, error / bound) if bound else tight
    assert tight > 0.1
    assert quantile_projection(Law.of([0, 1], [F(1, 4), F(3, 4)]), 2)[0] == Law.of([0, 1], [F(1, 2), F(1, 2)])
