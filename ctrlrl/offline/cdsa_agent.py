"""The agent of CDSA: learns the density of a dataset, and corrects the policies of others."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from ctrlrl.engine.corrected import CorrectedAgent, CorrectionConfig
from ctrlrl.engine.data_model import DataModel
from ctrlrl.engine.offline_config import OfflineConfig
from ctrlrl.engine.offline_rows import SLICE
from ctrlrl.nets.normalizer import RunningMoments
from ctrlrl.nets.score import CorrectionModel
from ctrlrl.offline.cdsa import CDSA

ROWS = 4096
"""Steps of the data, evenly spaced, by which the typical size of scores is measured."""


class CDSAAgent(DataModel):
    """An agent trained by CDSA (see :class:`ctrlrl.offline.cdsa.CDSA`). It is no policy, but corrects others::

    corrected = cdsa.correct(ctrlrl.load("runs/td3_bc"), eta_action=0.5)
    corrected.evaluate(100)
    """

    loop = OfflineConfig
    instead = "agent.correct(policy) corrects one by it"
    algorithm: CDSA  # type: ignore[assignment]
    policy: CorrectionModel  # type: ignore[assignment]

    # -- training -----------------------------------------------------------------------------

    def _fit_scaling(self) -> None:
        """Set what the networks standardise by from all rows that are learned from."""
        memory, model = self._memory(), self.policy
        sizes = {"obs": model.obs_size, "action": model.action_size, "change": model.obs_size}
        moments = {name: RunningMoments((size,)) for name, size in sizes.items()}
        for start in range(0, len(memory), SLICE):
            rows = memory.sample(torch.arange(start, min(start + SLICE, len(memory)), device=self.device))
            obs, next_obs = cast(Tensor, rows.obs), cast(Tensor, rows.next_obs)
            for name, x in {"obs": obs, "action": rows.action, "change": next_obs - obs}.items():
                moments[name].update(x.cpu())
        for name, found in moments.items():
            model.fit(name, found.mean, found.var.sqrt())  # type: ignore[arg-type]

    def _noise(self, count: int, drawing: torch.Generator) -> dict[str, Tensor]:
        size = self.policy.obs_size + self.policy.action_size
        return self.algorithm.noise(count, self.config.batch_size, size, drawing)

    def _iterate(self) -> dict[str, float]:
        metrics = super()._iterate()
        memory, model = self._memory(), self.policy
        rows = memory.sample(torch.arange(0, len(memory), max(1, len(memory) // ROWS), device=self.device))
        model.fit_typical(model.standard_obs(cast(Tensor, rows.obs)), model.standard_action(rows.action))
        return metrics

    # -- correcting ---------------------------------------------------------------------------

    def correct(
        self, policy: Any, config: CorrectionConfig | None = None, *, seed: int | None = None, **settings: Any
    ) -> CorrectedAgent:
        """``policy`` with its actions corrected along the gradient of this dataset's log-density.

        Args:
            policy: An agent of this library, a Stable-Baselines3 model or anything with ``predict(observation,
                deterministic=...)``, or an ONNX policy: its file or an onnxruntime session (see
                :class:`ctrlrl.engine.corrected.OnnxPolicy`).
            config: How to correct; or its fields as ``settings``, by name.
            seed: Of evaluations; the policy's own by default, this agent's where it has none.
            **settings: Fields of CorrectionConfig.

        Raises:
            ValueError: The policy's spaces are others, or this agent has not been trained.
            TypeError: Nothing that acts, or an unknown setting.
        """
        if self.learner.updates == 0:
            raise ValueError("this agent of cdsa has learned nothing yet; train it first (agent.learn)")
        if config is not None and settings:
            raise ValueError(f"give config or {', '.join(sorted(settings))}, not both")
        return CorrectedAgent(
            policy, self.policy, config or CorrectionConfig(**settings),
            observation_space=self.observation_space, action_space=self.action_space, env_spec=self.env_spec,
            seed=self.seed if seed is None else seed, info=self.info,
        )  # fmt: skip
