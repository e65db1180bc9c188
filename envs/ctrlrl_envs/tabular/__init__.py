"""Finite worlds that show their transition tables, for objectives beside the mean return.

==========================  ==========================================================  ==============  ======
id                          task                                                        states          steps
==========================  ==========================================================  ==============  ======
``ctrlrl/Ladder-v0``        stay or gamble, three times: every optimum is a fraction    1               3
``ctrlrl/TargetGrid-v0``    collect a return that is wanted exactly                     16              20
``ctrlrl/RiskyGrid-v0``     a short way with fines, a long one without                  24, to 10,000   50
``ctrlrl/Homeostasis-v0``   feed two drives by turns (vector reward)                    3               20
``ctrlrl/WindyCliff-v0``    along a cliff with gusts                                    48              100
==========================  ==========================================================  ==============  ======

``env.unwrapped.P`` is the table as Gymnasium's toy-text environments have it, and steps are drawn from it;
``env.unwrapped.exact()`` is the same in fractions. The observation is the state alone: :class:`TabularWorld` says what
that means where the horizon is finite.

``gymnasium.make_vec(id, num_envs=..., vectorization_mode="vector_entry_point")`` makes many at once, in NumPy; see
:class:`ctrlrl_envs.multimodal.ToyVector` for how these are reset.
"""

from __future__ import annotations

from ctrlrl_envs.tabular.base import GridWorld, TabularVector, TabularWorld, rational
from ctrlrl_envs.tabular.grids import (
    RiskyGrid,
    RiskyGridVector,
    TargetGrid,
    TargetGridVector,
    WindyCliff,
    WindyCliffVector,
)
from ctrlrl_envs.tabular.homeostasis import Homeostasis, HomeostasisVector
from ctrlrl_envs.tabular.ladder import Ladder, LadderVector

__all__ = [
    "GridWorld", "Homeostasis", "HomeostasisVector", "Ladder", "LadderVector", "RiskyGrid", "RiskyGridVector",
    "TabularVector", "TabularWorld", "TargetGrid", "TargetGridVector", "WindyCliff", "WindyCliffVector", "rational",
]  # fmt: skip
