"""Quantiles of the demand to come, learned from recorded demand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ctrlrl.nets.mlp import mlp

LEVELS = tuple(k / 20 for k in range(1, 20))
"""Probabilities of the quantiles that are forecast."""
SMALLEST = 1e-3
"""Size that a series is taken to have at least, in mean sizes of all: none may be divided by nothing."""


class QuantileForecaster(nn.Module):
    """Quantiles of the total demand of the next ``h`` periods, for several horizons ``h`` at once.

    A fully connected network shared by all series. It sees past demand in units of the series' size (the mean of its
    absolute values), the logarithm of that size, and the features of the period; it answers, for each horizon and
    probability, how far the quantile per period lies from the past mean, in the same units. Its answers are put in
    order, so quantiles never cross; that never makes the pinball loss worse (Chernozhukov, Fernandez-Val, Galichon
    2010).

    Its weights need no gradients: :meth:`fit` trains them once, and they stay as they are.

    Source: Alvo, Russo, Kanoria, Lee (arXiv:2306.11246) and the released code, of which it has the layers (128, 128,
    ELU), the probabilities and the straight lines between them. Differs: the code takes demand in units and cuts
    forecasts off at 0; here sizes are divided out, at the cost of one input more, and forecasts of returns stay
    negative. The released code has no training of it; ours is that of :meth:`fit`.

    Args:
        window: Past periods ``W`` it sees.
        features: Features ``F`` of a period.
        horizons: Periods to sum over, each 1 or more: the lead time and one, for a stock.
        levels: Probabilities of the quantiles, rising, two or more.
        hidden: Widths of the layers.
    """

    levels: Tensor
    periods: Tensor
    smallest: Tensor
    shift: Tensor
    scale: Tensor
    fitted: Tensor

    def __init__(
        self,
        window: int,
        features: int,
        horizons: Sequence[int],
        levels: Sequence[float] = LEVELS,
        hidden: tuple[int, ...] = (128, 128),
    ) -> None:
        super().__init__()
        if window < 1 or not horizons or min(horizons) < 1:
            raise ValueError(f"window {window} and horizons {tuple(horizons)} must be of 1 period or more")
        if len(levels) < 2 or list(levels) != sorted(set(levels)) or not 0.0 < levels[0] <= levels[-1] < 1.0:
            raise ValueError(f"levels {tuple(levels)} must be two or more rising probabilities between 0 and 1")
        self.window, self.horizons = window, tuple(horizons)
        self.net = mlp(window + 1 + features, hidden, "elu")
        self.net.append(nn.Linear(hidden[-1], len(horizons) * len(levels)))
        self.register_buffer("levels", torch.tensor(levels), persistent=False)
        self.register_buffer("periods", torch.tensor(horizons, dtype=torch.float32)[:, None], persistent=False)
        self.register_buffer("smallest", torch.tensor(1.0))
        self.register_buffer("shift", torch.zeros(1 + features))  # of the logarithm of the size, and of the features
        self.register_buffer("scale", torch.ones(1 + features))
        self.register_buffer("fitted", torch.tensor(False))
        self.ready = False
        """Whether it has been fitted: ``fitted``, without waiting for the device."""
        self.requires_grad_(False)

    def forward(self, past: Tensor, time: Tensor | None = None) -> Tensor:
        """[..., H, Q] quantiles by horizon and probability, never falling along the last axis.

        Args:
            past: [..., W] demand, the newest last.
            time: [..., F] features of the first period to come; None where there are none.
        """
        mean, size = self._size(past)
        seen = size.log() if time is None else torch.cat([size.log(), time], -1)
        answer = self.net(torch.cat([past / size, (seen - self.shift) / self.scale], -1))
        answer = answer.unflatten(-1, (len(self.horizons), len(self.levels))).sort(-1).values
        return self.periods * (mean.unsqueeze(-1) + size.unsqueeze(-1) * answer)

    def _size(self, past: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and size, [..., 1] each."""
        size = past.abs().mean(-1, keepdim=True)
        return past.mean(-1, keepdim=True), torch.maximum(size, self.smallest)

    def at(self, quantiles: Tensor, level: Tensor) -> Tensor:
        """[...] of quantiles [..., Q] at probabilities ``level`` [...]: on straight lines between those that are known.

        The outermost lines go on beyond them, as in the released code: for most demand that is too low above the
        highest known probability.
        """
        upper = torch.searchsorted(self.levels, level.detach().contiguous()).clamp(1, len(self.levels) - 1)
        start, end = self.levels[upper - 1], self.levels[upper]
        low, high = (quantiles.gather(-1, i.unsqueeze(-1)).squeeze(-1) for i in (upper - 1, upper))
        return low + (high - low) * (level - start) / (end - start)

    # -- training -----------------------------------------------------------------------------

    def fit(
        self,
        demand: Tensor,
        past: Tensor,
        time: Tensor | None = None,
        generator: torch.Generator | None = None,
        *,
        steps: int = 2000,
        batch: int = 1024,
        learning_rate: float = 3e-3,
    ) -> None:
        """Train it by the pinball loss on ``K`` recorded series, and freeze it.

        A tenth of the series, drawn at random, is held out (none of fewer than ten); the weights with the least loss
        on them are kept. The loss is in units of each series' size, so that all count alike.

        Args:
            demand: [K, T] of the periods to learn from.
            past: [K, W] of those before.
            time: [T, F] their features.
            generator: CPU generator of the rows drawn.
            steps: Of Adam, its learning rate falling to 0 along a cosine.
            batch: Rows (a series at a period) of a step.
            learning_rate: At the start.

        Raises:
            ValueError: The longest horizon does not fit into the periods.
        """
        rows = _Rows(demand, past, time, self)
        self._measure(rows)
        self.requires_grad_(True)
        optimizer = torch.optim.Adam(self.parameters(), learning_rate)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        order = torch.randperm(rows.series, generator=generator)
        held, kept = order[: rows.series // 10], order[rows.series // 10 :]
        best, weights = float("inf"), self.state_dict()
        for step in range(1, steps + 1):
            series = kept[torch.randint(len(kept), (batch,), generator=generator)]
            period = torch.randint(rows.periods, (batch,), generator=generator)
            optimizer.zero_grad(set_to_none=True)
            self._loss(rows, series, period).backward()
            optimizer.step()
            schedule.step()
            if len(held) and step % max(steps // 20, 1) == 0:
                with torch.no_grad():
                    every = torch.cartesian_prod(held, torch.arange(rows.periods))
                    loss = float(self._loss(rows, *every.unbind(1)))
                if loss < best:
                    best, weights = loss, {k: v.clone() for k, v in self.state_dict().items()}
        optimizer.zero_grad(set_to_none=True)
        self.load_state_dict(weights)
        self.requires_grad_(False)
        self.fitted.fill_(True)
        self.ready = True

    def _measure(self, rows: _Rows) -> None:
        """Take the units of the inputs from the data."""
        sizes = rows.past.abs().mean(-1)
        self.smallest.copy_(SMALLEST * sizes.mean()).clamp_min_(torch.finfo(sizes.dtype).tiny)
        seen = torch.maximum(sizes, self.smallest).log().reshape(-1, 1)
        parts = [seen] if rows.time is None else [seen, rows.time]
        self.shift.copy_(torch.cat([part.mean(0) for part in parts]))
        self.scale.copy_(torch.cat([part.std(0, correction=0) for part in parts]))
        self.scale[self.scale < 1e-6] = 1.0  # what never changes says nothing

    def _loss(self, rows: _Rows, series: Tensor, period: Tensor) -> Tensor:
        """Mean pinball loss of rows (series [M], period [M]), per period and in units of the series' size."""
        series, period = series.to(self.levels.device), period.to(self.levels.device)
        past = rows.past[series, period]
        time = None if rows.time is None else rows.time[period]
        error = rows.total[series, period].unsqueeze(-1) - self(past, time)
        error = error / (self.periods * self._size(past)[1].unsqueeze(-1))
        return torch.maximum(self.levels * error, (self.levels - 1.0) * error).mean()

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.ready = bool(self.fitted)


class _Rows:
    """What to learn from: series ``k`` at period ``t``, for all whose longest horizon is recorded.

    Attributes:
        past: [K, P, W] demand before, the newest last.
        total: [K, P, H] demand of the horizons, from the period itself on.
        time: [T, F], or None.
    """

    def __init__(self, demand: Tensor, past: Tensor, time: Tensor | None, forecaster: QuantileForecaster) -> None:
        longest, there = max(forecaster.horizons), demand.shape[1]
        self.series, self.periods = len(demand), there - longest + 1
        if self.periods < 1:
            raise ValueError(f"{there} recorded periods are fewer than the {longest} to forecast; train on more")
        if past.shape[1] != forecaster.window:
            raise ValueError(f"{past.shape[1]} past periods are given, and {forecaster.window} expected")
        levels = forecaster.levels
        self.past = torch.cat([past, demand], 1).to(levels).unfold(1, forecaster.window, 1)[:, : self.periods]
        summed = torch.nn.functional.pad(demand.double().cumsum(1), (1, 0))
        until = [summed[:, h : h + self.periods] for h in forecaster.horizons]
        self.total = torch.stack([x - summed[:, : self.periods] for x in until], -1).to(levels)
        self.time = None if time is None else time.to(levels)
