"""How good a policy is, from recorded data alone: fitted Q evaluation and importance sampling, with intervals.

======  ========================================================================================
fqe     fitted Q evaluation (:mod:`ctrlrl.engine.fitted_q`): a model; no behaviour policy needed
is      trajectory importance sampling
pdis    per-decision importance sampling
wis     trajectory importance sampling, weights normalised
pdwis   per-decision importance sampling, weights normalised at every step
dr      doubly robust: fitted Q corrected by importance sampling
wdr     doubly robust, weights normalised at every step
======  ========================================================================================

The formulas are in :mod:`ctrlrl.core.off_policy_estimate`. All but fqe need the density of the policy and of the
behaviour policy at the recorded actions, both in the environment's units. They hold for few steps or policies close to
the behaviour: the effective sample size says so, and a tiny one is noted.

Without ``horizon`` the discounted value is estimated. fqe, dr and wdr let cut episodes go on; the others count what
was recorded only. With ``horizon`` all estimate the sum of the rewards of the first ``horizon`` steps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ctrlrl import names
from ctrlrl.core import off_policy_estimate as ope
from ctrlrl.core.ratio import log_ratio
from ctrlrl.data.dataset import Dataset
from ctrlrl.engine.agent import Agent
from ctrlrl.engine.bootstrap import Bounds, student_quantile
from ctrlrl.engine.fitted_q import FittedQ, FittedQConfig, check_estimand, fitted_q, over_rows, steps_of
from ctrlrl.engine.policy_density import AgentPolicy, EvaluatedPolicy, Likelihood, NoDensityError, density_of
from ctrlrl.engine.seeding import generator

METHODS = ("fqe", "is", "pdis", "wis", "pdwis", "dr", "wdr")
LOG_PROBS = "action_log_probs"
"""Column of ``dataset.infos`` with the behaviour policy's log-density of the action, in the environment's units."""
_MODELLED = {"dr", "wdr"}
FEW = 10.0
"""Effective sample size below which an importance-sampling estimate is called unreliable."""


@dataclass(frozen=True)
class Estimate:
    """What one method says of the policy's value."""

    name: str
    value: float | None
    """None where the method was refused; the note says why."""
    low: float | None = None
    high: float | None = None
    """Ends of the confidence interval; None where there is none."""
    student: tuple[float, float] | None = None
    """Student's interval, where the estimate is a mean over independent episodes."""
    effective_sample_size: float | None = None
    """Equally weighted episodes that the weighted ones are worth; for forms with weights per step the mean over steps,
    discounted as their rewards are. None without weights."""
    n_episodes: int = 0
    note: str = ""


