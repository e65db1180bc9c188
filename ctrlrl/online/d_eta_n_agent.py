"""The agent of D-eta-N: puts the stock into the observation, and finds the initial stock for what is wanted."""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple, cast

import gymnasium as gym
import numpy as np
import torch
from torch import Tensor

from ctrlrl.engine import algorithm as algorithms
from ctrlrl.engine import environments
from ctrlrl.engine.collected import Collected
from ctrlrl.engine.config import ConfigError, build
from ctrlrl.engine.evaluate import Evaluation
from ctrlrl.engine.off_policy import OffPolicyAgent
from ctrlrl.engine.off_policy_config import OffPolicyConfig
from ctrlrl.engine.seeding import derive
from ctrlrl.engine.stock import PATH, Stock, stock_of, stocked
from ctrlrl.nets.discrete import STOCK, StockActor
from ctrlrl.online.d_eta_n import INITIAL, DEtaN
from ctrlrl.types import EnvSpec, Obs

RUN = frozenset(["seed", "n_envs", "backend", "env_kwargs", "restoring"])
"""Arguments of OffPolicyAgent that are no settings."""


class StockScan(NamedTuple):
    """What each initial stock promises, by the network."""

    stock: float
    """The best one."""
    value: float
    """What it promises: the conditional value at risk, or the mix with the mean."""
    stocks: np.ndarray
    """[P] float64."""
    values: np.ndarray
    """[P] float64."""


