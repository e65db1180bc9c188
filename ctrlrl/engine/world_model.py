"""Fitting a world model to recorded steps, and short rollouts of a policy in it (MOPO, arXiv:2005.13239)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ctrlrl.engine.errors import CheckpointError, NonFiniteUpdateError
from ctrlrl.engine.seeding import derive, generator
from ctrlrl.engine.step import FlatParameters, OptState, adam, gradient
from ctrlrl.engine.terminations import Terminal
from ctrlrl.nets.actors import BoxActor
from ctrlrl.nets.dynamics import DynamicsEnsemble, likelihood_loss
from ctrlrl.nets.normalizer import RunningMoments
from ctrlrl.nets.q_ensemble import EnsembleLinear
from ctrlrl.nets.trajectory_codec import Steps
from ctrlrl.types import check_types

Rows: TypeAlias = Callable[[Tensor], Steps]
"""The recorded steps at places [N] int64, each [N, ...]; ``done`` is not looked at."""

SLICE = 65_536
"""Rows that are looked at together for their moments."""
ROLLED = 1_024
"""Rollouts side by side: more leave a CPU's cache."""
IMPROVEMENT = 0.01
"""Share by which a held-out error must fall to count as lower, as in MOPO's released code."""
BOUND_COEF = 0.01
"""Pull on the bounds of the log-variance towards each other, as in PETS."""


