"""The DeepMind control suite under EnvPool's ids (``HopperStand-v1``, ``FingerSpin-v1``, ``WalkerWalk-v1``, ...).

The id is the domain and the task of dm_control, each in camel case: ``finger``/``turn_hard`` is ``FingerTurnHard-v1``.
The same ids run in C++ (``backend="envpool"``, ``pip install 'ctrlrl[fast]'``) and through dm_control and Shimmy
(``sync``, ``async``, ``gymnasium.make``; ``pip install 'ctrlrl[dmc]'``), where ``auto`` takes EnvPool if it is
installed. Both have

- observations: one float32 vector, the entries of dm_control's observation in its order;
- actions: dm_control's, as float32, in [-1, 1] (``lqr``: within 1e10);
- episodes: 1000 control steps, then truncated; only ``lqr`` terminates. Returns lie in [0, 1000], ``lqr``'s below.

A seed gives other episodes in EnvPool than in dm_control: their random numbers differ.

What is known to be the same
----------------------------
For every task where EnvPool's first observation tells the state, dm_control started from it and sent the same actions
gives the same observations and rewards: all tasks of ``acrobot``, ``cartpole``, ``cheetah``, ``finger``, ``hopper``,
``humanoid``, ``humanoid_CMU``, ``manipulator``, ``pendulum``, ``reacher``, ``stacker``, ``swimmer``, ``walker``, and
``point_mass``/``easy``. What the observation leaves out there, such as the place, changes no reward. Of ``fish`` and
``humanoid`` the first observation leaves open which way they are turned, which the velocities of four steps tell.
Over 30 steps rewards differ by less than 1e-6, of ``stacker``, whose falling boxes amplify rounding, 5e-3.

The hidden state of ``dog``, ``quadruped``, ``lqr`` (springs) and ``point_mass``/``hard`` (gains) is not recovered;
there only spaces and limits are compared.

What differs
------------
- ``BallInCupCatch-v1`` (rewards), ``CartpoleTwoPoles-v1`` and ``CartpoleThreePoles-v1`` (first states): see
  ``ctrlrl.engine.envpool.DISAGREE``. ``auto`` does not take EnvPool for them.
- ``finger``: from MuJoCo 3.7 on, contacts are stiffer than in EnvPool, whose MuJoCo is 3.6; with that version
  installed the rewards are the same in contact too.
- ``QuadrupedEscape-v1`` draws its terrain with OpenGL in dm_control, and needs it.
- ``lqr``: springs are drawn when an EnvPool environment is built; here at every ``reset`` with a seed.

Source: Tassa et al. 2018 (arXiv 1801.00690); the returns are not normalised.
"""

from __future__ import annotations

_TASKS = {
    "acrobot": "swingup swingup_sparse",
    "ball_in_cup": "catch",
    "cartpole": "balance balance_sparse swingup swingup_sparse two_poles three_poles",
    "cheetah": "run",
    "dog": "fetch run stand trot walk",
    "finger": "spin turn_easy turn_hard",
    "fish": "swim upright",
    "hopper": "hop stand",
    "humanoid": "run run_pure_state stand walk",
    "humanoid_CMU": "run stand walk",
    "lqr": "lqr_2_1 lqr_6_2",
    "manipulator": "bring_ball bring_peg insert_ball insert_peg",
    "pendulum": "swingup",
    "point_mass": "easy hard",
    "quadruped": "escape fetch run walk",
    "reacher": "easy hard",
    "stacker": "stack_2 stack_4",
    "swimmer": "swimmer6 swimmer15",
    "walker": "run stand walk",
}

STEPS = 1000
"""Control steps of an episode."""


def _camel(name: str) -> str:
    return "".join(part[:1].upper() + part[1:] for part in name.split("_"))


TASKS: dict[str, tuple[str, str]] = {
    f"{_camel(domain)}{_camel(task)}-v1": (domain, task) for domain, tasks in _TASKS.items() for task in tasks.split()
}
"""What dm_control calls each id: its domain and its task."""
