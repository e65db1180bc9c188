"""The feed of whole episodes: groups from chosen seeds, what a loss asks for beside them, outcomes, replay."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from torch import Tensor

from ctrlrl.core.select import Selection, Selector, State
from ctrlrl.data.episodes import Episodes, concatenate
from ctrlrl.data.replay import Replay
from ctrlrl.engine import environments, extras
from ctrlrl.engine.config import OnPolicyConfig
from ctrlrl.engine.episode_estimate import estimate_episodes, success_of
from ctrlrl.engine.feed import Gathered, denoising_rows
from ctrlrl.engine.player import Player
from ctrlrl.engine.seeding import derive, generator
from ctrlrl.losses.base import Memory, PolicyLoss
from ctrlrl.losses.needs import PROVIDES, Need
from ctrlrl.types import ON_POLICY, EnvSpec, World


class EpisodeFeed:
    """``n_groups`` groups of ``group_size`` episodes per iteration; each episode is a row."""

    def __init__(
        self,
        player: Player,
        policy: Any,
        loss: PolicyLoss,
        config: OnPolicyConfig,
        seed: int,
        world: World,
        spec: EnvSpec | None,
    ) -> None:
        self.player, self.policy, self.loss, self.config = player, policy, loss, config
        self.seed, self.world, self.spec = seed, world, spec
        self.wanted: frozenset[Need] = loss.required() | (loss.uses & PROVIDES[world])
        self.reference: Any = None
        self.memory: Memory = loss.memory()
        self.bounds = (math.inf, -math.inf)
        settings = config.episodes
        self.replay = Replay(settings.replay_rows, settings.replay_age) if "replay" in self.wanted else None
        self.selector: Selector | None = loss.selector()
        self.pool: list[int] | None = None
        self.features: Tensor | None = None
        self.selector_state: State = {}
        if settings.seed_pool is not None:
            self.pool = [derive(seed, "pool", k) for k in range(settings.seed_pool)]
        elif self.selector is not None:
            raise ValueError(f"{loss.name} chooses among known seeds: set seed_pool to their number")
        self.horizon = player.horizon
        self.steps_bound = settings.n_groups * settings.group_size * player.horizon

    # -- one iteration ------------------------------------------------------------------------

    def border(self, iteration: int) -> None:
        self.player.border()

    def gather(self, iteration: int, knobs: Mapping[str, Tensor], progress: float) -> Gathered:
        began = time.perf_counter()
        self.player.new_iteration(iteration)
        selection = self._select(iteration, progress)
        group = torch.arange(len(selection.index)).repeat_interleave(selection.size)
        seeds = self._seeds(iteration, selection)
        drawn = extras.draw_all(
            self.player,
            self.loss,
            self.wanted,
            seeds,
            group,
            self.config.episodes,
            float(knobs["temperature"]) if "temperature" in knobs else 1.0,
            generator(self.seed, "extras", iteration),
        )
        episodes = concatenate(drawn.parts)
        collecting = time.perf_counter() - began
        own = drawn.source == ON_POLICY
        returns = episodes.returns()
        score = self._score(returns)
        last_value = self._last_values(episodes) if "values" in self.wanted else None
        flow = self.world == "flow"
        batch = estimate_episodes(
            self.policy, self.reference, self.wanted, self.config, episodes, drawn.source, drawn.pivot, score,
            last_value, likelihood=not flow,
        )  # fmt: skip
        if self.selector is not None:
            assert self.features is not None
            mine = own.cpu()
            seen = selection.index[episodes.group.cpu()][mine]
            self.selector_state = self.selector.learn(self.selector_state, seen, score.cpu()[mine], self.features[seen])
        stats = self._stats(drawn.own, batch, own)
        if self.replay is not None:
            fresh = batch.mask.shape[0]
            batch = self.replay.extend(batch)
            stats["replayed"] = torch.tensor(float(batch.mask.shape[0] - fresh))
        start = self.loss.begin(batch, knobs, self.memory)
        self.memory = start.memory
        update = start.batch
        if flow:  # after begin, which compares episodes: unfolded, a long one would count more than a short one
            update = denoising_rows(self.policy, self.reference, update, generator(self.seed, "denoise", iteration))
        if self.replay is not None:
            keep = self.loss.keep(start.batch) & (start.batch.source == ON_POLICY)
            self.replay.update(start.batch._replace(coef=None, weight=None), keep)
        ended = list(zip(drawn.own.returns().tolist(), drawn.own.length.tolist(), strict=True))
        obs = {k: v.transpose(0, 1) for k, v in episodes.obs.items()} if isinstance(episodes.obs, dict) else (
            episodes.obs.transpose(0, 1)
        )  # fmt: skip
        exists = torch.arange(episodes.mask.shape[1], device=episodes.length.device) < episodes.length.unsqueeze(1)
        return Gathered(
            update, obs, exists.T, ended, int(episodes.length.sum()) + drawn.discarded, collecting,
            episodes.simulation_s, stats | start.stats,
        )  # fmt: skip

    def _select(self, iteration: int, progress: float) -> Selection:
        settings = self.config.episodes
        noise = generator(self.seed, "select", iteration)
        if self.selector is not None:
            assert self.pool is not None
            if self.features is None:
                self.features = self._features(self.pool)
            if not self.selector_state:
                self.selector_state = self.selector.initial(len(self.pool), self.features)
            return self.selector.select(self.selector_state, settings.n_groups, settings.group_size, progress, noise)
        count = len(self.pool) if self.pool is not None else settings.n_groups
        order = torch.randperm(count, generator=noise)
        index = order.repeat(math.ceil(settings.n_groups / count))[: settings.n_groups]
        return Selection(index, torch.full_like(index, settings.group_size))

    def _seeds(self, iteration: int, selection: Selection) -> list[int]:
        """One reset seed per episode."""
        if self.pool is None:
            each = [derive(self.seed, "group", iteration, g) for g in range(len(selection.index))]
        else:
            each = [self.pool[k] for k in selection.index.tolist()]
        return [s for s, n in zip(each, selection.size.tolist(), strict=True) for _ in range(n)]

    def _score(self, returns: Tensor) -> Tensor:
        """[B] outcomes in [0, 1]: rewards of token tasks are; returns lie between the extremes seen so far."""
        if self.world == "tokens":
            return returns.clamp(0.0, 1.0)
        low, high = min(self.bounds[0], float(returns.min())), max(self.bounds[1], float(returns.max()))
        self.bounds = (low, high)
        return (returns - low) / (high - low) if high > low else torch.full_like(returns, 0.5)

    @torch.no_grad()
    def _last_values(self, episodes: Episodes) -> Tensor:
        """[B] value of each final observation, zero where the episode terminated."""
        value = self.policy.values(episodes.last_obs)["value"]
        return value.masked_fill(episodes.terminated_t.any(1), 0.0)

    def _features(self, pool: list[int]) -> Tensor:
        """[pool, F] the first observation of every seed of the pool, one-hot where it is of integers."""
        if self.spec is None:
            raise ValueError("choosing among seeds needs an environment that can be built again; give an id or EnvSpec")
        env = environments.build_env(self.spec)
        try:
            space = env.observation_space
            rows = [np.asarray(gym.spaces.flatten(space, env.reset(seed=s)[0])) for s in pool]
        finally:
            env.close()
        return torch.from_numpy(np.stack(rows)).float()

    def _stats(self, episodes: Episodes, batch: Any, own: Tensor) -> dict[str, Tensor]:
        """What the loop logs of the episodes; controllers see it in the next iteration."""
        mask = batch.mask & own.unsqueeze(1)
        known = self.world != "flow" and bool(mask.any())  # a denoising step's entropy is its schedule's
        stats = {"entropy": batch.entropy_old[mask].mean()} if known else {}
        stats["success"] = success_of(episodes, self.config.episodes.success_return).float().mean()
        return stats

    # -- state --------------------------------------------------------------------------------

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint must hold."""
        found = {f"memory/{k}": v for k, v in self.memory.items()}
        found |= {f"selector/{k}": v for k, v in self.selector_state.items()}
        if self.replay is not None:
            found |= {f"replay/{k}": v for k, v in self.replay.tensors().items()}
        return found | {f"player/{k}": v for k, v in self.player.tensors().items()}

    def counters(self) -> dict[str, Any]:
        """The same, for numbers."""
        low, high = self.bounds
        return {"bounds": None if low > high else [low, high]}

    def restore(self, tensors: Mapping[str, Tensor], counters: Mapping[str, Any]) -> None:
        """Take over what :meth:`tensors` and :meth:`counters` gave."""

        def under(prefix: str) -> dict[str, Tensor]:
            return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}

        device = next(self.policy.parameters()).device
        self.memory = {k: v.to(device) for k, v in under("memory/").items()}
        self.selector_state = under("selector/")
        if self.replay is not None:
            self.replay.restore({k: v.to(device) for k, v in under("replay/").items()})
        self.player.restore(under("player/"))
        bounds = counters.get("bounds")
        self.bounds = (math.inf, -math.inf) if bounds is None else (bounds[0], bounds[1])

    def close(self) -> None:
        self.player.close()
