"""Evaluation over an uncertainty set: the same episodes under every parameter of a regular grid."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import numpy as np

from ctrlrl.engine import environments, uncertainty
from ctrlrl.engine.evaluate import MAX_STEPS
from ctrlrl.engine.seeding import derive, generator
from ctrlrl.engine.sync import LeanSyncVectorEnv
from ctrlrl.engine.uncertainty import Convention, Params
from ctrlrl.types import EnvSpec

if TYPE_CHECKING:
    from ctrlrl.engine.agent import Agent

WIDTH = 32
"""Episodes side by side."""


class RobustEvaluation(NamedTuple):
    """Raw results by cell of the grid (the first parameter changes slowest) and by reset seed.

    The return of a cell is the mean over its episodes; worst case, mean and standard deviation are over cells.
    """

    names: tuple[str, ...]
    """[d] parameters."""
    axes: tuple[np.ndarray, ...]
    """[d] arrays: the values of each parameter on the grid."""
    returns: np.ndarray
    """[cells, episodes] undiscounted sums of the environment's own rewards."""
    lengths: np.ndarray
    """[cells, episodes] steps."""
    seeds: np.ndarray
    """[episodes] reset seeds, the same in every cell."""
    nominal: Params
    """The environment's own parameters, which need not lie on the grid or inside the set."""
    nominal_returns: np.ndarray
    """[episodes] returns under ``nominal``, of the same seeds; the grid's statistics leave them out."""

    @property
    def params(self) -> list[Params]:
        """[cells] the parameters of each cell."""
        return uncertainty.cells(self.names, self.axes)

    @property
    def by_cell(self) -> np.ndarray:
        """[cells] mean return of each cell."""
        return self.returns.mean(axis=1)

    @property
    def grid(self) -> np.ndarray:
        """Mean return of each cell as an array with one dimension for each parameter."""
        return self.by_cell.reshape([len(axis) for axis in self.axes])

    @property
    def worst(self) -> float:
        """Return of the worst cell."""
        return float(self.by_cell.min())

    @property
    def worst_params(self) -> Params:
        """Parameters of the worst cell; the first among equals."""
        return self.params[int(self.by_cell.argmin())]

    @property
    def mean(self) -> float:
        """Mean return over the cells."""
        return float(self.by_cell.mean())

    @property
    def std(self) -> float:
        """Standard deviation of the return over the cells."""
        return float(self.by_cell.std())

    @property
    def nominal_mean(self) -> float:
        """Mean return under the nominal parameters."""
        return float(self.nominal_returns.mean())

    def document(self) -> dict[str, Any]:
        """All of it and its summary, for ``runfolder.write_json``."""
        summary = {"worst": self.worst, "worst_params": self.worst_params, "mean": self.mean, "std": self.std}
        return {**summary, "nominal_mean": self.nominal_mean, **self._asdict()}

    @classmethod
    def from_document(cls, document: Mapping[str, Any]) -> Self:
        """What :meth:`document` was made of, read back from JSON."""
        arrays = {k: np.array(document[k]) for k in ("returns", "lengths", "seeds", "nominal_returns")}
        axes = tuple(np.array(axis) for axis in document["axes"])
        return cls(names=tuple(document["names"]), axes=axes, nominal=dict(document["nominal"]), **arrays)


def evaluate_grid(
    agent: Agent,
    points: int = 10,
    episodes: int = 1,
    convention: Convention = "m2td3",
    seed: int | None = None,
    deterministic: bool = True,
    env_spec: EnvSpec | None = None,
    width: int = WIDTH,
) -> RobustEvaluation:
    """Run ``episodes`` whole episodes in every cell of a grid over the environment's uncertainty set.

    Every cell gets the reset seeds of ``agent.evaluate(episodes, seed=seed)`` (common random numbers), and so do the
    nominal parameters. The parameters are set before each episode's reset and hold through it, whatever the
    environment's own arguments (``params``, ``randomize``) say.

    Args:
        agent: Acts through ``agent.session()``; nothing of it changes.
        points: Of the grid, in each dimension.
        episodes: In each cell.
        convention: ``"m2td3"`` includes the upper end of every range, ``"rrls"`` leaves it out.
        seed: Defaults to the agent's seed.
        deterministic: Act by the mode or by sampling.
        env_spec: Where to evaluate; the agent's own by default. It needs the agent's spaces.
        width: Episodes side by side; the result does not depend on it when acting deterministically, up to the
            rounding of a batched network.

    Raises:
        ValueError: The environment has no uncertainty set or other spaces, or an argument is out of range.
    """
    for name, value in (("episodes", episodes), ("width", width)):
        if value < 1:
            raise ValueError(f"{name}={value} must be at least 1")
    spec = environments.resolve(target(agent) if env_spec is None else env_spec, n_envs=1, backend="sync")
    assert isinstance(spec, EnvSpec)
    found = _checked(agent, spec)
    axes = found.axes(points, convention)
    cells = [*uncertainty.cells(found.names, axes), found.nominal]
    base = derive(agent.seed if seed is None else seed, "evaluate")
    seeds = np.array([derive(base, "evaluation", k) for k in range(episodes)])
    spec = dataclasses.replace(spec, n_envs=min(width, len(cells) * episodes))
    env = environments.make_vector(spec, autoreset="disabled")
    assert isinstance(env, LeanSyncVectorEnv)
    noise = None if deterministic else generator(base, "noise")
    try:
        with environments.torch_threads(getattr(getattr(agent, "config", None), "threads", None)):
            returns, lengths = run_cells(env, agent.session(noise), cells, seeds.tolist())
    finally:
        env.close()
    return RobustEvaluation(
        found.names, tuple(axes), returns[:-1], lengths[:-1], seeds, dict(found.nominal), returns[-1]
    )


