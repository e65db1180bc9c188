"""Distributional dynamic programming as an agent: plans on the environment's own table and acts with the stock."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self, cast

import gymnasium as gym
import torch
from torch import Tensor, nn

from ctrlrl.engine import environments
from ctrlrl.engine.config import ConfigError, RunConfig, build
from ctrlrl.engine.evaluate import Evaluation
from ctrlrl.engine.stock import PATH, stock_of, stocked, stocked_space
from ctrlrl.engine.trainer import TrainedAgent
from ctrlrl.nets.causal import OBSERVATION, TIMESTEP
from ctrlrl.nets.discrete import STOCK
from ctrlrl.types import EnvSpec, Obs, check_types

if TYPE_CHECKING:  # the planner is imported where it is used: it needs SciPy
    from ctrlrl.core.distribution import Law
    from ctrlrl.planning.distributional_problem import Answer, Objective

logger = logging.getLogger("ctrlrl")

PAPER = "Optimizing Return Distributions with Distributional Dynamic Programming, arXiv:2501.13028"
DIFFERS = (
    "With a horizon every stock that can be reached is solved, without projection or error; without one, stocks and "
    "returns are on grids with a bound. CVaR is scanned over all possible returns. The policy is told gamma^t times "
    "the stock, which does not grow. Ties go to the larger mean."
)


@dataclass(frozen=True)
class DistributionalDPSettings:
    """What is wanted of the return, and by which engine."""

    name: ClassVar[str] = "distributional_dp"
    paper: ClassVar[str] = PAPER
    differs: ClassVar[str] = DIFFERS
    loop_defaults: ClassVar[Mapping[str, Any]] = {"eval_every": None}
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {}

    objective: Literal[
        "mean", "cvar", "upper_cvar", "mean_cvar", "target", "exceedance", "shortfall", "surplus", "distance",
        "squared", "reached",
    ] = "mean"  # fmt: skip
    """What to maximise: mean, cvar (mean of the worst share tau of outcomes), upper_cvar (of the best), mean_cvar,
    target (-E |return - goal|), exceedance (P(return >= goal)), or the mean of a utility of return - goal: shortfall,
    surplus, distance, squared, reached."""
    tau: float = 0.25
    """Share of the outcomes that cvar, upper_cvar and mean_cvar average, in (0, 1]; taken as it is written: 0.1 is
    1/10."""
    mean_share: float = 0.5
    """Weight of the mean in mean_cvar, in [0, 1]."""
    goal: float | None = None
    """The return that target and exceedance need; of utilities 0 by default."""
    gamma: float = 1.0
    """Discount per step, in (0, 1]; taken as it is written."""
    horizon: int | None = None
    """Steps of an episode at most, which then are part of the problem; None is the environment's own limit."""
    engine: Literal["auto", "exact", "lattice", "grid"] = "auto"
    """exact: reachable stocks one by one, in fractions where the table has them; lattice: arrays, for gamma 1 and
    rewards that are multiples of a unit; grid: gamma < 1 without a horizon, with error bounds; auto takes what fits."""

    def __post_init__(self) -> None:
        check_types(self)
        if not 0.0 < self.gamma <= 1.0:
            raise ValueError(f"gamma={self.gamma} must be above 0 and at most 1")
        if self.horizon is not None and (self.horizon < 1 or self.engine == "grid"):
            what = "has no part in engine='grid'; leave it out" if self.engine == "grid" else "must be at least 1"
            raise ValueError(f"horizon={self.horizon} {what}")
        _ = self.wanted

    @property
    def wanted(self) -> Objective:
        """The objective, its numbers as fractions.

        Raises:
            ValueError: It is unknown, or a number does not fit it.
        """
        from ctrlrl.planning.distributional_problem import Objective, as_written

        goal = None if self.goal is None else as_written(self.goal)
        return Objective(self.objective, as_written(self.tau), as_written(self.mean_share), goal)


class StockPolicy(nn.Module):
    """A plan for environments in ``Stock``: from observations to actions [N] int64."""

    stochastic = False

    def __init__(self, agent: DistributionalDP) -> None:
        super().__init__()
        self._agent = [agent]  # in a list, as it is no part of the module

    def deterministic(self, obs: Obs) -> Tensor:
        """The action of each row; the nearest stock that was solved counts.

        Raises:
            ValueError: A state that cannot be reached in so many steps, or a step after the last one.
        """
        told, answer = cast(dict[str, Tensor], obs), self._agent[0].answer
        rows = zip(told[TIMESTEP][:, 0].tolist(), told[OBSERVATION].tolist(), told[STOCK][:, 0].tolist(), strict=True)
        return torch.tensor([answer.action(t, s, stock) for t, s, stock in rows], dtype=torch.int64)