@dataclass(frozen=True)
class WorldModelConfig:
    """An ensemble of dynamics networks, and how it is fitted; the defaults are MOPO's where nothing else is said."""

    model_members: int = 7
    """Networks."""
    model_elites: int = 5
    """How many of them, those with the lowest held-out error, rollouts follow; all count for the uncertainty."""
    model_hidden: tuple[int, ...] = (200, 200, 200, 200)
    """Widths of each network's hidden layers."""
    model_learning_rate: float = 1e-3
    """Adam's learning rate."""
    model_weight_decay: tuple[float, ...] = (2.5e-5, 5e-5, 7.5e-5, 7.5e-5, 1e-4)
    """Weight of half the squares of each layer's weights in the loss, from the first layer on; the last one also
    counts for those after it."""
    model_batch_size: int = 256
    """Rows of each network per optimiser step."""
    model_bootstrap: bool = True
    """Each network learns from rows of its own, drawn with replacement; otherwise all from the same, in other order."""
    model_held_out: int = 1_000
    """Rows held out to judge the networks by, at most a fifth of all."""
    model_patience: int = 5
    """Epochs without a lower held-out error of any network (by a hundredth) after which the fit ends."""
    model_max_epochs: int = 200
    """Epochs after which it ends anyway; MOPO has no bound."""
    model_epoch_steps: int | None = 1_000
    """Optimiser steps of an epoch, at most; None passes over all rows, as MOPO does: 4,000 steps of a million rows."""
    model_ends: str = "auto"
    """What tells where a rollout ends: ``package.module:function`` of observation, action in [-1, 1] and next
    observation, [N, ...] each, to [N] bool; "auto" takes what is known of the environment, "none" is never."""

    def __post_init__(self) -> None:
        check_types(self)
        for name in ("members", "elites", "batch_size", "held_out", "patience", "max_epochs", "epoch_steps"):
            value = getattr(self, f"model_{name}")
            if value is not None and value < 1:
                raise ValueError(f"model_{name}={value} must be at least 1")
        if self.model_elites > self.model_members:
            raise ValueError(f"model_elites={self.model_elites} of model_members={self.model_members} networks")
        if not 0.0 < self.model_learning_rate < math.inf:
            raise ValueError(f"model_learning_rate={self.model_learning_rate} must be positive")
        if not all(0.0 <= v < math.inf for v in self.model_weight_decay):
            raise ValueError(f"model_weight_decay={self.model_weight_decay} must not be negative")

    def ensemble(self, obs_size: int, action_size: int, seed: int) -> DynamicsEnsemble:
        """The networks, freshly initialised."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive(seed, "world model"))
            return DynamicsEnsemble(
                obs_size, action_size, self.model_members, self.model_hidden, self.model_elites
            ).requires_grad_(False)


class WorldModelFit:
    """The fit of an ensemble, an epoch at a time; everything random follows from ``seed`` and the epoch.

    After every epoch the networks are judged by the mean squared error of their means on the held-out rows, and each
    keeps the parameters it was best with.

    Args:
        ensemble: What is fitted; it has the best parameters after :meth:`finish`.
        config: How.
        seed: Of the split and the batches.
    """

    def __init__(self, ensemble: DynamicsEnsemble, config: WorldModelConfig, seed: int) -> None:
        self.ensemble, self.config, self.seed = ensemble, config, seed
        self.flat = FlatParameters(ensemble)
        zeros, self.device = torch.zeros_like(self.flat.flat), self.flat.flat.device
        self.state = OptState(
            self.flat.flat, zeros, zeros.clone(), torch.zeros(2, device=self.device),
            torch.ones((), dtype=torch.bool, device=self.device),
        )  # fmt: skip
        self._tick = torch.tensor([1.0, 0.0], device=self.device)
        self._rate = torch.tensor(config.model_learning_rate, device=self.device)
        layers = [f"{name}.weight" for name, m in ensemble.named_modules() if isinstance(m, EnsembleLinear)]
        decay = config.model_weight_decay or (0.0,)
        self._decay = {name: decay[min(i, len(decay) - 1)] for i, name in enumerate(layers)}
        self.best = self.flat.flat.clone()
        self.best_error = torch.full((ensemble.members,), torch.inf, device=self.device)
        self.since, self.epochs = 0, 0

    @property
    def done(self) -> bool:
        """Whether all epochs are over, or ``model_patience`` of them without a lower error of any network."""
        return self.epochs >= self.config.model_max_epochs or self.since >= self.config.model_patience

    def begin(self, rows: Rows, count: int) -> None:
        """Name the data, before the first epoch of a process: ``count`` rows. Standardises by all of them.

        Raises:
            ValueError: Fewer than two rows.
        """
        if count < 2:
            raise ValueError(f"{count} row to fit a world model to; at least 2 are needed, one to judge it by")
        self.rows = rows
        order = torch.randperm(count, generator=generator(self.seed, "split")).to(self.device)
        held_out = min(self.config.model_held_out, max(1, count // 5))
        self.held_out, training = order[:held_out], order[held_out:]
        members, n = self.ensemble.members, len(training)
        if self.config.model_bootstrap:
            drawn = torch.randint(n, (members, n), generator=generator(self.seed, "bootstrap")).to(self.device)
            self.training = training[drawn]
        else:
            self.training = training.expand(members, -1)
        self._standardise(count)

    @torch.no_grad()
    def _standardise(self, count: int) -> None:
        ensemble = self.ensemble
        inputs = RunningMoments((ensemble.obs_size + ensemble.action_size,))
        targets = RunningMoments((ensemble.outputs,))
        least, most = (torch.full((ensemble.outputs,), sign * torch.inf, device=self.device) for sign in (1.0, -1.0))
        for places in torch.arange(count, device=self.device).split(SLICE):
            rows = self.rows(places)
            reward = rows.reward.unsqueeze(-1)
            inputs.update(torch.cat([rows.obs, rows.action], -1).cpu())
            targets.update(torch.cat([rows.next_obs - rows.obs, reward], -1).cpu())
            seen = torch.cat([rows.next_obs, reward], -1)
            least, most = torch.minimum(least, seen.amin(0)), torch.maximum(most, seen.amax(0))
        for name, moments in (("input", inputs), ("target", targets)):
            ensemble.scale(name, moments.mean, moments.var.sqrt())
        ensemble.least.copy_(least)
        ensemble.most.copy_(most)

    def epoch(self, steps: int = 0, iteration: int = 0) -> dict[str, float]:
        """One epoch; returns the loss of training, and the mean of the elites' present errors on held-out rows.

        Raises:
            NonFiniteUpdateError: One of them is NaN or infinite; ``steps`` and ``iteration`` say where the run stands.
        """
        config, drawing = self.config, generator(self.seed, "order", self.epochs)
        members, n = self.training.shape
        used = n if config.model_epoch_steps is None else min(n, config.model_epoch_steps * config.model_batch_size)
        order = torch.stack([torch.randperm(n, generator=drawing)[:used] for _ in range(members)]).to(self.device)
        batches = self.training.gather(1, order).split(config.model_batch_size, 1)
        loss = float(torch.stack([self._step(batch) for batch in batches]).mean())
        error = self.errors()
        elites = error.sort().values[: config.model_elites]
        if not (math.isfinite(loss) and bool(error.isfinite().all())):
            raise NonFiniteUpdateError("loss of the world model", steps, iteration, 0, kept=False)
        better = error < (1.0 - IMPROVEMENT) * self.best_error
        self.best_error = torch.where(better, error, self.best_error)
        now = self.flat.views(self.state.params)
        for name, kept in self.flat.views(self.best).items():
            kept[better] = now[name][better]
        self.since = 0 if bool(better.any()) else self.since + 1
        self.epochs += 1
        return {"train_loss": loss, "held_out_error": float(elites.mean())}

    def finish(self) -> DynamicsEnsemble:
        """Give the networks the parameters they were best with, and choose the elites."""
        self.flat.flat.copy_(self.best)
        self.ensemble.elites.copy_(self.best_error.argsort(stable=True)[: len(self.ensemble.elites)])
        return self.ensemble

    @torch.no_grad()
    def errors(self) -> Tensor:
        """[E] mean squared errors of the networks' means on the held-out rows, in deviations of the targets."""
        total = torch.zeros_like(self.best_error)
        for places in self.held_out.split(SLICE):
            rows = self.rows(places)
            mean, _ = self._call(self.state.params, self.ensemble.inputs(rows.obs, rows.action))
            target = self.ensemble.targets(rows.obs, rows.reward, rows.next_obs)
            total += (mean - target).square().sum((1, 2))
        return total / (len(self.held_out) * self.ensemble.outputs)

    def _call(self, params: Tensor, inputs: Tensor) -> tuple[Tensor, Tensor]:
        return torch.func.functional_call(self.ensemble, self.flat.views(params), (inputs,), tie_weights=False)

    def _step(self, places: Tensor) -> Tensor:
        """One optimiser step on the rows at ``places`` [E, B]."""
        rows = Steps(*(x.unflatten(0, places.shape) for x in self.rows(places.flatten())))
        inputs = self.ensemble.inputs(rows.obs, rows.action)
        target = self.ensemble.targets(rows.obs, rows.reward, rows.next_obs)

        def objective(params: Tensor) -> tuple[Tensor, Tensor]:
            views = self.flat.views(params)
            likelihood = likelihood_loss(*self._call(params, inputs), target).sum()
            decay = torch.stack([0.5 * coef * views[name].square().sum() for name, coef in self._decay.items()]).sum()
            bounds = BOUND_COEF * (views["log_var_max"] - views["log_var_min"]).sum()
            return likelihood + decay + bounds, likelihood.detach() / len(places)

        grad, loss = gradient(objective, self.state.params)
        self.state = adam(self.state, grad, self._rate, 1e-8, 0, self._tick, None)
        return loss

    # -- state --------------------------------------------------------------------------------

    def tensors(self) -> dict[str, Tensor]:
        """Everything that a checkpoint holds of the fit."""
        fit = {"params": self.state.params, "m": self.state.m, "v": self.state.v, "clock": self.state.clock}
        return {**fit, "best": self.best, "best_error": self.best_error}

    def counters(self) -> dict[str, Any]:
        """The same, for JSON values."""
        return {"since": self.since, "epochs": self.epochs}

    def restore(self, tensors: Mapping[str, Tensor], counters: Mapping[str, Any]) -> None:
        """Take over what :meth:`tensors` and :meth:`counters` gave; the data is named by :meth:`begin`."""
        if tensors["params"].shape != self.flat.flat.shape:
            raise CheckpointError("the world model in the checkpoint has another size; use the run's config")
        found = {k: v.to(self.device, copy=True) for k, v in tensors.items()}
        self.state = self.state._replace(**{k: found[k] for k in ("params", "m", "v", "clock")})
        self.best, self.best_error = found["best"], found["best_error"]
        self.since, self.epochs = counters["since"], counters["epochs"]


