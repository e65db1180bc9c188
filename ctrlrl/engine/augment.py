"""Generated transitions that a learner trains on beside the recorded ones, made anew while its policy changes."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, Self

import gymnasium as gym
import torch
from torch import Tensor

from ctrlrl.data.dataset import Dataset
from ctrlrl.data.transitions import TransitionReplay, Transitions
from ctrlrl.engine import algorithm as algorithms
from ctrlrl.engine import runfolder
from ctrlrl.engine.config import ConfigError
from ctrlrl.engine.guidance import GuidanceConfig, log_prob_of
from ctrlrl.engine.prior import PriorData, same_bounds
from ctrlrl.engine.rebuild import rebuild
from ctrlrl.engine.seeding import generator
from ctrlrl.nets.actors import BoxActor
from ctrlrl.nets.edm import SamplerConfig
from ctrlrl.nets.trajectory_codec import Steps
from ctrlrl.types import check_types

PREFIX = "generated/"
"""Of a checkpoint's tensors that are generated rows."""
JUDGED = 4_096
"""Generated rows whose log-density under the policy is noted."""


@dataclass(frozen=True)
class AugmentConfig:
    """Which rows are generated, how many of a batch they are, and how often they are made.

    Policy-guided diffusion's released code makes 8,192 trajectories of 128 transitions each time, which is the work of
    many GPUs; the other defaults are its own.
    """

    augment: str | None = None
    """Run folder of policy_guided_diffusion whose model generates rows (--augment RUN); None trains on the data
    alone. The model sees no further training. Guided with kappa above 0, else rows are drawn as they come."""
    augment_share: float = 0.9375
    """Share of each batch that is generated, rounded to whole rows: 240 of 256. 0 leaves them out."""
    augment_every: int = 10_000
    """Updates between two sets; each replaces the one before. The first is made before any update, and is unguided.
    Where updates_per_graph is above 1 a set waits for the next graph."""
    augment_trajectories: int = 512
    """Trajectories of a set."""

    def __post_init__(self) -> None:
        check_types(self)
        if not 0.0 <= self.augment_share <= 1.0:
            raise ValueError(f"augment_share={self.augment_share} must lie in [0, 1]")
        for name in ("augment_every", "augment_trajectories"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")


class RowSource(Protocol):
    """What makes transitions for a policy.

    It may have an attribute ``statistics``, a mapping from names to numbers about the rows it gave last, which is
    logged as ``augment/<name>``. For learners with columns of their own, which are found from whole trajectories
    (ReBRAC's next action), it needs a method ``dataset`` of the same arguments as :meth:`rows`, which gives a Dataset.
    """

    def rows(self, policy: BoxActor, first: bool, generator: torch.Generator) -> Steps:
        """Transitions [N, ...]: raw observations and rewards, actions in [-1, 1], ``done`` where nothing follows.

        Args:
            policy: As it is trained at this moment.
            first: This is the first set of the training.
            generator: Of all randomness, on the CPU.
        """
        ...


class Generative(Protocol):
    """A trained model of trajectories: what is asked of PolicyGuidedDiffusionAgent."""

    method: str
    observation_space: gym.Space
    action_space: gym.Space

    def generate(
        self, trajectories: int, policy: Any = None, guidance: GuidanceConfig | None = None,
        sampler: SamplerConfig | None = None, generator: torch.Generator | None = None,
    ) -> tuple[Steps, Tensor]:  # fmt: skip
        """Steps [N, T, ...], and [N, T] bool: which of them are transitions."""
        ...

    def to_dataset(self, steps: Steps, transitions: Tensor) -> Dataset:
        """The same as a Dataset."""
        ...


class PolicyGuidedDataset:
    """Transitions drawn from a trained model of trajectories, guided by the policy that is to learn from them.

    Source: Jackson et al. 2024, "Policy-Guided Diffusion", arXiv:2404.06356; as in its released code the first set is
    unguided. Trajectories of length 1 and kappa 0 are SynthER (arXiv:2303.06614).

    Args:
        model: The trained model.
        trajectories: Of each set.
        guidance: How to guide; with kappa 0 not at all.
        sampler: How to turn noise into trajectories.

    Attributes:
        statistics: Of the rows given last, where they may be guided: ``log_prob``, mean log-density of their actions
            under the policy. Guidance is to raise it, and does not always.
    """

    def __init__(
        self, model: Generative, trajectories: int, guidance: GuidanceConfig, sampler: SamplerConfig
    ) -> None:  # fmt: skip
        self.model, self.trajectories, self.guidance, self.sampler = model, trajectories, guidance, sampler
        self.statistics: Mapping[str, float] = {}

    @classmethod
    def of_run(
        cls, run: str | os.PathLike[str], observation_space: gym.Space, action_space: gym.Space, device: str,
        trajectories: int, guidance: GuidanceConfig, sampler: SamplerConfig,
    ) -> Self:  # fmt: skip
        """The same with the model of a run folder, for a learner of these spaces.

        Raises:
            ConfigError: The run has no such model, or one of other spaces.
        """
        method = runfolder.read_config(run)["method"]
        kind: Any = algorithms.get(method).agent_class() if algorithms.is_one(method) else None
        if not hasattr(kind, "generate"):
            raise ConfigError(
                f"augment={os.fspath(run)!r} is a run of {method}, which generates nothing; expected one of "
                "policy_guided_diffusion"
            )
        model = rebuild(kind, run, device=device)
        theirs = model.observation_space
        both = isinstance(theirs, gym.spaces.Box) and isinstance(observation_space, gym.spaces.Box)
        if not both or theirs.shape != observation_space.shape:
            raise ConfigError(
                f"augment={os.fspath(run)!r} generates observations of {theirs}, this learner sees "
                f"{observation_space}: train the model on data of the same environment"
            )
        if not same_bounds(model.action_space, action_space):
            raise ConfigError(
                f"augment={os.fspath(run)!r} generates actions of {model.action_space}, this learner has "
                f"{action_space}: the same action would mean another one. Train the model on data of the same "
                "environment, with the same env"
            )
        return cls(model, trajectories, guidance, sampler)

    def rows(self, policy: BoxActor, first: bool, generator: torch.Generator) -> Steps:
        """See RowSource; [M, ...] with M at most trajectories times their length."""
        steps, transitions = self._generate(policy, first, generator)
        return Steps(*(part[transitions] for part in steps))

    def dataset(self, policy: BoxActor, first: bool, generator: torch.Generator) -> Dataset:
        """The same as a Dataset of trajectories, each an episode that ends or is cut.

        Raises:
            ConfigError: The model is one of single transitions.
        """
        steps, transitions = self._generate(policy, first, generator)
        if transitions.shape[1] == 1:
            raise ConfigError(
                "this method learns from columns that are found from whole trajectories, and the model generates "
                "single transitions: train it with a window_length above 1"
            )
        return self.model.to_dataset(steps, transitions)

    def _generate(self, policy: BoxActor, first: bool, generator: torch.Generator) -> tuple[Steps, Tensor]:
        guided = self.guidance.kappa > 0.0
        steps, transitions = self.model.generate(
            self.trajectories, policy=policy if guided and not first else None, guidance=self.guidance,
            sampler=self.sampler, generator=generator,
        )  # fmt: skip
        if guided:
            obs, action = (part[transitions][:JUDGED] for part in (steps.obs, steps.action))
            with torch.no_grad():
                found = log_prob_of(policy, self.guidance.kernel_std)(obs, action)
            self.statistics = {"log_prob": float(found.mean())}
        return steps, transitions


class Generated:
    """The generated rows of a training: made anew at set updates, mixed into every batch, part of its checkpoints.

    A set is made before update 0 and before every multiple of ``every``. A checkpoint in between holds the rows; one
    where the next set is due does not, since the resumed run makes the same set first.

    Args:
        policy: The trained policy, whose parameters change in place.
        device: Where to hold rows.
        reward_map: "reward_scale" and "reward_shift", those of the recorded rewards.
        seed: Of the run.

    Attributes:
        source: What makes the rows; None trains on recorded ones alone.
        replay: The rows, once there are some.
        made_at: Updates done when they were made.
    """

    def __init__(self, policy: BoxActor, device: torch.device, reward_map: Mapping[str, float], seed: int) -> None:
        self.policy, self.device, self.reward_map, self.seed = policy, device, reward_map, seed
        self.source: RowSource | None = None
        self.share, self.every = 0.0, 1
        self.replay: TransitionReplay | None = None
        self.made_at: int | None = None
        self._stored: Callable[[Dataset], TransitionReplay] | None = None
        self._recorded: dict[str, float] = {}

    def begin(
        self, source: RowSource, share: float, every: int, stored: Callable[[Dataset], TransitionReplay] | None = None
    ) -> None:  # fmt: skip
        """Take rows from ``source`` from now on.

        Args:
            source: What makes them.
            share: Of each batch, rounded to whole rows.
            every: Updates between two sets.
            stored: For methods with columns of their own: what makes rows of a dataset, as of the recorded one.

        Raises:
            ConfigError: ``stored`` is given, and the source has no datasets.
        """
        if stored is not None and not hasattr(source, "dataset"):
            raise ConfigError(
                f"this method learns from columns that are found from whole trajectories, and {type(source).__name__} "
                "gives single transitions"
            )
        self.source, self.share, self.every, self._stored = source, share, every, stored

    def due(self, steps: int) -> bool:
        """Whether a set is to be made before update ``steps``."""
        return self.made_at is None or steps // self.every > self.made_at // self.every

    def refresh(self, steps: int, recorded: TransitionReplay) -> dict[str, float]:
        """Make a set if one is due, and return what to log of it against the ``recorded`` rows; else nothing.

        Raises:
            ConfigError: There is not a single row.
            FloatingPointError: A row is not finite.
        """
        assert self.source is not None
        if not self.due(steps):
            return {}
        first, drawing = self.made_at is None, generator(self.seed, "augment", steps)
        if self._stored is None:
            self.replay = self._of(self.source.rows(self.policy, first, drawing))
        else:
            made: Any = self.source
            self.replay = self._stored(made.dataset(self.policy, first, drawing))
        for name, column in self.replay.columns.items():
            if not column.isfinite().all():
                raise FloatingPointError(
                    f"generated rows are not finite ({name}) at update {steps:,}: guide less (kappa), or train the "
                    "model for longer"
                )
        self.made_at = steps
        self._recorded = self._recorded or moments(recorded)
        return {
            **{f"augment/{k}": v for k, v in moments(self.replay).items()},
            **{f"augment/{k}_data": v for k, v in self._recorded.items()},
            **{f"augment/{k}": v for k, v in getattr(self.source, "statistics", {}).items()},
            "augment/rows": float(len(self.replay)),
        }

    def sample(self, recorded: TransitionReplay, count: int, size: int, drawing: torch.Generator) -> Transitions:
        """``count`` batches of ``size`` rows, one after the other; of each the generated rows come first."""
        assert self.replay is not None
        return PriorData(self.replay, self.share).sample(recorded, count, size, drawing)

    def _of(self, steps: Steps) -> TransitionReplay:
        n = len(steps.reward)
        if n == 0:
            raise ConfigError(f"{type(self.source).__name__} gave no transition; ask for more trajectories")
        reward = steps.reward * self.reward_map["reward_scale"] + self.reward_map["reward_shift"]
        replay = self._empty(n)
        replay.add(steps.obs, steps.action, reward, steps.done, torch.zeros_like(steps.done), steps.next_obs)
        return replay

    def _empty(self, n: int, extras: Mapping[str, Any] | None = None) -> TransitionReplay:
        policy = self.policy
        return TransitionReplay(
            policy.observation_space, policy.action_shape, policy.action_dtype, n, self.device, extras=extras
        )

    # -- state --------------------------------------------------------------------------------

    def tensors(self, steps: int) -> dict[str, Tensor]:
        """What a checkpoint after ``steps`` updates holds."""
        if self.replay is None or (self.source is not None and self.due(steps)):
            return {}
        return {PREFIX + k: v for k, v in self.replay.rows(0, self.replay.added).items()}

    def counters(self) -> dict[str, int]:
        """The same beside tensors."""
        return {} if self.made_at is None else {"generated_at": self.made_at}

    def restore(self, tensors: Mapping[str, Tensor], counters: Mapping[str, Any]) -> None:
        """Take over what :meth:`tensors` and :meth:`counters` gave."""
        self.made_at, self.replay = counters.get("generated_at"), None
        rows = {k.removeprefix(PREFIX): v for k, v in tensors.items() if k.startswith(PREFIX)}
        if rows:
            extras = {k: v for k, v in rows.items() if k.startswith("extras/")}
            described = {k.removeprefix("extras/"): (tuple(v.shape[1:]), v.dtype) for k, v in extras.items()}
            self.replay = self._empty(len(rows["reward"]), described)
            self.replay.put(0, rows)


def moments(rows: TransitionReplay) -> dict[str, float]:
    """Share of the ``rows`` that end an episode; mean and deviation of the rewards, as they are learned from."""
    n = len(rows)
    reward, ends = (rows.columns[k][:n].double() for k in ("reward", "terminated"))
    return {
        "terminal_rate": float(ends.mean()),
        "reward_mean": float(reward.mean()),
        "reward_std": float(reward.std(correction=0)),
    }
