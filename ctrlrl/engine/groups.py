"""Whole episodes in groups that start from the same reset seed."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import gymnasium as gym
import numpy as np
import torch
from torch import Tensor

from ctrlrl.data.rollout import RolloutStorage, torch_dtype
from ctrlrl.engine import guard
from ctrlrl.engine.collected import Collected, assemble, row_of
from ctrlrl.engine.errors import NonFiniteError
from ctrlrl.engine.sync import LeanSyncVectorEnv
from ctrlrl.nets.heads import Categorical, DiagonalGaussian
from ctrlrl.types import Distribution, Obs

if TYPE_CHECKING:
    from ctrlrl.engine.collector import ActorProtocol


class Draw(NamedTuple):
    """How episodes are sampled, where it is not plainly by the policy."""

    temperature: float = 1.0
    """Actions come from the policy to the power of one over this, normalised: logits divided by it, variances
    multiplied."""
    support: Callable[[Obs], Tensor] | None = None
    """Observations [N, ...] to the actions allowed there, bool [N, K]."""
    behaviour: bool = False
    """Keep the log-probabilities of the sampler."""
    dtype: torch.dtype | None = None
    """Precision the sampler computes in; None is the policy's own."""
    forced: Tensor | None = None
    """[B, F, ...] actions that replace the policy's at the first positions of each episode."""
    forced_length: Tensor | None = None
    """[B] int64: how many."""

    @property
    def plain(self) -> bool:
        """Whether the policy's own way of acting will do."""
        return self.temperature == 1.0 and self.support is None and not self.behaviour and self.dtype is None


def drawn_from(dist: Distribution, temperature: float, support: Tensor | None) -> Distribution:
    """``dist`` to the power of 1 / ``temperature``, on ``support`` [..., K] alone, normalised.

    Raises:
        ValueError: A support for actions that are not one choice among finitely many.
    """
    # float32 whatever the sampler computes in, so that the probabilities that are kept add up to one
    params = {k: v.float() for k, v in dist.params().items()}
    if isinstance(dist, Categorical):
        logits = params["logits"] / temperature
        return Categorical(logits if support is None else logits.masked_fill(~support, -torch.inf))
    if support is not None:
        raise ValueError(f"a restricted support needs one categorical action, found {type(dist).__name__}")
    if isinstance(dist, DiagonalGaussian):
        return DiagonalGaussian(params["mean"], params["log_std"] + 0.5 * math.log(temperature))
    if temperature == 1.0:
        return dist
    raise ValueError(f"no temperature is defined for {type(dist).__name__}")


def run_groups(
    env: gym.vector.VectorEnv,
    policy: ActorProtocol,
    seeds: Sequence[int],
    group: Tensor,
    max_steps: int,
    generator: torch.Generator,
    device: torch.device,
    history: guard.History,
    params: Any = None,
    draw: Draw | None = None,
) -> Collected:
    """Run one episode for each of ``seeds``, of the groups ``group`` [B], on however many environments ``env`` has.

    A place that has finished its episode takes the next waiting one. The noise belongs to (episode, step), so an
    episode does not depend on the place it ran in, up to the rounding of the policy's batched arithmetic.
    """
    if isinstance(params, list) and any(p != params[0] for p in params):
        raise ValueError("episodes of a group move between environments, so these must all have the same parameters")
    if isinstance(env, LeanSyncVectorEnv):
        env.skip_ended = True
    draw = draw or Draw()
    n, total = env.num_envs, len(seeds)
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
    kept = _Kept(draw, max_steps, total)
    finals: list[tuple[int, int, Any]] = []
    episode = np.arange(n)  # which episode each place runs; its own index or more than ``total`` where none
    active = episode < total
    clock = np.zeros(n, dtype=np.int64)
    waiting = min(n, total)
    simulation = 0.0

    def place_seeds() -> Any:
        # seeds of places without an episode do not matter, but must be there
        return [int(seeds[min(int(k), total - 1)]) for k in episode]

    obs, _ = env.reset(seed=place_seeds())
    with torch.inference_mode():
        while active.any():
            places = np.flatnonzero(active)
            e, t = episode[places], clock[places]
            pick = np.minimum(episode, total - 1)
            tensors = _tensors(obs, env.single_observation_space, device)
            here = noise[torch.from_numpy(clock), torch.from_numpy(pick)].to(device)
            action = kept.act(policy, tensors, here, clock, pick, t, e, places)
            out = policy.to_env(tensors, action).cpu().numpy().astype(space.dtype)
            _write_rows(storage, t, e, obs, places)
            storage.action[torch.from_numpy(t), torch.from_numpy(e)] = action.cpu()[torch.from_numpy(places)]
            sent[t, e] = out[places]
            storage.valid[t, e] = True
            began = time.perf_counter()
            obs, reward, terminated, truncated, infos = env.step(out)
            simulation += time.perf_counter() - began
            truncated = np.array(truncated) | (clock + 1 >= max_steps)
            storage.reward[t, e] = reward[places]
            storage.terminated[t, e], storage.truncated[t, e] = terminated[places], truncated[places]
            clock[places] += 1
            _write_rows(storage, t + 1, e, obs, places)
            ended = terminated | truncated
            for i in places[ended[places]]:
                kept.outcome(infos, int(i), int(episode[i]))
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
    _guard(history, storage, sent, finals, seeds, params)
    return kept.attach(_finish(storage, finals, simulation, group, device), device)


