"""``ctrlrl eval`` of a run on an environment with a transition table: the law of its return, exact and simulated."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np

from ctrlrl.core.distribution import Law
from ctrlrl.engine import environments
from ctrlrl.engine.evaluate import Evaluation
from ctrlrl.engine.stock import PATH, stock_of
from ctrlrl.planning.distributional_dp_agent import DistributionalDP
from ctrlrl.planning.distributional_problem import DIGITS, Answer, Objective, as_written, solve_for, table_of

PICTURE = "law.png"
"""In the run folder."""
LEVELS = tuple(Fraction(k, 20) for k in (1, 5, 10, 15, 19))
"""Of the quantiles that are shown."""


class Discounted(gym.Wrapper):
    """Rewards in the money of the first step: gamma^t R_(t+1)."""

    def __init__(self, env: gym.Env, gamma: float) -> None:
        super().__init__(env)
        self.gamma, self._discount = gamma, 1.0

    def reset(self, **kwargs: Any) -> tuple[Any, dict[str, Any]]:
        self._discount = 1.0
        return self.env.reset(**kwargs)

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        obs, reward, terminated, truncated, info = self.env.step(action)
        discounted = self._discount * float(reward)
        self._discount *= self.gamma
        return obs, discounted, terminated, truncated, info


@dataclass(frozen=True)
class Found:
    """What is known of the returns of an agent."""

    answer: Answer
    """The exact optimum of the objective."""
    simulated: Law
    """Of the agent's (discounted) returns."""
    episodes: int
    """How many were simulated."""
    method: str
    """Of the agent."""
    stock: float | None
    """The initial stock that the agent was given in the simulation, if it was chosen for it."""
    planned: bool = False
    """The optimum is the agent's own policy."""

    def laws(self) -> dict[str, Law]:
        """By name, in the order in which they are shown."""
        who = "simulated" if self.planned else self.method
        rows = {"exact" if self.planned else "optimum": self.answer.law, who: self.simulated}
        return rows | {"risk-neutral": self.answer.neutral}

    def row(self, law: Law) -> list[float]:
        """Objective, mean and quantiles."""
        objective = self.answer.objective
        if not law.exact:
            objective = objective.as_float()
        return [float(v) for v in (objective.of(law), law.mean(), *law.quantiles(LEVELS))]

    def lines(self) -> list[str]:
        """For the terminal."""
        answer = self.answer
        scan, value = answer.scan, answer.scan.value
        said = [f"  law of the return, {answer.words}"]
        titles = [answer.objective.label, "mean", *(f"{float(100 * level):g} %" for level in LEVELS)]
        if answer.objective.name == "mean":
            titles[0] = "objective"
        wide = max(10, len(titles[0]))
        said.append(" " * 18 + f"{titles[0]:>{wide}}" + "".join(f"{t:>10}" for t in titles[1:]))
        for name, law in self.laws().items():
            first, *others = self.row(law)
            said.append(f"    {name:14}{first:>{wide}.5g}" + "".join(f"{v:>10.5g}" for v in others))
        fraction = f"{value} = " if 1 < getattr(value, "denominator", 1) < 1_000_000 else ""
        bound = f"error at most {scan.error_bound:.2g}" if scan.error_bound else "without error"
        who = "value" if self.planned else "best possible"
        said.append(
            f"  {who}: {answer.objective.label} = {fraction}{float(value):.6g}, {bound}; "
            f"initial stock {float(scan.stock):g}"
        )
        if answer.law_error:
            said.append(f"  the exact laws are on a grid: off by at most {answer.law_error:.2g} in Wasserstein-1")
        if scan.is_bound:
            said.append(f"  the value is {scan.note}")
        if self.stock is not None:
            said.append(f"  {self.method} was given the initial stock {self.stock:.4g}")
        return said

    def document(self) -> dict[str, Any]:
        """For JSON."""
        answer = self.answer
        names = ["objective", "mean", *(str(float(level)) for level in LEVELS)]
        return {
            "objective": answer.objective.label,
            "engine": answer.engine,
            "value": float(answer.scan.value),
            "fraction": str(answer.scan.value) if isinstance(answer.scan.value, Fraction) else None,
            "error_bound": answer.scan.error_bound,
            "initial_stock": float(answer.scan.stock),
            "laws": {
                name: dict(zip(names, self.row(law), strict=True))
                | {"returns": law.atoms.astype(float), "probabilities": law.probabilities.astype(float)}
                for name, law in self.laws().items()
            },
        }


