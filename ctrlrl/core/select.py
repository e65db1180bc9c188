"""Selectors: which reset seeds to play next, and how often each. Pure functions over a pool of seeds."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple, Protocol, TypeAlias, runtime_checkable

import torch
from torch import Tensor

from ctrlrl.core import budget

State: TypeAlias = dict[str, Tensor]


class Selection(NamedTuple):
    """What to play in one iteration."""

    index: Tensor  # pyright: ignore[reportIncompatibleMethodOverride]
    """[G] int64 positions in the pool, one per group; repeats are allowed."""
    size: Tensor
    """[G] int64 episodes of each group, at least one."""


@runtime_checkable
class Selector(Protocol):
    """What every selector offers. Its state is a dictionary of tensors that belongs to the caller."""

    def initial(self, pool: int, features: Tensor) -> State:
        """State before the first iteration, for ``pool`` seeds whose first observations are ``features`` [pool, F]."""
        ...

    def select(
        self, state: State, n_groups: int, group_size: int, progress: float, generator: torch.Generator
    ) -> Selection:
        """Choose ``n_groups`` groups with ``n_groups * group_size`` episodes in all."""
        ...

    def learn(self, state: State, index: Tensor, score: Tensor, features: Tensor) -> State:
        """New state after episodes of pool members ``index`` [B] scored ``score`` [B] in [0, 1].

        ``features`` [B, F] describe each episode's first observation.
        """
        ...


# -- which seeds ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class VarianceSampling:
    """Seeds whose outcomes vary are played more often (variance-aware sampling, arXiv 2509.21268).

    floor(share G) seeds drawn with probability ~ (v - min v) / (max v - min v), the rest uniformly
    v = p (1 - p),  v <- momentum v + (1 - momentum) p (1 - p)

    p is the mean score of the seed's last episodes. A seed not yet played has v = 1/4, the largest there is.
    """

    share: float = 0.5
    """Part of the groups that is drawn by variance."""
    momentum: float = 0.0
    """Weight of the old variance when a seed is played again."""

    def initial(self, pool: int, features: Tensor) -> State:
        """Every seed might be undecided."""
        return {"variance": torch.full((pool,), 0.25)}

    def select(
        self, state: State, n_groups: int, group_size: int, progress: float, generator: torch.Generator
    ) -> Selection:
        """Groups of equal size."""
        weight = self.weight(state)
        count = int(self.share * n_groups)
        chosen = [budget.uniform(len(weight), n_groups - count, generator)]
        if count:
            chosen.insert(0, torch.multinomial(weight, count, replacement=True, generator=generator))
        index = torch.cat(chosen)
        return Selection(index, torch.full_like(index, group_size))

    def weight(self, state: State) -> Tensor:
        """[pool] sampling probabilities up to a factor; all alike where no seed stands out."""
        v = state["variance"]
        spread = v.max() - v.min()
        return (v - v.min()) / spread if spread > 0 else torch.ones_like(v)

    def learn(self, state: State, index: Tensor, score: Tensor, features: Tensor) -> State:
        """Variances of the seeds just played."""
        old = state["variance"]
        total, count = _tally(index, score.to(old.dtype), len(old))
        p = total / count.clamp(min=1.0)
        new = self.momentum * old + (1.0 - self.momentum) * p * (1.0 - p)
        return {"variance": torch.where(count > 0, new, old)}


@dataclass(frozen=True)
class PassRateBudget:
    """Group sizes from each seed's pass rate so far, by :func:`mixed_outcome_value`; the seeds come in turn.

    p = (s + prior) / (n + 2 prior),  s <- decay s + new successes,  n <- decay n + new episodes

    A seed not yet played gets ``group_size`` episodes.
    """

    low: int = 2
    """Fewest episodes of a group."""
    high: int = 128
    """Most episodes of a group."""
    prior: float = 0.5
    """Successes and failures that a seed is credited with beforehand."""
    decay: float = 0.5
    """Weight that a seed's earlier episodes keep when it is played again, as the policy has changed since."""

    def initial(self, pool: int, features: Tensor) -> State:
        """No seed was played."""
        return {"solved": torch.zeros(pool), "played": torch.zeros(pool)}

    def select(
        self, state: State, n_groups: int, group_size: int, progress: float, generator: torch.Generator
    ) -> Selection:
        """Any seeds; episodes where they inform most."""
        index = budget.uniform(len(state["played"]), n_groups, generator)
        solved, played = state["solved"][index], state["played"][index]
        size = torch.full_like(index, group_size)
        seen = played > 0
        if seen.any():
            p = (solved[seen] + self.prior) / (played[seen] + 2.0 * self.prior)
            size[seen] = budget.allocate(budget.mixed_outcome_value(p, self.high), self.low, group_size * len(p))
        return Selection(index, size)

    def learn(self, state: State, index: Tensor, score: Tensor, features: Tensor) -> State:
        """Add the new outcomes to the faded old ones."""
        total, count = _tally(index, score.to(state["solved"].dtype), len(state["solved"]))
        fade = torch.where(count > 0, self.decay, 1.0)
        return {"solved": fade * state["solved"] + total, "played": fade * state["played"] + count}


# -- a value of the first observation -------------------------------------------------------------