class WorldModel:
    """Short rollouts in an ensemble, with less reward where it is unsure (MOPO, algorithm 2).

    Args:
        ensemble: Fitted.
        penalty: Reward taken off for each unit of uncertainty (lambda).
        terminal: Where episodes end; None is nowhere.

    Attributes:
        statistics: Of the last :meth:`rollout`: ``uncertainty``, its mean over the steps, and ``dropped``, the share
            of steps that were left out.
    """

    def __init__(self, ensemble: DynamicsEnsemble, penalty: float = 0.0, terminal: Terminal | None = None) -> None:
        self.ensemble, self.penalty, self.terminal = ensemble, penalty, terminal
        self.statistics: Mapping[str, float] = {}

    @torch.no_grad()
    def step(self, obs: Tensor, action: Tensor, generator: torch.Generator) -> tuple[Steps, Tensor]:
        """A step from observations [N, O] with actions [N, A] in [-1, 1], and how unsure the ensemble is of it, [N].

        Each row is as a random elite says, noise included. Nothing is taken off the reward.
        """
        model, device = self.ensemble, obs.device
        found = model.predict(obs, action)
        which = torch.randint(len(model.elites), (len(obs),), generator=generator).to(device)
        noise = torch.randn(len(obs), model.outputs, generator=generator).to(device)
        drawn = found.draw(model.elites[which], noise)
        next_obs, reward = obs + drawn[:, :-1], drawn[:, -1]
        done = torch.zeros_like(reward) if self.terminal is None else self.terminal(obs, action, next_obs).float()
        return Steps(obs, action, reward, done, next_obs), found.uncertainty()

    @torch.no_grad()
    def rollout(self, policy: BoxActor, start: Tensor, horizon: int, generator: torch.Generator) -> Steps:
        """Up to ``horizon`` steps from each of the observations ``start`` [N, O], all in one row [M, ...].

        A rollout stops where its episode ends. It also stops before a step whose next observation or reward is not
        finite, or lies farther outside the data's range than that range is wide (1 where the data never changes):
        such a step is no data.

        Args:
            policy: Acts as it explores.
            start: Recorded observations.
            horizon: Steps.
            generator: On the CPU, so that every device draws the same.
        """
        found: list[Steps] = []
        doubts: list[Tensor] = []
        for obs in start.split(ROLLED):
            for _ in range(horizon):
                noise = policy.noise(1, len(obs), generator)[0].to(obs.device)
                step, unsure = self.step(obs, policy.act(obs, noise), generator)
                doubts.append(unsure)
                # the penalty may be of any size: the reward is judged without it
                fine = self.plausible(step)
                step = step._replace(reward=step.reward - self.penalty * unsure)
                found.append(Steps(*(x[fine] for x in step)))
                obs = found[-1].next_obs[found[-1].done == 0.0]
                if len(obs) == 0:
                    break
        steps = Steps(*(torch.cat(parts) for parts in zip(*found, strict=True)))
        doubt = torch.cat(doubts)
        self.statistics = {"uncertainty": float(doubt.mean()), "dropped": 1.0 - len(steps.obs) / len(doubt)}
        return steps

    def plausible(self, step: Steps) -> Tensor:
        """[N] bool: which of ``step`` [N, ...] are within reach of the data (see :meth:`rollout`)."""
        low, high = self.ensemble.least, self.ensemble.most
        margin = torch.where(high > low, high - low, torch.ones_like(high))
        seen = torch.cat([step.next_obs, step.reward.unsqueeze(-1)], -1)
        return ((seen >= low - margin) & (seen <= high + margin)).all(-1)

    def open_loop(
        self, choose: Callable[[Tensor, int], Tensor], start: Tensor, horizon: int, generator: torch.Generator
    ) -> Steps:
        """Trajectories of ``horizon`` steps [N, T, ...] from ``start`` [N, O], on through ends and the absurd.

        To be compared with the environment: nothing is left out and nothing taken off the rewards.

        Args:
            choose: Actions [N, A] in [-1, 1] at observations [N, O] and step t, by a policy or from a recording.
            start: Observations to begin with.
            horizon: T.
            generator: On the CPU.
        """
        found: list[Steps] = []
        obs = start
        for t in range(horizon):
            found.append(self.step(obs, choose(obs, t), generator)[0])
            obs = found[-1].next_obs
        return Steps(*(torch.stack(parts, 1) for parts in zip(*found, strict=True)))


class Rollouts:
    """Rollouts from recorded observations as rows to learn from (see :class:`ctrlrl.engine.augment.RowSource`).

    Args:
        model: Where.
        starts: The observations [N, O] of N recorded steps, by their number and a generator on the CPU.
        count: N, in each set.
        horizon: Steps of each rollout, at most.
    """

    def __init__(
        self, model: WorldModel, starts: Callable[[int, torch.Generator], Tensor], count: int, horizon: int
    ) -> None:
        self.model, self.starts, self.count, self.horizon = model, starts, count, horizon

    @property
    def statistics(self) -> Mapping[str, float]:
        """See :class:`WorldModel`."""
        return self.model.statistics

    def rows(self, policy: BoxActor, first: bool, generator: torch.Generator) -> Steps:
        """The steps [M, ...] of one set, M at most count x horizon; the first set is like all others."""
        return self.model.rollout(policy, self.starts(self.count, generator), self.horizon, generator)
