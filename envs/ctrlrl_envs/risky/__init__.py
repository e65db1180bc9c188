"""Tasks whose best mean return takes a small chance of a large loss.

==============================  ======================================================================================
id                              risk
==============================  ======================================================================================
``ctrlrl/RiskyPointMass-v0``    a disc on the straight way, in which each step costs 50 with probability 0.1
``ctrlrl/RiskyHalfCheetah-v0``  faster than 4 m/s, each step costs 70 with probability 0.1
``ctrlrl/RiskyHopper-v0``       torso tilted by more than 0.1 rad, each step costs 50 with probability 0.1
``ctrlrl/RiskyWalker2d-v0``     torso tilted by more than 0.5 rad, each step costs 30 with probability 0.1
==============================  ======================================================================================

Evaluate them by more than the mean: ``ctrlrl eval RUN --risk 0.1`` shows value at risk and conditional value at risk.
``info["violation"]`` says whether the step was taken where a penalty may fall.
"""

from __future__ import annotations

from ctrlrl_envs.risky.penalty import StochasticPenalty, half_cheetah, hopper, walker2d
from ctrlrl_envs.risky.point_mass import RiskyPointMass, RiskyPointMassVector, safe_action, straight_action

__all__ = [
    "RiskyPointMass", "RiskyPointMassVector", "StochasticPenalty", "half_cheetah", "hopper", "safe_action",
    "straight_action", "walker2d",
]  # fmt: skip
