"""Stepping the environments with a policy; the only place that knows about autoreset."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import gymnasium as gym
import numpy as np
import torch
from gymnasium.vector import AutoresetMode
from torch import Tensor

from ctrlrl.data.rollout import RolloutStorage
from ctrlrl.engine import environments, envpool, guard
from ctrlrl.engine.collected import Collected, assemble, copy_obs, keep_finals, next_values, row_of
from ctrlrl.engine.groups import Draw, run_groups
from ctrlrl.engine.spaces import check_observation
from ctrlrl.engine.sync import LeanSyncVectorEnv
from ctrlrl.types import EnvSpec, Obs

__all__ = ["ActorProtocol", "Collected", "Collector", "border_seeds", "next_values"]


class ActorProtocol(Protocol):
    """What the collector needs of a policy. Nothing is differentiated."""

    @property
    def action_shape(self) -> tuple[int, ...]:
        """Shape of one action as the density sees it."""
        ...

    @property
    def action_dtype(self) -> torch.dtype:
        """Its type."""
        ...

    def noise(self, n_steps: int, n_envs: int, generator: torch.Generator) -> Tensor:
        """The noise of a whole rollout, [n_steps, n_envs, ...]."""
        ...

    def act(self, obs: Obs, noise: Tensor) -> Tensor:
        """Actions [N, ...] that ``noise`` [N, ...] selects at ``obs`` [N, ...]."""
        ...

    def to_env(self, obs: Obs, action: Tensor) -> Tensor:
        """The environment's actions [N, ...]."""
        ...

    def sampler(self) -> Callable[[Obs, Tensor], tuple[Tensor, Tensor]]:
        """``act`` and ``to_env`` in one call, valid while the parameters stay as they are."""
        ...


def border_seeds(seed: int, border: int, n_envs: int) -> list[int]:
    """Seeds in [0, 2^31) of the environments created at a border: a fixed function of its arguments."""
    state = np.random.SeedSequence([int(seed), int(border)]).generate_state(n_envs)
    return [int(s >> 1) for s in state]


