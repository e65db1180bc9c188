"""CDSA: the gradient of the dataset's log-density, which corrects the actions of any policy as it acts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn

from ctrlrl.data.dataset import Dataset
from ctrlrl.data.transitions import Transitions
from ctrlrl.engine.algorithm import Networks, OfflineAlgorithm, Spaces, register
from ctrlrl.engine.config import ConfigError
from ctrlrl.engine.corrected import CorrectedAgent
from ctrlrl.engine.offline_config import OfflineConfig
from ctrlrl.nets.score import CorrectionModel

if TYPE_CHECKING:
    from ctrlrl.engine.learner import Nets
    from ctrlrl.engine.transition_agent import TransitionAgent
    from ctrlrl.engine.transition_config import TransitionConfig
    from ctrlrl.offline.cdsa_agent import CDSAAgent


@register
@dataclass(frozen=True)
class CDSA(OfflineAlgorithm):
    """Denoising score matching of the data's states and actions, with inverse and forward dynamics. It has no policy.

    ``agent.correct(policy)`` is any policy corrected by it (see :mod:`ctrlrl.engine.corrected`). Rewards are not used:
    gamma, tau and the settings of the rewards are of no effect, and those of critics neither. All networks have the
    widths ``actor_hidden``; observations and actions are always normalised.
    """

    paper: ClassVar[str] = (
        "CDSA: Conservative Denoising Score-based Algorithm for Offline Reinforcement Learning, arXiv:2406.07541"
    )
    differs: ClassVar[str] = (
        "Of the paper only the abstract was at hand and no code is released: that a score model of the dataset's "
        "density and an inverse-dynamics model correct a trained policy is the paper's, all settings and the rules of "
        "the correction are ours. No next state is known when acting; it is predicted by a small forward model. One "
        "Adam trains all networks on the sum of their losses, which share no parameter."
    )
    loop_defaults: ClassVar[Mapping[str, Any]] = {
        "batch_size": 512, "learning_rate": 1e-3, "actor_schedule": "cosine", "actor_hidden": (256, 256, 256),
        "activation": "silu", "eval_every": None,
    }  # fmt: skip
    capabilities: ClassVar[frozenset[str]] = frozenset(["resume", "box", "gpu", "compile"])

    densities: Literal["both", "joint", "conditional"] = "both"
    """Which scores to learn: of p(s, a), of p(a | s) and p(s), or of all three; ``score_on`` of a correction chooses
    among them."""
    sigma_low: float = 0.03
    """Smallest noise level, in deviations of the data; ln(sigma) is uniform in training."""
    sigma_high: float = 1.0
    """Largest noise level."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 < self.sigma_low < self.sigma_high < float("inf"):
            raise ValueError(f"0 < sigma_low={self.sigma_low} < sigma_high={self.sigma_high} does not hold")

    @classmethod
    def agent_class(cls) -> type[TransitionAgent]:
        from ctrlrl.offline.cdsa_agent import CDSAAgent

        return CDSAAgent

    def usable(self, data: Dataset) -> np.ndarray:
        """[N] bool: steps whose next observation is known, of ends too: it is what the networks learn to predict."""
        return data.next_known

    def networks(self, spaces: Spaces, config: TransitionConfig, encoder: Callable[..., nn.Module] | None) -> Networks:
        if not isinstance(config, OfflineConfig):
            raise ConfigError("cdsa learns no policy that could go on in an environment; correct one that does by it")
        if encoder is not None or config.network.encoder is not None:
            raise ConfigError("cdsa needs flat observations and has no use for an encoder; leave it out")
        model = CorrectionModel(
            spaces.observation, spaces.action, config.network, self.densities, (self.sigma_low, self.sigma_high)
        )
        return Networks(model, {})

    def noise(
        self, n: int, batch_size: int, action_size: int, generator: torch.Generator, params: int = 0
    ) -> dict[str, Tensor]:
        """``uniform`` [n, B], which selects noise levels, and standard normal ``noise`` [n, B, O + A].

        ``action_size`` is O + A here: what is denoised are states and actions.
        """
        return {
            "uniform": torch.rand((n, batch_size), generator=generator, device=generator.device),
            "noise": torch.randn((n, batch_size, action_size), generator=generator, device=generator.device),
        }

    def update(
        self, nets: Nets, batch: Transitions, noise: Mapping[str, Tensor], knobs: Mapping[str, Tensor], phase: int
    ) -> dict[str, Tensor]:
        def total(model: Callable[..., dict[str, Tensor]]) -> tuple[Tensor, dict[str, Tensor]]:
            losses = model(batch.obs, batch.action, batch.next_obs, noise["uniform"], noise["noise"])
            return torch.stack(list(losses.values())).sum(), {k: v.detach() for k, v in losses.items()}

        return nets.descend("actor", total)


def correct(agent: Any, model: CDSAAgent, **settings: Any) -> CorrectedAgent:
    """``agent`` with its actions corrected by ``model``; see :meth:`ctrlrl.offline.cdsa_agent.CDSAAgent.correct`."""
    return model.correct(agent, **settings)
