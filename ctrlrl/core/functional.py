"""Statistical functionals: what is to be maximised of a law, and which properties dynamic programming may rely on."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from ctrlrl.core.distribution import Law, Numbers

PROBES = np.array([-3.0, -2.0, -1.0, -0.25, 0.0, 0.25, 1.0, 2.0, 3.0])
"""Where declared properties of a utility are tried out."""


class NotOptimisableError(ValueError):
    """Dynamic programming on stocks does not maximise this functional; the message says which property it lacks."""


class Functional(ABC):
    """A number K(nu) for each law nu, larger is better.

    The three properties are the conditions of Ávila Pires et al. (arXiv 2501.13028, section 4). They are declared, not
    derived; those of a scalar utility are tried out on a few points.
    """

    indifferent_to_mixtures: ClassVar[bool]
    """If K(nu_i) >= K(nu'_i) for each i then K of the mixture of the nu_i >= K of the same mixture of the nu'_i."""

    @property
    def indifferent_to_gamma(self) -> bool:
        """If K(X) >= K(X') then K(gamma X) >= K(gamma X') for 0 < gamma <= 1."""
        return False

    @property
    def lipschitz(self) -> float | None:
        """L with |K(nu) - K(nu')| <= L W1(nu, nu'), of vectors with the 1-norm; None: there is none."""
        return None

    @property
    @abstractmethod
    def name(self) -> str:
        """As it is called in messages."""

    @abstractmethod
    def __call__(self, law: Law) -> Any:
        """K of the law."""

    def of_segments(self, atoms: Numbers, probabilities: Numbers, starts: Sequence[int]) -> NDArray[Any]:
        """K of many laws at once: the i-th has the atoms from ``starts[i]`` up to ``starts[i + 1]``; [k]."""
        ends = [*starts[1:], len(probabilities)]
        laws = (Law.of(atoms[a:b], probabilities[a:b]) for a, b in zip(starts, ends, strict=True))
        return np.array([self(law) for law in laws])

    def lacks(self, gamma: Any = 1, endless: bool = False) -> list[str]:
        """Reasons why stock-augmented dynamic programming is not exact for it; empty if it is."""
        found = []
        if not self.indifferent_to_mixtures:
            found.append(
                "it is not indifferent to mixtures, so the best plan after each outcome need not be best overall"
            )
        if gamma != 1 and not self.indifferent_to_gamma:
            found.append(f"it is not indifferent to gamma (here {gamma}), so discounting changes which law is better")
        if endless and self.lipschitz is None:
            found.append("it has no Lipschitz constant, so without a horizon sweeps need not converge")
        return found

    def check(self, gamma: Any = 1, endless: bool = False, allow: bool = False) -> None:
        """Raise NotOptimisableError if it lacks what is needed; with ``allow`` warn (UserWarning) instead."""
        reasons = self.lacks(gamma, endless)
        if not reasons:
            return
        text = f"{self.name} cannot be maximised by dynamic programming on stocks: {'; '.join(reasons)}"
        if not allow:
            raise NotOptimisableError(f"{text}. allow=True runs it anyway: what it returns may be far from the best")
        warnings.warn(f"{text}. What is returned may be far from the best", UserWarning, stacklevel=3)


@dataclass(frozen=True)
class ExpectedUtility(Functional):
    """K = E f(X). Named ones by ``ExpectedUtility.named``; ``two_slopes``, ``norm`` and ``penalised`` take numbers.

    Raises ValueError where a declared degree or Lipschitz constant of a scalar utility is refuted by an example.
    """

    function: Callable[[Numbers], Any]
    """f, on all atoms at once: [n] (or vectors [n, m]) to [n]; must take object arrays for exact laws."""
    label: str
    """As it is called in messages."""
    degree: float | None
    """d with f(k x) = k^d f(x) for every k > 0; None: there is none, and then gamma must be 1."""
    lipschitz: float | None = None  # type: ignore[assignment]
    """Lipschitz constant of f, for vectors with the 1-norm; None: there is none."""
    vector: bool = False
    """f takes vectors."""

    indifferent_to_mixtures: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.vector:
            return
        at, twice = (np.asarray(self.function(x), dtype=float) for x in (PROBES, 2 * PROBES))
        if at.shape != PROBES.shape:
            raise ValueError(f"{self.label}: f maps {list(PROBES.shape)} to {list(at.shape)}; expected one number each")
        if self.degree is not None and not np.allclose(twice, 2.0**self.degree * at):
            raise ValueError(f"{self.label}: degree={self.degree} declared, but f(2x) is not 2^{self.degree} f(x)")
        slope = np.abs(np.diff(at) / np.diff(PROBES)).max()
        if self.lipschitz is not None and slope > self.lipschitz * (1 + 1e-9):
            raise ValueError(f"{self.label}: lipschitz={self.lipschitz} declared, but a slope of {slope:.6g} was found")

    @property
    def name(self) -> str:
        return f"the mean of {self.label}"

    @property
    def indifferent_to_gamma(self) -> bool:
        return self.degree is not None

    def __call__(self, law: Law) -> Any:
        return law.expect(self.function)

    def of_segments(self, atoms: Numbers, probabilities: Numbers, starts: Sequence[int]) -> NDArray[Any]:
        return np.add.reduceat(probabilities * self.function(atoms), starts)

    @staticmethod
    def named(name: str) -> ExpectedUtility:
        """mean x, shortfall min(x,0), surplus max(x,0), distance -|x|, squared -x^2, reached 1{x>=0}.

        Raises ValueError on any other name.
        """
        if name not in UTILITIES:
            raise ValueError(f"utility {name!r} is unknown; expected one of {', '.join(UTILITIES)}")
        return UTILITIES[name]

    @staticmethod
    def two_slopes(left: Any, right: Any) -> ExpectedUtility:
        """left min(x, 0) + right max(x, 0); every f of degree one on numbers is of this kind."""

        def function(x: Numbers) -> Numbers:
            return left * np.minimum(x, 0) + right * np.maximum(x, 0)

        label = f"{left} min(x, 0) + {right} max(x, 0)"
        return ExpectedUtility(function, label, 1, float(max(abs(left), abs(right))))

    @staticmethod
    def norm(order: float = 2, power: float = 1) -> ExpectedUtility:
        """-||x||^power of a vector, in the norm of that order (>= 1); exact in rationals where power = order."""
        if order < 1 or power <= 0:
            raise ValueError(f"order={order!r}, power={power!r}; expected order >= 1 and power > 0")

        def function(x: Numbers) -> Any:
            total = (np.abs(x) ** order).sum(-1)
            return -total if power == order else -(total.astype(float) ** (power / order))

        label = f"-||x||_{order}^{power}"
        return ExpectedUtility(function, label, power, 1.0 if power == 1 else None, vector=True)

    @staticmethod
    def penalised(weights: Sequence[Any]) -> ExpectedUtility:
        """x_0 + sum_i weights_i min(x_i, 0) of a vector [1 + k]: a return, and k budgets not to be overdrawn."""
        w = np.array(list(weights), dtype=object)

        def function(x: Numbers) -> Any:
            if x.ndim != 2 or x.shape[1] != 1 + len(w):
                raise ValueError(f"atoms {list(x.shape)} for {len(w)} weights; expected vectors [n, {1 + len(w)}]")
            total = x[:, 0] + (np.minimum(x[:, 1:], 0) * w).sum(-1)
            return total if x.dtype == object else total.astype(float)

        largest = max([1.0, *(abs(float(v)) for v in w)])
        return ExpectedUtility(function, f"x_0 + {list(weights)} . min(x, 0)", 1, largest, vector=True)


UTILITIES = {
    "mean": ExpectedUtility(lambda x: x, "x", 1, 1.0),
    "shortfall": ExpectedUtility(lambda x: np.minimum(x, 0), "min(x, 0)", 1, 1.0),
    "surplus": ExpectedUtility(lambda x: np.maximum(x, 0), "max(x, 0)", 1, 1.0),
    "distance": ExpectedUtility(lambda x: -np.abs(x), "-|x|", 1, 1.0),
    "squared": ExpectedUtility(lambda x: -(x * x), "-x^2", 2),
    "reached": ExpectedUtility(lambda x: np.where(x >= 0, 1, 0), "1{x >= 0}", 0),
}
"""Utilities by name; see ``ExpectedUtility.named``."""


@dataclass(frozen=True)
class CVaR(Functional):
    """Mean of the worst share ``level``, taken as K itself. The scan over stocks maximises it properly."""

    level: Any
    """In (0, 1]."""

    indifferent_to_mixtures: ClassVar[bool] = False

    @property
    def indifferent_to_gamma(self) -> bool:
        return True

    @property
    def lipschitz(self) -> float:
        return 1.0 / float(self.level)

    @property
    def name(self) -> str:
        return f"CVaR at {self.level} used directly"

    def __call__(self, law: Law) -> Any:
        return law.cvar(self.level)


@dataclass(frozen=True)
class Quantile(Functional):
    """The quantile (value at risk) of a level."""

    level: Any
    """In [0, 1]."""

    indifferent_to_mixtures: ClassVar[bool] = False

    @property
    def indifferent_to_gamma(self) -> bool:
        return True

    @property
    def name(self) -> str:
        return f"the quantile at {self.level}"

    def __call__(self, law: Law) -> Any:
        return law.quantile(self.level)


@dataclass(frozen=True)
class MeanVariance(Functional):
    """Mean minus ``weight`` times the variance."""

    weight: Any = 1
    """>= 0."""

    indifferent_to_mixtures: ClassVar[bool] = False

    @property
    def name(self) -> str:
        return f"mean - {self.weight} variance"

    def __call__(self, law: Law) -> Any:
        return law.mean() - self.weight * law.variance()


@dataclass(frozen=True)
class Entropic(Functional):
    """(1/beta) log E exp(beta X). Orders laws as an expected utility does, so at gamma = 1 it can be maximised."""

    beta: float
    """< 0 shuns risk, > 0 seeks it."""

    indifferent_to_mixtures: ClassVar[bool] = True

    @property
    def name(self) -> str:
        return f"the entropic risk at {self.beta}"

    def __call__(self, law: Law) -> Any:
        return law.entropic(self.beta)