def estimate(
    policy: Agent | EvaluatedPolicy,
    dataset: Dataset,
    *,
    gamma: float = 0.99,
    horizon: int | None = None,
    methods: Sequence[str] = METHODS,
    confidence: float = 0.95,
    replications: int = 1000,
    deterministic: bool = False,
    behaviour: Agent | Likelihood | None = None,
    fqe: FittedQConfig | None = None,
    samples: int = 8,
    seed: int = 0,
) -> dict[str, Estimate]:
    """Estimate the value of ``policy`` at the first observations of the data's episodes.

    Intervals are those of Efron's bias-corrected bootstrap over episodes, accelerated (BCa) where the estimate is a
    mean: products of ratios are so skewed that plain percentiles lie too low (Thomas, Theocharous and Ghavamzadeh
    2015). They take what was fitted as given. That of fqe is Student's, from networks fitted to bootstrap samples of
    the episodes (Hao et al. 2021, arXiv 2102.03607). None of them knows of a bias.

    Args:
        policy: An agent, or anything that acts and (for importance sampling) knows its density.
        dataset: Episodes.
        gamma: Discount per step.
        horizon: Steps that count; None is without end, except that gamma = 1 takes the longest episode where episodes
            were cut.
        methods: Names from :data:`METHODS`.
        confidence: Of the intervals.
        replications: Of the bootstrap.
        deterministic: Evaluate the mode of an agent's policy instead of the policy; it has no density.
        behaviour: Whose density stands for that of ``dataset.infos["action_log_probs"]``: a known behaviour policy
            (also one of :mod:`ctrlrl.interop.d4rl_policy`), or an estimated one.
        fqe: How action values are fitted, for fqe, dr and wdr.
        samples: Actions drawn at an observation for its value, where the policy is stochastic.
        seed: Of everything.

    Returns:
        One :class:`Estimate` per method, in the order asked for; refused methods have no value and say why.

    Raises:
        ValueError: An unknown method, spaces that do not fit, or a sum without end.
    """
    methods = _known(methods)
    if not 0.0 < confidence < 1.0 or replications < 2 or samples < 1:
        raise ValueError(
            f"confidence={confidence} must lie between 0 and 1, replications={replications} be at least 2 and "
            f"samples={samples} at least 1"
        )
    target = AgentPolicy(policy, deterministic) if isinstance(policy, Agent) else policy
    target.check(dataset)
    if gamma == 1.0 and horizon is None and not dataset.terminals[dataset.ends].all():
        horizon = max(episode.stop - episode.start for episode in dataset.episodes)
    check_estimand(dataset, gamma, horizon)
    bounds = Bounds(confidence, replications, seed)
    weights = _weights(target, dataset, behaviour, horizon) if set(methods) - {"fqe"} else ""
    fitted, columns = None, None
    if "fqe" in methods or (not isinstance(weights, str) and _MODELLED & set(methods)):
        drawn = samples if target.stochastic else 1
        fitted = fitted_q(
            target.act, dataset, gamma=gamma, horizon=horizon, config=fqe, samples=drawn, seed=seed,
            device=target.device,
        )  # fmt: skip
        if not isinstance(weights, str) and _MODELLED & set(methods):
            columns = _columns(fitted, target, dataset, drawn, generator(seed, "off_policy_evaluation", "values"))
    found: dict[str, Estimate] = {}
    for name in methods:
        if name == "fqe" and fitted is not None:
            found[name] = _fitted(fitted, dataset, confidence)
        elif isinstance(weights, str):
            found[name] = Estimate(name, None, n_episodes=len(dataset.episodes), note=weights)
        else:
            model = columns if name in _MODELLED else None
            found[name] = _weighted(name, weights, dataset, gamma, horizon, model, bounds)
    return found


# -- importance sampling ------------------------------------------------------------------------------


class Weights(NamedTuple):
    """Log-ratios of the recorded actions, by episode."""

    log_ratio: Tensor
    """[E, T] float64."""
    inexact: int
    """Steps whose density had to be guessed, for their action lies at a bound."""


class Columns(NamedTuple):
    """What a model says of the recorded steps."""

    q: Tensor
    """[E, T] of the action taken."""
    value: Tensor
    """[E, T] of the observation before."""
    value_t: Tensor
    """[E, T] of the observation after, 0 where nothing follows."""
    mask: Tensor
    """[E, T] bool: steps of which it is known what follows."""


def _weights(
    target: EvaluatedPolicy, data: Dataset, behaviour: Agent | Likelihood | None, horizon: int | None
) -> Weights | str:
    """Log-ratios, or why there are none."""
    if not target.stochastic:
        return "a deterministic policy has no density, so recorded actions cannot be weighted; fqe needs none"
    rows = np.arange(len(data))
    inexact = torch.zeros(len(data), dtype=torch.bool)
    try:
        mine, guessed = _densities(target, data, rows)
        if behaviour is not None:
            other = AgentPolicy(behaviour) if isinstance(behaviour, Agent) else behaviour
            theirs, more = _densities(other, data, rows)
            inexact = guessed | more
        elif LOG_PROBS in data.infos:
            theirs, inexact = torch.from_numpy(np.asarray(data.infos[LOG_PROBS], np.float64).reshape(-1)), guessed
        else:
            return (
                f"{data.info.id} does not say how likely its actions were (infos/{LOG_PROBS}); pass the behaviour "
                "policy, or an estimate of it, as behaviour="
            )
    except NoDensityError as error:
        return str(error)
    wrong = ~theirs.isfinite() | mine.isnan() | (mine == torch.inf)
    if wrong.any():
        row = int(wrong.nonzero()[0])
        return f"row {row} has log-densities {mine[row]:g} (policy) and {theirs[row]:g} (behaviour): not finite"
    mask = _mask(data, horizon)
    ratio = log_ratio(_padded(mine, data, horizon), _padded(theirs, data, horizon), mask)
    if ope.log_weight(ratio, mask)[:, -1].isneginf().all():
        return "the policy would take none of the recorded episodes: every weight is zero"
    return Weights(ratio, int(_padded(inexact, data, horizon).sum()))


