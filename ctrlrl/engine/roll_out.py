"""Rolling a policy out into a dataset: episodes in order, with the density of every action."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import gymnasium as gym
import numpy as np
import torch
from torch import Tensor

from ctrlrl.data.dataset import Dataset, DatasetError, DatasetInfo
from ctrlrl.engine import environments
from ctrlrl.engine.agent import Agent
from ctrlrl.engine.policy_density import clipped_density, log_volume
from ctrlrl.engine.seeding import derive, generator
from ctrlrl.nets.actor_critic import ActorCritic
from ctrlrl.nets.actors import GaussianActor, SquashedGaussian, SquashedGaussianActor
from ctrlrl.nets.heads import CategoricalHead, DiagonalGaussian, GaussianHead, MultiCategoricalHead
from ctrlrl.nets.latent_policy import LatentPolicy
from ctrlrl.types import EnvSpec, Obs

LOG_PROBS = "action_log_probs"
"""D4RL's name of the column with the behaviour policy's log-density."""

Act: TypeAlias = Callable[[Any, np.ndarray], np.ndarray]
"""``(observations [N, ...], episode numbers [N]) -> actions [N, ...]``."""
Sampler: TypeAlias = Callable[[Any, np.ndarray], tuple[np.ndarray, np.ndarray | None]]
"""As :data:`Act`, with the actions' log-probabilities [N] where they are known."""


def roll_out(
    policy: Agent | Act | None,
    env: EnvSpec,
    steps: int,
    seed: int = 0,
    *,
    stochastic: bool = True,
    n_envs: int = 8,
    progress: Callable[[int], None] | None = None,
) -> Dataset:
    """``steps`` steps of a policy: episodes 0, 1, ... in order, the last one cut.

    Episode ``k`` starts from a seed of its own and samples with noise of its own, so that the data do not depend on
    ``n_envs`` beyond the rounding of a batched network.

    The column ``action_log_probs`` is the log-density of each action in the environment's units. Where a Gaussian is
    cut at the bounds, an entry that lies on one counts with the log of the probability of being cut there. A
    deterministic policy, a function, or a policy whose density is not at hand (flows, IWOCS) has no such column.
    MuJoCo environments give ``qpos`` and ``qvel`` before each step, as in D4RL's files. Floats are float32, as in
    D4RL's files and as policies see them.

    Args:
        policy: Agent; function; None for uniformly random actions.
        env: Environment; it runs in this process.
        steps: Environment steps.
        seed: Of everything.
        stochastic: Sample the actions; otherwise take the mode.
        n_envs: Environments side by side.
        progress: Called with the steps done so far.

    Raises:
        DatasetError: A reward, observation or action is not finite; says where.
        ValueError: The policy does not fit the environment; no steps.
    """
    if steps < 1:
        raise ValueError(f"steps={steps} must be at least 1")
    env = alone(env)
    vector = open_vector(env, n_envs)
    try:
        space = vector.single_action_space
        if policy is None:
            act = uniform(space, seed)
        elif isinstance(policy, Agent):
            check_spaces(policy, vector)
            act = _sampler(policy, stochastic, seed)
        else:
            act = lambda obs, index, given=policy: (given(obs, index), None)  # noqa: E731
        with own_threads(policy):
            columns, index = _record(vector, act, steps, seed, progress)
    finally:
        vector.close()
    order = np.argsort(index, kind="stable")[:steps]

    def column(name: str) -> Any:
        value = columns[name]
        return {k: v[order] for k, v in value.items()} if isinstance(value, dict) else value[order]

    timeouts = column("timeouts")
    timeouts[-1] |= not column("terminals")[-1]
    name = "uniform" if policy is None else policy.method if isinstance(policy, Agent) else "function"
    data = Dataset(
        observations=column("observations"),
        actions=column("actions"),
        rewards=column("rewards"),
        terminals=column("terminals"),
        timeouts=timeouts,
        next_observations=column("next_observations"),
        next_known=np.ones(steps, bool),
        observation_space=vector.single_observation_space,
        action_space=space,
        info=DatasetInfo(f"{env.id}-{name}", env, about={"algorithm": name, "seed": seed, "stochastic": stochastic}),
        infos={name: column(name) for name in (LOG_PROBS, "qpos", "qvel") if name in columns},
    )
    _check_finite(data)
    return data


