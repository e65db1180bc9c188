"""Toys that a policy with one mode cannot solve, with the exact optimum and the Gaussian ceiling of each.

============================  =========================================================  ========  ============
id                            task                                                       optimum   best Gaussian
============================  =========================================================  ========  ============
``ctrlrl/HiddenBit-v0``       guess a hidden +1 or -1 within four tries                  .9375     .500
``ctrlrl/TwoGoalReacher-v0``  walk from a fork to the one of two goals that pays         .88125    .4314
``ctrlrl/OneStateBump-v0``    one action, one narrow bump of reward (no second mode)     1         1
============================  =========================================================  ========  ============

The numbers are expected returns of policies without memory, by default arguments. The modules :mod:`hidden_bit`,
:mod:`two_goal_reacher` and :mod:`one_state_bump` have functions for others: ``optimum``, ``gaussian_ceiling``,
``gaussian_win_rate``, ``win_rate`` of samples, ``expected_return``. The classes' docstrings say for which policies a
ceiling holds, and why.

``gymnasium.make_vec(id, num_envs=..., vectorization_mode="vector_entry_point")`` makes many at once, in NumPy; see
:class:`ToyVector` for how these are reset. The hidden bit is in no observation and no info; ``env.unwrapped.bit`` tells
it.
"""

from __future__ import annotations

from ctrlrl_envs.multimodal import hidden_bit, one_state_bump, two_goal_reacher
from ctrlrl_envs.multimodal.base import Ceiling, ToyVector
from ctrlrl_envs.multimodal.hidden_bit import HiddenBit, HiddenBitVector
from ctrlrl_envs.multimodal.one_state_bump import OneStateBump, OneStateBumpVector
from ctrlrl_envs.multimodal.two_goal_reacher import TwoGoalReacher, TwoGoalReacherVector

__all__ = [
    "Ceiling", "HiddenBit", "HiddenBitVector", "OneStateBump", "OneStateBumpVector", "ToyVector", "TwoGoalReacher",
    "TwoGoalReacherVector", "hidden_bit", "one_state_bump", "two_goal_reacher",
]  # fmt: skip
