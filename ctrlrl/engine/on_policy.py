"""The on-policy loop: collect, estimate, update, log, save. It runs every policy-optimisation loss."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
import os
import time
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import gymnasium as gym
import numpy as np
import torch
from torch import Tensor

from ctrlrl.engine import checkpoint, devices, diagnose, environments, hooks, replay, runfolder
from ctrlrl.engine.agent import Agent, load_module
from ctrlrl.engine.config import build, to_dict
from ctrlrl.engine.errors import CheckpointError, NonFiniteError, NonFiniteUpdateError
from ctrlrl.engine.feeds import make_feed, make_reference
from ctrlrl.engine.graphs import compiler_available
from ctrlrl.engine.log import Progress, RunLogger, Tags
from ctrlrl.engine.seeding import derive, generator
from ctrlrl.engine.update import Updater
from ctrlrl.engine.world import Policy, build_policy, check_world, defaults, whole_episodes, world_of
from ctrlrl.losses import base as losses
from ctrlrl.nets.actor_critic import encoder_path
from ctrlrl.nets.normalizer import RewardNormalizer
from ctrlrl.types import Backend, EnvSpec, SequenceBatch

logger = logging.getLogger("ctrlrl")


class OnPolicyAgent(Agent):
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

    method = ""
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
        self.method = method or self.method
        if encoder is not None:
            # by name where it has one, so that the run can be loaded without passing it again
            settings["encoder"] = encoder if isinstance(encoder, str) else encoder_path(encoder)
            encoder = None if settings["encoder"] is not None else encoder
        loss_type = losses.get(self.method)
        self.seed = int(seed)
        resolved = environments.resolve(env, n_envs=n_envs, backend=backend, env_kwargs=env_kwargs)
        self.observation_space, self.action_space, self.tokens = environments.describe(resolved)
        kind = str(settings.get("policy", "auto"))
        self.world = world_of(self.action_space, self.tokens, kind, loss_type.needs)
        episodes = whole_episodes(self.world, loss_type.needs)
        asked = backend or (env.backend if isinstance(env, EnvSpec) else "auto")
        if episodes and isinstance(resolved, EnvSpec) and asked == "auto":
            # EnvPool cannot start episodes from given seeds
            resolved = environments.resolve(dataclasses.replace(resolved, backend="sync"))
        self._live = None if isinstance(resolved, EnvSpec) else resolved
        self.env_spec = resolved if isinstance(resolved, EnvSpec) else environments.spec_of(resolved)
        config, self.loss = build(loss_type, settings, preset, defaults(self.world, loss_type.needs))
        check_world(self.loss, self.world, self.action_space, config)
        self.n_envs = self.env_spec.n_envs if self._live is None and self.env_spec else environments.width(resolved)
        self.device = devices.resolve(config.device)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive(self.seed, "network"))
            policy = build_policy(
                self.world, self.observation_space, self.action_space, self.tokens, config, self.loss, encoder
            )
            self.policy = policy.to(self.device)
        threads = config.threads or devices.threads(self.policy)
        self.config = dataclasses.replace(config, device=str(self.device), threads=threads)
        self.reward_normalizer = RewardNormalizer(self.n_envs, config.gamma, config.clip_reward).to(self.device)
        compile = self.config.compile
        if compile and not compiler_available(self.device):
            logger.warning("--compile needs a C++ compiler (g++ or clang++) and none was found: running eager.")
            compile = False
        self.updater = Updater(self.policy, self.loss, self.config, compile)
        self.reference = make_reference(self.policy, self.loss, self.config, restoring)
        self.collector, self.feed = make_feed(
            self._source(), self.tokens, self.world, self.policy, self.reference, self.loss, self.config,
            self.reward_normalizer, self.seed, self.device,
        )  # fmt: skip
        self.controllers = self.loss.controllers()
        self.controller_states = {k: c.initial() for k, c in self.controllers.items()}
        self.iteration = self.steps = 0
        self.span = (0, 0)
        self.stats: dict[str, float] = {}
        self.best = -math.inf
        self.episodes = 0
        self.recent: deque[tuple[float, int]] = deque(maxlen=100)
        self.run_dir: Path | None = None
        self.timings = {"simulation_s": 0.0, "inference_s": 0.0, "update_s": 0.0, "rest_s": 0.0}

    # -- training -----------------------------------------------------------------------------

    def learn(
        self,
        steps: int,
        *,
        run_dir: str | os.PathLike[str] | None = None,
        root: str | os.PathLike[str] | None = "runs",
        callbacks: Sequence[Any] = (),
        progress: bool = True,
        wandb: Mapping[str, Any] | None = None,
        tensorboard: bool = True,
        tags: Tags = "sb3",
    ) -> OnPolicyAgent:
        """Train for ``steps`` more environment steps (rounded up to whole iterations) and return the agent.

        Args:
            steps: Environment steps, counted over all environments.
            run_dir: Folder of the run; None makes one below ``root``.
            root: Where run folders are made; None (with no ``run_dir``) writes no files at all.
            callbacks: Objects with any of the methods of :class:`ctrlrl.engine.hooks.Callback`.
            progress: Show a live display.
            wandb: Arguments of wandb.init to also log there.
            tensorboard: Also write TensorBoard files.
            tags: Whose names TensorBoard and wandb show: sb3, cleanrl or rsl_rl.

        Ctrl-C finishes the iteration, saves, and says how to resume; a second one stops at once.
        """
        if steps < 1:
            raise ValueError(f"steps={steps} must be at least 1")
        before = self.run_dir
        if run_dir is not None:
            runfolder.guard_target(run_dir)
            if before != Path(run_dir) and (Path(run_dir) / runfolder.CONFIG).exists():
                raise FileExistsError(
                    f"{run_dir} holds a run already; agent.resume continues it (ctrlrl train --resume), "
                    "another run needs another folder"
                )
            self.run_dir = Path(run_dir)
            (self.run_dir / runfolder.CHECKPOINTS).mkdir(parents=True, exist_ok=True)
        elif root is not None:
            self.run_dir = runfolder.create(root, self._env_name(), self.method, self.seed)
        else:
            self.run_dir = None
        self.span = (self.steps, self.steps + steps)
        if self.run_dir != before:
            self.best = -math.inf  # every run has a best checkpoint of its own
        if self.run_dir is not None:
            runfolder.write_json(self.run_dir / runfolder.CONFIG, self.document())
            with environments.torch_threads(self.config.threads):
                runfolder.write_json(self.run_dir / runfolder.VERSIONS, runfolder.versions())
            self.write_checkpoint(self.run_dir, "last")
        return self._train(callbacks, progress, wandb, tensorboard, tags, resume=False)

    def resume(
        self,
        run_dir: str | os.PathLike[str],
        *,
        callbacks: Sequence[Any] = (),
        progress: bool = True,
        wandb: Mapping[str, Any] | None = None,
        tensorboard: bool = True,
        tags: Tags = "sb3",
    ) -> OnPolicyAgent:
        """Continue the run in ``run_dir`` from its last checkpoint to its planned end."""
        self.run_dir = Path(run_dir)
        checkpoint.clean_temporaries(self.run_dir / runfolder.CHECKPOINTS)
        self.load_checkpoint(self.run_dir, "last")
        if self.steps >= self.span[1]:
            return self
        return self._train(callbacks, progress, wandb, tensorboard, tags, resume=True)

    def _train(
        self,
        callbacks: Sequence[Any],
        progress: bool,
        wandb: Mapping[str, Any] | None,
        tensorboard: bool,
        tags: Tags,
        resume: bool,
    ) -> OnPolicyAgent:
        hooks.check(callbacks)
        if self.config.eval_every is not None and not self.can_evaluate:
            logger.warning("No evaluations: these environments cannot be built again one by one (see Agent.evaluate).")
        with contextlib.ExitStack() as stack:
            stack.enter_context(environments.torch_threads(self.config.threads))
            interrupted = stack.enter_context(hooks.interruptible())
            log = None
            if self.run_dir is not None:
                step = self.steps if resume else None
                log = RunLogger(self.run_dir, tensorboard, None if wandb is None else dict(wandb), step, tags)
                stack.callback(log.close)
            label = f"{self.method} {self._env_name()}"
            bar = stack.enter_context(Progress(self.span[1], self.steps, label, enabled=progress))
            self.collector.dump_dir = self.run_dir
            stack.callback(self.feed.close)
            try:
                self._loop(log, bar, callbacks, interrupted)
            except (NonFiniteError, NonFiniteUpdateError) as error:
                if self.run_dir is not None:
                    last = self.run_dir / runfolder.CHECKPOINTS / "last.safetensors"
                    error.add_note(f"The last saved state is {last}.")
                raise
        return self

    def _loop(
        self,
        log: RunLogger | None,
        bar: Progress,
        callbacks: Sequence[Any],
        interrupted: Mapping[str, bool],
    ) -> None:
        border_every = max(10, math.ceil(self.config.checkpoint_every / self.feed.steps_bound))
        self.stopped = False
        first = self.iteration
        clock = time.perf_counter()
        while self.steps < self.span[1] and not self.stopped:
            if self.iteration == first or self.iteration % border_every == 0:
                self.feed.border(self.iteration)
            before = self.steps
            metrics = self._iterate()
            now = time.perf_counter()
            metrics["time/fps"] = (self.steps - before) / (now - clock)
            clock = now
            metrics |= self._progress_metrics()
            bar.update(self.steps, metrics)
            if log is not None:
                log.log(self.steps, metrics, self.histograms)
            self._notify(callbacks, "on_update", metrics)
            if self._due(self.config.eval_every, before):
                self._evaluate(log, bar, callbacks)
                clock = time.perf_counter()
            finished = self.steps >= self.span[1] or self.stopped
            if self.run_dir is not None and (finished or self.iteration % border_every == 0):
                if log is not None:
                    log.flush()
                path = self.write_checkpoint(self.run_dir, "last")
                path.with_name("interrupted.safetensors").unlink(missing_ok=True)  # behind "last" by now
                self._notify(callbacks, "on_checkpoint", path)
                clock = time.perf_counter()
            if interrupted["asked"] and not finished:
                if self.run_dir is not None:
                    self.write_checkpoint(self.run_dir, "interrupted")
                raise hooks.Interrupted(self.run_dir, self.steps)

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
        start, end = self.span
        stats = {**self.stats, "progress": (self.steps - start) / max(end - start, 1)}
        rate = self.config.learning_rate
        if self.config.learning_rate_schedule == "linear":
            rate *= 1.0 - stats["progress"]
        numbers = {"learning_rate": rate, "progress": stats["progress"]}
        for name, controller in self.controllers.items():
            self.controller_states[name], knobs = controller.step(self.controller_states[name], stats)
            numbers |= knobs
        tensors = {k: torch.tensor(v, device=self.device) for k, v in numbers.items()}
        return tensors | {"horizon": torch.tensor(float(self.feed.horizon), device=self.device)}, numbers

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

    def _progress_metrics(self) -> dict[str, float]:
        values: dict[str, float] = {
            "time/iterations": self.iteration,
            "time/total_timesteps": self.steps,
            "time/episodes": self.episodes,
        }
        if self.recent:
            values["rollout/ep_rew_mean"] = float(np.mean([r for r, _ in self.recent]))
            values["rollout/ep_len_mean"] = float(np.mean([n for _, n in self.recent]))
        return values

    def _due(self, every: int | None, before: int) -> bool:
        """Whether a multiple of ``every`` steps was passed since step ``before``, or the run ends here."""
        if every is None:
            return False
        passed = self.steps // every > before // every
        return (passed or self.steps >= self.span[1]) and self.can_evaluate

    def _evaluate(self, log: RunLogger | None, bar: Progress, callbacks: Sequence[Any]) -> None:
        result = self.evaluate(self.config.eval_episodes)
        bar.update(self.steps, {"eval/mean_reward": result.mean})
        if log is not None:
            extra = {"deterministic": True, "checkpoint": "current", "seeds": result.seeds.tolist()}
            log.evaluation(self.steps, result.returns.tolist(), result.lengths.tolist(), extra)
        if result.mean > self.best:
            self.best = result.mean
            if self.run_dir is not None:
                self.write_checkpoint(self.run_dir, "best")
        self._notify(callbacks, "on_evaluation", result)

    def _notify(self, callbacks: Sequence[Any], hook: str, value: Any) -> None:
        if not hooks.notify(callbacks, hook, self, value):
            self.stopped = True

    # -- state --------------------------------------------------------------------------------

    def document(self) -> dict[str, Any]:
        spaces = {k: v for k, v in self.identity().items() if k.endswith("_space")}
        env = dataclasses.asdict(self.env_spec) if self.env_spec is not None else None
        return {
            "format": runfolder.FORMAT,
            "method": self.method,
            "env": env,
            "config": to_dict(self.config),
            "loss": to_dict(self.loss),
            "seed": self.seed,
            "n_envs": self.n_envs,
            "spaces": spaces,
            "total_steps": self.span[1],
        }

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
        return {
            "iteration": self.iteration,
            "steps": self.steps,
            "span": list(self.span),
            "controllers": self.controller_states,
            "stats": self.stats,
            "best": self.best,
            "episodes": self.episodes,
            "recent": [list(e) for e in self.recent],
            "feed": self.feed.counters(),
        }

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
        self.iteration, self.steps = counters["iteration"], counters["steps"]
        self.span = (counters["span"][0], counters["span"][1])
        self.controller_states = counters["controllers"]
        self.stats = counters["stats"]
        self.best, self.episodes = counters["best"], counters["episodes"]
        self.recent = deque(((e[0], int(e[1])) for e in counters["recent"]), maxlen=100)

    def _source(self) -> EnvSpec | gym.Env | gym.vector.VectorEnv:
        source = self.env_spec if self._live is None else self._live
        assert source is not None
        return source

    def _env_name(self) -> str:
        return self.env_spec.id if self.env_spec is not None else "live"