class DEtaNAgent(OffPolicyAgent):
    """An agent trained by D-eta-N (see :class:`ctrlrl.online.d_eta_n.DEtaN`) on the environment in ``Stock``.

    An environment that is not in the wrapper ``ctrlrl.engine.stock:Stock`` is put into it, with the discount of the
    settings and initial stocks drawn from their range; it then is part of the run's EnvSpec. One that is keeps its own.
    ``evaluate(stock=-g)`` begins every episode with that stock, ``choose_stock(level)`` finds one.

    Raises:
        ConfigError: Rewards are mapped, or the wrapper has another discount than the settings.
        ValueError: A vector reward, or a live vector environment without the wrapper.
    """

    loop: ClassVar[type[OffPolicyConfig]] = OffPolicyConfig
    algorithm: DEtaN
    policy: StockActor  # type: ignore[assignment]

    def __init__(
        self,
        env: Any,
        method: str | None = None,
        *,
        preset: str | None = None,
        encoder: Any = None,
        **settings: Any,
    ) -> None:
        own = {k: v for k, v in settings.items() if k not in RUN}
        config, algorithm = build(algorithms.get(method or self.method), own, preset, loop=self.loop)
        if config.reward_scale != 1.0 or config.reward_shift != 0.0:
            raise ConfigError("the stock counts the environment's rewards: leave reward_scale and reward_shift alone")
        env = _in_stock(env, cast(DEtaN, algorithm), config.gamma)
        super().__init__(env, method, preset=preset, encoder=encoder, **settings)
        self._fresh()

    # -- acting -------------------------------------------------------------------------------

    def evaluate(
        self,
        episodes: int = 100,
        deterministic: bool = True,
        n_envs: int | None = None,
        seed: int | None = None,
        stock: float | None = None,
    ) -> Evaluation:
        """As in Agent; returns are undiscounted and without the stock.

        Args:
            episodes: How many.
            deterministic: As in Agent.
            n_envs: As in Agent.
            seed: As in Agent.
            stock: Initial stock of every episode; None leaves it to the environment, which in training draws them.
        """
        before = self.env_spec
        if stock is not None and before is not None:
            self.env_spec = stocked(before, initial=float(stock))
        try:
            return super().evaluate(episodes, deterministic, n_envs, seed)
        finally:
            self.env_spec = before

    def choose_stock(self, level: float | None = None, points: int = 2001, starts: int = 10) -> float:
        """The initial stock that is best by :meth:`scan_stock`."""
        return self.scan_stock(level, points, starts).stock

    def scan_stock(self, level: float | None = None, points: int = 2001, starts: int = 10) -> StockScan:
        """What each initial stock c promises: -c + F(c) / level for cvar, -c + F(c) for mean_cvar.

        F is the mean, over first observations, of the best action's mean utility. The best c is minus a quantile of the
        return at ``level`` (arXiv 2501.13028, section 5; Rockafellar and Uryasev 2000).

        Args:
            level: In (0, 1]; by default the setting. mean_cvar has only its own.
            points: Stocks, evenly over the range trained on.
            starts: Resets to take first observations from.

        Raises:
            ValueError: Another objective, a level outside of its range, or an environment that cannot be built again.
        """
        own = self.algorithm
        level = own.level if level is None else level
        if own.objective not in ("cvar", "mean_cvar"):
            raise ValueError(f"objective={own.objective!r} needs no scan: begin with minus the target")
        if not 0.0 < level <= 1.0:
            raise ValueError(f"level={level} must lie in (0, 1]")
        if own.objective == "mean_cvar" and level != own.level:
            raise ValueError(f"mean_cvar was trained for level={own.level}, found {level}; cvar serves all levels")
        stocks = torch.linspace(own.stock_low, own.stock_high, points, device=self.device)
        found = torch.zeros(points, dtype=torch.float64, device=self.device)
        with torch.inference_mode():
            for obs in self._first_observations(starts):
                returns = self.policy(obs, stocks.unsqueeze(0))
                each = own.utility.of(returns, stocks.unsqueeze(0), torch.ones_like(stocks).unsqueeze(0))
                found += each.amax(-1).squeeze(0).double() / starts
        values = -stocks.double() + found / (level if own.objective == "cvar" else 1.0)
        best = int(values.argmax())
        return StockScan(float(stocks[best]), float(values[best]), stocks.double().cpu().numpy(), values.cpu().numpy())

    def _first_observations(self, count: int) -> list[Obs]:
        """One batch [1, ...] from each of ``count`` resets."""
        if self.env_spec is None:
            raise ValueError("the environment cannot be built again to look at its first observations; pass it by id")
        env = environments.build_env(self.env_spec)
        try:
            seeds = [derive(self.seed, "first observation", k) for k in range(count)]
            return [self._as_batch(env.reset(seed=seed)[0])[0] for seed in seeds]
        finally:
            env.close()

    # -- training -----------------------------------------------------------------------------

    def _fresh(self) -> None:
        """Every environment is at an episode's first step."""
        self._initial = torch.zeros(self.n_envs, device=self.device)
        self._within = torch.zeros(self.n_envs, dtype=torch.bool, device=self.device)

    def _border(self) -> None:
        self._fresh()
        super()._border()

    def _extras(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        return {INITIAL: ((), torch.float32)}

    def _columns(self, c: Collected) -> dict[str, Tensor] | None:
        stock = cast(dict[str, Tensor], c.obs)[STOCK].squeeze(-1)
        found = torch.empty_like(stock)
        for t in range(len(stock)):
            self._initial = torch.where(self._within, self._initial, stock[t])
            found[t] = self._initial
            # a step that only resets is followed by an episode's first
            self._within = c.valid_t[t] & ~(c.terminated_t[t] | c.truncated_t[t])
        return {INITIAL: found.flatten()}


def _in_stock(env: Any, own: DEtaN, gamma: float) -> Any:
    """``env`` in Stock, as it is where it is in one already."""
    arguments: dict[str, Any] = {"initial": [own.stock_low, own.stock_high], "gamma": gamma}
    if own.finite_horizon:
        arguments |= {"timestep": True, "finite_horizon": True}
    if isinstance(env, str | EnvSpec):
        spec = EnvSpec(env) if isinstance(env, str) else env
        if stock_of(spec) is None:
            return stocked(spec, **arguments)
        known = next(kwargs for path, kwargs in spec.wrappers if path == PATH)
        found, key = known.get("gamma", 1.0), known.get("key")
    elif isinstance(env, gym.Env):
        wrapper = env
        while isinstance(wrapper, gym.Wrapper) and not isinstance(wrapper, Stock):
            wrapper = wrapper.env
        if not isinstance(wrapper, Stock):
            return Stock(env, **arguments)
        found, key = wrapper.gamma, wrapper.key
    else:
        return env  # the network says what is missing in its observations
    if key is not None:
        raise ConfigError(f"the stock collects info[{key!r}], but this method learns from the scalar reward alone")
    if found != gamma:
        raise ConfigError(f"gamma={gamma}, but the environment's stock is discounted by {found}; set both alike")
    return env
