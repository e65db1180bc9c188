"""Gymnasium's MuJoCo tasks with physics that can be set: the uncertainty sets of M2TD3, RRLS and IWOCS.

``gymnasium.make("ctrlrl/RobustHopper-v0", uncertainty="2d")`` is ``Hopper-v5``, bit for bit, until
``env.unwrapped.set_params({"world_friction": 0.5})`` changes it, at once and over resets until set again. The order
of the parameters is the order of the sets: 1d has the first, 2d the first two, 3d all three.

====================  ==========================  ================================  ==========================
ctrlrl/Robust...-v0   first                       second                            third
====================  ==========================  ================================  ==========================
Ant                   ``torso_mass`` 0.1-3        ``front_left_leg_mass`` 0.01-3    ``front_right_leg_mass``
                                                                                    0.01-3
HalfCheetah           ``world_friction`` 0.1-4    ``torso_mass`` 0.1-7              ``back_thigh_mass`` 0.1-3
                      (1d: 0.1-3)
Hopper                ``world_friction`` 0.1-3    ``torso_mass`` 0.1-3              ``thigh_mass`` 0.1-4
HumanoidStandup       ``torso_mass`` 0.1-16       ``right_foot_mass`` 0.1-8         ``left_thigh_mass`` 0.1-5
                                                  (3d of M2TD3: 0.1-5)              (3d of M2TD3: 0.1-8)
InvertedPendulum      ``pole_mass`` 1-31          ``cart_mass`` 1-11                none
Walker2d              ``world_friction`` 0.1-4    ``torso_mass`` 0.1-5              ``thigh_mass`` 0.1-6
====================  ==========================  ================================  ==========================

Masses in kg. ``uncertainty="force"`` has constant forces in [-3, 3] N on named bodies instead, nominally 0; the
classes list them. See :class:`RobustEnv` for the arguments: how friction is set, inertia, and parameters drawn anew at
every reset. ``info["params"]`` of a reset tells the parameters. :func:`evaluation_grid` makes the grids of the papers;
``gymnasium.make_vec(..., vectorization_mode="vector_entry_point")`` makes many at once, whose ``set_params`` takes such
a grid.

Where we differ from the published suites
-----------------------------------------
- ``friction_mode="contact"`` (default): the friction asked for is that of the contact. The suites set the floor alone,
  and MuJoCo takes the larger coefficient of the two geoms: on Hopper nothing below 2.0 has an effect, on Walker2d
  nothing below 1.9. ``"floor"`` does as they do.
- The nominal values are the model's own; RRLS begins Hopper with another floor and InvertedPendulum with the masses of
  cart and pole exchanged.
- A change of mass also renews what MuJoCo derives from it (``mj_setConst``).
- The planar robots' forces are along x and z, as in RARL. RRLS has x and y, and y is across the plane: they cannot
  feel it, so RRLS's set is ours with every z at 0.
- Forces hold over resets; RRLS's are lost in a reset.
- Parameters have one name each, ``torso_mass`` for RRLS's ``torsomass``.

Sources: Tanabe et al. 2022 (M2TD3, arXiv 2211.03413); Zouitine et al. 2024 (RRLS, arXiv 2406.08406) and its code;
Pinto et al. 2017 (RARL, arXiv 1703.02702); Zouitine et al. 2024 (IWOCS, arXiv 2410.06212).
"""

from __future__ import annotations

from ctrlrl_envs.robust.base import RobustEnv, evaluation_grid
from ctrlrl_envs.robust.tasks import (
    RobustAnt,
    RobustHalfCheetah,
    RobustHopper,
    RobustHumanoidStandup,
    RobustInvertedPendulum,
    RobustWalker2d,
)
from ctrlrl_envs.robust.vector import RobustVectorEnv

__all__ = [
    "RobustAnt", "RobustEnv", "RobustHalfCheetah", "RobustHopper", "RobustHumanoidStandup", "RobustInvertedPendulum",
    "RobustVectorEnv", "RobustWalker2d", "evaluation_grid",
]  # fmt: skip
