"""The robust tasks and their parameter sets."""

from __future__ import annotations

from typing import Any, Literal

from gymnasium.envs.mujoco.ant_v5 import AntEnv
from gymnasium.envs.mujoco.half_cheetah_v5 import HalfCheetahEnv
from gymnasium.envs.mujoco.hopper_v5 import HopperEnv
from gymnasium.envs.mujoco.humanoidstandup_v5 import HumanoidStandupEnv
from gymnasium.envs.mujoco.inverted_pendulum_v5 import InvertedPendulumEnv
from gymnasium.envs.mujoco.walker2d_v5 import Walker2dEnv

from ctrlrl_envs.robust.base import Force, Friction, Mass, Parameter, RobustEnv

X, Y, Z = 0, 1, 2


class RobustAnt(RobustEnv, AntEnv):
    """Gymnasium's ``Ant-v5`` (description, spaces, reward: see there) with masses that can be set.

    ========================  ==========  ============  ========
    parameter                 sets        range         nominal
    ========================  ==========  ============  ========
    ``torso_mass``            1d 2d 3d    [0.1, 3] kg   0.327
    ``front_left_leg_mass``   2d 3d       [0.01, 3] kg  0.0392
    ``front_right_leg_mass``  3d          [0.01, 3] kg  0.0392
    ========================  ==========  ============  ========

    "force": ``torso_force_x``, ``torso_force_y``, and the same of ``front_left_leg`` and ``front_right_leg``, in
    [-3, 3] N. Forces that are applied are part of ``cfrc_ext``, so the observation and the contact cost hold them.
    """

    physics = {  # noqa: RUF012 - annotated in the base
        "torso_mass": Mass("torso", 0.1, 3.0),
        "front_left_leg_mass": Mass("front_left_leg", 0.01, 3.0),
        "front_right_leg_mass": Mass("front_right_leg", 0.01, 3.0),
    }
    forces = {  # noqa: RUF012
        "torso_force_x": Force("torso", X),
        "torso_force_y": Force("torso", Y),
        "front_left_leg_force_x": Force("front_left_leg", X),
        "front_left_leg_force_y": Force("front_left_leg", Y),
        "front_right_leg_force_x": Force("front_right_leg", X),
        "front_right_leg_force_y": Force("front_right_leg", Y),
    }


class RobustHalfCheetah(RobustEnv, HalfCheetahEnv):
    """Gymnasium's ``HalfCheetah-v5`` (description, spaces, reward: see there) with friction and masses to be set.

    =====================  =========  ===========================  ========
    parameter              sets       range                        nominal
    =====================  =========  ===========================  ========
    ``world_friction``     1d 2d 3d   [0.1, 4]; in 1d [0.1, 3]     0.4
    ``torso_mass``         2d 3d      [0.1, 7] kg                  6.25
    ``back_thigh_mass``    3d         [0.1, 3] kg                  1.54
    =====================  =========  ===========================  ========

    Both friction modes set all geoms, as published. "force": ``torso_force_x``, ``torso_force_z``, and the same of
    ``back_foot`` and ``front_foot``, in [-3, 3] N.
    """

    physics = {  # noqa: RUF012
        "world_friction": Friction("bfoot", 0.1, 4.0, all_geoms=True),
        "torso_mass": Mass("torso", 0.1, 7.0),
        "back_thigh_mass": Mass("bthigh", 0.1, 3.0),
    }
    alone = {"world_friction": Friction("bfoot", 0.1, 3.0, all_geoms=True)}  # noqa: RUF012
    forces = {  # noqa: RUF012
        "torso_force_x": Force("torso", X),
        "torso_force_z": Force("torso", Z),
        "back_foot_force_x": Force("bfoot", X),
        "back_foot_force_z": Force("bfoot", Z),
        "front_foot_force_x": Force("ffoot", X),
        "front_foot_force_z": Force("ffoot", Z),
    }


class RobustHopper(RobustEnv, HopperEnv):
    """Gymnasium's ``Hopper-v5`` (description, spaces, reward: see there) with friction and masses to be set.

    ==================  =========  =============  ==========================================
    parameter           sets       range          nominal
    ==================  =========  =============  ==========================================
    ``world_friction``  1d 2d 3d   [0.1, 3]       2.0; with ``friction_mode="floor"`` 1.0
    ``torso_mass``      2d 3d      [0.1, 3] kg    3.67, outside the set as published
    ``thigh_mass``      3d         [0.1, 4] kg    4.06, outside the set as published
    ==================  =========  =============  ==========================================

    With ``friction_mode="floor"`` every value up to the foot's 2.0 gives the same contact. RRLS begins with a floor
    of 0.7 instead of the model's 1.0, without effect for that reason. "force": ``foot_force_x``, ``foot_force_z``
    in [-3, 3] N.
    """

    physics = {  # noqa: RUF012
        "world_friction": Friction("foot_geom", 0.1, 3.0),
        "torso_mass": Mass("torso", 0.1, 3.0),
        "thigh_mass": Mass("thigh", 0.1, 4.0),
    }
    forces = {"foot_force_x": Force("foot", X), "foot_force_z": Force("foot", Z)}  # noqa: RUF012


