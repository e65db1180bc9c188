"""D4RL's reward on gymnasium-robotics' door."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np


class DoorReward(gym.Wrapper, gym.utils.RecordConstructorArgs):
    """The door's dense reward as D4RL has it (Rajeswaran et al. 2018, its released environments).

    AdroitHandDoor-v1 of gymnasium-robotics 1.2.1 to 1.4.2 pays for the distance of palm and handle instead of charging
    it; 1.2.0 takes off 0.1 more in each step. This computes the whole reward anew, whatever the version.
    """

    def __init__(self, env: gym.Env) -> None:
        gym.utils.RecordConstructorArgs.__init__(self)
        gym.Wrapper.__init__(self, env)

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        obs, _, terminated, truncated, info = self.env.step(action)
        simulator: Any = self.env.unwrapped
        hinge, apart = float(obs[28]), obs[35:38]  # the door's angle, palm minus handle
        reward = -0.1 * np.linalg.norm(apart) - 0.1 * (hinge - 1.57) ** 2 - 1e-5 * np.square(simulator.data.qvel).sum()
        reward += 2.0 * (hinge > 0.2) + 8.0 * (hinge > 1.0) + 10.0 * (hinge > 1.35)
        return obs, float(reward), terminated, truncated, info