def target(agent: Agent, env: str | EnvSpec | None = None, env_kwargs: Mapping[str, Any] | None = None) -> EnvSpec:
    """Where ``agent`` is to be evaluated.

    Args:
        agent: With its own environment, the default.
        env: Another id, which gets the wrappers of the agent's environment; or an EnvSpec, taken as it is.
        env_kwargs: Added to the environment's arguments.

    Raises:
        ValueError: There is neither ``env`` nor an environment that can be rebuilt.
    """
    own = agent.env_spec
    if isinstance(env, str):
        env = EnvSpec(env, wrappers=() if own is None else own.wrappers)
    spec = own if env is None else env
    if spec is None:
        raise ValueError(
            "this agent was built on a live environment without an id, which cannot be rebuilt for evaluation; "
            "pass env= an id or an EnvSpec, for example env='ctrlrl/RobustHopper-v0'"
        )
    return dataclasses.replace(spec, kwargs={**spec.kwargs, **(env_kwargs or {})})


def _checked(agent: Agent, spec: EnvSpec) -> uncertainty.UncertaintySet:
    """The uncertainty set of an environment on which ``agent`` can act."""
    env = environments.build_env(spec)
    try:
        for kind, own, found in (
            ("observations", agent.observation_space, env.observation_space),
            ("actions", agent.action_space, env.action_space),
        ):
            if own != found:
                raise ValueError(
                    f"{spec.id} has {kind} in {found}, the agent was trained with {own}; an agent can be evaluated "
                    "only on an environment with its own spaces"
                )
        return uncertainty.of(env)
    finally:
        env.close()


def run_cells(
    env: LeanSyncVectorEnv,
    act: Callable[[Any, np.ndarray], np.ndarray],
    cells: Sequence[Params],
    seeds: Sequence[int],
) -> tuple[np.ndarray, np.ndarray]:
    """Run one whole episode for each pair of parameters and reset seed; an ended one makes place for the next.

    Args:
        env: With autoreset disabled.
        act: ``(observations [N, ...], episode numbers [N]) -> actions``; an episode has the number
            cell * len(seeds) + seed.
        cells: Parameters, set before the reset and in no running episode.
        seeds: Reset seeds, the same for all cells.

    Returns:
        Returns and lengths, each [cells, seeds].
    """
    env.skip_ended = True  # places without work stay as they are
    n, jobs, each = env.num_envs, len(cells) * len(seeds), len(seeds)
    returns, lengths = np.zeros(jobs), np.zeros(jobs, dtype=np.int64)
    job, waiting = np.arange(n), n
    fresh = active = np.ones(n, dtype=bool)
    obs: Any = None
    while active.any():
        if fresh.any():
            for i in np.flatnonzero(fresh).tolist():  # and not the others, which are in the midst of an episode
                env.envs[i].get_wrapper_attr("set_params")(cells[int(job[i]) // each])
            obs, _ = env.reset(seed=[seeds[j % each] for j in job.tolist()], options={"reset_mask": fresh})
        obs, reward, terminated, truncated, _ = env.step(act(obs, job))
        returns[job[active]] += reward[active]
        lengths[job[active]] += 1
        if lengths.max() >= MAX_STEPS:
            raise RuntimeError(
                f"an episode has not ended after {MAX_STEPS:,} steps: give the environment a time limit "
                "(max_episode_steps in gymnasium.register)"
            )
        ended = active & (terminated | truncated)
        fresh = ended & (np.cumsum(ended) <= jobs - waiting)
        active = active & ~ended | fresh
        job = job.copy()  # a session may compare the numbers with those it kept
        job[fresh] = waiting + np.arange(fresh.sum())
        waiting += int(fresh.sum())
    return returns.reshape(len(cells), each), lengths.reshape(len(cells), each)
