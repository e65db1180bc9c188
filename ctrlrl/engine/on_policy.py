"""The on-policy loop: collect, estimate, update, log, save. It runs every policy-optimisation loss."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
import time
from collections.abc import Mapping
from typing import Any, ClassVar

import gymnasium as gym
import torch
from torch import Tensor

from ctrlrl.engine import devices, diagnose, environments, replay
from ctrlrl.engine.agent import load_module
from ctrlrl.engine.config import OnPolicyConfig, build
from ctrlrl.engine.errors import CheckpointError, NonFiniteUpdateError
from ctrlrl.engine.feeds import make_feed, make_reference
from ctrlrl.engine.seeding import derive, generator
from ctrlrl.engine.trainer import TrainedAgent
from ctrlrl.engine.update import Updater
from ctrlrl.engine.world import Policy, build_policy, check_world, defaults, whole_episodes, world_of
from ctrlrl.losses import base as losses
from ctrlrl.losses.base import PolicyLoss
from ctrlrl.nets.normalizer import RewardNormalizer
from ctrlrl.types import Backend, EnvSpec, SequenceBatch, World

logger = logging.getLogger("ctrlrl")


class OnPolicyAgent(TrainedAgent):
    """An agent trained by the on-policy loop with one policy loss.

    Args:
        env: Gymnasium id, EnvSpec, or a live environment (single or vector).
        method: Name of the loss, or ``package.module:Class``. Classes such as ``ctrlrl.PPO`` fix it.
        seed: Seed of everything.
        n_envs: Environments side by side; an EnvSpec or a live vector environment brings its own.
        backend: sync, async, envpool or auto.
        env_kwargs: Keyword arguments of the environment, with an id.
        preset: Named settings of the method.
        encoder: Your own encoder class, or its ``package.module:Class`` (see NetworkConfig.encoder).
        restoring: A checkpoint follows, which holds the reference policy too.
        **settings: Fields of OnPolicyConfig, NetworkConfig and the loss, by name.
    """

    own_name = "loss"
    policy: Policy
    capabilities: ClassVar[frozenset[str]] = frozenset(
        ["resume", "vector", "box", "discrete", "multidiscrete", "dict_obs", "image_obs", "gpu", "compile"]
    )
    # cudagraphs is not among them before a machine with a GPU has run its test

    def __init__(
        self,
        env: str | EnvSpec | gym.Env | gym.vector.VectorEnv,
        method: str | None = None,
        *,
        seed: int = 0,
        n_envs: int | None = None,
        backend: Backend | None = None,
        env_kwargs: dict[str, Any] | None = None,
        preset: str | None = None,
        encoder: Any = None,
        restoring: bool = False,
        **settings: Any,
    ) -> None:
        super().__init__()
        self.method = method or self.method
        encoder = self._name_encoder(encoder, settings)
        loss_type = self._loss_type(settings)
        self.seed = int(seed)
        resolved = environments.resolve(env, n_envs=n_envs, backend=backend, env_kwargs=env_kwargs)
        self.observation_space, self.action_space, self.tokens = environments.describe(resolved)
        kind = str(settings.get("policy", "auto"))
        self.world: World = world_of(self.action_space, self.tokens, kind, loss_type.needs)
        episodes = whole_episodes(self.world, loss_type.needs)
        asked = backend or (env.backend if isinstance(env, EnvSpec) else "auto")
        if episodes and isinstance(resolved, EnvSpec) and asked == "auto":
            # EnvPool cannot start episodes from given seeds
            resolved = environments.resolve(dataclasses.replace(resolved, backend="sync"))
        self._use(resolved)
        config, self.loss = self._settle(
            loss_type, settings, preset, defaults(self.world, loss_type.needs), self.action_space
        )
        check_world(self.loss, self.world, self.action_space, config)
        self.device = devices.resolve(config.device)
        self._encoder = encoder
        self.policy = self._network(config, derive(self.seed, "network"))
        threads = config.threads or devices.threads(self.policy)
        self.config = dataclasses.replace(config, device=str(self.device), threads=threads)
        self.reward_normalizer = RewardNormalizer(self.n_envs, config.gamma, config.clip_reward).to(self.device)
        self.updater = Updater(self.policy, self.loss, self.config, self._compiles())
        self.reference = make_reference(self.policy, self.loss, self.config, restoring)
        self.collector, self.feed = make_feed(
            self._source(), self.tokens, self.world, self.policy, self.reference, self.loss, self.config,
            self.reward_normalizer, self.seed, self.device,
        )  # fmt: skip
        self.controllers = self.loss.controllers()
        self.controller_states = {k: c.initial() for k, c in self.controllers.items()}
        self.stats: dict[str, float] = {}

    # -- what a composed method changes -------------------------------------------------------

    looked_at: ClassVar[tuple[str, ...]] = ()
    """Settings on which the defaults of others depend: the command line looks at them first."""

    @classmethod
    def _loss_type(cls, settings: Mapping[str, Any]) -> type[PolicyLoss]:
        """The policy loss."""
        return losses.get(cls.method)

    @classmethod
    def _settle(
        cls, loss: type[PolicyLoss], settings: Mapping[str, Any], preset: str | None, found: Mapping[str, Any],
        actions: gym.Space | None,
    ) -> tuple[OnPolicyConfig, PolicyLoss]:  # fmt: skip
        """Sort the settings; ``found`` are the defaults of this kind of rows. The action space may not be known."""
        return build(loss, settings, preset, found)

    def _network(self, config: OnPolicyConfig, seed: int) -> Policy:
        """The policy, freshly initialised."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return self._build_policy(config).to(self.device)

    def _build_policy(self, config: OnPolicyConfig) -> Policy:
        return build_policy(
            self.world, self.observation_space, self.action_space, self.tokens, config, self.loss, self._encoder
        )

    # -- training -----------------------------------------------------------------------------

    @property
    def steps_bound(self) -> int:
        """Environment steps of one iteration."""
        return self.feed.steps_bound

    def _border(self) -> None:
        self.feed.border(self.iteration)

    def _open(self) -> None:
        self.collector.dump_dir = self.run_dir

    def _close(self) -> None:
        self.feed.close()

    def _iterate(self) -> dict[str, float]:
        """One iteration: gather, update. Returns what to log."""
        began = time.perf_counter()
        knobs, rates = self._knobs()
        gathered = self.feed.gather(self.iteration, knobs, rates["progress"])
        batch = gathered.batch
        updating = time.perf_counter()
        found = self.updater.run(batch, knobs, generator(self.seed, "shuffle", self.iteration))
        metrics = self._accept(found, batch, knobs)
        updated = time.perf_counter()
        diagnosed, self.histograms = diagnose.look(
            self.policy, self.loss, batch, knobs, self.config.diagnose_every, self.iteration
        )
        metrics |= {k: float(v) for k, v in gathered.stats.items()}
        self.policy.update_normalizer(gathered.obs, gathered.valid)
        self.iteration += 1
        self.steps += gathered.steps
        for episode in gathered.episodes:
            self.recent.append(episode)
        self.episodes += len(gathered.episodes)
        self.stats = dict(metrics)
        self.timings["simulation_s"] += gathered.simulation_s
        self.timings["inference_s"] += gathered.collecting_s - gathered.simulation_s
        self.timings["update_s"] += updated - updating
        self.timings["rest_s"] += (updating - began - gathered.collecting_s) + (time.perf_counter() - updated)
        del rates["progress"]
        return {f"train/{k}": v for k, v in (metrics | rates).items()} | diagnosed

    def _knobs(self) -> tuple[dict[str, Tensor], dict[str, float]]:
        """Scalars of this iteration (with its "progress"), as tensors for the update and as numbers for the log."""
        start, end = self._stretch()
        stats = {**self.stats, "progress": min(1.0, (self.steps - start) / max(end - start, 1))}
        rate = self.config.learning_rate
        if self.config.learning_rate_schedule == "linear":
            rate *= 1.0 - stats["progress"]
        numbers = {"learning_rate": rate, "progress": stats["progress"]}
        for name, controller in self.controllers.items():
            self.controller_states[name], knobs = controller.step(self.controller_states[name], stats)
            numbers |= knobs
        tensors = {k: torch.tensor(v, device=self.device) for k, v in numbers.items()}
        return tensors | {"horizon": torch.tensor(float(self.feed.horizon), device=self.device)}, numbers

    def _stretch(self) -> tuple[int, int]:
        """Steps between which schedules run from their beginning to their end."""
        return self.span

    def _accept(self, found: dict[str, Tensor], batch: SequenceBatch, knobs: dict[str, Tensor]) -> dict[str, float]:
        """Check the update for NaN, make it the policy's, and average its metrics."""
        names = list(found)
        means = torch.stack([found[n].float().mean() for n in names]).tolist()
        metrics = dict(zip(names, means, strict=True))
        if not all(math.isfinite(v) for v in means):
            self._refuse(found, batch, knobs)
        self.updater.accept()
        mask = batch.mask
        if "value" in self.loss.critics:
            target, value = batch.value_target[mask], batch.value_old[mask]
            variance = target.var()
            metrics["explained_variance"] = float(1.0 - (target - value).var() / variance) if variance > 0 else math.nan
        log_std = getattr(getattr(self.policy, "head", None), "log_std", None)
        if log_std is not None:
            metrics["std"] = float(log_std.detach().exp().mean())
        elif batch.dist_old is not None and "log_std" in batch.dist_old:
            metrics["std"] = float(batch.dist_old["log_std"][mask].exp().mean())
        metrics["n_updates"] = float((self.iteration + 1) * self.config.epochs)
        return metrics

    def _refuse(self, found: dict[str, Tensor], batch: SequenceBatch, knobs: dict[str, Tensor]) -> None:
        first = {n: int((~v.isfinite()).nonzero()[0]) for n, v in found.items() if not v.isfinite().all()}
        # the earliest step, not the first name: after it everything is NaN
        name, step = min(first.items(), key=lambda item: item[1])
        dump = None
        if self.run_dir is not None:
            dump = self.run_dir / "nan_update.safetensors"
            replay.dump_update(dump, self, batch, knobs, {"quantity": name, "optimiser_step": step})
        raise NonFiniteUpdateError(name, self.steps, self.iteration, step, dump)

    # -- state --------------------------------------------------------------------------------

    @property
    def own(self) -> PolicyLoss:
        """The settings of the loss."""
        return self.loss

    @classmethod
    def blueprint(
        cls, preset: str | None = None, env: str = "", env_kwargs: Mapping[str, Any] | None = None,
        policy: str = "auto", chosen: Mapping[str, Any] | None = None,
    ) -> tuple[OnPolicyConfig, PolicyLoss]:  # fmt: skip
        """The defaults with which this method would train on ``env``: token sequences and groups of episodes have
        some of their own. Without an environment, or with one that cannot be built, the loss alone decides.
        ``chosen`` are the user's settings among ``looked_at``."""
        chosen = chosen or {}
        loss = cls._loss_type(chosen)
        found, actions = defaults("continuous", loss.needs), None
        with contextlib.suppress(Exception):  # training says what is wrong
            if env:
                _, actions, tokens = environments.describe(environments.resolve(env, env_kwargs=env_kwargs))
                found = defaults(world_of(actions, tokens, policy, loss.needs), loss.needs)
        return cls._settle(loss, chosen, preset, found, actions)

    def tensors(self) -> dict[str, Tensor]:
        state = self.updater.state
        return {
            **super().tensors(),
            "optimizer/m": state.m,
            "optimizer/v": state.v,
            "optimizer/clock": state.clock,
            **{f"reward/{k}": v for k, v in self.reward_normalizer.state_dict().items()},
            **({} if self.reference is None else {f"reference/{k}": v for k, v in self.reference.state_dict().items()}),
            **{f"feed/{k}": v for k, v in self.feed.tensors().items()},
        }

    def counters(self) -> dict[str, Any]:
        return super().counters() | {
            "controllers": self.controller_states, "stats": self.stats, "feed": self.feed.counters()
        }  # fmt: skip

    def restore(self, tensors: Mapping[str, Tensor], counters: Mapping[str, Any]) -> None:
        state = self.updater.state
        load_module(self.policy, tensors, "policy/")
        load_module(self.reward_normalizer, tensors, "reward/")
        if self.reference is not None:
            load_module(self.reference, tensors, "reference/")
        mine = {k.removeprefix("feed/"): v for k, v in tensors.items() if k.startswith("feed/")}
        self.feed.restore(mine, counters.get("feed", {}))
        if tensors["optimizer/m"].shape != state.m.shape:
            raise CheckpointError("the checkpoint's network differs in size from this agent's; use the run's config")
        self.updater.state = state._replace(
            m=tensors["optimizer/m"].to(self.device),
            v=tensors["optimizer/v"].to(self.device),
            clock=tensors["optimizer/clock"].to(self.device),
        )
        self.controller_states, self.stats = counters["controllers"], counters["stats"]
        super().restore(tensors, counters)
