"""Functionals declare what dynamic programming may rely on, and what they declare is so."""

import warnings
from fractions import Fraction as F

import numpy as np
import pytest

from ctrlrl.core.distribution import Law, wasserstein
from ctrlrl.core.functional import (
    UTILITIES,
    CVaR,
    Entropic,
    ExpectedUtility,
    MeanVariance,
    NotOptimisableError,
    Quantile,
)

LAW = Law.of([-2, 0, 4], [F(1, 4), F(1, 4), F(1, 2)])
SCALAR = [*UTILITIES.values(), ExpectedUtility.two_slopes(3, 1)]


def test_values_by_hand():
    found = {name: utility(LAW) for name, utility in UTILITIES.items()}
    assert found == {
        "mean": F(3, 2), "shortfall": F(-1, 2), "surplus": 2, "distance": F(-5, 2), "squared": -9, "reached": F(3, 4)
    }  # fmt: skip
    assert ExpectedUtility.two_slopes(3, F(1, 2))(LAW) == F(-3, 2) + 1
    assert CVaR(F(1, 2))(LAW) == -1 and Quantile(F(1, 2))(LAW) == 0
    assert MeanVariance(2)(LAW) == F(3, 2) - 2 * (9 - F(9, 4))
    assert Entropic(1.0)(Law.at(3.0)) == pytest.approx(3)


def test_vector_utilities_by_hand():
    law = Law.of([(3, -4), (0, 1)], [F(1, 2), F(1, 2)])
    assert ExpectedUtility.norm(2, 2)(law) == -13
    assert ExpectedUtility.norm(2)(law) == pytest.approx(-3)
    assert ExpectedUtility.norm(1)(law) == -4
    assert ExpectedUtility.penalised([10])(law) == F(3, 2) - 20
    with pytest.raises(ValueError, match="vectors"):
        ExpectedUtility.penalised([10, 1])(law)
    assert UTILITIES["mean"].vector is False and ExpectedUtility.norm().vector
    with pytest.raises(ValueError, match="one number per atom"):
        UTILITIES["mean"](law)


@pytest.mark.parametrize("functional", [*SCALAR, CVaR(0.3), Quantile(0.4), MeanVariance(), Entropic(-1.0)])
def test_many_at_once_is_one_by_one(functional):
    laws = [Law.of([1.0, 5.0], [0.5, 0.5]), Law.at(-1.0), Law.of([-3.0, 0.0, 2.0], [0.2, 0.3, 0.5])]
    atoms, p = (np.concatenate([getattr(law, a) for law in laws]) for a in ("atoms", "probabilities"))
    assert functional.of_segments(atoms, p, [0, 2, 3]) == pytest.approx([functional(law) for law in laws])


@pytest.mark.parametrize("utility", SCALAR, ids=lambda u: u.label)
def test_declared_degree_and_lipschitz_constant_hold(utility):
    rng = np.random.default_rng(0)
    for _ in range(20):
        a, b = (Law.of(rng.normal(size=5), rng.dirichlet(np.ones(5))) for _ in range(2))
        assert utility(a.affine(0.3)) == pytest.approx(0.3**utility.degree * utility(a))
        if utility.lipschitz is not None:
            assert abs(utility(a) - utility(b)) <= utility.lipschitz * wasserstein(a, b) + 1e-12


def test_declarations_that_an_example_refutes_are_refused():
    with pytest.raises(ValueError, match="degree=1"):
        ExpectedUtility(lambda x: -x * x, "-x^2", 1)
    with pytest.raises(ValueError, match="a slope of 2"):
        ExpectedUtility(lambda x: 2 * x, "2x", 1, 1.0)
    with pytest.raises(ValueError, match="unknown"):
        ExpectedUtility.named("cvar")


@pytest.mark.parametrize(
    ("functional", "problem", "lacking"),
    [
        (UTILITIES["shortfall"], {"gamma": 0.9, "endless": True}, []),
        (UTILITIES["squared"], {"gamma": 0.9}, []),
        (UTILITIES["squared"], {"gamma": 0.9, "endless": True}, ["Lipschitz"]),
        (ExpectedUtility(lambda x: x - x * x, "x - x^2", None), {}, []),
        (ExpectedUtility(lambda x: x - x * x, "x - x^2", None), {"gamma": 0.5}, ["gamma"]),
        (CVaR(0.1), {"gamma": 0.5, "endless": True}, ["mixtures"]),
        (Quantile(0.1), {}, ["mixtures"]),
        (MeanVariance(), {"gamma": 0.5, "endless": True}, ["mixtures", "gamma", "Lipschitz"]),
        (Entropic(-1.0), {}, []),
        (Entropic(-1.0), {"gamma": 0.5}, ["gamma"]),
    ],
)
def test_what_is_lacking_is_said_refused_and_with_leave_warned_about(functional, problem, lacking):
    reasons = functional.lacks(**problem)
    assert len(reasons) == len(lacking) and all(word in text for word, text in zip(lacking, reasons, strict=True))
    if not lacking:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            functional.check(**problem)
        return
    with pytest.raises(NotOptimisableError, match=lacking[0]):
        functional.check(**problem)
    with pytest.warns(UserWarning, match=lacking[-1]):
        functional.check(**problem, allow=True)


def test_cvar_the_quantile_and_mean_variance_break_the_order_of_mixtures():
    """What they declare to lack they do lack: a better part makes the mixture worse."""
    high = Law.at(F(10))
    for functional, better, worse, other in (
        (MeanVariance(), Law.at(F(4)), Law.at(F(3)), Law.at(F(0))),
        (CVaR(F(1, 2)), Law.at(F(0)), Law.of([-1, 5], [F(1, 2)] * 2), high),
        (Quantile(F(1, 2)), Law.at(F(1)), Law.of([0, 5], [F(1, 2)] * 2), high),
    ):
        mixed = [Law.mixture([law, other], [F(1, 2)] * 2) for law in (better, worse)]
        assert functional(better) > functional(worse) and functional(mixed[0]) < functional(mixed[1]), functional.name
