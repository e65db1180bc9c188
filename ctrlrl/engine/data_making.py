"""Datasets made by our own policies, in D4RL's protocol, and the replay of a run as a dataset.

The kinds (Fu et al. 2020, section 5, and the scripts released with it):

- ``random``: every action uniform over the action space, as the released script does; the paper speaks of a randomly
  initialised policy.
- ``medium``: sampled actions of one checkpoint. D4RL stops SAC where it reaches about a third of the expert's
  performance; which checkpoint that is, the caller decides, and the score reached is noted.
- ``expert``: sampled actions of a policy trained to the end.
- ``medium-replay``: every transition in the replay of the run that gave the medium policy, up to its checkpoint.
- ``medium-expert``: as many steps of ``medium`` as of ``expert``, in this order.

Actions are sampled, not the mode (a deterministic policy such as TD3's has only the mode). An episode has its whole
trajectory; the last one is cut where the steps asked for are reached, and its timeout is set.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np

from ctrlrl.data.dataset import Dataset, DatasetInfo
from ctrlrl.engine import runfolder
from ctrlrl.engine.agent import Agent
from ctrlrl.engine.evaluate import evaluate
from ctrlrl.engine.replay_data import from_run
from ctrlrl.engine.roll_out import alone, check_spaces, open_vector, own_threads, roll_out, uniform
from ctrlrl.engine.seeding import derive
from ctrlrl.types import EnvSpec

__all__ = ["KINDS", "Kind", "References", "Source", "concatenate", "from_run", "make", "measure_references", "roll_out"]

Kind: TypeAlias = Literal["random", "medium", "expert", "medium-replay", "medium-expert"]
KINDS: tuple[Kind, ...] = ("random", "medium", "expert", "medium-replay", "medium-expert")


@dataclass(frozen=True)
class Source:
    """A policy that makes data, and where it comes from."""

    agent: Agent
    """Acts; nothing of it changes."""
    run: Path | None = None
    """Run folder it was loaded from."""
    checkpoint: str = "last"
    """Which of the run's checkpoints."""

    def about(self) -> dict[str, Any]:
        """Method, run, checkpoint with its SHA-256, and environment steps trained."""
        found: dict[str, Any] = {"method": self.agent.method, "steps": self.agent.steps}
        if self.run is not None:
            file = self.run / runfolder.CHECKPOINTS / f"{self.checkpoint}.safetensors"
            digest = hashlib.sha256(file.read_bytes()).hexdigest()
            found |= {"run": self.run.resolve().name, "checkpoint": self.checkpoint, "sha256": digest}
        return found


class References(NamedTuple):
    """The mean returns that score 0 and 100."""

    low: float
    high: float


# -- the kinds ------------------------------------------------------------------------------------


