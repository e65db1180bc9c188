"""The off-policy loop: step, remember, update. It runs every off-policy method."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Self

import gymnasium as gym
import numpy as np
import torch
from torch import Tensor

from ctrlrl.data.dataset import DatasetInfo, normalized
from ctrlrl.data.transitions import ReplaySizeError, TransitionReplay, Transitions
from ctrlrl.engine import environments, prior, replay_files, runfolder
from ctrlrl.engine.algorithm import OfflineAlgorithm
from ctrlrl.engine.collected import Collected
from ctrlrl.engine.collector import Collector
from ctrlrl.engine.config import ConfigError
from ctrlrl.engine.errors import NonFiniteError
from ctrlrl.engine.off_policy_config import OffPolicyConfig
from ctrlrl.engine.offline_rows import check_actions, rows_of
from ctrlrl.engine.prior import PriorData
from ctrlrl.engine.seeding import derive, generator
from ctrlrl.engine.transition_agent import TransitionAgent
from ctrlrl.types import Backend, EnvSpec, Obs

logger = logging.getLogger("ctrlrl")


class OffPolicyAgent(TransitionAgent):
    """An agent trained by the off-policy loop.

    Args:
        env: Gymnasium id, EnvSpec, or a live environment (single or vector).
        method: Name of the method, or ``package.module:Class``. Classes such as ``ctrlrl.SAC`` fix it.
        seed: Seed of everything.
        n_envs: Environments side by side; an EnvSpec or a live vector environment brings its own.
        backend: sync, async, envpool or auto.
        env_kwargs: Keyword arguments of the environment, with an id.
        preset: Named settings of the method.
        encoder: Your own encoder class, or its ``package.module:Class`` (see QNetworkConfig.encoder).
        restoring: A checkpoint follows.
        **settings: Fields of OffPolicyConfig, QNetworkConfig and the method, by name.
    """

    own_name = "algorithm"
    loop = OffPolicyConfig

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
        self.seed = int(seed)
        resolved = environments.resolve(env, n_envs=n_envs, backend=backend, env_kwargs=env_kwargs)
        self.observation_space, self.action_space, _ = environments.describe(resolved)
        self._use(resolved)
        self.n_params = self._count_params()
        self.source: dict[str, Any] | None = None
        """What is known of the run that this one starts from."""
        if settings.get("start_from") is not None and not restoring:
            settings["start_from"] = os.path.abspath(settings["start_from"])
            self.source = prior.source_of(settings["start_from"])
            settings = prior.settings_of(settings["start_from"]) | settings
        self._build(settings, preset, encoder, self.n_params)
        self._check_online()
        if self.config.start_from is not None and not restoring:
            fresh = prior.take_over(self.learner, self.config.start_from, self.method, self.action_space)
            if fresh:
                logger.warning("%s has no %s: begun afresh.", self.config.start_from, ", ".join(fresh))
        self.explorer = self.algorithm.explorer(self.policy)
        self.collector = Collector(
            self._source(), self.explorer, self.config.collect_steps, self.device, self.seed, keep_terminal=True
        )
        self.replay: TransitionReplay | None = None
        self.prior: PriorData | None = None
        self.segments: list[dict[str, Any]] = []
        """Files of the replay that the next checkpoint names."""
        self._kept: dict[Path, list[dict[str, Any]]] = {}
        self._stored_in: Path | None = None
        self.debt = 0.0
        """Updates that are due but were not yet whole."""

    def _count_params(self) -> int:
        return 0

    def _check_online(self) -> None:
        own = type(self.algorithm)
        if issubclass(own, OfflineAlgorithm) and own.columns is not OfflineAlgorithm.columns:
            raise ConfigError(
                f"{self.method} learns from columns that only recorded data has: it cannot go on in an environment"
            )
        if self.config.start_from is not None and "box" not in own.capabilities:
            raise ConfigError(f"start_from: offline methods act in Box spaces, {self.method} cannot go on with theirs")

    # -- training -----------------------------------------------------------------------------

    @property
    def steps_bound(self) -> int:
        """Environment steps of one iteration; where environments spend steps on resetting, a few more."""
        round_steps = self.config.collect_steps * self.n_envs
        return math.ceil(self.config.iteration_steps / round_steps) * round_steps

    def _border(self) -> None:
        self.collector.border(derive(self.seed, "border"), self.iteration)

    def _prepare(self) -> None:
        if not self.config.memory_map:  # which needs the run's folder
            self._memory()

    def _open(self) -> None:
        self.collector.dump_dir = self.run_dir
        if self.config.offline_share > 0.0 and self.prior is None:
            self.prior = self._recorded()
        if len(self._memory()) == 0 and self.span[1] - self.steps <= self.config.learning_starts:
            logger.warning(
                "No update will be made: the run's %s steps are not more than learning_starts=%s.",
                f"{self.span[1] - self.steps:,}", f"{self.config.learning_starts:,}",
            )  # fmt: skip

    def _close(self) -> None:
        if self.collector.env is not None and self._live is None:
            self.collector.env.close()

    def _memory(self) -> TransitionReplay:
        """The replay, made (and read back) when it is first needed: an agent that only acts needs none."""
        if self.replay is None:
            # the files there have no name; a temporary folder is often in memory itself
            folder = (self.run_dir or Path(tempfile.gettempdir())) if self.config.memory_map else None
            try:
                self.replay = TransitionReplay(
                    self.observation_space, self.policy.action_shape, self.policy.action_dtype,
                    self.config.replay_size, self.device, extras=self._extras(), folder=folder,
                )  # fmt: skip
            except ReplaySizeError as error:
                error.add_note("The settings are replay_size (--replay-size) and memory_map (--memory-map).")
                raise
            if self._stored_in is not None and self._kept.get(self._stored_in):
                replay_files.restore(self.replay, self._stored_in / runfolder.CHECKPOINTS, self._kept[self._stored_in])
        return self.replay

    def _recorded(self) -> PriorData:
        """The dataset of the run that this one starts from; rewards as they are."""
        assert self.source is not None
        folder = (self.run_dir or Path(tempfile.gettempdir())) if self.config.memory_map else None
        with contextlib.ExitStack() as stack:
            scratch = None
            if folder is not None:
                scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ctrlrl-", dir=folder)))
            data = prior.recorded(self.source, scratch)
            check_actions(data, self.action_space)
            rows = rows_of(data, self.policy, self.device, {"reward_scale": 1.0, "reward_shift": 0.0}, {}, folder)
        return PriorData(rows, self.config.offline_share)

    def _extras(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Further columns of the replay: shape and type by name."""
        return {}

    def _iterate(self) -> dict[str, float]:
        """One line of the log: rounds of a few steps, each followed by the updates that are due."""
        began = time.perf_counter()
        seed, iteration, config = self.seed, self.iteration, self.config
        acting = generator(seed, "act", iteration)
        drawing = torch.Generator(self.device).manual_seed(derive(seed, "draw", iteration))
        memory = self._memory()
        before, updating = self.steps, 0.0
        found: dict[str, list[Tensor]] = {}
        episodes: list[tuple[float, int]] = []
        simulation = 0.0
        self.cut = False
        while self.steps - before < self.steps_bound and not self.cut:
            self.explorer.ready = self.steps >= config.learning_starts or config.start_from is not None
            self.explorer.progress = self.steps / self.span[1]
            self._before_collection()
            try:
                collected = self.collector.collect(acting)
            except NonFiniteError as error:
                if error.what == "action":  # more likely an update's fault: let that say so first
                    self._averages(found)
                raise
            rows = memory.added
            self._remember(memory, collected)
            self._after_collection(collected)
            episodes += collected.episodes
            simulation += collected.simulation_s
            self.steps += memory.added - rows
            # a replay that begins empty later on (from "best") is filled first, too
            due = memory.added - max(rows, config.learning_starts)
            if due >= 0 and memory.added > rows:
                started = time.perf_counter()
                self.algorithm.after_steps(self.learner, self.steps - due, self.steps)
                self.debt += config.replay_ratio * due
                self._update(memory, drawing, found)
                updating += time.perf_counter() - started
            self.cut = self.interrupted["asked"] and self.steps - before < self.steps_bound
        self.episodes += len(episodes)
        self.recent.extend(episodes)
        metrics = self._averages(found)
        self.iteration += 1
        whole = time.perf_counter() - began
        for name, seconds in {
            "simulation_s": simulation, "update_s": updating, "inference_s": whole - simulation - updating
        }.items():  # fmt: skip
            self.timings[name] += seconds
        return {f"train/{k}": v for k, v in metrics.items()} | self.explorer.metrics()

    def _before_collection(self) -> None:
        """Called before every round of steps, for methods that set the environment's parameters."""

    def _after_collection(self, collected: Collected) -> None:
        """Called after every round of steps, when its transitions are in the replay."""

    def _remember(self, memory: TransitionReplay, c: Collected) -> None:
        """Store the valid steps of a collection, each with its true next observation."""
        following = next_observations(c)
        flat = {
            "obs": _rows(c.obs), "action": _rows(c.action), "reward": _rows(c.reward_t),
            "terminated": _rows(c.terminated_t), "truncated": _rows(c.truncated_t), "next_obs": _rows(following),
            "extras": self._columns(c),
        }  # fmt: skip
        if not c.valid_t.all():
            keep = c.valid_t.flatten()
            flat = {k: _map(v, lambda x: x[keep]) for k, v in flat.items()}
        memory.add(**flat)

    def _mapped(self, batch: Transitions) -> Transitions:
        """Rewards as they are learned from; the replay has the environment's own."""
        scale, shift = self.config.reward_scale, self.config.reward_shift
        return batch if scale == 1.0 and shift == 0.0 else batch._replace(reward_t=batch.reward_t * scale + shift)

    def _columns(self, c: Collected) -> dict[str, Tensor] | None:
        """Rows [T * N, ...] of the further columns."""
        return None

    def _update(self, memory: TransitionReplay, drawing: torch.Generator, found: dict[str, list[Tensor]]) -> None:
        """Do the updates that are due, several in one graph where enough are."""
        config, size = self.config, self.config.batch_size
        while self.debt >= 1.0:
            due = int(self.debt)
            count = config.updates_per_graph if due >= config.updates_per_graph else 1
            if self.prior is None:
                batch = memory.sample(memory.draw(count, size, drawing).flatten())
            else:
                batch = self.prior.sample(memory, count, size, drawing)
            width = math.prod(self.policy.action_shape)
            noise = self.algorithm.noise(count, size, width, drawing, self.n_params)
            for name, values in self.learner.run(self._mapped(batch), noise, count).items():
                found.setdefault(name, []).append(values)
            self.debt -= count

    # -- state --------------------------------------------------------------------------------

    def normalized(self, returns: Any) -> np.ndarray | None:
        """D4RL's score, where the data of the run that this one starts from has reference scores."""
        if self.source is None:
            return None
        return normalized(DatasetInfo("", **{k: self.source[k] for k in prior.REFERENCES}), returns)

    def document(self) -> dict[str, Any]:
        return super().document() | ({} if self.source is None else {"source": self.source})

    @classmethod
    def from_document(cls, document: Mapping[str, Any], env: Any, settings: dict[str, Any]) -> Self:
        agent = super().from_document(document, env, settings)
        agent.source = document.get("source")
        return agent

    def counters(self) -> dict[str, Any]:
        return super().counters() | {"debt": self.debt, "replay": self.segments}

    def write_checkpoint(self, folder: Path, name: str) -> Path:
        """As in Agent; "last" comes with the replay, whose new rows are written as a file of their own."""
        if name != "last":
            kept, self.segments = self.segments, []
            try:
                return super().write_checkpoint(folder, name)
            finally:
                self.segments = kept
        if self._stored_in is not None and self._kept.get(self._stored_in):
            self._memory()
        checkpoints, self.segments = folder / runfolder.CHECKPOINTS, self._kept.get(folder, [])
        if self.replay is not None:
            self.segments = self._kept[folder] = replay_files.save(self.replay, checkpoints, self.segments)
        path = super().write_checkpoint(folder, name)
        replay_files.clean(checkpoints, self.segments)
        return path

    def load_checkpoint(self, folder: Any, name: str = "last") -> None:
        """As in Agent. The replay is read when training goes on; "best" and "interrupted" have none."""
        super().load_checkpoint(folder, name)
        self.replay, self._kept, self._stored_in = None, {Path(folder): self.segments}, Path(folder)

    def _drop_replay(self) -> None:
        """Begin with an empty replay at the next step; no checkpoint names the old one any more."""
        if self.replay is not None:
            self.replay.close()
        self.replay, self.segments, self._kept, self._stored_in = None, [], {}, None

    def restore(self, tensors: Mapping[str, Tensor], counters: Mapping[str, Any]) -> None:
        super().restore(tensors, counters)
        self.debt, self.segments = counters["debt"], list(counters["replay"])


def next_observations(c: Collected) -> Obs:
    """[T, N, ...] the true observation after each step: the final one where an episode was cut."""

    def one(obs: Tensor, last: Tensor, final: Tensor) -> Tensor:
        following = torch.cat([obs[1:], last.unsqueeze(0)])
        following[c.final_t, c.final_n] = final
        return following

    if isinstance(c.obs, dict):
        assert isinstance(c.last_obs, dict) and isinstance(c.final_obs, dict)
        return {k: one(c.obs[k], c.last_obs[k], c.final_obs[k]) for k in c.obs}
    assert isinstance(c.last_obs, Tensor) and isinstance(c.final_obs, Tensor)
    return one(c.obs, c.last_obs, c.final_obs)


def _map(x: Any, f: Callable[[Tensor], Tensor]) -> Any:
    if x is None:
        return None
    return {k: f(v) for k, v in x.items()} if isinstance(x, dict) else f(x)


def _rows(x: Any) -> Any:
    return _map(x, lambda v: v.flatten(0, 1))
