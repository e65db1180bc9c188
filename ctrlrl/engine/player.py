"""Players: they run one episode from each of the given seeds, in control or on token sequences."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import gymnasium as gym
import torch
from torch import Tensor

from ctrlrl.data.episodes import Episodes
from ctrlrl.engine import environments
from ctrlrl.engine.agent import load_module
from ctrlrl.engine.collected import Collected
from ctrlrl.engine.collector import Collector
from ctrlrl.engine.config import OnPolicyConfig
from ctrlrl.engine.groups import Draw
from ctrlrl.engine.seeding import generator
from ctrlrl.engine.sequences import run_sequences
from ctrlrl.losses.base import PolicyLoss
from ctrlrl.types import EnvSpec, Obs

DTYPES = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Player:
    """Base: what both worlds share. ``play`` numbers its calls, so that each has noise of its own."""

    horizon: int
    """Most steps of one episode."""

    def __init__(self, policy: Any, loss: PolicyLoss, config: OnPolicyConfig, seed: int, device: torch.device) -> None:
        self.policy, self.loss, self.config, self.seed, self.device = policy, loss, config, seed, device
        wanted = loss.required()
        self.behaviour = "logp_behaviour" in wanted
        self.dtype = DTYPES[config.episodes.behaviour_dtype]
        # the masking policy is a copy that lags behind (NLPO)
        self.lagged: Any = copy.deepcopy(policy) if "support" in wanted else None
        self.iteration = self.calls = 0

    def new_iteration(self, iteration: int) -> None:
        """To be called before the first episodes of each iteration."""
        self.iteration, self.calls = iteration, 0
        if self.lagged is not None and iteration % self.loss.lag() == 0:
            self.lagged.load_state_dict(self.policy.state_dict())

    def play(
        self,
        seeds: Sequence[int],
        group: Tensor,
        temperature: float = 1.0,
        forced: Tensor | None = None,
        forced_length: Tensor | None = None,
    ) -> Episodes:
        """One episode from each of ``seeds``.

        Args:
            seeds: Reset seeds.
            group: [B] group of each episode.
            temperature: Of the sampling.
            forced: [B, F, ...] actions that replace the policy's at each episode's first positions.
            forced_length: [B] how many; positions that the environment writes count too.
        """
        noise = generator(self.seed, "actions", self.iteration, self.calls)
        self.calls += 1
        return self._play(seeds, group, Draw(temperature, forced=forced, forced_length=forced_length), noise)

    def _play(self, seeds: Sequence[int], group: Tensor, draw: Draw, noise: torch.Generator) -> Episodes:
        raise TypeError(f"{type(self).__name__} does not say how to play")

    def border(self) -> None:
        """Episodes always start from seeds, so there is nothing to start afresh."""

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint must hold."""
        return {} if self.lagged is None else {f"lagged/{k}": v for k, v in self.lagged.state_dict().items()}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over what :meth:`tensors` gave."""
        if self.lagged is not None:
            load_module(self.lagged, tensors, "lagged/")

    def close(self) -> None:
        """Close the environments."""


class ControlPlayer(Player):
    """Episodes of a control environment."""

    def __init__(
        self,
        collector: Collector,
        policy: Any,
        loss: PolicyLoss,
        config: OnPolicyConfig,
        seed: int,
        device: torch.device,
    ) -> None:
        super().__init__(policy, loss, config, seed, device)
        self.collector = collector
        self.horizon = config.episodes.horizon or collector.horizon()
        self.says_success = False

    def _play(self, seeds: Sequence[int], group: Tensor, draw: Draw, noise: torch.Generator) -> Episodes:
        support: Callable[[Obs], Tensor] | None = None
        if self.lagged is not None:
            lagged = self.lagged
            support = lambda obs: self.loss.allowed(lagged.distribution(obs).params()["logits"])  # noqa: E731
        draw = draw._replace(support=support, behaviour=self.behaviour, dtype=self.dtype)
        episodes = episodes_of(self.collector.collect_episodes(seeds, group, self.horizon, noise, draw))
        if episodes.success is not None:
            self.says_success = True
        elif self.says_success:  # said before, so this time all failed
            episodes = episodes._replace(success=torch.zeros_like(episodes.group, dtype=torch.bool))
        return episodes

    def tensors(self) -> dict[str, Tensor]:
        return {**super().tensors(), "says_success": torch.tensor(self.says_success)}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        super().restore(tensors)
        self.says_success = bool(tensors.get("says_success", False))

    def close(self) -> None:
        self.collector.close()


def episodes_of(c: Collected) -> Episodes:
    """Columns of whole episodes as rows."""

    def rows(x: Any) -> Any:
        if isinstance(x, dict):
            return {k: rows(v) for k, v in x.items()}
        return None if x is None else x.transpose(0, 1)

    assert c.group is not None
    free = c.valid_t if c.free_t is None else c.valid_t & c.free_t
    return Episodes(
        obs=rows(c.obs),
        action=rows(c.action),
        mask=rows(free),
        reward_t=rows(torch.where(c.valid_t, c.reward_t, torch.zeros_like(c.reward_t))),
        terminated_t=rows(c.terminated_t & c.valid_t),
        truncated_t=rows(c.truncated_t & c.valid_t),
        last_obs=c.last_obs,
        length=c.valid_t.sum(0),
        group=c.group,
        simulation_s=c.simulation_s,
        logp_behaviour=rows(c.logp_behaviour),
        success=c.success,
        rewards=c.rewards,
        support=rows(c.support),
    )


class TokenPlayer(Player):
    """Episodes of a token environment, all in lock-step, with a key-value cache."""

    def __init__(
        self,
        spec: EnvSpec,
        tokens: Mapping[str, Any],
        policy: Any,
        loss: PolicyLoss,
        config: OnPolicyConfig,
        seed: int,
        device: torch.device,
    ) -> None:
        super().__init__(policy, loss, config, seed, device)
        self.horizon = int(tokens["length"]) - int(tokens["prompt"])
        limit = config.episodes.horizon
        if limit is not None and limit != self.horizon:
            raise ValueError(f"horizon={limit}, but these episodes have {self.horizon} positions; leave it unset")
        self.spec = spec
        self._envs: dict[int, gym.vector.VectorEnv] = {}

    def _env(self, width: int) -> gym.vector.VectorEnv:
        # of exact width, as the policy is asked about idle places too; hints ask for a new one now and then
        if width not in self._envs:
            while len(self._envs) >= 8:
                self._envs.pop(next(iter(self._envs))).close()
            self._envs[width] = environments.make_native(self.spec, width)
        return self._envs[width]

    def _play(self, seeds: Sequence[int], group: Tensor, draw: Draw, noise: torch.Generator) -> Episodes:
        forced = draw.forced
        if forced is not None and draw.forced_length is not None:
            late = torch.arange(forced.shape[1], device=forced.device) >= draw.forced_length.unsqueeze(1)
            forced = forced.masked_fill(late, -1)
        return run_sequences(
            self._env(len(seeds)),
            self.policy,
            list(seeds),
            group,
            noise,
            self.device,
            temperature=draw.temperature,
            forced=forced,
            support=None if self.lagged is None else (self.lagged, self.loss.allowed),
            behaviour_dtype=self.dtype,
        )

    def close(self) -> None:
        for env in self._envs.values():
            env.close()
        self._envs = {}
