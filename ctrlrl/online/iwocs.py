"""IWOCS: a robust policy from ordinary ones, each trained where the last ones did worst."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, cast

import gymnasium as gym
import numpy as np
import torch
from torch import Tensor, nn

from ctrlrl.data.transitions import Transitions
from ctrlrl.engine.algorithm import Networks, Spaces, register
from ctrlrl.engine.config import ConfigError
from ctrlrl.nets.actors import BoxActor, QNetworkConfig
from ctrlrl.nets.normalizer import RunningMoments
from ctrlrl.nets.q_ensemble import QEnsemble
from ctrlrl.online.sac import SAC
from ctrlrl.types import check_types

if TYPE_CHECKING:
    from ctrlrl.engine.learner import Nets
    from ctrlrl.engine.transition_config import TransitionConfig
    from ctrlrl.online.iwocs_agent import IWOCSAgent


@register
@dataclass(frozen=True)
class IWOCS(SAC):
    """SAC under randomised parameters, then SAC under the worst case of all policies so far, several times; acts by
    the most pessimistic of those policies whose model explains the last step."""

    paper: ClassVar[str] = "Solving robust MDPs as a sequence of static RL problems, arXiv:2410.06212"
    differs: ClassVar[str] = (
        "The policy of the iteration with the best worst case is kept, not the last one. Before the first search the "
        "policy under training acts. The earlier worst cases are tried in every search, and training stops when one of "
        "them comes out again, or when no other is worse by more than gap_tolerance: the paper's gap to Q is between a "
        "discounted estimate and a return. The error of a prediction is the mean over the entries of the observation, "
        "in their standard deviations, and over two predictors (normalize_error, predictors); the paper's sum over raw "
        "entries is not the same thing in two tasks. There is none at the first step of an episode, where every policy "
        "is valid. Searches are smaller than the paper's, over three reset seeds that all candidates share, and points "
        "outside the set are moved to its edge; the presets paper and paper_3d have the paper's numbers. search='grid' "
        "is its IWOCS*, with both ends of every range on the grid where the paper seems to leave out the upper one."
    )
    loop_defaults: ClassVar[Mapping[str, Any]] = {"critic_learning_rate": 1e-3, "adam_eps": 1e-5}
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        name: {
            "default_steps": first, "model_steps": 800_000, "max_models": models, "population": 100, "generations": 6,
            "thresholds": (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0), "search_episodes": 1,
            "normalize_error": False,
        }
        for name, first, models in (("paper", 1_600_000, 3), ("paper_3d", 1_800_000, 4))
    }  # fmt: skip
    capabilities: ClassVar[frozenset[str]] = frozenset(["resume", "vector", "box", "gpu", "compile"])

    default_steps: int | None = None
    """Environment steps under randomised parameters; None shares the run's steps out so that this is twice
    model_steps."""
    model_steps: int | None = None
    """Environment steps on each worst case; None shares the run's steps out."""
    max_models: int = 3
    """Worst cases to train on."""
    thresholds: tuple[float, ...] = (0.1, 0.3, 1.0)
    """Largest errors of the prediction of a step with which a policy stays valid: each is tried, and the one with the
    best worst case kept for the policy."""
    search: Literal["cma", "grid"] = "cma"
    """How worst cases are searched for: CMA-ES, or a regular grid."""
    population: int = 16
    """Candidates per generation of CMA-ES."""
    generations: int = 6
    """Generations of CMA-ES."""
    grid_points: int = 10
    """Points of the grid in each dimension, both ends included."""
    search_episodes: int = 3
    """Episodes under each candidate, from the same reset seeds; their steps are not counted as training steps."""
    search_envs: int = 64
    """Episodes of a search side by side."""
    predictors: int = 2
    """Networks that predict the next observation; their errors are averaged."""
    normalize_error: bool = True
    """Measure the error of a prediction in standard deviations of the model's observations, as the mean over their
    entries; or as the plain L1 norm, in their own units."""
    repeat_tolerance: float = 0.01
    """A worst case this close to one trained on is the same, as a share of every parameter's range."""
    gap_tolerance: float = 0.0
    """Stop when the worst case is at most this much worse than the worst model trained on, in units of the return."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_types(self)
        for name in (
            "default_steps", "model_steps", "max_models", "generations", "search_episodes", "search_envs", "predictors"
        ):  # fmt: skip
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} must be at least 1")
        for name, least in (("population", 3), ("grid_points", 2)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)} must be at least {least}")
        for name in ("repeat_tolerance", "gap_tolerance"):
            if not getattr(self, name) >= 0.0:
                raise ValueError(f"{name}={getattr(self, name)} must not be negative")
        if not self.thresholds or not all(rho > 0.0 for rho in self.thresholds):
            raise ValueError(f"thresholds={self.thresholds} must be one or more numbers above 0")

    @classmethod
    def agent_class(cls) -> type[IWOCSAgent]:
        from ctrlrl.online.iwocs_agent import IWOCSAgent

        return IWOCSAgent

    def plan(self, steps: int, begun: bool, warm_up: int) -> tuple[int, int]:
        """How ``steps`` are shared out: the length of the next phase, and of those after it.

        Args:
            steps: Of the whole run.
            begun: The default policy is trained already.
            warm_up: Random steps at the beginning of every phase.

        Raises:
            ConfigError: A phase would be no longer than its warm-up.
        """
        first, later, models = self.default_steps, self.model_steps, self.max_models
        if begun:
            first = later = later or steps // models
        elif first is None:
            first = 2 * steps // (models + 2) if later is None else steps - models * later
        later = later or max(steps - first, 0) // models
        for name, length in (("default_steps", first), ("model_steps", later)):
            reached = name == ("model_steps" if begun else "default_steps") or (not begun and steps > first)
            if reached and length <= warm_up:
                raise ConfigError(
                    f"{name} would be {length:,} of {steps:,} steps, but every phase begins with "
                    f"learning_starts={warm_up:,} random ones: train for longer, or set learning_starts lower"
                )
        return first, later

    def networks(self, spaces: Spaces, config: TransitionConfig, encoder: Callable[..., nn.Module] | None) -> Networks:
        observation = spaces.observation
        if not isinstance(observation, gym.spaces.Box) or not np.issubdtype(observation.dtype, np.floating):
            raise TypeError(
                f"iwocs predicts observations and needs a Box of floats, found {observation}; "
                "gymnasium.wrappers.FlattenObservation makes one of others"
            )
        actor, trained, copies = super().networks(spaces, config, encoder)
        size = cast(BoxActor, actor).action_shape[0]
        trained = {
            **trained,
            "value": QEnsemble(observation, size, config.network, encoder, extra_layers=1),
            "predictor": Predictor(
                observation, size, config.network, encoder, self.predictors, self.normalize_error
            ),
        }
        return Networks(actor, trained, {**copies, "value_target": "value"})

    def update(
        self, nets: Nets, batch: Transitions, noise: Mapping[str, Tensor], knobs: Mapping[str, Tensor], phase: int
    ) -> dict[str, Tensor]:
        with torch.no_grad():
            # the soft target's own action
            action = nets["actor"](batch.next_obs).pre_tanh(noise["next_action"]).tanh()
            following = nets["value_target"](batch.next_obs, action).amin(0)
            target = batch.reward_t + knobs["gamma"] * (1.0 - batch.terminated_t) * following
        metrics = super().update(nets, batch, noise, knobs, phase)

        def value_loss(value: Callable[..., Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
            loss = 0.5 * (value(batch.obs, batch.action) - target).square().mean(1).sum()
            return loss, {"value_loss": loss.detach()}

        def prediction_loss(predictor: Callable[..., Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
            error = predictor(batch.obs, batch.action, batch.next_obs).mean(1)
            return error.sum(), {"prediction_error": error.detach().mean()}

        metrics |= nets.descend("value", value_loss)
        metrics |= nets.descend("predictor", prediction_loss)
        nets.track("value_target", "value", knobs["tau"])
        return metrics


class Predictor(nn.Module):
    """Predicts the next observation; calling it gives the error of that prediction.

    Observations are predicted and compared as (s - mean) / std with the statistics that :meth:`observe` gathered: the
    identity until then, and for entries that never change.

    Args:
        space: Of the observations, a Box.
        action_size: Of the actions.
        network: Widths of the critics.
        encoder: As that of the critics.
        members: Predictors side by side.
        mean: The error is the mean over the observation's entries, or their sum (the L1 norm).
    """

    shift: Tensor
    scale: Tensor

    def __init__(
        self, space: gym.spaces.Box, action_size: int, network: QNetworkConfig,
        encoder: Callable[..., nn.Module] | None, members: int, mean: bool,
    ) -> None:  # fmt: skip
        super().__init__()
        self.mean = mean
        self.size = math.prod(space.shape)
        self.members = members
        self.body = QEnsemble(space, action_size, network, encoder, members=members, outputs=self.size)
        self.moments = RunningMoments((self.size,))
        self.register_buffer("shift", torch.zeros(self.size))
        self.register_buffer("scale", torch.ones(self.size))

    def forward(self, obs: Tensor, action: Tensor, next_obs: Tensor) -> Tensor:
        """[E, B] each predictor's absolute error over the entries of the observation."""
        predicted = self.body(obs, action).reshape(self.members, -1, self.size)
        wanted = (next_obs.flatten(1) - self.shift) * self.scale
        error = (predicted - wanted).abs()
        return error.mean(-1) if self.mean else error.sum(-1)

    @torch.no_grad()
    def observe(self, obs: Tensor) -> None:
        """Take ``obs`` [M, ...] into the statistics."""
        self.moments.update(obs.flatten(1))
        std = self.moments.var.sqrt()
        self.scale.copy_(torch.where(std > 1e-6, 1.0 / std, 1.0))
        self.shift.copy_(self.moments.mean)