@runtime_checkable
class StartValue(Protocol):
    """Predicts success from the first observation. Made with the number of episodes to remember."""

    def initial(self, features: Tensor) -> State:
        """State before the first iteration; ``features`` [pool, F] are all first observations there are."""
        ...

    def probability(self, state: State, features: Tensor) -> Tensor:
        """[M] chance of success of first observations ``features`` [M, F]."""
        ...

    def learn(self, state: State, features: Tensor, score: Tensor) -> State:
        """New state after episodes from ``features`` [B, F] scored ``score`` [B] in [0, 1]."""
        ...


@dataclass(frozen=True)
class LogisticStartValue:
    """Bayesian logistic regression on the last ``context`` episodes, with Laplace's approximation.

    logit p = w . x + b,  w ~ N(0, prior_scale^2 / F),  b ~ N(0, prior_scale^2)

    x are the F features, standardised over the pool. It is solved as a Gaussian process whose covariance is
    prior_scale^2 (x . x' / F + 1), so that its cost depends on ``context`` and not on F. The prediction is the
    posterior mean of the probability, by MacKay's approximation.
    """

    context: int = 256
    """Episodes remembered, the last ones."""
    prior_scale: float = 2.0
    """Deviation that the logit of a typical observation has beforehand."""

    def initial(self, features: Tensor) -> State:
        """No episode yet: all chances are even."""
        x = features.double()
        std = x.std(0, unbiased=False)
        scale = torch.where(std > 1e-6, std, torch.ones_like(std))
        empty = x.new_zeros(0)
        return {"mean": x.mean(0), "scale": scale, "x": x[:0], "score": empty, "residual": empty, "precision": empty}

    def probability(self, state: State, features: Tensor) -> Tensor:
        """Posterior mean."""
        x = (features.double() - state["mean"]) / state["scale"]
        cross = self._covariance(x, state["x"])
        mean = cross @ state["residual"]
        variance = self._covariance(x, x).diagonal()
        if len(state["x"]):
            root = state["precision"].sqrt()
            solved = torch.linalg.solve(self._inner(state["x"], root), root.unsqueeze(-1) * cross.T)
            variance = variance - (cross.T * root.unsqueeze(-1) * solved).sum(0)
        return torch.sigmoid(mean / (1.0 + torch.pi / 8.0 * variance.clamp(min=0.0)).sqrt())

    def learn(self, state: State, features: Tensor, score: Tensor) -> State:
        """Newton's method to the posterior mode of the remembered episodes' logits (Rasmussen & Williams, 3.1)."""
        new = (features.double() - state["mean"]) / state["scale"]
        x = torch.cat([state["x"], new])[-self.context :]
        y = torch.cat([state["score"], score.double()])[-self.context :]
        covariance = self._covariance(x, x)
        logit = torch.zeros_like(y)
        for _ in range(20):
            p = torch.sigmoid(logit)
            root = (p * (1.0 - p)).sqrt()
            b = root.square() * logit + y - p
            logit = covariance @ (b - root * torch.linalg.solve(self._inner(x, root), root * (covariance @ b)))
        p = torch.sigmoid(logit)
        return state | {"x": x, "score": y, "residual": y - p, "precision": p * (1.0 - p)}

    def _covariance(self, x: Tensor, other: Tensor) -> Tensor:
        return self.prior_scale**2 * (x @ other.T / x.shape[1] + 1.0)

    def _inner(self, x: Tensor, root: Tensor) -> Tensor:
        """I + W^1/2 K W^1/2, which is well conditioned."""
        identity = torch.eye(len(x), dtype=x.dtype, device=x.device)
        return identity + root.unsqueeze(-1) * self._covariance(x, x) * root


@dataclass(frozen=True)
class StartValueBudget:
    """Group sizes from a predicted chance of success, by :func:`failure_value`; the seeds come in turn."""

    value: StartValue = field(default_factory=LogisticStartValue)
    """Predicts success from the first observation."""
    low: int = 2
    """Fewest episodes of a group."""
    high: int = 32
    """Most episodes of a group."""

    def initial(self, pool: int, features: Tensor) -> State:
        """The features of all seeds, and the value model's own state."""
        return {"features": features} | self._own(self.value.initial(features))

    def select(
        self, state: State, n_groups: int, group_size: int, progress: float, generator: torch.Generator
    ) -> Selection:
        """Any seeds; episodes where failures can be told from successes."""
        index = budget.uniform(len(state["features"]), n_groups, generator)
        p = self.value.probability(self._model(state), state["features"][index])
        return Selection(index, budget.allocate(budget.failure_value(p, self.high), self.low, n_groups * group_size))

    def learn(self, state: State, index: Tensor, score: Tensor, features: Tensor) -> State:
        """Show the value model what happened."""
        return state | self._own(self.value.learn(self._model(state), features, score))

    @staticmethod
    def _own(model: State) -> State:
        return {f"value.{k}": v for k, v in model.items()}

    @staticmethod
    def _model(state: State) -> State:
        return {k.removeprefix("value."): v for k, v in state.items() if k.startswith("value.")}


def _tally(index: Tensor, score: Tensor, pool: int) -> tuple[Tensor, Tensor]:
    """[pool] sum of the scores and number of the episodes of each seed."""
    zero = torch.zeros(pool, dtype=score.dtype, device=score.device)
    return zero.index_add(0, index, score), zero.index_add(0, index, torch.ones_like(score))
