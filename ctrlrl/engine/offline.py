"""The offline loop: draw transitions from a dataset, update. It runs every offline method."""

from __future__ import annotations

import dataclasses
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

from ctrlrl.data.dataset import Dataset, DatasetError, DatasetInfo, normalized
from ctrlrl.data.transitions import TransitionReplay, Transitions
from ctrlrl.engine import environments, prior, runfolder
from ctrlrl.engine.algorithm import OfflineAlgorithm
from ctrlrl.engine.augment import Generated, PolicyGuidedDataset, RowSource
from ctrlrl.engine.config import ConfigError
from ctrlrl.engine.evaluate import Evaluation
from ctrlrl.engine.offline_config import AugmentedConfig
from ctrlrl.engine.offline_rows import SLICE, check_actions, rows_of
from ctrlrl.engine.seeding import derive
from ctrlrl.engine.spaces import space_from_json
from ctrlrl.engine.transition_agent import TransitionAgent
from ctrlrl.nets.normalizer import ObsScaling, RunningMoments
from ctrlrl.types import EnvSpec

logger = logging.getLogger("ctrlrl")


class OfflineAgent(TransitionAgent):
    """An agent trained on a dataset; its steps are updates.

    Args:
        env: Where to evaluate: Gymnasium id or EnvSpec. The dataset's own by default; without any the agent trains,
            and cannot be evaluated by episodes.
        method: Name of the method, or ``package.module:Class``. Classes such as ``ctrlrl.IQL`` fix it.
        dataset: D4RL or Minari id, path, or a Dataset.
        seed: Seed of everything.
        env_kwargs: Keyword arguments of the environment, with an id.
        preset: Named settings of the method.
        encoder: Your own encoder class, or its ``package.module:Class`` (see QNetworkConfig.encoder).
        document: config.json of the run that is being loaded: the data is read when training goes on.
        **settings: Fields of AugmentedConfig, its groups and the method, by name.

    Raises:
        DatasetError: The data cannot be used, or does not fit the environment.
    """

    own_name = prior.OWN_NAME
    loop = AugmentedConfig
    algorithm: OfflineAlgorithm
    n_envs = 1
    _live = None

    def __init__(
        self,
        env: str | EnvSpec | None = None,
        method: str | None = None,
        *,
        dataset: str | Path | Dataset | None = None,
        seed: int = 0,
        env_kwargs: dict[str, Any] | None = None,
        preset: str | None = None,
        encoder: Any = None,
        document: Mapping[str, Any] | None = None,
        **settings: Any,
    ) -> None:
        super().__init__()
        self.method = method or self.method
        encoder = self._name_encoder(encoder, settings)
        self.seed = int(seed)
        self._dataset = dataset if isinstance(dataset, Dataset) else None
        if dataset is not None:
            known = isinstance(dataset, Dataset)
            name = dataset.info.path or dataset.info.id if known else str(dataset)
            # so that the run can be resumed from another folder
            settings["dataset"] = os.path.abspath(name) if os.path.exists(name) else name
            if known and "like" in dataset.info.about and name.endswith((".hdf5", ".h5")):
                settings.setdefault("like", dataset.info.about["like"])
        if document is None:
            if settings.get("augment") is not None:
                settings["augment"] = os.path.abspath(settings["augment"])
            self._dataset = self._dataset or self._load(settings)
            self.info = self._dataset.info
            self.observation_space, self.action_space = self._dataset.observation_space, self._dataset.action_space
        else:
            self.info = info_from(document["data"])
            self.observation_space, self.action_space = (
                space_from_json(document["spaces"][f"{k}_space"]) for k in ("observation", "action")
            )
        self.env_spec = self._environment(env, env_kwargs, restoring=document is not None)
        self._build(settings, preset, encoder)
        self.replay: TransitionReplay | None = None
        self.reward_map = (
            document["data"]["reward_map"]
            if document is not None
            else self._reward_map(self.algorithm.select(self.data))
        )
        self.fingerprint = document["data"]["rows"] if document is not None else prior.fingerprint(self.data)
        self.generated = Generated(self.policy, self.device, self.reward_map, self.seed)

    @property
    def data(self) -> Dataset:
        """The dataset as it was loaded; read again where this agent was itself loaded."""
        if self._dataset is None:
            # that an end was missing has been said when the run began
            kept = {k: getattr(self.config, k) for k in ("dataset", "like", "memory_map")}
            self._dataset = self._load(kept | {"unfinished": "cut"})
            prior.refuse_other(self.config.dataset, prior.fingerprint(self._dataset), self.fingerprint)
        return self._dataset

    def _compare(self, run_dir: str | os.PathLike[str]) -> None:
        super()._compare(run_dir)
        prior.refuse_other(self.config.dataset, self.fingerprint, runfolder.read_config(run_dir)["data"]["rows"])

    def _load(self, settings: Mapping[str, Any]) -> Dataset:
        from ctrlrl.data.load import load

        name = settings.get("dataset")
        if not name:
            raise DatasetError(
                f"{self.method} learns from recorded data: name it by dataset= (--dataset), a D4RL or Minari id or the "
                "path of a file; ctrlrl data list shows what there is"
            )
        folder = None
        if settings.get("memory_map"):
            self._scratch = tempfile.TemporaryDirectory(prefix="ctrlrl-")  # goes with the agent
            folder = Path(self._scratch.name)
        unfinished = settings.get("unfinished", "error")
        return load(name, like=settings.get("like"), unfinished=unfinished, memory_map=folder)

    def _environment(
        self, env: str | EnvSpec | None, env_kwargs: Mapping[str, Any] | None, restoring: bool
    ) -> EnvSpec | None:
        """What to evaluate in; the data's own environment may be missing here, the user's may not."""
        asked = env is not None
        if not asked:
            env = self.info.env
        if env is None:
            if not restoring:
                named = self.info.about.get("env_left_out")
                why = f"names {named}, whose package only you can name" if named else "names no environment"
                logger.warning("No evaluations: %s %s; give one as env= (--env).", self.info.id, why)
            return None
        try:
            spec = environments.resolve(env, backend="sync", env_kwargs=env_kwargs)
            observation, action, _ = environments.describe(spec)
        except (environments.UnknownEnvironment, gym.error.Error, ImportError) as error:
            if asked:
                raise
            logger.warning("No evaluations: %s", error)
            return None
        assert isinstance(spec, EnvSpec)
        for kind, theirs, mine in (
            ("observations", observation, self.observation_space), ("actions", action, self.action_space)
        ):  # fmt: skip
            if shapes(theirs) != shapes(mine):
                raise DatasetError(
                    f"{spec.id} has {kind} of shape {shapes(theirs)}, {self.info.id} has {shapes(mine)}: "
                    "they do not belong together"
                )
        if not restoring:
            self.observation_space, self.action_space = observation, action
            check_actions(self.data, action)
        return spec

    # -- training -----------------------------------------------------------------------------

    @property
    def steps_bound(self) -> int:
        """Updates of one iteration."""
        return self.config.iteration_steps

    def _border(self) -> None:
        """There is nothing to recreate: every iteration draws by a generator of its own."""

    def _prepare(self) -> None:
        if not self.config.memory_map:  # which needs the run's folder
            self._memory()
        self._augment()

    def _open(self) -> None:
        self._memory()
        self._augment()
        self._warn_of_no_guidance()
        if self.learner.updates == 0:
            self._fit_scaling()

    def _close(self) -> None:
        if self.replay is not None and self.config.memory_map:
            self.replay.close()
            self.replay = None

    def _memory(self) -> TransitionReplay:
        """The usable rows on the device, actions scaled to [-1, 1] and rewards as the settings say."""
        if self.replay is not None:
            return self.replay
        folder = (self.run_dir or Path(tempfile.gettempdir())) if self.config.memory_map else None
        self.replay = self._stored(self.data, folder)
        return self.replay

    def _stored(self, data: Dataset, folder: Path | None = None) -> TransitionReplay:
        """The rows of ``data`` that the method learns from."""
        # the environment's bounds, where there is one, say what the actions mean
        data = dataclasses.replace(self.algorithm.select(data), action_space=self.action_space)
        columns = self.algorithm.columns(data, self.config.gamma)
        usable = self.algorithm.usable(data)
        return rows_of(data, self.policy, self.device, self.reward_map, columns, folder, usable)

    def _reward_map(self, data: Dataset) -> dict[str, float]:
        """Factor and shift of the rewards."""
        config, scale = self.config, float(self.config.reward_scale)
        if config.scale_by_returns:
            spread = float(data.returns.max() - data.returns.min())
            if spread <= 0.0:
                raise DatasetError(f"{data.info.id}: all episodes have one return; scale_by_returns cannot divide by 0")
            scale *= 1000.0 / spread
        return {"reward_scale": scale, "reward_shift": float(config.reward_shift)}

    def _fit_scaling(self) -> None:
        """Set what normalises observations from the data, where the networks normalise."""
        found = [m for net in self.learner.modules.values() for m in net.modules() if isinstance(m, ObsScaling)]
        if not found:
            return
        memory, floats = self._memory(), self.policy.features.preprocess.floats
        moments = RunningMoments((found[0].shift.numel(),))
        for start in range(0, len(memory), SLICE):
            rows = memory.sample(torch.arange(start, min(start + SLICE, len(memory)), device=self.device))
            seen = floats(rows.obs)
            assert seen is not None
            moments.update(seen.cpu())
        for module in found:
            module.fit(moments.mean, moments.var.sqrt())

    # -- generated rows -----------------------------------------------------------------------

    def _row_source(self) -> RowSource | None:
        """What makes rows to learn from beside the recorded ones; None learns from those alone.

        Asked once, when training begins.
        """
        config = self.config
        if not isinstance(config, AugmentedConfig) or config.augmentation.augment is None:
            return None
        if round(self._generated_share() * config.batch_size) == 0:
            return None
        if self.replay is not None and type(self.replay) is not TransitionReplay:
            raise ConfigError(f"{self.method} learns from pieces of episodes; generated rows are single transitions")
        if len(self.algorithm.select(self.data)) < len(self.data):
            raise ConfigError(
                f"{self.method} learns from a part of the episodes here, and the model was trained on all of them: "
                "leave best_share or augment out"
            )
        return PolicyGuidedDataset.of_run(
            config.augmentation.augment, self.observation_space, self.action_space, str(self.device),
            config.augmentation.augment_trajectories, config.guiding, config.sampling,
        )  # fmt: skip

    def _generated_share(self) -> float:
        """Share of each batch that is generated, where there is a row source."""
        return self.config.augmentation.augment_share

    def _generated_every(self) -> int:
        """Updates after which other rows are generated."""
        return self.config.augmentation.augment_every

    def _augment(self) -> None:
        if self.generated.source is None and (source := self._row_source()) is not None:
            own = type(self.algorithm).columns is not OfflineAlgorithm.columns
            stored = self._stored if own else None
            self.generated.begin(source, self._generated_share(), self._generated_every(), stored)

    def _warn_of_no_guidance(self) -> None:
        source, every = self.generated.source, self.generated.every
        guided = isinstance(source, PolicyGuidedDataset) and source.guidance.kappa > 0.0
        if guided and self.span[1] <= every:
            logger.warning(
                "No row will be guided: the first set never is, and the next is due after %s updates, where this "
                "training has ended. Lower augment_every, or train for longer.", f"{every:,}",
            )  # fmt: skip

    # -- updates ------------------------------------------------------------------------------

    def _iterate(self) -> dict[str, float]:
        """One line of the log: ``iteration_steps`` updates on rows drawn with replacement."""
        began, config, memory = time.perf_counter(), self.config, self._memory()
        drawing = torch.Generator(self.device).manual_seed(derive(self.seed, "draw", self.iteration))
        left = min(config.iteration_steps, self.span[1] - self.steps)
        found: dict[str, list[Tensor]] = {}
        statistics: dict[str, float] = {}
        next_batches = self._batches(memory, left, drawing, statistics)
        self.cut = False
        while left > 0 and not self.cut:
            count = min(config.updates_per_graph, left)
            self._schedule()
            batch = next_batches(count)
            noise = self._noise(count, drawing)
            for name, values in self.learner.run(batch, noise, count).items():
                found.setdefault(name, []).append(values)
            left -= count
            self.steps += count
            self.cut = self.interrupted["asked"] and left > 0
        metrics = self._averages(found)
        self.iteration += 1
        self.timings["update_s"] += time.perf_counter() - began
        return {f"train/{k}": v for k, v in metrics.items()} | statistics

    def _noise(self, count: int, drawing: torch.Generator) -> dict[str, Tensor]:
        """What the method draws for the next ``count`` updates."""
        return self.algorithm.noise(count, self.config.batch_size, self.policy.action_shape[0], drawing)

    def _batches(
        self, memory: TransitionReplay, updates: int, drawing: torch.Generator, statistics: dict[str, float]
    ) -> Callable[[int], Transitions]:
        """What gives the next so many of this iteration's batches, one after the other.

        Args:
            memory: The recorded rows.
            updates: Batches that may be asked for.
            drawing: What draws rows.
            statistics: Where to put what there is to log.
        """
        size, first, generated = self.config.batch_size, self.steps, self.generated
        if generated.source is None:
            index = memory.draw(updates, size, drawing)
            return lambda count: memory.sample(index[self.steps - first :][:count].flatten())

        def both(count: int) -> Transitions:
            statistics.update(generated.refresh(self.steps, memory))
            return generated.sample(memory, count, size, drawing)

        return both

    def _schedule(self) -> None:
        if self.config.actor_schedule == "cosine":
            first, last = self.span
            share = 0.5 * (1.0 + math.cos(math.pi * (self.steps - first) / (last - first)))
            self.learner.knobs["lr/actor"].fill_(self.algorithm.learning_rate("actor", self.config) * share)

    @property
    def can_evaluate(self) -> bool:
        """Whether there is an environment to evaluate in."""
        return self.env_spec is not None and super().can_evaluate

    def evaluate(
        self, episodes: int = 100, deterministic: bool = True, n_envs: int | None = None, seed: int | None = None
    ) -> Evaluation:
        """As in Agent; the data must name an environment, or the agent be built with one."""
        if self.env_spec is None:
            raise ValueError(f"{self.info.id} names no environment to evaluate in; train it with env= (--env)")
        return super().evaluate(episodes, deterministic, n_envs, seed)

    # -- results ------------------------------------------------------------------------------

    def normalized(self, returns: Any) -> np.ndarray | None:
        """D4RL's score of raw returns, where the data has reference scores."""
        return normalized(self.info, returns)

    def _env_name(self) -> str:
        return Path(self.info.id).stem if self.info.path else self.info.id

    # -- state --------------------------------------------------------------------------------

    def tensors(self) -> dict[str, Tensor]:
        return super().tensors() | self.generated.tensors(self.steps)

    def counters(self) -> dict[str, Any]:
        return super().counters() | self.generated.counters()

    def restore(self, tensors: Mapping[str, Tensor], counters: Mapping[str, Any]) -> None:
        super().restore(tensors, counters)
        self.generated.restore(tensors, counters)

    def document(self) -> dict[str, Any]:
        return super().document() | {
            "data": {**info_document(self.info), "rows": self.fingerprint, "reward_map": self.reward_map}
        }

    @classmethod
    def from_document(cls, document: Mapping[str, Any], env: Any, settings: dict[str, Any]) -> Self:
        return cls(env, seed=document["seed"], document=document, **settings)


def info_document(info: DatasetInfo) -> dict[str, Any]:
    """``info`` as JSON values."""
    return dict(runfolder.plain(info))


def info_from(document: Mapping[str, Any]) -> DatasetInfo:
    """The inverse of :func:`info_document`."""
    known = {k: v for k, v in document.items() if k not in ("rows", "reward_map")}
    env = known.pop("env", None)
    if env is not None:
        env = EnvSpec(**{**env, "wrappers": tuple((path, dict(kwargs)) for path, kwargs in env["wrappers"])})
    return DatasetInfo(env=env, **known)


def shapes(space: gym.Space) -> Any:
    """Shape of a space, by key where it is a Dict."""
    return {k: shapes(s) for k, s in space.spaces.items()} if isinstance(space, gym.spaces.Dict) else space.shape