def _record(
    vector: Any, act: Sampler, steps: int, seed: int, progress: Callable[[int], None] | None
) -> tuple[dict[str, Any], np.ndarray]:
    """Columns [T x N, ...] in order of time until the first episodes together have ``steps`` steps, and the number of
    the episode of each row."""
    n = vector.num_envs
    index, lengths, running = np.arange(n), [0] * n, [True] * n
    kept: dict[str, list[Any]] = {}
    numbers: list[np.ndarray] = []
    first = whole = 0  # the first episode that still runs, and the steps of those before it
    obs, _ = vector.reset(seed=[derive(seed, "episode", k) for k in range(n)])
    while True:
        states = _states(vector.envs)
        action, log_prob = act(obs, index)
        following, reward, terminated, truncated, _ = vector.step(action)
        row = {
            "observations": _narrow(obs), "actions": action, "rewards": reward.astype(np.float32),
            "terminals": terminated, "timeouts": truncated, "next_observations": _narrow(following), **states,
        }  # fmt: skip
        if log_prob is not None:
            row[LOG_PROBS] = log_prob.astype(np.float32)
        for name, value in row.items():
            kept.setdefault(name, []).append(value)
        numbers.append(index.copy())
        for k in index:
            lengths[k] += 1
        ended = terminated | truncated
        for place in np.flatnonzero(ended):
            running[index[place]] = False
            index[place] = len(lengths)
            lengths.append(0)
            running.append(True)
        while not running[first]:
            whole, first = whole + lengths[first], first + 1
        done = min(whole + lengths[first], steps)
        if progress is not None:
            progress(done)
        if done == steps:
            break
        obs = following
        if ended.any():
            seeds = [derive(seed, "episode", int(k)) if now else None for k, now in zip(index, ended, strict=True)]
            obs, _ = vector.reset(seed=seeds, options={"reset_mask": ended})

    def joined(values: list[Any]) -> Any:
        if isinstance(values[0], dict):
            return {k: np.concatenate([v[k] for v in values]) for k in values[0]}
        return np.concatenate(values)

    return {name: joined(values) for name, values in kept.items()}, np.concatenate(numbers)


def _states(envs: Sequence[gym.Env]) -> dict[str, np.ndarray]:
    """Positions and velocities [N, ...] of MuJoCo environments."""
    found = [getattr(env.unwrapped, "data", None) for env in envs]
    if not all(hasattr(data, "qpos") and hasattr(data, "qvel") for data in found):
        return {}
    return {k: np.stack([np.array(getattr(data, k), np.float32).ravel() for data in found]) for k in ("qpos", "qvel")}


# -- acting ---------------------------------------------------------------------------------------


class _Noise:
    """Noise [N, ...] of each step: every episode has a stream of its own."""

    BLOCK = 64

    def __init__(self, draw: Callable[[int, torch.Generator], Tensor], seed: int) -> None:
        self.draw, self.seed = draw, seed
        self.streams: dict[int, tuple[int, torch.Generator, list[Tensor]]] = {}

    def __call__(self, index: np.ndarray) -> Tensor:
        rows = []
        for place, episode in enumerate(index.tolist()):
            number, source, left = self.streams.get(place, (-1, torch.Generator(), []))
            if number != episode:
                source, left = generator(self.seed, "noise", episode), []
            if not left:
                left = list(self.draw(self.BLOCK, source).unbind(0))[::-1]
            rows.append(left.pop())
            self.streams[place] = episode, source, left
        return torch.stack(rows)