class RobustHumanoidStandup(RobustEnv, HumanoidStandupEnv):
    """Gymnasium's ``HumanoidStandup-v5`` (description, spaces, reward: see there) with masses that can be set.

    ====================  =========  ================================================  ========
    parameter             sets       range                                             nominal
    ====================  =========  ================================================  ========
    ``torso_mass``        1d 2d 3d   [0.1, 16] kg                                      8.91
    ``right_foot_mass``   2d 3d      [0.1, 8] kg; in 3d with ``bounds="m2td3"`` 0.1-5  1.77
    ``left_thigh_mass``   3d         [0.1, 5] kg; with ``bounds="m2td3"`` 0.1-8        4.75
    ====================  =========  ================================================  ========

    "force": ``torso_force_x``, ``torso_force_y``, and the same of ``right_thigh`` and ``left_foot``, in [-3, 3] N.
    Forces that are applied are part of ``cfrc_ext``, so the observation holds them; and its part ``cinert`` holds the
    masses themselves, so that a policy sees the physics it is in. Gymnasium's argument
    ``include_cinert_in_observation=False`` hides them.

    Args:
        uncertainty: See :class:`RobustEnv`, as the other arguments.
        bounds: Whose ranges in 3d: ``"rrls"``, or ``"m2td3"`` for those of M2TD3 and IWOCS, where the two of foot
            and thigh are exchanged.
        kwargs: See :class:`RobustEnv`.
    """

    physics = {  # noqa: RUF012
        "torso_mass": Mass("torso", 0.1, 16.0),
        "right_foot_mass": Mass("right_foot", 0.1, 8.0),
        "left_thigh_mass": Mass("left_thigh", 0.1, 5.0),
    }
    forces = {  # noqa: RUF012
        "torso_force_x": Force("torso", X),
        "torso_force_y": Force("torso", Y),
        "right_thigh_force_x": Force("right_thigh", X),
        "right_thigh_force_y": Force("right_thigh", Y),
        "left_foot_force_x": Force("left_foot", X),
        "left_foot_force_y": Force("left_foot", Y),
    }

    def __init__(
        self,
        uncertainty: Literal["1d", "2d", "3d", "force"] = "2d",
        *,
        bounds: Literal["rrls", "m2td3"] = "rrls",
        **kwargs: Any,
    ) -> None:
        if bounds not in ("rrls", "m2td3"):
            raise ValueError(f"bounds={bounds!r} is unknown; expected one of rrls, m2td3")
        self.bounds = bounds
        super().__init__(uncertainty, **kwargs)
        self._ezpickle_kwargs["bounds"] = bounds

    def uncertainty_set(self, name: str) -> dict[str, Parameter]:
        """The parameters of a set, in order; see the base."""
        found = super().uncertainty_set(name)
        if name == "3d" and self.bounds == "m2td3":
            found["right_foot_mass"] = Mass("right_foot", 0.1, 5.0)
            found["left_thigh_mass"] = Mass("left_thigh", 0.1, 8.0)
        return found


class RobustInvertedPendulum(RobustEnv, InvertedPendulumEnv):
    """Gymnasium's ``InvertedPendulum-v5`` (description, spaces, reward: see there) with masses that can be set.

    ==============  ======  ============  ========
    parameter       sets    range         nominal
    ==============  ======  ============  ========
    ``pole_mass``   1d 2d   [1, 31] kg    5.02
    ``cart_mass``   2d      [1, 11] kg    10.47
    ==============  ======  ============  ========

    There is no 3d. RRLS begins with the two nominal values exchanged, which is another task than Gymnasium's.
    "force": ``pole_force_x``, ``pole_force_z`` in [-3, 3] N.
    """

    physics = {"pole_mass": Mass("pole", 1.0, 31.0), "cart_mass": Mass("cart", 1.0, 11.0)}  # noqa: RUF012
    forces = {"pole_force_x": Force("pole", X), "pole_force_z": Force("pole", Z)}  # noqa: RUF012


class RobustWalker2d(RobustEnv, Walker2dEnv):
    """Gymnasium's ``Walker2d-v5`` (description, spaces, reward: see there) with friction and masses to be set.

    ==================  =========  =============  ==========================================
    parameter           sets       range          nominal
    ==================  =========  =============  ==========================================
    ``world_friction``  1d 2d 3d   [0.1, 4]       1.9; with ``friction_mode="floor"`` 0.7
    ``torso_mass``      2d 3d      [0.1, 5] kg    3.67
    ``thigh_mass``      3d         [0.1, 6] kg    4.06, the right one's
    ==================  =========  =============  ==========================================

    With ``friction_mode="floor"`` every value up to the feet's 1.9 gives the same contact. "force":
    ``leg_force_x``, ``leg_force_z``, ``left_foot_force_x``, ``left_foot_force_z`` in [-3, 3] N.
    """

    physics = {  # noqa: RUF012
        "world_friction": Friction("foot_geom", 0.1, 4.0),
        "torso_mass": Mass("torso", 0.1, 5.0),
        "thigh_mass": Mass("thigh", 0.1, 6.0),
    }
    forces = {  # noqa: RUF012
        "leg_force_x": Force("leg", X),
        "leg_force_z": Force("leg", Z),
        "left_foot_force_x": Force("foot_left", X),
        "left_foot_force_z": Force("foot_left", Z),
    }