class Model(nn.Module):
    """What training on one worst case leaves: its policy, how good that is, and how the world moves there."""

    def __init__(self, actor: BoxActor, value: QEnsemble, predictor: Predictor) -> None:
        super().__init__()
        self.actor, self.value, self.predictor = actor, value, predictor


class Memory(NamedTuple):
    """What happened one step before."""

    obs: Tensor
    """[N, ...] the observation then."""
    action: Tensor
    """[N, A] the action then, in [-1, 1]."""
    there: Tensor
    """[N] bool: False at the first step of an episode."""

    @classmethod
    def none(cls, obs: Tensor, action_size: int) -> Memory:
        """At the first step of every episode; ``obs`` [N, ...] gives the shapes."""
        n = obs.shape[0]
        return cls(torch.zeros_like(obs), obs.new_zeros(n, action_size), obs.new_zeros(n, dtype=torch.bool))


class Composite:
    """The policy of section 3.3: of the policies whose model explains the last step, the one that expects least.

    A policy is valid where the error with which its model predicted this observation from the last one is at most
    its threshold, and at the first step of an episode. Of the valid ones argmin_j Q_j(s, pi_j(s)) acts, Q_j being the
    smaller of its two critics; where none is valid, ``default``.

    Args:
        default: Acts where no model is valid.
        models: One for each worst case trained on.
        thresholds: One for each model.
    """

    def __init__(self, default: BoxActor, models: Sequence[Model], thresholds: Sequence[float]) -> None:
        self.default, self.parts = default, list(zip(models, thresholds, strict=True))

    def choose(self, obs: Tensor, before: Memory) -> Tensor:
        """[N] index of the model whose policy acts at ``obs`` [N, ...]; -1 is the default policy."""
        return self._choose(obs, before, [model.actor.mode(obs) for model, _ in self.parts])

    def act(self, obs: Tensor, before: Memory, noise: Tensor | None = None) -> Tensor:
        """Actions [N, A] in [-1, 1]: the chosen policies' modes, or selected by ``noise`` [N, A]."""
        modes = [model.actor.mode(obs) for model, _ in self.parts]
        chosen = self._choose(obs, before, modes)
        action = self.default.mode(obs) if noise is None else self.default.act(obs, noise)
        for j, (model, _) in enumerate(self.parts):
            own = modes[j] if noise is None else model.actor.act(obs, noise)
            action = torch.where((chosen == j).unsqueeze(1), own, action)
        return action

    def _choose(self, obs: Tensor, before: Memory, modes: Sequence[Tensor]) -> Tensor:
        if not self.parts:
            return torch.full((obs.shape[0],), -1, device=obs.device)
        values = []
        for (model, threshold), mode in zip(self.parts, modes, strict=True):
            error = model.predictor(before.obs, before.action, obs).mean(0)
            valid = (error <= threshold) | ~before.there
            values.append(torch.where(valid, model.value(obs, mode).amin(0), torch.inf))
        least, index = torch.stack(values).min(0)
        return torch.where(torch.isinf(least), -1, index)