class Collector:
    """Owns the environments and steps them.

    Args:
        env: EnvSpec (the environments are built at every border) or live environment (reset at every border).
        policy: See :class:`ActorProtocol`.
        n_steps: Steps per environment and rollout.
        device: Where the policy lives.
        seed: Seed of border 0, which is drawn before the first rollout unless :meth:`border` was called.
        dump_dir: Folder for the file that replays a non-finite value; None writes none.
        keep_terminal: Keep the last observation of episodes that terminated too, not only of those that were cut.

    Raises:
        ValueError: A live vector environment that does not declare its autoreset.
    """

    def __init__(
        self,
        env: EnvSpec | gym.Env | gym.vector.VectorEnv,
        policy: ActorProtocol,
        n_steps: int,
        device: torch.device | str = "cpu",
        seed: int = 0,
        *,
        dump_dir: str | os.PathLike[str] | None = None,
        keep_terminal: bool = False,
    ) -> None:
        if n_steps < 1:
            raise ValueError(f"n_steps={n_steps} must be at least 1")
        self.spec = environments.concrete(env) if isinstance(env, EnvSpec) else None
        self._live = None if isinstance(env, EnvSpec) else environments.wrap_live(env)
        self.policy, self.n_steps, self.seed = policy, n_steps, seed
        self.device = torch.device(device)
        self.dump_dir = None if dump_dir is None else Path(dump_dir)
        self.keep_terminal = keep_terminal
        self.n_envs = environments.width(env)
        self.env: gym.vector.VectorEnv | None = None
        self._groups: gym.vector.VectorEnv | None = None
        self._obs: Any = None
        self._params: Any = None
        self._broken = False

    # -- borders ------------------------------------------------------------------------------

    def border(self, seed: int, border: int) -> None:
        """Start afresh: everything after it is a function of (seed, border) and the policy alone.

        Environments of a spec are built again, those of a live one are reset; both with seeds derived from
        (seed, border). Parameters set by :meth:`set_params` are set again. Episodes that were running are cut
        and not reported.
        """
        seeds = border_seeds(seed, border, self.n_envs)
        if self.spec is not None:
            if self.env is not None:
                self.env.close()
            self.env = environments.make_vector(self.spec, seeds, copy=False)
        else:
            self.env = self._live
        assert self.env is not None
        mode = self.env.metadata["autoreset_mode"]
        self._next_step, self._disabled = mode == AutoresetMode.NEXT_STEP, mode == AutoresetMode.DISABLED
        self._history = guard.History(self.spec, seeds, self.dump_dir)
        if self._params is not None:
            self._apply(self._params)
        obs = environments.start(self.env, seeds)
        if not isinstance(self.env, LeanSyncVectorEnv):
            name = self.spec.id if self.spec is not None else type(self.env).__name__
            check_observation(self.env.observation_space, obs, name)
        self._obs, self._broken = copy_obs(obs), False
        self._ended = np.zeros(self.n_envs, dtype=np.bool_)
        self._return, self._length = np.zeros(self.n_envs), np.zeros(self.n_envs, dtype=np.int64)

    def set_params(self, params: Mapping[str, float] | Sequence[Mapping[str, float]]) -> None:
        """Set the parameters of all environments (or one mapping each); they hold across autoreset and borders."""
        self._params = dict(params) if isinstance(params, Mapping) else [dict(p) for p in params]
        if self.env is not None:
            self._apply(self._params)

    def _apply(self, params: Any) -> None:
        assert self.env is not None
        environments.set_params(self.env, params)
        self._history.params(params)

    @property
    def live(self) -> gym.vector.VectorEnv | None:
        """The user's own environment, where it was given one."""
        return self._live

    @property
    def observation(self) -> Any:
        """What the environments showed last, [N, ...]; valid until the next step."""
        return self._obs

    # -- rollouts -----------------------------------------------------------------------------

    def collect(self, generator: torch.Generator) -> Collected:
        """Step every environment ``n_steps`` times.

        Raises:
            NonFiniteError: A reward, observation or action is NaN or infinite. Nothing of the rollout survives.
        """
        if self._broken:
            raise RuntimeError("the last rollout did not complete; call border(seed, number) before the next one")
        if self._obs is None:
            self.border(self.seed, 0)
        env, policy, device = self.env, self.policy, self.device
        assert env is not None
        n_steps = self.n_steps
        space = env.single_action_space
        storage = RolloutStorage(
            env.single_observation_space, policy.action_shape, policy.action_dtype, n_steps, self.n_envs, device
        )
        noise = policy.noise(n_steps, self.n_envs, generator).to(device).unbind(0)
        sent = np.empty((n_steps, self.n_envs, *(space.shape or ())), dtype=space.dtype)
        finals: list[tuple[int, int, Any]] = []
        sample, step, write_obs, write_action = policy.sampler(), env.step, storage.write_obs, storage.write_action
        rewards, terminations, truncations = storage.reward, storage.terminated, storage.truncated
        clock, disabled, on_cpu = time.perf_counter, self._disabled, device.type == "cpu"
        same_step = not disabled and not self._next_step and self._live is not None  # our own always give it
        simulation, t = 0.0, 0
        next_obs, self._broken = self._obs, True
        try:
            with torch.inference_mode():
                obs = write_obs(0, next_obs)
                for t in range(n_steps):
                    action, out = sample(obs, noise[t])
                    write_action(t, action)
                    # a row of our own: the environment may keep the array it is given
                    row = sent[t]
                    row[...] = out.numpy() if on_cpu else out.cpu().numpy()
                    began = clock()
                    next_obs, rewards[t], terminations[t], truncations[t], infos = step(row)
                    if disabled:
                        next_obs = self._reset_ended(t, next_obs, terminations[t], truncations[t], finals)
                    simulation += clock() - began
                    if same_step and (truncations[t] & ~terminations[t]).any() and "final_obs" not in infos:
                        raise ValueError(
                            "an episode was truncated and reset in the same step, but infos has no 'final_obs': "
                            f"without its last observation there is no value to go on with. Found {sorted(infos)}"
                        )
                    if infos and "final_obs" in infos:
                        keep_finals(t, infos, self._finals_wanted(terminations[t], truncations[t]), finals)
                    obs = write_obs(t + 1, next_obs)
        except Exception as error:
            self._history.add(sent[: t + 1])
            if (found := guard.first(storage, sent, finals, t + 1, t + 1)) is not None:
                raise self._history.error(found, storage, t + 1, t + 1) from error
            raise
        self._history.add(sent)
        self._mark_reset_steps(storage)
        if (found := guard.first(storage, sent, finals, n_steps, n_steps + 1)) is not None:
            raise self._history.error(found, storage, n_steps, n_steps + 1)
        self._obs, self._broken = copy_obs(next_obs), False
        if self._next_step:
            self._ended = terminations[-1] | truncations[-1]
        return assemble(storage, finals, self._episodes(storage), simulation)

    def _reset_ended(self, t: int, obs: Any, terminated: Any, truncated: Any, finals: list[Any]) -> Any:
        """With autoreset disabled: note the final observations and reset what ended."""
        ended = terminated | truncated
        if not ended.any():
            return obs
        wanted = self._finals_wanted(terminated, truncated)
        finals += [(t, int(n), row_of(obs, int(n))) for n in np.flatnonzero(wanted)]
        assert self.env is not None
        return self.env.reset(options={"reset_mask": ended})[0]

    def _finals_wanted(self, terminated: Any, truncated: Any) -> Any:
        return terminated | truncated if self.keep_terminal else truncated & ~terminated

    def _mark_reset_steps(self, storage: RolloutStorage) -> None:
        """Mark the steps that only reset: with NEXT_STEP, each one after an end, across rollouts too."""
        if self._next_step:
            storage.valid[0] = ~self._ended
            storage.valid[1:] = ~(storage.terminated | storage.truncated)[:-1]
            storage.reward[~storage.valid] = 0.0

    def _episodes(self, storage: RolloutStorage) -> list[tuple[float, int]]:
        """Returns and lengths of the episodes that ended, in order of time; the others run on."""
        sums, counts = np.cumsum(storage.reward, axis=0), np.cumsum(storage.valid, axis=0)
        # what had been gathered before this rollout, as if the sums had begun that much below zero
        sum_0, count_0 = -self._return, -self._length
        finished: list[tuple[float, int]] = []
        for t, n in np.argwhere(storage.terminated | storage.truncated):
            finished.append((float(sums[t, n] - sum_0[n]), int(counts[t, n] - count_0[n])))
            sum_0[n], count_0[n] = sums[t, n], counts[t, n]
        self._return, self._length = sums[-1] - sum_0, counts[-1] - count_0
        return finished

    # -- groups -------------------------------------------------------------------------------

    def collect_groups(
        self,
        n_groups: int,
        group_size: int,
        seeds: Sequence[int],
        max_steps: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Collected:
        """Run ``n_groups * group_size`` whole episodes; those of a group start from the same reset seed.

        Column ``g * group_size + i`` is episode ``i`` of group ``g``; see :meth:`collect_episodes`.

        Args:
            n_groups: Groups.
            group_size: Episodes per group.
            seeds: One reset seed per group.
            max_steps: Episodes longer than this are truncated; by default the environment's limit.
            generator: Of the policy's noise; a new one from the collector's seed by default.
        """
        if n_groups < 1 or group_size < 1:
            raise ValueError(f"n_groups and group_size must each be at least 1, found {n_groups}, {group_size}")
        if len(seeds) != n_groups:
            raise ValueError(f"found {len(seeds)} seeds for {n_groups} groups; every group needs one")
        group = torch.arange(n_groups).repeat_interleave(group_size)
        return self.collect_episodes([int(seeds[g]) for g in group.tolist()], group, max_steps, generator)

    def collect_episodes(
        self,
        seeds: Sequence[int],
        group: Tensor,
        max_steps: int | None = None,
        generator: torch.Generator | None = None,
        draw: Draw | None = None,
    ) -> Collected:
        """Run one whole episode from each reset seed.

        Column ``i`` is the episode of ``seeds[i]``; ``T`` is the longest episode, and ``valid_t`` is False after an
        episode's end. The environments are others than those of :meth:`collect` (a live one is shared, and the next
        ``collect`` begins at border 0 again): in this process up to 32 side by side, or ``n_envs`` if that is more.

        Args:
            seeds: Reset seeds; equal ones give equal starts.
            group: [B] int64 group of each episode, handed through.
            max_steps: Episodes longer than this are truncated; by default the environment's limit.
            generator: Of the policy's noise; a new one from the collector's seed by default.
            draw: Temperature, support, prescribed actions.

        Raises:
            ValueError: EnvPool, a live environment whose autoreset is not disabled, or no limit at all.
            NonFiniteError: As in :meth:`collect`.
        """
        if max_steps is None:
            max_steps = self.horizon()
        if max_steps < 1:
            raise ValueError(f"max_steps={max_steps} must be at least 1")
        if self.spec is not None and self.spec.backend == "envpool":
            raise ValueError(f"{self.spec.id}: groups need reset(seed=...), which EnvPool ignores; use backend='sync'")
        if self._live is not None:
            if self._live.metadata["autoreset_mode"] != AutoresetMode.DISABLED:
                raise ValueError(
                    "groups on a live environment need a vector environment with autoreset DISABLED; "
                    "pass one, or an id or EnvSpec instead"
                )
            self._groups, self._obs = self._live, None
        elif self._groups is None:
            assert self.spec is not None
            width = self.spec.n_envs if self.spec.backend == "async" else max(self.spec.n_envs, min(len(seeds), 32))
            wide = dataclasses.replace(self.spec, n_envs=width)
            self._groups = environments.make_vector(wide, autoreset="disabled", copy=False, keep_infos=True)
        if self._params is not None:
            environments.set_params(self._groups, self._params)
        if generator is None:
            generator = torch.Generator().manual_seed(self.seed)
        assert self._groups is not None
        return run_groups(
            self._groups, self.policy, seeds, group, max_steps, generator, self.device,
            guard.History(self.spec, [], self.dump_dir), self._params, draw,
        )  # fmt: skip

    def horizon(self) -> int:
        """The environment's limit of steps: the registered one, or ``unwrapped.max_episode_steps`` of its own.

        Raises:
            ValueError: It has none.
        """
        limit = None
        if self.spec is not None:
            limit = self.spec.kwargs.get("max_episode_steps") or envpool.step_limit(self.spec.id.rpartition(":")[2])
        if limit is None:
            limit = self._own_limit()
        if limit is None:
            raise ValueError(
                "these episodes have no known limit of steps; set horizon, the longest episode (on the command line "
                "--horizon; in a call of the collector, give max_steps)"
            )
        return limit

    def _own_limit(self) -> int | None:
        """What an environment that truncates by itself says; a spec is built for a moment."""
        if self.spec is not None and self.spec.backend == "envpool":
            return None
        env: Any = self._live if self.spec is None else environments.build_env(self.spec)
        limit = getattr(env.unwrapped, "max_episode_steps", None)
        if env is not self._live:
            env.close()
        return limit if isinstance(limit, int) and limit > 0 else None

    def close(self) -> None:
        """Close the environments that were built here; a live one is the caller's."""
        for env in (self.env, self._groups):
            if env is not None and env is not self._live:
                env.close()
        self.env = self._groups = self._obs = None
