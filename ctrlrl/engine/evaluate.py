"""Honest evaluation: a fixed number of whole episodes, each from a seed of its own."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np

from ctrlrl.engine.seeding import derive


class Evaluation(NamedTuple):
    """Raw results, one entry per episode, in the order of their seeds."""

    returns: np.ndarray
    """[episodes] undiscounted sums of the environment's own rewards."""
    lengths: np.ndarray
    """[episodes] steps."""
    seeds: np.ndarray
    """[episodes] reset seeds."""

    @property
    def mean(self) -> float:
        """Mean return."""
        return float(self.returns.mean())

    @property
    def std(self) -> float:
        """Standard deviation of the returns over episodes."""
        return float(self.returns.std())

    def value_at_risk(self, level: float = 0.1) -> float:
        """Return that the worst ``level`` of the episodes do not exceed: the k-th lowest, k = ceil(level x episodes).

        Raises:
            ValueError: The level is not in (0, 1].
        """
        _check_level(level)
        place = math.ceil(level * len(self.returns) - 1e-9) - 1  # 0.07 x 100 is 7.000...1 in floats
        return float(np.sort(self.returns)[place])

    def conditional_value_at_risk(self, level: float = 0.1) -> float:
        """Mean return of the worst ``level`` of the episodes; the last of them counts with the part that belongs to it.

        ``level`` 1 is the mean. Source: Rockafellar and Uryasev 2002, Conditional value-at-risk for general loss
        distributions, prop. 8.

        Raises:
            ValueError: The level is not in (0, 1].
        """
        _check_level(level)
        count = level * len(self.returns)
        weight = np.clip(count - np.arange(len(self.returns)), 0.0, 1.0)
        return float((np.sort(self.returns) * weight).sum() / count)


def _check_level(level: float) -> None:
    if not 0.0 < level <= 1.0:
        raise ValueError(f"level={level} must lie in (0, 1]: the share of the episodes that are the worst")


MAX_STEPS = 1_000_000
"""Steps after which an episode is taken to be endless."""


def evaluate(
    env: gym.vector.VectorEnv, act: Callable[[Any, np.ndarray], np.ndarray], episodes: int, seed: int
) -> Evaluation:
    """Run ``episodes`` episodes of ``act(obs, episode_index [N]) -> actions`` on a vector environment.

    The environment's autoreset must be disabled. Episode ``k`` is reset with a seed derived from
    ``(seed, k)``, so its result does not depend on how many environments run beside it, and no episode is
    counted because it was short (as happens when the first to finish are taken).
    """
    mode = env.metadata.get("autoreset_mode")
    if mode != gym.vector.AutoresetMode.DISABLED:
        raise ValueError(f"evaluation needs a vector environment with autoreset disabled, found {mode}")
    n = min(env.num_envs, episodes)
    seeds = _seeds(seed, episodes)
    returns, lengths = np.zeros(episodes), np.zeros(episodes, dtype=np.int64)
    index = np.minimum(np.arange(env.num_envs), episodes - 1)
    active = np.arange(env.num_envs) < n
    waiting = n
    reset: Any = env.reset  # gymnasium annotates one seed, its vector environments take a list
    obs, _ = reset(seed=[int(seeds[k]) for k in index])
    while active.any():
        obs, reward, terminated, truncated, _ = env.step(act(obs, index))
        returns[index[active]] += np.asarray(reward)[active]
        lengths[index[active]] += 1
        _check_endless(lengths)
        ended = np.logical_or(terminated, truncated)
        if not ended.any():
            continue
        for i in np.flatnonzero(ended):
            if active[i] and waiting < episodes:
                index[i] = waiting
                waiting += 1
            else:
                # a finished place idles on a reset episode that is not counted
                active[i] = False
        if active.any():
            obs, _ = reset(seed=[int(seeds[k]) for k in index], options={"reset_mask": ended})
    return Evaluation(returns, lengths, seeds)


def evaluate_first(
    build: Callable[[Sequence[int]], gym.vector.VectorEnv],
    act: Callable[[Any, np.ndarray], np.ndarray],
    episodes: int,
    seed: int,
    n_envs: int,
) -> Evaluation:
    """As :func:`evaluate`, for environments that are seeded when they are built and not in ``reset`` (EnvPool).

    Episodes run in groups of ``n_envs``. Each group has environments of its own, and the first episode of each of
    them counts.

    Args:
        build: Seeds, one per environment, to a vector environment that is not yet reset.
        act: As in :func:`evaluate`.
        episodes: How many.
        seed: Episode ``k`` has a seed derived from ``(seed, k)``.
        n_envs: Environments side by side.
    """
    seeds = _seeds(seed, episodes)
    returns, lengths = np.zeros(episodes), np.zeros(episodes, dtype=np.int64)
    for begin in range(0, episodes, n_envs):
        places = np.arange(begin, begin + n_envs)
        active = places < episodes
        index = np.minimum(places, episodes - 1)
        env = build([int(seeds[k]) for k in index])
        try:
            obs, _ = env.reset()
            while active.any():
                obs, reward, terminated, truncated, _ = env.step(act(obs, index))
                returns[index[active]] += np.asarray(reward)[active]
                lengths[index[active]] += 1
                _check_endless(lengths)
                active &= ~np.logical_or(terminated, truncated)
        finally:
            env.close()
    return Evaluation(returns, lengths, seeds)


def _seeds(seed: int, episodes: int) -> np.ndarray:
    return np.array([derive(seed, "evaluation", k) for k in range(episodes)])


def _check_endless(lengths: np.ndarray) -> None:
    if lengths.max() >= MAX_STEPS:
        raise RuntimeError(
            f"an episode has not ended after {MAX_STEPS:,} steps: give the environment a time limit "
            "(max_episode_steps in gymnasium.register), or train with eval_every=None"
        )
