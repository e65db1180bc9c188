"""GoRL's settings: a latent policy trained by any policy loss, and a generative decoder trained by regression."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from ctrlrl.engine.config import ConfigError, OnPolicyConfig
from ctrlrl.engine.refinement import RefinementConfig
from ctrlrl.losses.ppo import PPO
from ctrlrl.nets.decoders import DecoderConfig
from ctrlrl.types import check_types

PAPER = "GoRL: An Algorithm-Agnostic Framework for Online RL with Generative Policies, arXiv:2512.02581"
DIFFERS = (
    "Rollouts, batches and learning rate are this library's, for tens of environments rather than 2,048; the preset "
    "'paper' has the paper's, 'released' those of the released code. Diffusion decoders predict v and have their data "
    "scaled so that they begin as the identity, which the paper's sentence (a last layer of zeros, a cosine schedule) "
    "does not give. Batches of the fit are smaller. Rewards are normalised by their running deviation, not multiplied "
    "by ten. Networks are initialised orthogonally, not by LeCun's rule. The released code fits the decoder of each "
    "stage to ten of twenty million pairs, from data that runs past the end of episodes; here all are used and "
    "episodes end. It also samples its first stage by another schedule, which here is the exact identity. Schedules "
    "of the learning rate and of the loss run over each stage. Losses on whole episodes collect whole iterations."
)
_PAPER: dict[str, Any] = {
    "n_steps": 480, "batch_size": 30_720, "epochs": 16, "learning_rate": 1e-3, "refine_batch_size": 8192,
    "refine_steps": 512_000,
}  # fmt: skip
PRESETS: dict[str, dict[str, Any]] = {
    "paper": _PAPER,
    "released": {
        **_PAPER,
        "eps": 0.15, "later_eps": 0.3, "max_grad_norm": 0.5, "later_max_grad_norm": 1.0, "moment_coef": 5e-4,
        "later_moment_coef": 1e-3, "log_std_init": -0.365, "collect_with": "best", "refine_steps": 19_660_800,
        "decoder_hidden": (64, 64, 64, 64), "decoder_prediction": "epsilon", "decoder_schedule": "released",
    },
}  # fmt: skip
LATENT: Mapping[str, Any] = PPO.presets["gorl"]
"""Settings of the latent policy; the Gaussian policy to compare with has the same (``ppo`` with this preset)."""


@dataclass(frozen=True)
class StagesConfig:
    """How a run is divided between the latent policy and the decoder."""

    latent: str = "ppo"
    """Policy loss that trains the latent policy: ppo, bpo, mdpo or any other that runs on continuous control."""
    stages: tuple[float, ...] = (1 / 3, 1 / 3, 1 / 6, 1 / 6)
    """Share of the steps that each stage has; the decoder is fitted between them, and is the identity in the first."""
    stage_trigger: Literal["share", "plateau"] = "share"
    """What ends a stage: its share of the steps, or that the mean return of the last 100 episodes has not risen for
    a while (there are as many stages at most)."""
    plateau_share: float = 0.05
    """How long it may not rise, as a share of the run's steps; a stage is at least that long."""
    collect_with: Literal["last", "best"] = "last"
    """Latent policy that collects what the decoder is fitted to: the last, or the best evaluation's of the stage."""
    reset_latent: bool = True
    """Begin each stage with a fresh latent policy, N(0, I): the fitted decoder turns that into what was learnt."""
    decoder_from: str | None = None
    """Run whose decoder to begin with, in place of the identity; with one stage it stays as it is."""
    decoder_checkpoint: str = "last"
    """Checkpoint of that run: last, or stage_1, stage_2, ... with the decoder that the stage began with."""
    later_eps: float | None = None
    """The loss's eps from the second stage on; None keeps it."""
    later_max_grad_norm: float | None = None
    """The same of max_grad_norm."""
    later_moment_coef: float | None = None
    """The same of moment_coef."""

    def __post_init__(self) -> None:
        check_types(self)
        if not self.stages or not all(isinstance(s, int | float) and s > 0 for s in self.stages):
            raise ValueError(f"stages={self.stages} must be one or more numbers above 0")
        if abs(sum(self.stages) - 1.0) > 1e-6:
            raise ValueError(f"stages={self.stages} add up to {sum(self.stages):g}; they are shares and must make 1")
        if not 0.0 < self.plateau_share <= 1.0:
            raise ValueError(f"plateau_share={self.plateau_share} must lie in (0, 1]")
        if self.collect_with == "best" and not self.reset_latent:
            raise ValueError(
                "collect_with='best' goes back to an earlier policy, which reset_latent=False would go on with"
            )

    def ends(self, start: int, steps: int) -> list[int]:
        """Steps at which the stages of a run of ``steps`` that begins at ``start`` end."""
        return [start + round(steps * share) for share in itertools.accumulate(self.stages)]


@dataclass(frozen=True)
class GoRLConfig(OnPolicyConfig):
    """The on-policy loop's settings with those of stages, decoder and its fit."""

    stage: StagesConfig = field(default_factory=StagesConfig)
    """How the run is divided."""
    decoding: DecoderConfig = field(default_factory=DecoderConfig)
    """Shape of the decoder."""
    refinement: RefinementConfig = field(default_factory=RefinementConfig)
    """How it is fitted."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.refinement.refine_latents == "used" and self.decoding.decoder == "gaussian":
            raise ConfigError("refine_latents='used' is for decoders whose fit draws noise; a Gaussian's draws none")