@torch.no_grad()
def _densities(policy: Likelihood, data: Dataset, rows: np.ndarray) -> tuple[Tensor, Tensor]:
    """[N] log-densities of the recorded actions, and whether each was guessed."""

    device = getattr(policy, "device", torch.device("cpu"))

    def both(obs: Any, index: np.ndarray) -> Tensor:
        density = density_of(policy.log_prob(obs, torch.from_numpy(np.asarray(data.actions[index])).to(device)))
        return torch.stack([density.logp.double(), (~density.exact).double()])

    logp, guessed = over_rows(data.observations, rows, device, both)
    return logp, guessed > 0


def _weighted(
    name: str, weights: Weights, data: Dataset, gamma: float, horizon: int | None, columns: Columns | None,
    bounds: Bounds,
) -> Estimate:  # fmt: skip
    mask = _mask(data, horizon)
    reward = _padded(torch.from_numpy(np.asarray(data.rewards, np.float64)), data, horizon)
    inputs: tuple[Tensor, ...] = (weights.log_ratio, reward, mask)
    if name in ("is", "wis"):
        # a whole episode as one step: the same numbers, and a cheap bootstrap
        total = ope.log_weight(weights.log_ratio, mask)[:, -1:]
        inputs = (total, ope.discounted_return(reward, mask, gamma).unsqueeze(-1), torch.ones_like(total).bool())
    if columns is not None:
        inputs = (weights.log_ratio, reward, columns.q, columns.value, columns.value_t, columns.mask)
    formula = _FORMULAS[name]

    def value(*picked: Tensor) -> ope.Estimate:
        return formula(*picked, gamma=gamma)

    whole = value(*inputs)
    logs = ope.log_weight(inputs[0], inputs[-1])
    sizes = ope.effective_sample_size(logs)
    power = gamma ** torch.arange(len(sizes), dtype=sizes.dtype)
    size = float((sizes * power).sum() / power.sum())
    low, high = bounds.bootstrap(value, inputs, whole)
    student = bounds.student(whole.parts) if whole.parts is not None else None
    note = _remarks(name, weights, data, gamma, horizon, size, float(logs[:, -1].exp().mean()))
    return Estimate(name, float(whole.value), low, high, student, size, len(reward), note)


_FORMULAS: dict[str, Callable[..., ope.Estimate]] = {
    "is": ope.importance_sampling,
    "pdis": ope.per_decision,
    "wis": ope.weighted_importance_sampling,
    "pdwis": ope.weighted_per_decision,
    "dr": ope.doubly_robust,
    "wdr": ope.weighted_doubly_robust,
}


def _remarks(
    name: str, weights: Weights, data: Dataset, gamma: float, horizon: int | None, size: float, mean_weight: float
) -> str:
    """What a reader has to know before believing the number."""
    said = [_estimand(gamma, horizon)]
    if size < FEW:
        said.append(f"unreliable: {len(data.episodes)} episodes are worth {size:.1f}, and the interval is too narrow")
    elif not 0.5 < mean_weight < 2.0:
        said.append(f"the mean weight is {mean_weight:.2g} where 1 is expected: are both densities in one unit?")
    cut = int((~data.terminals[data.ends]).sum())
    if horizon is None and cut and name not in _MODELLED:
        said.append(f"{cut} episodes were cut, and what would follow is not counted")
    if weights.inexact:
        said.append(f"{weights.inexact} of {len(data)} actions lie at a bound, where their density is a guess")
    if name in _MODELLED:
        said.append("the interval takes the fitted values as given")
    return "; ".join(said)