class DistributionalDP(TrainedAgent):
    """Distributional dynamic programming with stock augmentation, on an environment that shows its transition table.

    The best policy for the mean, CVaR, a wanted return, the chance to reach one, and more; see
    :mod:`ctrlrl.planning.distributional_dp`. It acts on state, step and stock: the environment is put into
    ``ctrlrl.engine.stock:Stock`` with the best initial stock, as part of its EnvSpec, and the limit of steps is an end.

    ``learn`` plans, which is one step, and writes the run folder. A saved agent holds the settings and the value, no
    plan: planning has no chance in it and is done again when it is first needed.

    Paper: Optimizing Return Distributions with Distributional Dynamic Programming, arXiv:2501.13028

    Args:
        env: Gymnasium id, EnvSpec or live environment, with a table ``env.unwrapped.P``.
        seed: Of evaluations; planning has no chance in it.
        env_kwargs: Keyword arguments of the environment, with an id.
        preset: There are none.
        **settings: Fields of RunConfig and DistributionalDPSettings, by name.

    Attributes:
        answer: Plan, initial stock, value and laws; solved when first asked for.

    Raises:
        TypeError: The environment has no table, or a wrapper that changes what the table says.
        ConfigError: Settings that do not fit, or neither a horizon nor gamma < 1.
    """

    method = "distributional_dp"
    own_name = "distributional_dp"
    family: ClassVar[str] = "planning"
    paper: ClassVar[str] = PAPER
    differs: ClassVar[str] = DIFFERS
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = DistributionalDPSettings.presets
    capabilities: ClassVar[frozenset[str]] = frozenset(["resume", "discrete"])
    config: RunConfig
    policy: StockPolicy

    def __init__(
        self,
        env: str | EnvSpec | gym.Env,
        *,
        seed: int = 0,
        env_kwargs: dict[str, Any] | None = None,
        preset: str | None = None,
        **settings: Any,
    ) -> None:
        super().__init__()
        self.seed = int(seed)
        config, self._own = build(DistributionalDPSettings, settings, preset, loop=RunConfig)
        if config.device not in ("auto", "cpu") or config.compile or config.cudagraphs:
            raise ConfigError(
                "distributional_dp plans on the CPU, without torch: leave device, compile, cudagraphs out"
            )
        self.config = dataclasses.replace(config, device="cpu", threads=config.threads or 1)
        self.device = torch.device("cpu")
        one: dict[str, Any] = {"n_envs": 1, "backend": "sync"} if isinstance(env, str | EnvSpec) else {}
        self._use(environments.resolve(env, env_kwargs=env_kwargs, **one))
        self._recorded: float | None = None
        self._look()
        self.policy = StockPolicy(self)

    def _look(self) -> None:
        """Take note of table, horizon and spaces; put the environment into Stock."""
        from ctrlrl.planning.distributional_problem import table_of

        source, own = self._source(), self._own
        if isinstance(source, gym.vector.VectorEnv):
            raise TypeError("distributional_dp plans for one environment: pass an id, an EnvSpec or a single one")
        probe = environments.build_env(source) if isinstance(source, EnvSpec) else source
        try:
            self.table = table_of(probe, self._env_name())
            limit = probe.spec.max_episode_steps if probe.spec is not None else None
            bare = probe.unwrapped
            self.observation_space = stocked_space(bare.observation_space, 1, True)
            self.action_space = bare.action_space
        finally:
            if probe is not source:
                probe.close()
        self.horizon = None if own.engine == "grid" else own.horizon or limit
        if self.horizon is None and own.gamma == 1.0:
            ask = "its laws need gamma < 1" if own.engine == "grid" else "set horizon, or gamma below 1"
            raise ConfigError(f"{self._env_name()} is planned for without a limit of steps: {ask}")
        if self.env_spec is None:
            return
        spec = self.env_spec
        # a live environment's limit may not be that of its id
        if self.horizon is not None and (self.horizon != limit or self._live is not None):
            spec = dataclasses.replace(spec, kwargs={**spec.kwargs, "max_episode_steps": self.horizon})
        if next((kwargs.get("key") for path, kwargs in spec.wrappers if path == PATH), None) is not None:
            raise ConfigError(
                "the stock of this environment collects a vector reward; distributional_dp takes the scalar"
            )
        first = stock_of(spec)
        self.env_spec = stocked(
            spec, initial=0.0 if first is None else first, gamma=own.gamma, timestep=True,
            finite_horizon=self.horizon is not None,
        )  # fmt: skip

    # -- planning -----------------------------------------------------------------------------

    @cached_property
    def answer(self) -> Answer:
        """The best policy for the objective, its value and laws.

        Raises:
            ValueError: The problem needs too much memory, or does not fit the engine; with the numbers.
        """
        from ctrlrl.planning.distributional_problem import as_written, solve_for

        own, began = self._own, time.perf_counter()
        gamma = 1 if own.gamma == 1.0 else as_written(own.gamma)
        found = solve_for(self.table, own.wanted, self.horizon, gamma, own.engine)
        self.timings["update_s"] += time.perf_counter() - began
        if self.env_spec is not None:
            self.env_spec = stocked(self.env_spec, initial=float(found.scan.stock))
        value, before = float(found.scan.value), self._recorded
        if before is not None and abs(value - before) > 1e-9 * max(1.0, abs(before)) + found.scan.error_bound:
            logger.warning(
                "the saved agent had the value %.9g, planning again gives %.9g: the environment's table is another one",
                before, value,
            )  # fmt: skip
        return found

    @property
    def plan(self) -> Any:
        """What ``ctrlrl.planning.distributional_dp.solve`` returned: ``value(stock)``, ``law(stock)``, ``action``."""
        return self.answer.plan

    def value(self) -> Any:
        """Of the objective; a Fraction where it was solved in fractions."""
        return self.answer.scan.value

    def law(self) -> Law:
        """Of the (discounted) return."""
        return self.answer.law

    def summary(self) -> list[str]:
        """What was found, for the terminal."""
        found = self.answer
        scan, exact = found.scan, getattr(found.scan.value, "denominator", 0)
        shown = f"{scan.value} = " if 1 < exact < 1_000_000 else ""
        said = [
            found.words,
            f"{found.objective.label}: {shown}{float(scan.value):.6g}, error at most {scan.error_bound:.2g}; "
            f"initial stock {float(scan.stock):g}",
        ]
        if scan.is_bound:
            reached = float(found.objective.of(found.law))
            said.append(f"this is {scan.note}; the policy attains {reached:.6g}")
        return said

    def learn(self, steps: int = 1, **kwargs: Any) -> Self:  # type: ignore[override]
        """Plan, write the run folder and return the agent; arguments as in TrainedAgent. ``steps`` has no meaning."""
        return super().learn(1, **kwargs)

    @property
    def steps_bound(self) -> int:
        """Planning is one step."""
        return 1

    def _prepare(self) -> None:
        _ = self.answer

    def _border(self) -> None:
        """There is nothing to recreate."""

    def _iterate(self) -> dict[str, float]:
        found = self.answer
        self.iteration += 1
        self.steps += 1
        return {
            "plan/value": float(found.scan.value), "plan/error_bound": found.scan.error_bound,
            "plan/stock": float(found.scan.stock), "plan/seconds": self.timings["update_s"],
        }  # fmt: skip

    # -- results ------------------------------------------------------------------------------

    def evaluate(
        self, episodes: int = 100, deterministic: bool = True, n_envs: int | None = None, seed: int | None = None
    ) -> Evaluation:
        """As in Agent; returns are undiscounted and without the stock."""
        _ = self.answer  # which sets the initial stock
        return super().evaluate(episodes, deterministic, n_envs, seed)

    # -- state --------------------------------------------------------------------------------

    @property
    def own(self) -> DistributionalDPSettings:
        """What is the method's own."""
        return self._own

    @classmethod
    def blueprint(
        cls, preset: str | None = None, env: str = "", env_kwargs: Mapping[str, Any] | None = None, policy: str = "auto"
    ) -> tuple[RunConfig, DistributionalDPSettings]:
        """The settings before the user's own: the same for all environments."""
        return build(DistributionalDPSettings, {}, preset, loop=RunConfig)

    @classmethod
    def from_document(cls, document: Mapping[str, Any], env: Any, settings: dict[str, Any]) -> Self:
        return cls(env, seed=document["seed"], **settings)

    def document(self) -> dict[str, Any]:
        _ = self.answer
        return super().document()

    def counters(self) -> dict[str, Any]:
        return super().counters() | {"value": float(self.answer.scan.value)}

    def restore(self, tensors: Mapping[str, Tensor], counters: Mapping[str, Any]) -> None:
        super().restore(tensors, counters)
        self._recorded = counters["value"]

    def export(self, path: Any, deterministic: bool = True) -> Path:
        """Refused: a table by step, state and stock is no network."""
        raise ValueError(
            "distributional_dp acts by a table of steps, states and stocks, which has no form as a network"
        )