def answer_of(agent: Any, levels: Sequence[float] = ()) -> Answer:
    """The exact optimum for what an agent wants, as far as that is known: the mean of a method that knows no risk.

    Args:
        agent: Of a run on an environment with a table.
        levels: The first is the level of the CVaR to compare with, whatever the agent wants.

    Raises:
        TypeError: The environment has no table.
        ValueError: The objective needs a goal that the run does not tell, or there is no limit of steps.
    """
    if isinstance(agent, DistributionalDP) and not levels:
        return agent.answer
    if agent.env_spec is None:
        raise ValueError("this agent was trained on a live environment without an id, whose table is not known")
    spec, own = agent.env_spec, getattr(agent, "algorithm", None)
    env = environments.build_env(dataclasses.replace(spec, backend="sync"))
    try:
        table, limit = table_of(env, agent._env_name()), env.spec.max_episode_steps if env.spec is not None else None
    finally:
        env.close()
    wanted = Objective("cvar", as_written(levels[0])) if levels else _wanted(own, spec)
    gamma = _gamma(spec)
    if limit is None and gamma == 1:
        raise ValueError(f"{agent._env_name()} has no limit of steps, so its undiscounted laws cannot be solved for")
    return solve_for(table, wanted, limit, gamma)


def look(agent: Any, result: Evaluation, deterministic: bool, seed: int | None, answer: Answer) -> Found:
    """The returns of an agent beside the exact laws.

    Args:
        agent: Of a run on an environment with a table.
        result: Its episodes, taken as they are where there is no discount.
        deterministic: How it acted.
        seed: Of the episodes.
        answer: See :func:`answer_of`.
    """
    stock, gamma = _stock(agent, answer.objective), float(answer.gamma)
    if stock is not None or gamma != 1.0:
        before = agent.env_spec
        path = f"{__name__}:{Discounted.__name__}"
        agent.env_spec = dataclasses.replace(before, wrappers=(*before.wrappers, (path, {"gamma": gamma})))
        try:
            given = {} if stock is None else {"stock": stock}
            result = agent.evaluate(len(result.returns), deterministic=deterministic, seed=seed, **given)
        finally:
            agent.env_spec = before
    law, planned = Law.of(np.round(result.returns, DIGITS)), answer is agent.__dict__.get("answer")
    return Found(answer, law, len(result.returns), agent.method, stock, planned)


def draw(found: Found, path: Path, title: str) -> None:
    """Write the picture: the laws and, of a planned policy, its actions over the stock."""
    from ctrlrl.run import distribution_figures as pictures

    chart = pictures.chart_of(found.answer) if found.planned else None
    mark = {"target": found.answer.objective.goal, "exceedance": found.answer.objective.goal}
    goal = mark.get(found.answer.objective.name)
    path.write_bytes(pictures.picture(found.laws(), title, chart, None if goal is None else float(goal)))


def _wanted(own: Any, spec: Any) -> Objective:
    """The objective of a learner; the mean where it has none of its own."""
    name = getattr(own, "objective", "mean")
    if name in ("mean", "cvar"):
        return Objective(name, as_written(getattr(own, "level", 0.25)))
    if name == "mean_cvar":
        return Objective(name, as_written(own.level), as_written(own.mean_weight))
    first = stock_of(spec)
    if not isinstance(first, int | float):
        raise ValueError(
            f"the objective {name!r} needs a goal, which this run draws anew in every episode; --risk 0.25 compares "
            "with the best conditional value at risk"
        )
    return Objective(name, goal=-as_written(first))


def _gamma(spec: Any) -> Any:
    """The discount of the stock, as the return has it; 1 where there is no stock."""
    found = next((kwargs.get("gamma", 1.0) for path, kwargs in spec.wrappers if path == PATH), 1.0)
    return 1 if found == 1 else as_written(found)


def _stock(agent: Any, objective: Objective) -> float | None:
    """The initial stock that a learner chooses by itself for a scanned objective; None where it has none to choose."""
    if not hasattr(agent, "choose_stock") or objective.name not in ("cvar", "mean_cvar"):
        return None
    if getattr(agent.algorithm, "objective", None) != objective.name:
        return None
    return float(agent.choose_stock(float(objective.tau)))