def make(
    kind: Kind,
    env: EnvSpec,
    source: Source | None = None,
    steps: int | None = None,
    *,
    expert: Source | None = None,
    seed: int = 0,
    n_envs: int = 8,
    reference_episodes: int = 100,
    progress: Callable[[int], None] | None = None,
) -> Dataset:
    """A dataset of ``kind``; see the module for what each is.

    Reference scores are measured where an expert is known, so that normalised scores exist for it: see
    :func:`measure_references`. Those of an expert that is no better than random actions are only noted in
    ``about["references"]``: with them no score would mean anything.

    Args:
        kind: One of :data:`KINDS`.
        env: Environment, in the data and to evaluate in.
        source: The medium (for ``expert`` the expert) policy; none for ``random``.
        steps: Environment steps. For ``medium-replay`` the first so many of the run's training, all by default.
        expert: The expert policy, for ``medium-expert`` and for the reference scores.
        seed: Of everything.
        n_envs: Environments side by side.
        reference_episodes: Episodes of each policy for the reference scores.
        progress: Called with the steps done.

    Raises:
        ValueError: Something that the kind needs is missing.
        DatasetError: The run has no replay.
    """
    if kind not in KINDS:
        raise ValueError(f"kind={kind!r} is unknown; expected one of {', '.join(KINDS)}")
    if source is None and kind != "random":
        raise ValueError(f"{kind} data need a trained policy (--policy RUN)")
    if steps is None and kind != "medium-replay":
        raise ValueError(f"{kind} data need a number of steps (--steps)")
    if expert is None and kind == "medium-expert":
        raise ValueError("medium-expert data need the expert's run too (--expert RUN)")
    expert = source if kind == "expert" and expert is None else expert
    env = alone(env)
    if kind == "medium-replay":
        if source is None or source.run is None:
            raise ValueError("medium-replay data are the replay of a run: give its folder (--policy RUN)")
        data = from_run(source.run, source.checkpoint, steps)
        if data.info.env is None or data.info.env.id != env.id:
            found = "a live environment" if data.info.env is None else data.info.env.id
            raise ValueError(
                f"{source.run} was trained in {found}, not in {env.id}: its replay is no data of the latter"
            )
    else:
        assert steps is not None
        if steps < 2 and kind == "medium-expert":
            raise ValueError(f"steps={steps} cannot be halved; medium-expert needs at least 2")
        parts = [(None if kind == "random" else source, steps)]
        if kind == "medium-expert":
            parts = [(source, steps // 2), (expert, steps - steps // 2)]
        made: list[Dataset] = []
        for k, (part, count) in enumerate(parts):
            policy = None if part is None else part.agent
            made.append(roll_out(policy, env, count, derive(seed, kind, k), n_envs=n_envs, progress=progress))
            progress = None if progress is None else _shifted(progress, count)
        data = concatenate(made)
    about: dict[str, Any] = {**data.info.about, "kind": kind, "seed": seed, "versions": runfolder.versions()}
    about["algorithm"] = "uniform" if source is None or kind == "random" else source.agent.method
    if source is not None and kind != "random":
        about["behaviour"] = source.about()
    info = DatasetInfo(f"{env.id}-{kind}", env)
    if expert is not None:
        about["expert"] = expert.about()
        low, high = measure_references(env, expert.agent, reference_episodes, seed)
        about["references"] = {"episodes": reference_episodes, "seed": seed, "random": low, "expert": high}
        if high > low:
            info = dataclasses.replace(info, ref_min_score=low, ref_max_score=high)
            about["normalized_mean_return"] = float(100.0 * (data.returns.mean() - low) / (high - low))
    return dataclasses.replace(data, info=dataclasses.replace(info, about=about))


def measure_references(env: EnvSpec, expert: Agent, episodes: int = 100, seed: int = 0, n_envs: int = 10) -> References:
    """The mean returns of uniformly random actions and of ``expert`` (its mode), over whole episodes.

    D4RL's smallest returns are measured so; its largest ones are those of the policy it calls the expert.

    Args:
        env: Environment.
        expert: Agent with the environment's spaces.
        episodes: Of each; both start from the same reset seeds.
        seed: Of the resets and the random actions.
        n_envs: Environments side by side.
    """
    vector = open_vector(env, min(n_envs, episodes))
    try:
        check_spaces(expert, vector)
        random = uniform(vector.single_action_space, seed)
        low = evaluate(vector, lambda obs, index: random(obs, index)[0], episodes, derive(seed, "references"))
        with own_threads(expert):
            high = evaluate(vector, expert.session(None), episodes, derive(seed, "references"))
    finally:
        vector.close()
    return References(low.mean, high.mean)


def concatenate(parts: Sequence[Dataset]) -> Dataset:
    """The datasets one after the other, with the info columns that all have and the info of the first."""
    first = parts[0]
    if len(parts) == 1:
        return first

    def joined(values: list[Any]) -> Any:
        if isinstance(values[0], Mapping):
            shared = [k for k in values[0] if all(k in v for v in values)]
            return {k: np.concatenate([v[k] for v in values]) for k in shared}
        return np.concatenate(values)

    names = ("observations", "actions", "rewards", "terminals", "timeouts", "next_observations", "next_known", "infos")
    return dataclasses.replace(first, **{name: joined([getattr(part, name) for part in parts]) for name in names})


def _shifted(progress: Callable[[int], None], by: int) -> Callable[[int], None]:
    return lambda done: progress(by + done)
