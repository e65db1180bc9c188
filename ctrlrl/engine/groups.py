"""Whole episodes in groups that start from the same reset seed."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import gymnasium as gym
import numpy as np
import torch

from ctrlrl.data.rollout import RolloutStorage, torch_dtype
from ctrlrl.engine import guard
from ctrlrl.engine.collected import Collected, assemble, row_of
from ctrlrl.engine.errors import NonFiniteError
from ctrlrl.engine.sync import LeanSyncVectorEnv
from ctrlrl.types import Obs

if TYPE_CHECKING:
    from ctrlrl.engine.collector import ActorProtocol


def run_groups(
    env: gym.vector.VectorEnv,
    policy: ActorProtocol,
    n_groups: int,
    group_size: int,
    seeds: Sequence[int],
    max_steps: int,
    generator: torch.Generator,
    device: torch.device,
    history: guard.History,
    params: Any = None,
) -> Collected:
    """Run the episodes on however many environments ``env`` has; see ``Collector.collect_groups``.

    A place that has finished its episode takes the next waiting one. The noise belongs to (episode, step), so an
    episode does not depend on the place it ran in, up to the rounding of the policy's batched arithmetic.
    """
    if n_groups < 1 or group_size < 1 or max_steps < 1:
        found = f"{n_groups}, {group_size}, {max_steps}"
        raise ValueError(f"n_groups, group_size and max_steps must each be at least 1, found {found}")
    if len(seeds) != n_groups:
        raise ValueError(f"found {len(seeds)} seeds for {n_groups} groups; every group needs one")
    if isinstance(params, list) and any(p != params[0] for p in params):
        raise ValueError("episodes of a group move between environments, so these must all have the same parameters")
    if isinstance(env, LeanSyncVectorEnv):
        env.skip_ended = True
    n, total = env.num_envs, n_groups * group_size
    space = env.single_action_space
    storage = RolloutStorage(
        env.single_observation_space, policy.action_shape, policy.action_dtype, max_steps, total, "cpu"
    )
    for array in storage.host_obs().values():
        array[...] = 0
    storage.action.zero_()
    storage.valid[...] = False
    sent = np.zeros((max_steps, total, *(space.shape or ())), dtype=space.dtype)
    noise = policy.noise(max_steps, total, generator)
    finals: list[tuple[int, int, Any]] = []
    episode = np.arange(n)  # which episode each place runs; its own index or more than ``total`` where none
    active = episode < total
    clock = np.zeros(n, dtype=np.int64)
    waiting = min(n, total)
    simulation = 0.0

    def place_seeds() -> Any:
        # seeds of places without an episode do not matter, but must be there
        return [int(seeds[min(int(k), total - 1) // group_size]) for k in episode]

    obs, _ = env.reset(seed=place_seeds())
    with torch.inference_mode():
        while active.any():
            places = np.flatnonzero(active)
            e, t = episode[places], clock[places]
            pick = np.minimum(episode, total - 1)
            tensors = _tensors(obs, env.single_observation_space, device)
            action = policy.act(tensors, noise[torch.from_numpy(clock), torch.from_numpy(pick)].to(device))
            out = policy.to_env(tensors, action).cpu().numpy().astype(space.dtype)
            _write_rows(storage, t, e, obs, places)
            storage.action[torch.from_numpy(t), torch.from_numpy(e)] = action.cpu()[torch.from_numpy(places)]
            sent[t, e] = out[places]
            storage.valid[t, e] = True
            began = time.perf_counter()
            obs, reward, terminated, truncated, _ = env.step(out)
            simulation += time.perf_counter() - began
            truncated = np.array(truncated) | (clock + 1 >= max_steps)
            storage.reward[t, e] = reward[places]
            storage.terminated[t, e], storage.truncated[t, e] = terminated[places], truncated[places]
            clock[places] += 1
            _write_rows(storage, t + 1, e, obs, places)
            ended = terminated | truncated
            for i in places[ended[places]]:
                if not terminated[i]:
                    finals.append((int(clock[i]) - 1, int(episode[i]), row_of(obs, i)))
                active[i] = waiting < total
                if active[i]:
                    episode[i] = waiting
                    waiting += 1
                elif isinstance(env, LeanSyncVectorEnv):
                    env.leave(i)
                clock[i] = 0
            # idle places of an environment that cannot skip them are reset too and then ignored
            again = ended if not isinstance(env, LeanSyncVectorEnv) else ended & active
            if again.any() and active.any():
                obs, _ = env.reset(seed=place_seeds(), options={"reset_mask": again})
    _guard(history, storage, sent, finals, seeds, group_size, params)
    return _finish(storage, finals, simulation, group_size, device)


def _tensors(obs: Any, space: gym.Space, device: torch.device) -> Obs:
    def leaf(value: Any, part: gym.Space) -> torch.Tensor:
        return torch.from_numpy(np.array(value)).to(device, torch_dtype(part.dtype))

    if isinstance(space, gym.spaces.Dict):
        return {k: leaf(obs[k], s) for k, s in space.spaces.items()}
    return leaf(obs, space)


def _write_rows(storage: RolloutStorage, t: np.ndarray, episode: np.ndarray, obs: Any, places: np.ndarray) -> None:
    for key, array in storage.host_obs().items():
        array[t, episode] = (obs[key] if key else obs)[places]


def _finish(
    storage: RolloutStorage, finals: list[Any], simulation: float, group_size: int, device: torch.device
) -> Collected:
    """Cut to the longest episode; ``last_obs`` is each episode's own final observation."""
    lengths = storage.valid.sum(0)
    longest, total = int(lengths.max()), storage.n_envs
    returns = np.where(storage.valid, storage.reward, 0.0).sum(0)
    episodes = [(float(r), int(k)) for r, k in zip(returns, lengths, strict=True)]
    collected = assemble(storage, finals, episodes, simulation)
    ends = torch.from_numpy(lengths)
    columns = torch.arange(total)
    everything = storage.obs()
    if isinstance(everything, dict):
        last: Obs = {k: v[ends, columns].to(device) for k, v in everything.items()}
    else:
        last = everything[ends, columns].to(device)

    def cut(x: Any) -> Any:
        return {k: v[:longest].to(device) for k, v in x.items()} if isinstance(x, dict) else x[:longest].to(device)

    def whole(x: Any) -> Any:
        return {k: v.to(device) for k, v in x.items()} if isinstance(x, dict) else x.to(device)

    timed = ("obs", "action", "reward_t", "terminated_t", "truncated_t", "valid_t")
    return collected._replace(
        **{k: cut(getattr(collected, k)) for k in timed},
        **{k: whole(getattr(collected, k)) for k in ("final_t", "final_n", "final_obs")},
        last_obs=last,
        group=(columns // group_size).to(device),
    )


def _guard(
    history: guard.History,
    storage: RolloutStorage,
    sent: np.ndarray,
    finals: list[Any],
    seeds: Sequence[int],
    group_size: int,
    params: Any,
) -> None:
    """Raise for the first non-finite value; the dump replays that one episode in an environment of its own."""
    found = guard.first(storage, sent, finals, storage.n_steps, storage.n_steps + 1)
    if found is None:
        return
    step, column, what = found
    path = None
    if history.folder is not None:
        if history.spec is not None:
            history.spec = dataclasses.replace(history.spec, n_envs=1)
        history.seeds = [int(seeds[column // group_size])]
        if params is not None:
            history.params(params[0] if isinstance(params, list) else params)
        rows = {f"obs/{k}": v[: step + 2, column] for k, v in storage.host_obs().items()}
        rows["reward"] = storage.reward[: step + 1, column]
        path = history.write(what, 0, step, sent[: step + 1, column : column + 1], rows)
    raise NonFiniteError(what, column, step, path, f"episode {column} of the groups")
