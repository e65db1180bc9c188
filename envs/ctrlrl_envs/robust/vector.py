"""The robust tasks, many at once, each with parameters of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, ClassVar, cast

import gymnasium as gym
import numpy as np
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from gymnasium.wrappers import TimeLimit

from ctrlrl_envs.robust import tasks
from ctrlrl_envs.robust.base import RobustEnv

_MODES = {mode.name.lower(): mode for mode in AutoresetMode}


class RobustVectorEnv(SyncVectorEnv):
    """``num_envs`` robust environments stepped one after the other; equal to as many single ones, bit for bit.

    A plain loop, as nothing was found clearly faster: two threads ran at 0.9 to 1.0 of its speed with 16 and with 100
    environments, on two cores shared with other work. ``mujoco.rollout`` does not hand back the solver's warm start,
    so that its trajectories leave Gymnasium's in the last digits after a few steps.

    Args:
        num_envs: How many.
        autoreset_mode: ``"same_step"`` (the last observation and info are in ``infos["final_obs"]`` and
            ``infos["final_info"]``), ``"disabled"`` (the caller resets with ``options={"reset_mask": mask}``) or
            ``"next_step"``; or Gymnasium's ``AutoresetMode``.
        max_episode_steps: Truncates; ``gymnasium.make_vec`` gives the registered limit.
        kwargs: Those of the single environment.

    Raises:
        ValueError: No environment, an unknown autoreset mode, or what the single environment refuses.
    """

    env_type: ClassVar[type[RobustEnv]]

    def __init__(
        self,
        num_envs: int = 1,
        *,
        autoreset_mode: str | AutoresetMode = "same_step",
        max_episode_steps: int | None = None,
        **kwargs: Any,
    ) -> None:
        if num_envs < 1:
            raise ValueError(f"num_envs={num_envs} must be at least 1")
        mode = autoreset_mode if isinstance(autoreset_mode, AutoresetMode) else _MODES.get(autoreset_mode)
        if mode is None:
            raise ValueError(f"autoreset_mode={autoreset_mode!r} is unknown; expected one of {', '.join(_MODES)}")
        super().__init__([partial(self._build, max_episode_steps, kwargs)] * num_envs, autoreset_mode=mode)
        self.robust = [cast(RobustEnv, env.unwrapped) for env in self.envs]
        self.parameter_space, self.nominal = self.robust[0].parameter_space, self.robust[0].nominal

    def _build(self, limit: int | None, kwargs: Mapping[str, Any]) -> gym.Env:
        env = self.env_type(**kwargs)
        return env if limit is None else TimeLimit(env, limit)

    @property
    def params(self) -> list[dict[str, float]]:
        """The parameters of each environment as they are now (copies)."""
        return [env.params for env in self.robust]

    def set_params(self, params: Mapping[str, Any] | Sequence[Mapping[str, Any]] | np.ndarray) -> None:
        """Set the parameters of all environments; see :meth:`RobustEnv.set_params`.

        Args:
            params: One mapping for all, one mapping each, or an array [num_envs, d] with the parameters in the
                order of ``parameter_space``.

        Raises:
            ValueError: Wrong number of rows or columns, or what a single environment refuses; then nothing is
                changed.
        """
        n, names = self.num_envs, list(self.parameter_space)
        if isinstance(params, np.ndarray):
            if params.shape != (n, len(names)):
                raise ValueError(f"params has shape {params.shape}; expected {(n, len(names))} for {', '.join(names)}")
            params = [dict(zip(names, row, strict=True)) for row in params.tolist()]
        each = [params] * n if isinstance(params, Mapping) else list(params)
        if len(each) != n:
            raise ValueError(f"found {len(each)} parameter mappings for {n} environments; give one each or one for all")
        found = [env.checked(one) for env, one in zip(self.robust, each, strict=True)]
        for env, one in zip(self.robust, found, strict=True):
            env.set_params(one)

    def reset(
        self, *, seed: int | Sequence[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Reset all environments, or those of ``options["reset_mask"]`` (bool [num_envs]).

        Args:
            seed: One seed each; an int ``s`` gives environment ``i`` the seed ``s + i``.
            options: ``{"params": {...}}`` is for every environment that is reset.
        """
        seeds = int(seed) if isinstance(seed, int | np.integer) else None if seed is None else list(seed)
        # a copy, as Gymnasium takes the mask out of it
        return super().reset(seed=seeds, options=None if options is None else dict(options))


class RobustAntVector(RobustVectorEnv):
    """:class:`RobustAnt`, many at once."""

    env_type = tasks.RobustAnt


class RobustHalfCheetahVector(RobustVectorEnv):
    """:class:`RobustHalfCheetah`, many at once."""

    env_type = tasks.RobustHalfCheetah


class RobustHopperVector(RobustVectorEnv):
    """:class:`RobustHopper`, many at once."""

    env_type = tasks.RobustHopper


class RobustHumanoidStandupVector(RobustVectorEnv):
    """:class:`RobustHumanoidStandup`, many at once."""

    env_type = tasks.RobustHumanoidStandup


class RobustInvertedPendulumVector(RobustVectorEnv):
    """:class:`RobustInvertedPendulum`, many at once."""

    env_type = tasks.RobustInvertedPendulum


class RobustWalker2dVector(RobustVectorEnv):
    """:class:`RobustWalker2d`, many at once."""

    env_type = tasks.RobustWalker2d
