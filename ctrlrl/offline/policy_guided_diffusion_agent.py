"""The agent of policy-guided diffusion: learns a model of trajectories, and generates some."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import gymnasium as gym
import numpy as np
import torch
from torch import Tensor

from ctrlrl.data.dataset import Dataset, DatasetInfo
from ctrlrl.data.transitions import TransitionReplay, Transitions
from ctrlrl.data.windows import windows
from ctrlrl.engine import environments
from ctrlrl.engine.agent import Agent
from ctrlrl.engine.data_model import DataModel
from ctrlrl.engine.errors import UnknownEnvironment
from ctrlrl.engine.guidance import Guidance, GuidanceConfig, log_prob_of
from ctrlrl.engine.offline_rows import SLICE
from ctrlrl.engine.prior import same_bounds
from ctrlrl.engine.seeding import derive, generator
from ctrlrl.nets.actors import BoxActor
from ctrlrl.nets.edm import SamplerConfig, sample
from ctrlrl.nets.normalizer import RunningMoments
from ctrlrl.nets.trajectory_codec import Steps
from ctrlrl.nets.trajectory_denoiser import TrajectoryModel
from ctrlrl.offline.policy_guided_diffusion import (
    LEVEL,
    NOISE,
    PolicyGuidedDiffusion,
    PolicyGuidedDiffusionConfig,
    windowed,
)
from ctrlrl.types import EnvSpec

HELD_OUT = 256
"""Most windows that the validation loss is the mean of."""


class WindowReplay(TransitionReplay):
    """The rows of a full replay as windows of ``length`` steps, with the noise that an update adds to each.

    Attributes:
        starts, held_out: Places at which windows begin, of the episodes to learn from and of the others.
        noise: Generator of the noise, on the device.
    """

    def __init__(
        self, rows: TransitionReplay, starts: np.ndarray, held_out: np.ndarray, length: int, channels: int
    ) -> None:
        vars(self).update(vars(rows))  # the same memory
        self.starts, self.held_out = (torch.from_numpy(s).to(self.device) for s in (starts, held_out))
        self.channels, self.length = channels, length
        self.noise = torch.Generator(self.device)

    def draw(self, n_batches: int, batch_size: int, generator: torch.Generator) -> Tensor:
        """[n_batches, batch_size] places at which windows to learn from begin, uniform, with replacement."""
        shape = (n_batches, batch_size)
        return self.starts[torch.randint(len(self.starts), shape, generator=generator, device=self.device)]

    def sample(self, index: Tensor) -> Transitions:
        """[B * length, ...] the windows that begin at ``index`` [B], one after the other, and noise for each."""
        found = self.plain(index)
        noise, level = (
            torch.randn(shape, generator=self.noise, device=self.device)
            for shape in ((len(found.reward_t), self.channels), (len(index),))
        )
        return found._replace(extras={NOISE: noise, LEVEL: level.repeat_interleave(self.length)})

    def plain(self, index: Tensor) -> Transitions:
        """The same without noise."""
        steps = torch.arange(self.length, device=self.device)
        return super().sample((index.unsqueeze(-1) + steps).flatten())


class PolicyGuidedDiffusionAgent(DataModel):
    """A diffusion model of the data (see :class:`ctrlrl.offline.policy_guided_diffusion.PolicyGuidedDiffusion`).

    It trains, resumes and is saved as every agent, and instead of acting it generates: :meth:`generate` draws
    trajectories, :meth:`to_dataset` makes a dataset of them, which ``ctrlrl.data`` writes. It needs no environment;
    where the data names one that can be built, that says what the bounds of the actions are.
    """

    loop = PolicyGuidedDiffusionConfig
    instead = "agent.generate draws trajectories from it, for other methods to learn from"
    config: PolicyGuidedDiffusionConfig
    algorithm: PolicyGuidedDiffusion  # type: ignore[assignment]
    policy: TrajectoryModel  # type: ignore[assignment]
    loaded_from: Path | None = None
    """Folder of the run that this model was loaded from."""

    def load_checkpoint(self, folder: str | os.PathLike[str], name: str = "last") -> None:
        super().load_checkpoint(folder, name)
        self.loaded_from = Path(folder)

    def _environment(
        self, env: str | EnvSpec | None, env_kwargs: Mapping[str, Any] | None, restoring: bool
    ) -> EnvSpec | None:
        if env is None:
            # no evaluation is lost that could be warned of
            if self.info.env is None:
                return None
            try:
                environments.describe(environments.resolve(self.info.env, backend="sync", env_kwargs=env_kwargs))
            except (UnknownEnvironment, gym.error.Error, ImportError):
                return None
        return super()._environment(env, env_kwargs, restoring)

    # -- training -----------------------------------------------------------------------------

    def _memory(self) -> WindowReplay:
        if not isinstance(self.replay, WindowReplay):
            data, length = self.algorithm.select(self.data), self.algorithm.window_length
            starts = windows(self.data, length, self.algorithm.window_stride, self.algorithm.drop_timeouts)
            apart = self._held_out(np.searchsorted(np.flatnonzero(data.ends), starts))
            place = (np.cumsum(data.usable) - 1)[starts]
            channels = self.policy.codec.channels
            self.replay = WindowReplay(super()._memory(), place[~apart], place[apart], length, channels)
        return self.replay

    def _held_out(self, episode: np.ndarray) -> np.ndarray:
        """[W] bool: which windows, given the number of the episode of each, are not learned from."""
        found, share = np.unique(episode), self.algorithm.held_out
        count = min(max(1, round(share * len(found))), len(found) - 1) if share > 0.0 else 0
        order = np.random.default_rng(derive(self.seed, "held_out")).permutation(found)
        return np.isin(episode, order[:count])

    def _reward_map(self, data: Dataset) -> dict[str, float]:
        return {"reward_scale": 1.0, "reward_shift": 0.0}  # what is generated is as the data

    def _fit_scaling(self) -> None:
        """Standardise the channels by the windows to learn from, each step as often as it is in one."""
        memory, length = self._memory(), self.algorithm.window_length
        moments = RunningMoments((self.policy.codec.channels,))
        for index in memory.starts.split(max(1, SLICE // length)):
            raw = self.policy.codec.raw(windowed(memory.plain(index), length))
            moments.update(raw.transpose(1, 2).flatten(0, 1).cpu())
        std = moments.var.sqrt()
        # dividing by the rounding noise of a constant would turn it into noise
        std = torch.where(std > 1e-6 * moments.mean.abs().clamp(min=1.0), std, 0.0)
        for model in self.learner.modules.values():
            cast(TrajectoryModel, model).codec.fit(moments.mean, std)

    def _schedule(self) -> None:
        first, last = self.span
        share, warm = (self.steps - first) / (last - first), self.algorithm.warmup_share
        factor = min(1.0, 0.1 + 0.9 * share / warm) if warm > 0.0 else 1.0
        if self.config.actor_schedule == "cosine" and share > warm:
            factor = 0.5 * (1.0 + math.cos(math.pi * (share - warm) / (1.0 - warm)))
        self.learner.knobs["lr/actor"].fill_(self.algorithm.learning_rate("actor", self.config) * factor)
        ramp = 9.0 / (10.0 + self.learner.updates) if self.algorithm.ema_rampup else 0.0
        self.learner.knobs["tau"].fill_(max(self.config.tau, ramp))

    def _iterate(self) -> dict[str, float]:
        memory = self._memory()
        memory.noise.manual_seed(derive(self.seed, "noise", self.iteration))
        metrics = super()._iterate()
        if len(memory.held_out):
            metrics["train/validation_loss"] = self._validation_loss(memory)
        return metrics

    def _validation_loss(self, memory: WindowReplay) -> float:
        """Loss of the averaged network on windows of episodes it has not seen, always the same with the same noise."""
        count = min(HELD_OUT, len(memory.held_out))
        index = memory.held_out[torch.arange(count) * len(memory.held_out) // count]
        memory.noise.manual_seed(derive(self.seed, "validation"))
        with torch.inference_mode():
            return float(self.averaged(*self.algorithm.inputs(memory.sample(index))).mean())

    # -- generating ---------------------------------------------------------------------------

    @property
    def averaged(self) -> TrajectoryModel:
        """The moving average of the model, which generates."""
        return cast(TrajectoryModel, self.learner.modules["actor_ema"])

    def generate(
        self,
        trajectories: int,
        policy: Agent | BoxActor | None = None,
        guidance: GuidanceConfig | None = None,
        sampler: SamplerConfig | None = None,
        generator: torch.Generator | None = None,
        batch_size: int = 256,
    ) -> tuple[Steps, Tensor]:
        """Trajectories [N, T, ...] on the agent's device, and [N, T] bool: which of their steps are transitions.

        T is ``window_length``. The last step of a trajectory has no next observation, and is a transition only where
        the episode ends there (see ``TrajectoryCodec.decode``).

        Args:
            trajectories: N.
            policy: Towards whose actions to push, an agent or its policy; None is the data alone.
            guidance: How, and how strongly; None, or a kappa of 0, is the data alone, bit for bit.
            sampler: Levels, churn and order; 32 steps of Heun's method by default.
            generator: Of all noise, on the CPU, so that every device draws the same. By default one of this agent's
                seed, which goes on from call to call.
            batch_size: Trajectories at once; another one draws other trajectories.

        Raises:
            ValueError: ``policy`` has other observations or actions, or N or ``batch_size`` is below 1.
            NoDensityError: It has no density to push by.
        """
        if trajectories < 1 or batch_size < 1:
            raise ValueError(f"trajectories={trajectories} and batch_size={batch_size} must be at least 1")
        model, config = self.averaged, sampler or SamplerConfig()
        noise, guide = generator or self._generating(), None
        if policy is not None and guidance is not None and guidance.kappa != 0.0:
            self._refuse_other(policy)
            log_prob = log_prob_of(policy, guidance.kernel_std)
            guide = Guidance(log_prob, model.codec, model.denoise, guidance, config)
        found: list[tuple[Steps, Tensor]] = []
        with environments.torch_threads(self.config.threads), torch.no_grad():
            for first in range(0, trajectories, batch_size):
                count = min(batch_size, trajectories - first)
                start = torch.randn(count, model.codec.channels, model.codec.length, generator=noise)
                x = sample(model.denoise, start.to(self.device), config, noise, guide)
                found.append(model.codec.decode(x))
        steps, known = zip(*found, strict=True)
        return Steps(*(torch.cat(parts) for parts in zip(*steps, strict=True))), torch.cat(known)

    def to_dataset(self, steps: Steps, transitions: Tensor, kappa: float = 0.0) -> Dataset:
        """What :meth:`generate` returned as a dataset in the environment's units, [N * T] rows.

        Episodes end where a step is done; a trajectory that is not done at its last step is cut there, and the
        observation after it is not known. Steps after a done one, which the data's windows never have, are kept as an
        episode of their own, as in the released code.

        Args:
            steps: [N, T, ...].
            transitions: [N, T].
            kappa: Strength of the guidance, to be noted in ``info.about["generated"]``.
        """
        done = steps.done > 0.5
        cut = torch.zeros_like(done)
        cut[:, -1] = ~done[:, -1]
        # in a window the next observation is the next step's, which after an end is another episode's
        known = transitions if done.shape[1] == 1 else transitions & ~done
        flat = Steps(*(x.flatten(0, 1) for x in steps))
        with torch.no_grad():
            actions = self.policy.to_env(flat.obs, flat.action)
        obs_type = self.observation_space.dtype
        run = self.run_dir or self.loaded_from
        about = {
            "run": None if run is None else str(run),
            "method": self.method,
            "data": self.info.id,
            "updates": self.steps,
            "kappa": kappa,
        }
        return Dataset(
            observations=flat.obs.cpu().numpy().astype(obs_type),
            actions=actions.cpu().numpy().astype(self.action_space.dtype),
            rewards=flat.reward.cpu().numpy().astype(np.float32),
            terminals=done.flatten().cpu().numpy(),
            timeouts=cut.flatten().cpu().numpy(),
            next_observations=flat.next_obs.cpu().numpy().astype(obs_type),
            next_known=known.flatten().cpu().numpy(),
            observation_space=self.observation_space,
            action_space=self.action_space,
            info=DatasetInfo(
                id=f"{self._env_name()}-generated",
                env=self.info.env,
                ref_min_score=self.info.ref_min_score,
                ref_max_score=self.info.ref_max_score,
                about={"generated": about},
            ),
        )

    def _generating(self) -> torch.Generator:
        if not hasattr(self, "_draws"):
            self._draws = generator(self.seed, "generate")
        return self._draws

    def _refuse_other(self, policy: Agent | BoxActor) -> None:
        mine, theirs = self.observation_space, policy.observation_space
        if theirs.shape != mine.shape or not same_bounds(policy.action_space, self.action_space):
            raise ValueError(
                f"the policy acts on {theirs} by {policy.action_space}, the trajectories are of {mine} and "
                f"{self.action_space}: the same action would mean another one. Train both for one environment"
            )
