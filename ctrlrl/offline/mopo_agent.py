"""The agent of MOPO: fits a world model to the dataset, then learns from rollouts in it."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from typing import Any, ClassVar, cast

import torch
from torch import Tensor

from ctrlrl.engine import terminations
from ctrlrl.engine.agent import load_module
from ctrlrl.engine.augment import RowSource
from ctrlrl.engine.offline import OfflineAgent
from ctrlrl.engine.seeding import derive
from ctrlrl.engine.world_model import Rollouts, WorldModel, WorldModelFit
from ctrlrl.nets.trajectory_codec import Steps
from ctrlrl.offline.mopo import MOPO, MOPOConfig

logger = logging.getLogger("ctrlrl")


class MOPOAgent(OfflineAgent):
    """An agent trained by MOPO (see :class:`ctrlrl.offline.mopo.MOPO`).

    ``learn`` first fits the world model: an iteration is an epoch of the fit, without an update, logged under
    ``model/``. The fitted model is part of every checkpoint. Later calls go on with the model as it is.

    Attributes:
        ensemble: The model's networks; fitted once :attr:`fit` is None.
        fit: The fit, until it is over.

    Raises:
        TypeError: Observations that are not flat, or not of floats.
    """

    loop: ClassVar[type[MOPOConfig]] = MOPOConfig  # type: ignore[assignment]
    algorithm: MOPO  # type: ignore[assignment]
    config: MOPOConfig

    def _build(self, settings: Mapping[str, Any], preset: str | None, encoder: Any, n_params: int = 0) -> None:
        super()._build(settings, preset, encoder, n_params)
        config = self.config.world_model
        obs_size, (action_size,) = self.observation_space.shape[0], self.policy.action_shape  # type: ignore[index]
        self.ensemble = config.ensemble(obs_size, action_size, self.seed).to(self.device)
        self.fit: WorldModelFit | None = WorldModelFit(self.ensemble, config, derive(self.seed, "world model"))

    @property
    def world_model(self) -> WorldModel:
        """The model with this agent's penalty and ends, to roll out in."""
        # the environment may not be installed here, and its ends be known nevertheless
        terminal = terminations.chosen(self.config.world_model.model_ends, self.env_spec or self.info.env)
        return WorldModel(self.ensemble, self.algorithm.penalty, terminal)

    # -- training -----------------------------------------------------------------------------

    def _row_source(self) -> RowSource:
        model = self.world_model
        if model.terminal is None and self.config.world_model.model_ends == "auto" and self.data.terminals.any():
            logger.warning(
                "%s has ends, but where a rollout of the model ends is not known: none will. Name a function of "
                "(observation, action, next observation) by model_ends (--model-ends package.module:function).",
                self.info.id,
            )
        return Rollouts(model, self._starts, self.algorithm.rollouts, self.algorithm.rollout_length)

    def _generated_share(self) -> float:
        return 1.0 - self.algorithm.real_share

    def _generated_every(self) -> int:
        return self.algorithm.rollouts_every

    def _starts(self, count: int, generator: torch.Generator) -> Tensor:
        memory = self._memory()
        return self._recorded(torch.randint(len(memory), (count,), generator=generator).to(self.device)).obs

    def _recorded(self, places: Tensor) -> Steps:
        """The recorded steps at ``places`` [N], with the environment's own rewards."""
        rows = self._memory().sample(places)
        reward = (rows.reward_t - self.reward_map["reward_shift"]) / self.reward_map["reward_scale"]
        return Steps(cast(Tensor, rows.obs), rows.action, reward, rows.terminated_t, cast(Tensor, rows.next_obs))

    def _open(self) -> None:
        super()._open()
        if self.fit is not None:
            self.fit.begin(self._recorded, len(self._memory()))

    def _iterate(self) -> dict[str, float]:
        if self.fit is None:
            return super()._iterate()
        began = time.perf_counter()
        self.cut = False
        found = {f"model/{k}": v for k, v in self.fit.epoch(self.steps, self.iteration).items()}
        self.iteration += 1
        if self.fit.done:
            self.fit.finish()
            self.fit = None
        self.timings["update_s"] += time.perf_counter() - began
        return found

    # -- state --------------------------------------------------------------------------------

    def tensors(self) -> dict[str, Tensor]:
        found = super().tensors() | {f"model/{k}": v for k, v in self.ensemble.state_dict().items()}
        return found if self.fit is None else found | {f"fit/{k}": v for k, v in self.fit.tensors().items()}

    def counters(self) -> dict[str, Any]:
        return super().counters() | {"fit": None if self.fit is None else self.fit.counters()}

    def restore(self, tensors: Mapping[str, Tensor], counters: Mapping[str, Any]) -> None:
        super().restore(tensors, counters)
        load_module(self.ensemble, tensors, "model/")
        if counters["fit"] is None:
            self.fit = None
            return
        fit = {k.removeprefix("fit/"): v for k, v in tensors.items() if k.startswith("fit/")}
        self.fit = self.fit or WorldModelFit(self.ensemble, self.config.world_model, derive(self.seed, "world model"))
        self.fit.restore(fit, counters["fit"])