class _Kept:
    """Samples as ``draw`` says, and keeps what only then is known."""

    def __init__(self, draw: Draw, steps: int, total: int) -> None:
        if draw.forced is not None and draw.forced_length is not None:  # clocks and choices live on the CPU
            draw = draw._replace(forced=draw.forced.cpu(), forced_length=draw.forced_length.cpu())
        self.draw, self.total = draw, total
        self.free = None if draw.forced is None else torch.ones(steps, total, dtype=torch.bool)
        self.logp = torch.zeros(steps, total) if draw.behaviour else None
        self.support: Tensor | None = None
        self.steps = steps
        self.success: dict[int, bool] = {}
        self.rewards: dict[int, Any] = {}

    def act(
        self, policy: Any, obs: Obs, noise: Tensor, clock: np.ndarray, pick: np.ndarray, t: Any, e: Any, places: Any
    ) -> Tensor:
        draw, index = self.draw, torch.from_numpy(places)
        t, e = torch.from_numpy(t), torch.from_numpy(e)
        dist: Distribution | None = None
        if draw.plain:
            action = policy.act(obs, noise)
        else:
            with torch.autocast(noise.device.type, draw.dtype or torch.bfloat16, enabled=draw.dtype is not None):
                dist = policy.distribution(obs)
            support = None if draw.support is None else draw.support(obs)
            assert dist is not None
            dist = drawn_from(dist, draw.temperature, support)
            action = dist.sample(noise)
            if support is not None:
                if self.support is None:
                    self.support = torch.ones(self.steps, self.total, support.shape[-1], dtype=torch.bool)
                self.support[t, e] = support.cpu()[index]
        if draw.forced is not None and draw.forced_length is not None:
            clocks, picks = torch.from_numpy(clock), torch.from_numpy(pick)
            forced = clocks < draw.forced_length[picks]
            given = draw.forced[picks, clocks.clamp(max=draw.forced.shape[1] - 1)].to(action)
            shape = (-1, *[1] * (action.ndim - 1))
            action = torch.where(forced.to(action.device).view(shape), given, action)
            assert self.free is not None
            self.free[t, e] = ~forced[index]
        if self.logp is not None and dist is not None:
            self.logp[t, e] = dist.log_prob(action).float().cpu()[index]
        return action

    def outcome(self, infos: dict[str, Any], place: int, episode: int) -> None:
        for key in ("is_success", "success"):
            if key in infos and infos.get(f"_{key}", np.ones(place + 1, dtype=bool))[place]:
                self.success[episode] = bool(infos[key][place])
        if "rewards" in infos and infos.get("_rewards", np.ones(place + 1, dtype=bool))[place]:
            self.rewards[episode] = np.asarray(infos["rewards"][place], dtype=np.float32)

    def attach(self, collected: Collected, device: torch.device) -> Collected:
        """``collected`` with what was kept, cut to its length."""
        longest = collected.reward_t.shape[0]
        every = range(self.total)
        success = rewards = None
        if self.success:  # an environment that says it of some means no where it is silent
            success = torch.tensor([self.success.get(k, False) for k in every], device=device)
        if self.rewards:
            nothing = np.zeros_like(next(iter(self.rewards.values())))
            rewards = torch.from_numpy(np.stack([self.rewards.get(k, nothing) for k in every])).to(device)

        def cut(x: Tensor | None) -> Tensor | None:
            return None if x is None else x[:longest].to(device)

        return collected._replace(
            free_t=cut(self.free),
            logp_behaviour=cut(self.logp),
            support=cut(self.support),
            success=success,
            rewards=rewards,
        )


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
    storage: RolloutStorage, finals: list[Any], simulation: float, group: Tensor, device: torch.device
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
        group=group.to(device),
    )


def _guard(
    history: guard.History,
    storage: RolloutStorage,
    sent: np.ndarray,
    finals: list[Any],
    seeds: Sequence[int],
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
        history.seeds = [int(seeds[column])]
        if params is not None:
            history.params(params[0] if isinstance(params, list) else params)
        rows = {f"obs/{k}": v[: step + 2, column] for k, v in storage.host_obs().items()}
        rows["reward"] = storage.reward[: step + 1, column]
        path = history.write(what, 0, step, sent[: step + 1, column : column + 1], rows)
    raise NonFiniteError(what, column, step, path, f"episode {column} of the groups")
