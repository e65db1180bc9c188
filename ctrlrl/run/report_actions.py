"""The part of a report that shows what generative policies do: their actions in a few states, next to a Gaussian's."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import gymnasium as gym
import numpy as np
from scipy.special import ndtri

from ctrlrl import api
from ctrlrl.engine import environments
from ctrlrl.engine.agent import Agent
from ctrlrl.engine.seeding import derive, generator
from ctrlrl.losses import base as losses
from ctrlrl.nets.actors import GaussianActor, SquashedGaussianActor
from ctrlrl.nets.heads import GaussianHead
from ctrlrl.nets.latent_policy import LatentPolicy
from ctrlrl.run import report_figures as figures
from ctrlrl.run import report_words as words
from ctrlrl.run.report_page import Image, Section
from ctrlrl.run.report_runs import Run

Observation: TypeAlias = Any
"""An array [1, ...], or a dict of such arrays."""
STATES, SAMPLES, SEED = 4, 2000, 0
LONGEST = 1000
"""Steps after which an episode is left: some never end."""
DECODED = ("gorl", "gorl_sac")
UNAVAILABLE = (ImportError, KeyError, OSError, RuntimeError, TypeError, ValueError, gym.error.Error)
"""What loading a run or playing its environment raises (``CheckpointError`` is a RuntimeError) where the run is
damaged, or was made elsewhere or by another version; such runs have no figure, and the page says why."""

DIMENSIONS = (
    "Of its {} dimensions, {} and {} are the least Gaussian: those with the largest 1-Wasserstein distance to the "
    "normal distribution of the same mean and variance, as a share of the distance between the bounds where these are "
    "finite, averaged over the states."
)


@dataclass(frozen=True)
class Visit:
    """Some states of an episode."""

    observations: Sequence[Observation]
    steps: Sequence[int]
    """Steps that were taken before each."""


def section(
    groups: Mapping[tuple[str, str], Sequence[Run]], order: Sequence[str], image: Callable[..., Image]
) -> Section | None:
    """The section "What the policy does" on ``groups`` ((environment, label) to runs); None if none is generative.

    Args:
        groups: Runs by environment and label; the first of each is looked at.
        order: All labels, which fixes their colours.
        image: Makes an Image of a name, PNG bytes, a description and a caption.
    """
    found = Section("What the policy does", "actions")
    found.text.append(
        "Actions of the last policies as the environment gets them, after the bounds, in a few states spread over one "
        "episode from a fixed seed. The states are the same for all methods on an environment, which are shown by the "
        "first of their runs."
    )
    for env in sorted({env for env, _ in groups}):
        _on(env, {label: group[0] for (name, label), group in groups.items() if name == env}, order, image, found)
    return found if found.images or found.notes else None


def generative(run: Run) -> bool:
    """Whether the run's policy makes actions out of noise by a decoder or by denoising, as its settings say.

    A loss of the user's own counts where its policy is set to "flow".
    """
    if run.method in DECODED or run.fields.get("config.network.policy") == '"flow"':
        return True
    return run.method in losses.names() and bool(losses.get(run.method).needs & {"denoising", "matching"})


def gaussian(agent: Agent) -> bool:
    """Whether the policy is a Gaussian in every state, up to the map onto the bounds."""
    policy = agent.policy
    if isinstance(policy, GaussianActor | SquashedGaussianActor):
        return True
    return type(getattr(policy, "head", None)) is GaussianHead and not isinstance(policy, LatentPolicy)


def visit(agent: Agent) -> Visit:
    """Up to four states, evenly from the first to the last, of one stochastic episode from a fixed seed.

    Raises:
        ValueError: The environment cannot be built again.
    """
    if agent.env_spec is None:
        raise ValueError("it was trained on a live environment without an id")
    seed = derive(SEED, "report")
    act = agent.session(generator(SEED, "report", "episode"))
    env = environments.make_vector(environments.fresh(agent.env_spec, 1), [seed])
    try:
        obs, seen, ended = environments.start(env, [seed]), [], False
        while not ended and len(seen) < LONGEST:
            seen.append({k: v.copy() for k, v in obs.items()} if isinstance(obs, dict) else obs.copy())
            obs, _, terminated, truncated, _ = env.step(act(obs, np.zeros(1, np.int64)))
            ended = bool(terminated[0] or truncated[0])
    finally:
        env.close()
    steps = np.unique(np.linspace(0, len(seen) - 1, STATES).round().astype(int)).tolist()
    return Visit([seen[k] for k in steps], steps)


def sample(agent: Agent, observations: Sequence[Observation], n: int = SAMPLES) -> np.ndarray:
    """[S, n, D] ``n`` of the environment's actions in each of S states, from a fixed seed.

    Raises:
        ValueError: The observations are not of the agent's space, or an action is not finite.
    """
    act = agent.session(generator(SEED, "report", "actions"))
    episodes = np.arange(n)
    drawn = []
    for one in observations:
        many = {k: v.repeat(n, 0) for k, v in one.items()} if isinstance(one, dict) else one.repeat(n, 0)
        drawn.append(act(many, episodes).reshape(n, -1).astype(np.float64))
    actions = np.stack(drawn)
    if not np.isfinite(actions).all():
        raise ValueError("its actions are not finite")
    return actions


def least_gaussian(actions: np.ndarray, space: gym.spaces.Box) -> tuple[int, int]:
    """The two dimensions of ``actions`` [S, n, D], D > 1, that have to move furthest to become Gaussian.

    That is the 1-Wasserstein distance to the normal distribution of the same mean and variance, as a share of the
    distance between the bounds where these are finite, in the mean over states.
    """
    n = actions.shape[1]
    normal = ndtri((np.arange(n) + 0.5) / n)[:, None]
    moved = np.abs(np.sort(actions, 1) - actions.mean(1, keepdims=True) - actions.std(1, keepdims=True) * normal)
    width = (space.high.astype(np.float64) - space.low).ravel()
    distance = moved.mean((0, 1)) / np.where(np.isfinite(width), width, 1.0)
    first, second = sorted(np.argsort(-distance, kind="stable")[:2].tolist())
    return first, second


def _on(env: str, runs: Mapping[str, Run], order: Sequence[str], image: Callable[..., Image], found: Section) -> None:
    """Add the figures of one environment to ``found``, and sentences about those that are missing."""
    drawn: dict[str, np.ndarray] = {}
    first: Agent | None = None
    seen: Visit | None = None
    for label, run in runs.items():
        if generative(run):
            try:
                agent = _open(run, first)
                visited = seen or visit(agent)
                drawn[label] = sample(agent, visited.observations)
            except UNAVAILABLE as error:
                found.notes.append(f"{env}: there is no figure of what {label} does. {_reason(error, run)}")
                continue
            first, seen = first or agent, visited
            if not getattr(agent.policy, "decoding", True):
                found.notes.append(f"{env}: {label} is in its first stage, without a decoder: still a Gaussian.")
    if first is None or seen is None:
        return
    other: figures.Drawn | None = None
    for label, run in runs.items():
        if other is None and not generative(run) and run.method in ("sac", *losses.names()):
            try:
                agent = _open(run, first)
                if gaussian(agent):
                    other = label, sample(agent, seen.observations)
            except UNAVAILABLE as error:
                found.notes.append(f"{env}: the actions of {label} are not shown. {_reason(error, run)}")
    space = first.action_space
    assert isinstance(space, gym.spaces.Box)
    player = next(iter(drawn))
    titles = [f"step {step:,}" for step in seen.steps]
    for label, actions in drawn.items():
        size = actions.shape[-1]
        pair = least_gaussian(actions, space) if size > 2 else (0, 1)
        own = label, actions[..., pair[:size]]
        theirs = None if other is None else (other[0], other[1][..., pair[:size]])
        caption = (
            f"{env}, {label}{_seed(runs[label])}: {SAMPLES:,} actions per state, in states of an episode that "
            f"{player}{_seed(runs[player])} played by sampling."
        )
        if size == 1:
            png = figures.action_histograms(titles, own, theirs, order)
        else:
            png = figures.action_scatters(titles, own, theirs, (f"action {pair[0]}", f"action {pair[1]}"), order)
            caption += "" if other else " Ellipses hold 50 % and 95 % of the Gaussian."
        caption += f" {DIMENSIONS.format(size, *pair)}" if size > 2 else ""
        alt = f"Actions on {env}. {'; '.join(_moments(*one, titles) for one in (own, theirs) if one is not None)}."
        found.images.append(image(f"actions-{words.slug(env)}-{words.slug(label)}", png, alt, caption))


def _open(run: Run, first: Agent | None) -> Agent:
    """The run's last policy; raises ``ValueError`` where its spaces are not those of ``first``."""
    agent = api.load(run.path, device="cpu")
    if first is not None:
        for name in ("observation_space", "action_space"):
            mine, theirs = getattr(agent, name), getattr(first, name)
            if mine != theirs:
                raise ValueError(f"its {name} {mine} is not that of the first, {theirs}")
    return agent


def _moments(label: str, actions: np.ndarray, titles: Sequence[str]) -> str:
    """Means and deviations in words."""
    said = []
    for title, points in zip(titles, actions, strict=True):
        parts = zip(points.mean(0), points.std(0), strict=True)
        said.append(f"{title} {' and '.join(f'{words.number(m)} (deviation {words.number(s)})' for m, s in parts)}")
    return f"{label}, mean at {', '.join(said)}"


def _seed(run: Run) -> str:
    return "" if run.seed is None else f" (seed {run.seed})"


def _reason(error: Exception, run: Run) -> str:
    """What went wrong, without the folders above the run's."""
    return f"{type(error).__name__}: {' '.join(str(error).replace(str(run.path), run.name).split())}"
