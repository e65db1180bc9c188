"""What a choice among trained policies costs in evaluation episodes, and how good the chosen one is.

Hyper-parameters are chosen by running the resulting policies; a method that needs many such episodes is no better
offline than one that needs few. Jackson et al. (2025, arXiv 2504.11453, and the code released with it) let a bandit do
the choosing: its arms are the trained policies, a pull is one evaluation episode, and after each pull one asks how
good the policy is that looks best so far. Here as there:

- a trial takes a random subset of the policies, without replacement;
- a pull draws one of the arm's recorded returns, with replacement;
- the arm is the one of largest ``mean + sqrt(alpha ln(t) / pulls)``, t from 1, untried arms first, ties at random;
- the policy of the best mean so far is deployed, and is worth the mean of all of its recorded returns.

Where it differs: only arms that were tried can be deployed (with mean 0 for the others, an untried policy would win
over negative returns), and the bonus is in units of ``unit``. The released code adds it to D4RL scores from 0 to 100;
returns without reference scores take a hundredth of their own range as one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class TuningCost:
    """The deployed policy's value after each evaluation episode, over trials."""

    mean: np.ndarray
    """[P] mean over trials after 1, 2, ..., P episodes."""
    low: np.ndarray
    high: np.ndarray
    """[P] what the middle part of the trials deploys: quantiles over trials."""
    mean_low: np.ndarray
    mean_high: np.ndarray
    """[P] bootstrap interval of ``mean``: of the simulation only, it shrinks with more trials."""
    candidates: int
    """Policies there are."""
    subset: int
    """Policies in each trial."""
    confidence: float

    def after(self, episodes: int) -> tuple[float, float, float]:
        """Mean, low and high after that many evaluation episodes, at least 1."""
        k = episodes - 1
        return float(self.mean[k]), float(self.low[k]), float(self.high[k])


def tuning_cost(
    returns: Sequence[np.ndarray],
    *,
    pulls: int = 100,
    subset: int = 20,
    trials: int = 1000,
    alpha: float = 2.0,
    unit: float | None = None,
    confidence: float = 0.95,
    replications: int = 1000,
    seed: int = 0,
) -> TuningCost:
    """How good the deployed policy is after each of ``pulls`` evaluation episodes.

    Args:
        returns: Recorded evaluation returns of each policy, [episodes] each.
        pulls: Evaluation episodes.
        subset: Policies in a trial; all of them where there are no more.
        trials: Repetitions, each with a subset and returns of its own.
        alpha: Of the bandit's bonus.
        unit: Size of one in the bonus: 1 for scores from 0 to 100. None is a hundredth of the range of the returns.
        confidence: Of the intervals.
        replications: Of the bootstrap.
        seed: Of everything.

    Raises:
        ValueError: No policy, a policy without returns, or one that is not finite.
    """
    if not returns or min(len(r) for r in returns) == 0:
        raise ValueError(f"expected evaluation returns of at least one policy, found {[len(r) for r in returns]}")
    for k, r in enumerate(returns):
        if not np.isfinite(r).all():
            raise ValueError(f"policy {k} has a return that is not finite: {np.asarray(r)[~np.isfinite(r)][0]}")
    if min(pulls, subset, trials, replications) < 1 or alpha < 0 or not 0 < confidence < 1:
        raise ValueError(
            f"pulls={pulls}, subset={subset}, trials={trials} and replications={replications} must be at least 1, "
            f"alpha={alpha} not negative and confidence={confidence} between 0 and 1"
        )
    flat = np.concatenate([np.asarray(r, np.float64) for r in returns])
    count = np.array([len(r) for r in returns])
    first, worth = np.r_[0, count.cumsum()[:-1]], np.array([float(np.mean(r)) for r in returns])
    unit = float(np.ptp(flat)) / 100.0 if unit is None else unit
    rng = np.random.default_rng(seed)
    k = min(subset, len(returns))
    arms = rng.random((trials, len(returns))).argsort(1)[:, :k]
    total, tried, rows = np.zeros((trials, k)), np.zeros((trials, k)), np.arange(trials)
    deployed = np.empty((trials, pulls))
    for t in range(1, pulls + 1):
        with np.errstate(divide="ignore", invalid="ignore"):
            mean = total / tried
            index = np.where(tried > 0, mean + unit * np.sqrt(alpha * np.log(t) / tried), np.inf)
        chosen = index.argmax(1)  # the first of equals, but the order of the arms is random
        arm = arms[rows, chosen]
        total[rows, chosen] += flat[first[arm] + rng.integers(count[arm])]
        tried[rows, chosen] += 1
        best = np.where(tried > 0, total / np.maximum(tried, 1), -np.inf).argmax(1)
        deployed[:, t - 1] = worth[arms[rows, best]]
    ends = (0.5 - confidence / 2, 0.5 + confidence / 2)
    low, high = np.quantile(deployed, ends, axis=0)
    weights = rng.multinomial(trials, np.full(trials, 1.0 / trials), size=replications) / trials
    mean_low, mean_high = np.quantile(weights @ deployed, ends, axis=0)
    return TuningCost(deployed.mean(0), low, high, mean_low, mean_high, len(returns), k, confidence)