def uniform(space: gym.Space, seed: int) -> Sampler:
    """Actions uniform over ``space``, with their log-density.

    Raises:
        ValueError: Bounds are infinite, or it is neither a Box of floats nor Discrete nor MultiDiscrete.
    """
    if isinstance(space, gym.spaces.Box) and np.issubdtype(space.dtype, np.floating) and space.is_bounded():
        start, width = space.low.astype(np.float64), space.high.astype(np.float64) - space.low.astype(np.float64)
    elif isinstance(space, gym.spaces.Discrete | gym.spaces.MultiDiscrete):
        start, width = np.asarray(space.start), np.asarray(space.n if hasattr(space, "n") else space.nvec)  # type: ignore[union-attr]
    else:
        raise ValueError(f"there is no uniform distribution over {space}; expected finite bounds, or Discrete")
    continuous = isinstance(space, gym.spaces.Box)
    noise = _Noise(lambda n, source: torch.rand(n, *width.shape, dtype=torch.float64, generator=source), seed)
    log_prob = -float(np.log(width.astype(np.float64)).sum())

    def act(obs: Any, index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        part = noise(index).numpy() * width
        action = np.clip(start + part, space.low, space.high) if continuous else start + np.floor(part)  # type: ignore[attr-defined]
        return action.astype(space.dtype), np.full(len(index), log_prob)

    return act


def _sampler(agent: Agent, stochastic: bool, seed: int) -> Sampler:
    """How ``agent`` acts, with the density of its actions where it is at hand."""
    policy = agent.policy
    own = type(agent)._act is Agent._act and type(agent).session is Agent.session
    density = _density(policy) if stochastic and own else None
    if density is None:
        sampled = stochastic and getattr(policy, "stochastic", True)
        session = agent.session(generator(seed, "noise") if sampled else None)
        return lambda obs, index: (session(obs, index), None)
    noise = _Noise(lambda n, source: policy.noise(n, 1, source)[:, 0], seed)

    def act(obs: Any, index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        with torch.inference_mode():
            action, log_prob = density(agent._as_batch(obs)[0], noise(index).to(agent.device))
        return action.cpu().numpy().astype(agent.action_space.dtype), log_prob.cpu().numpy()

    return act


def _density(policy: Any) -> Callable[[Obs, Tensor], tuple[Tensor, Tensor]] | None:
    """What ``policy`` does with noise: the environment's actions and their log-densities. None where those are not
    at hand."""
    head = getattr(policy, "head", None)
    if isinstance(policy, SquashedGaussianActor):

        def act(obs: Obs, noise: Tensor) -> tuple[Tensor, Tensor]:
            found = policy(obs)
            u = found.pre_tanh(noise)
            # at u, not at the action, from which float32 does not give u back
            return policy.to_env(obs, torch.tanh(u)), found.log_prob(u) - policy.scale.log().sum()

    elif isinstance(policy, GaussianActor):

        def act(obs: Obs, noise: Tensor) -> tuple[Tensor, Tensor]:
            found = policy(obs)
            sent = policy.to_env(obs, found.sample(noise))
            wide = DiagonalGaussian(policy.middle + policy.scale * found.mean, found.log_std + policy.scale.log())
            return sent, clipped_density(wide, sent.flatten(1), policy.low, policy.high).logp

    elif _decodes(policy):
        squashed = policy.head.action_map == "tanh"
        if not squashed and policy.head.bounded:
            return None  # how often decoded actions are cut off is not known

        def act(obs: Obs, noise: Tensor) -> tuple[Tensor, Tensor]:
            found, decoder = policy.distribution(obs), policy.decoder
            latent = found.sample(noise)
            # at the latent, which float32 does not give back from the action
            log_prob = found.log_prob(latent) - decoder.log_det(decoder.features(obs), latent)
            u = policy.decode(obs, latent)
            volume = log_volume(u, policy.head.low, policy.head.high) if squashed else 0.0
            return policy.head.to_env(u), log_prob - volume

    elif type(head) is GaussianHead:  # a flow's is a subclass

        def act(obs: Obs, noise: Tensor) -> tuple[Tensor, Tensor]:
            found = policy.distribution(obs)
            u = found.sample(noise)
            sent = policy.to_env(obs, u)
            if head.action_map == "tanh":
                volume = ((head.high - head.low) / 2).log().sum()
                return sent, SquashedGaussian(found.mean, found.log_std).log_prob(u) - volume
            return sent, clipped_density(found, sent.flatten(1), head.low, head.high).logp

    elif type(head) in (CategoricalHead, MultiCategoricalHead) and isinstance(policy, ActorCritic):

        def act(obs: Obs, noise: Tensor) -> tuple[Tensor, Tensor]:
            found = policy.distribution(obs)
            choice = found.sample(noise)
            return policy.to_env(obs, choice), found.log_prob(choice)

    else:
        return None
    return act


def _decodes(policy: Any) -> bool:
    return isinstance(policy, LatentPolicy) and policy.decoding


# -- small parts ----------------------------------------------------------------------------------


def alone(env: EnvSpec) -> EnvSpec:
    """What ``env`` is, with its version, and nothing of how many run side by side."""
    return EnvSpec(environments.concrete(dataclasses.replace(env, backend="sync")).id, env.kwargs, env.wrappers)


def open_vector(env: EnvSpec, n_envs: int) -> Any:
    """``n_envs`` environments in this process, with autoreset disabled."""
    if n_envs < 1:
        raise ValueError(f"n_envs={n_envs} must be at least 1")
    return environments.make_vector(dataclasses.replace(env, n_envs=n_envs, backend="sync"), autoreset="disabled")


def own_threads(policy: Any) -> contextlib.AbstractContextManager[None]:
    """The threads an agent was configured with, for as long as it acts."""
    return environments.torch_threads(getattr(getattr(policy, "config", None), "threads", None))


def check_spaces(agent: Agent, vector: Any) -> None:
    """Raise ``ValueError`` unless the agent was made for these environments."""
    for kind in ("observation", "action"):
        mine, found = getattr(agent, f"{kind}_space"), getattr(vector, f"single_{kind}_space")
        if mine != found:
            raise ValueError(f"the {agent.method} policy has the {kind} space {mine}, {vector.name} has {found}")


def _narrow(obs: Any) -> Any:
    if isinstance(obs, Mapping):
        return {k: _narrow(v) for k, v in obs.items()}
    return obs.astype(np.float32) if obs.dtype == np.float64 else obs


def _check_finite(data: Dataset) -> None:
    for name, column in data.columns().items():
        if column.dtype.kind == "f" and not np.isfinite(column).all():
            row = int(np.flatnonzero(~np.isfinite(column.reshape(len(data), -1)).all(1))[0])
            episode = int(data.ends[:row].sum())
            step = row - data.episodes[episode].start
            raise DatasetError(f"{data.info.id}: {name} is not finite in step {step} of episode {episode} (row {row})")
