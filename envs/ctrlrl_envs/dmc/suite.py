"""A task of the DeepMind control suite as one Gymnasium environment: dm_control through Shimmy, flat and in float32."""

from __future__ import annotations

import math
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.utils import EzPickle

try:
    from dm_control import suite
    from shimmy.dm_control_compatibility import DmControlCompatibilityV0
except ImportError as error:
    raise ImportError(
        f"single environments of the DeepMind control suite need dm_control and Shimmy: pip install 'ctrlrl[dmc]'; or "
        f"take EnvPool's, which need neither (backend='envpool'): pip install 'ctrlrl[fast]' ({error})"
    ) from error


class ControlSuite(DmControlCompatibilityV0):
    """One task, with the observation as one vector; see :mod:`ctrlrl_envs.dmc`.

    The time limit is Gymnasium's (``max_episode_steps`` of the registration), dm_control's own is switched off.

    Args:
        domain: As in ``dm_control.suite.load``.
        task: As in ``dm_control.suite.load``.
        render_mode: ``"rgb_array"`` or ``"human"``.
        width: Of a frame, in pixels.
        height: Of a frame, in pixels.
        camera: Which of the model's cameras films.
    """

    def __init__(
        self,
        domain: str,
        task: str,
        render_mode: str | None = None,
        width: int = 320,
        height: int = 240,
        camera: int = 0,
    ) -> None:
        self._name = domain, task
        frame = {"width": width, "height": height, "camera_id": camera} if render_mode != "human" else None
        super().__init__(self._load(), render_mode, frame)
        EzPickle.__init__(self, domain, task, render_mode, width, height, camera)
        observed: Any = self.observation_space
        acted: Any = self.action_space
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, observed["observations"].shape, np.float32)
        self.action_space = gym.spaces.Box(acted.low.astype(np.float32), acted.high.astype(np.float32))

    def _load(self, random: int | None = None) -> Any:
        settings = {"time_limit": math.inf, "random": random}
        return suite.load(*self._name, settings, {"flat_observation": True})

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Begin an episode; the springs of ``lqr`` are drawn from the seed too."""
        if seed is not None and self._name[0] == "lqr":
            self._env = self._load(seed)
        obs, info = super().reset(seed=seed, options=options)
        return obs["observations"].astype(np.float32), info

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """One control step."""
        obs, reward, terminated, truncated, info = super().step(action)
        return obs["observations"].astype(np.float32), float(reward), terminated, truncated, info
