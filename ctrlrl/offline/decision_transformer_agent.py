"""The agent of Decision Transformer: learns from windows of episodes, and acts by what it remembers of its own."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from ctrlrl.data.transitions import TransitionReplay, Transitions
from ctrlrl.engine.evaluate import Evaluation
from ctrlrl.engine.memory import recalled
from ctrlrl.engine.offline import OfflineAgent
from ctrlrl.engine.wrappers import aimed, space_told, target_of
from ctrlrl.nets.causal import TIMESTEP, Context, TrajectoryActor
from ctrlrl.offline.decision_transformer import DecisionTransformer
from ctrlrl.types import EnvSpec


class Windows(TransitionReplay):
    """The rows of a full replay of whole episodes, which gives windows of ``length`` steps in place of single ones.

    Every row is as likely to begin a window, so that episodes are drawn in proportion to their length. A window ends
    with its episode; one that is shorter is padded on the left by repeating its first row.
    """

    def __init__(self, rows: TransitionReplay, length: int) -> None:
        vars(self).update(vars(rows))  # the same memory
        self.length = length
        place = torch.arange(len(rows))
        ends = (rows.columns["terminated"] + rows.columns["truncated"] > 0.0).nonzero().flatten().cpu()
        self._left = (ends[torch.searchsorted(ends, place)] - place + 1).to(self.device)

    def sample(self, index: Tensor) -> Transitions:
        """[B * length, ...] the windows that begin at places ``index`` [B], one after the other."""
        missing = (self.length - self._left[index]).clamp(min=0)
        steps = (torch.arange(self.length, device=self.device) - missing.unsqueeze(-1)).clamp(min=0)
        return super().sample((index.unsqueeze(-1) + steps).flatten())


class DecisionTransformerAgent(OfflineAgent):
    """An agent trained by Decision Transformer (see :class:`ctrlrl.offline.decision_transformer.DecisionTransformer`).

    Its environment is wrapped by ReturnToGo, whose target is the setting ``target_return``; an EnvSpec that has the
    wrapper already keeps its own. ``predict`` takes what such an environment returns. What it does depends on the steps
    before: give ``predict`` back the state it returns, or every step counts as all there was.
    """

    algorithm: DecisionTransformer  # type: ignore[assignment]
    policy: TrajectoryActor  # type: ignore[assignment]

    def _environment(
        self, env: str | EnvSpec | None, env_kwargs: Mapping[str, Any] | None, restoring: bool
    ) -> EnvSpec | None:
        self._takes_target = env is None or target_of(env) is None
        recorded = self.info
        if not restoring:
            self.observation_space = space_told(self.observation_space)
        if recorded.env is not None:
            self.info = dataclasses.replace(recorded, env=aimed(recorded.env, 0.0))
        try:
            # the target follows with the settings
            return super()._environment(
                aimed(env, 0.0) if env is not None and self._takes_target else env, env_kwargs, restoring
            )
        finally:
            self.info = recorded

    def _build(self, settings: Mapping[str, Any], preset: str | None, encoder: Any, n_params: int = 0) -> None:
        super()._build(settings, preset, encoder, n_params)
        target = self.algorithm.target_return
        if target is None:
            target = float(self.data.returns.max())
            own = dataclasses.replace(self.algorithm, target_return=target)
            self.algorithm = self.learner.algorithm = own  # type: ignore[assignment]
        if self.env_spec is not None and self._takes_target:
            self.env_spec = aimed(self.env_spec, target)

    # -- training -----------------------------------------------------------------------------

    def _memory(self) -> TransitionReplay:
        if self.replay is None:
            self.replay = Windows(super()._memory(), self.algorithm.context)
        return self.replay

    def _fit_scaling(self) -> None:
        memory = cast(Windows, self._memory())
        memory.length = 1  # single steps: each counts once
        try:
            super()._fit_scaling()
        finally:
            memory.length = self.algorithm.context

    def _schedule(self) -> None:
        rate = self.learner.knobs["lr/actor"]
        rate.fill_(self.algorithm.learning_rate("actor", self.config))
        super()._schedule()
        rate.mul_(min(1.0, (self.learner.updates + 1) / max(1, self.algorithm.warmup_updates)))

    # -- acting -------------------------------------------------------------------------------

    def predict(
        self,
        observation: Any,
        state: tuple[np.ndarray, ...] | None = None,
        episode_start: np.ndarray | None = None,
        deterministic: bool = False,
    ) -> tuple[np.ndarray, tuple[np.ndarray, ...] | None]:
        """The environment's action, and what to give back as ``state`` at the next step (see ``Agent.predict``).

        Args:
            observation: What ReturnToGo tells, or a batch of it, each entry [N, ...].
            state: What the last call returned (see nets.causal.Context); None at the beginning. It counts only where
                this step follows on the one before.
            episode_start: [N] bool: where an episode begins, and ``state`` is from another.
            deterministic: Without meaning: the policy is deterministic.

        Raises:
            ValueError: The observation does not fit the space, or ``state`` or ``episode_start`` the observation.
        """
        found, batched = self._as_batch(observation)
        obs = cast(dict[str, Tensor], found)
        before = recalled(self.policy.nothing(len(obs[TIMESTEP])), state, episode_start, self.device)
        action, after = self._step(obs, before)
        return (action if batched else action[0]), tuple(part.cpu().numpy() for part in after)

    def session(self, noise: torch.Generator | None = None) -> Callable[[Any, np.ndarray], np.ndarray]:
        """As in Agent. An episode's first step is known by its timestep, whatever its number."""
        after: Context | None = None

        def act(observation: Any, episodes: np.ndarray) -> np.ndarray:
            nonlocal after
            obs = cast(dict[str, Tensor], self._as_batch(observation)[0])
            action, after = self._step(obs, self.policy.nothing(len(episodes)) if after is None else after)
            return action

        return act

    def _step(self, obs: dict[str, Tensor], before: Context) -> tuple[np.ndarray, Context]:
        """The environment's actions [N, ...], and the memory for the next step."""
        with torch.inference_mode():
            action, after = self.policy.step(obs, before)
            out = self.policy.to_env(obs, action)
        return out.cpu().numpy().astype(self.action_space.dtype, copy=False), after

    def evaluate(
        self,
        episodes: int = 100,
        deterministic: bool = True,
        n_envs: int | None = None,
        seed: int | None = None,
        target_return: float | None = None,
    ) -> Evaluation:
        """As in Agent; ``target_return`` is another return to aim at than the environment's own target."""
        kept = self.env_spec
        if kept is not None and target_return is not None:
            self.env_spec = aimed(kept, target_return)
        try:
            return super().evaluate(episodes, deterministic, n_envs, seed)
        finally:
            self.env_spec = kept
