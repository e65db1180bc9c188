"""What the agents that learn from single transitions share: networks, updates, state. See off_policy and offline."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from ctrlrl.engine import algorithm as algorithms
from ctrlrl.engine import devices
from ctrlrl.engine.algorithm import Algorithm, Spaces
from ctrlrl.engine.config import build
from ctrlrl.engine.errors import NonFiniteUpdateError
from ctrlrl.engine.learner import Learner
from ctrlrl.engine.off_policy_config import OffPolicyConfig
from ctrlrl.engine.offline_config import OfflineConfig
from ctrlrl.engine.seeding import derive
from ctrlrl.engine.trainer import TrainedAgent
from ctrlrl.nets.actors import BoxActor


class TransitionAgent(TrainedAgent):
    """An agent whose updates are those of an Algorithm on batches of transitions.

    Attributes:
        algorithm: The method.
        learner: Its networks under training.
        policy: The trained actor.
    """

    loop: ClassVar[type[OffPolicyConfig] | type[OfflineConfig]]
    """Settings of the loop."""
    algorithm: Any
    policy: BoxActor
    capabilities: ClassVar[frozenset[str]] = Algorithm.capabilities

    def _build(self, settings: Mapping[str, Any], preset: str | None, encoder: Any, n_params: int = 0) -> None:
        """Sort the settings, build the networks and what trains them; the spaces are known."""
        config, self.algorithm = build(algorithms.get(self.method), settings, preset, loop=self.loop)
        self.device = devices.resolve(config.device)
        spaces = Spaces(self.observation_space, self.action_space, n_params)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive(self.seed, "network"))
            actor, trained, copies = self.algorithm.networks(spaces, config, encoder)
        modules = {"actor": actor, **trained}
        threads = config.threads or max(devices.threads(m, config.batch_size) for m in modules.values())
        self.config = dataclasses.replace(config, device=str(self.device), threads=threads)
        self.learner = Learner(self.algorithm, modules, copies, self.config, self.device, self._compiles())
        self.policy = actor  # type: ignore[assignment]

    @classmethod
    def blueprint(
        cls, preset: str | None = None, env: str = "", env_kwargs: Mapping[str, Any] | None = None,
        policy: str = "auto", settings: Mapping[str, Any] | None = None,
    ) -> tuple[Any, Algorithm]:  # fmt: skip
        """The settings of the loop and of the method, before the user's own; ``settings`` are published ones."""
        return build(algorithms.get(cls.method), settings or {}, preset, loop=cls.loop)

    @property
    def own(self) -> Algorithm:
        """The settings of the method itself."""
        return self.algorithm

    def _averages(self, found: dict[str, list[Tensor]]) -> dict[str, float]:
        """Means over the iteration's updates; raises if one of them is not finite."""
        if not found:
            return {}
        series = {k: torch.cat(v) for k, v in found.items()}
        means = dict(zip(series, torch.stack([v.mean() for v in series.values()]).tolist(), strict=True))
        if not all(math.isfinite(v) for v in means.values()):
            # the earliest update, not the first name: after it everything is NaN. Some are logged at every k-th only
            updates = max(len(v) for v in series.values())
            first = {
                k: (int((~v.isfinite()).nonzero()[0]) + 1) * updates // len(v) - 1
                for k, v in series.items() if not v.isfinite().all()
            }  # fmt: skip
            name, update = min(first.items(), key=lambda item: item[1])
            raise NonFiniteUpdateError(name, self.steps, self.iteration, update, kept=False)
        return means | {"n_updates": float(self.learner.updates)}

    # -- state --------------------------------------------------------------------------------

    def tensors(self) -> dict[str, Tensor]:
        policy = super().tensors()
        rest = {k: v for k, v in self.learner.tensors().items() if not k.startswith("actor/net/")}
        return policy | {f"learner/{k}": v for k, v in rest.items()}

    def counters(self) -> dict[str, Any]:
        return super().counters() | {"updates": self.learner.updates}

    def restore(self, tensors: Mapping[str, Tensor], counters: Mapping[str, Any]) -> None:
        mine = {k.removeprefix("learner/"): v for k, v in tensors.items() if k.startswith("learner/")}
        actor = {f"actor/net/{k.removeprefix('policy/')}": v for k, v in tensors.items() if k.startswith("policy/")}
        self.learner.restore(mine | actor, counters["updates"])
        super().restore(tensors, counters)