# -- fitted Q -----------------------------------------------------------------------------------------


def _fitted(fitted: FittedQ, data: Dataset, confidence: float) -> Estimate:
    value, resampled = float(fitted.initial[0]), fitted.initial[1:]
    low = high = None
    said = [_estimand(fitted.gamma, fitted.horizon)]
    if len(resampled) > 1:
        half = student_quantile(confidence, len(resampled) - 1) * float(resampled.std(ddof=1))
        low, high = value - half, value + half
        said.append(f"interval from {len(resampled)} fits to resampled episodes")
    if not fitted.converged:
        said.append("not converged: values reach back about tau x updates steps, take more updates")
    said.append("a model: its bias is not known")
    if fitted.unusable:
        said.append(f"{fitted.unusable} steps without a known next observation were left out")
    return Estimate("fqe", value, low, high, n_episodes=len(data.episodes), note="; ".join(said))


@torch.no_grad()
def _columns(fitted: FittedQ, target: EvaluatedPolicy, data: Dataset, samples: int, acting: torch.Generator) -> Columns:
    """The fitted values at the recorded steps."""
    device, time, horizon = target.device, steps_of(data), fitted.horizon

    def q(obs: Any, index: np.ndarray) -> Tensor:
        action = torch.from_numpy(np.asarray(data.actions[index])).to(device)
        return fitted.q(obs, action, torch.from_numpy(time[index]).to(device))[0]

    def value(obs: Any, index: np.ndarray, later: int = 0) -> Tensor:
        return fitted.value(obs, torch.from_numpy(time[index] + later).to(device), acting, samples)[0]

    rows, known = np.arange(len(data)), np.asarray(data.next_known)
    values = over_rows(data.observations, rows, device, value)
    # the next row's value, but where an episode was cut that of its true last observation
    values_t = values.roll(-1)
    stop = np.asarray(data.terminals) | (time + 1 == horizon if horizon else False)
    cut = np.flatnonzero(data.ends & ~stop & known)
    if len(cut):
        last = over_rows(data.next_observations, cut, device, lambda obs, index: value(obs, index, 1))
        values_t[torch.from_numpy(cut)] = last
    values_t[torch.from_numpy(stop)] = 0.0
    followed = torch.from_numpy(~data.ends | stop | known)
    taken = over_rows(data.observations, rows, device, q)
    return Columns(*(_padded(x, data, horizon) for x in (taken, values, values_t, followed)))


# -- pieces -------------------------------------------------------------------------------------------


def _estimand(gamma: float, horizon: int | None) -> str:
    """What the number is, in words."""
    kind = "return" if gamma == 1.0 else f"return discounted by {gamma:g}"
    return f"{kind}, " + ("to the end of the episode" if horizon is None else f"first {horizon} steps")


def _mask(data: Dataset, horizon: int | None) -> Tensor:
    return _padded(torch.ones(len(data), dtype=torch.bool), data, horizon)


def _padded(column: Tensor, data: Dataset, horizon: int | None) -> Tensor:
    """[N] by episodes [E, T], zero beyond their end."""
    time = torch.from_numpy(steps_of(data))
    episode = torch.from_numpy(np.cumsum(np.r_[0, np.asarray(data.ends)[:-1]]))
    keep = time < (horizon or len(data))
    shape = (len(data.episodes), int(time[keep].max()) + 1)
    found = torch.zeros(shape, dtype=column.dtype)
    found[episode[keep], time[keep]] = column[keep]
    return found


def _known(methods: Sequence[str]) -> list[str]:
    for name in methods:
        if name not in METHODS:
            raise ValueError(f"no method {name!r}.{names.hint(name, METHODS)} Known: {', '.join(METHODS)}")
    return list(dict.fromkeys(methods))
