"""EnvPool's C++ environments as a Gymnasium vector environment, and which of them agree with Gymnasium's."""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import importlib.util
import logging
import warnings
from collections.abc import Sequence
from functools import cache
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.vector import AutoresetMode
from gymnasium.vector.utils import batch_space

from ctrlrl.types import EnvSpec

logger = logging.getLogger("ctrlrl")

_MUJOCO = (
    "Ant",
    "HalfCheetah",
    "Hopper",
    "InvertedDoublePendulum",
    "InvertedPendulum",
    "Reacher",
    "Swimmer",
    "Walker2d",
)

VERIFIED: frozenset[str] = frozenset(
    [f"{name}-{version}" for name in _MUJOCO for version in ("v4", "v5")]
    + ["Humanoid-v5", "HumanoidStandup-v5", "Pusher-v5"]
    + ["Acrobot-v1", "CartPole-v1", "MountainCar-v0", "MountainCarContinuous-v0", "Pendulum-v1"]
)
"""Ids whose spaces, step limit, reset distribution, dynamics, rewards and terminations agree with Gymnasium's
(tests/engine/test_envpool.py); ``backend="auto"`` takes EnvPool for these only."""

DISAGREE: dict[str, str] = {
    "BallInCupCatch-v1": "EnvPool takes another geom's size for the ball's and pays while that sticks out of the cup",
    "CartpoleThreePoles-v1": "EnvPool's upper poles start from angles with a tenth of the spread",
    "CartpoleTwoPoles-v1": "EnvPool's upper pole starts from angles with a tenth of the spread",
    "Humanoid-v4": "EnvPool's observation holds other contact forces than Gymnasium's, by thousands",
    "HumanoidStandup-v4": "EnvPool's rewards and the contact forces it observes are other than Gymnasium's",
    "Pusher-v4": "Gymnasium refuses it with MuJoCo 3, so there is nothing to agree with",
}
"""Ids of both libraries that are not known to be the same environment, and why. ``backend="auto"`` never takes
EnvPool for them; ``backend="envpool"`` does, with a warning."""

_DOG = (
    "joint_angles joint_velocites torso_pelvis_height z_projection torso_com_velocity inertial_sensors foot_forces "
    "touch_sensors actuator_state"
)
_HUMANOID = "joint_angles head_height extremities torso_vertical com_velocity velocity"
_QUADRUPED = "egocentric_state torso_velocity torso_upright imu force_torque"

SUITE_KEYS: dict[str, str] = {
    **dict.fromkeys(("DogRun-v1", "DogStand-v1", "DogTrot-v1", "DogWalk-v1"), _DOG),
    "FingerSpin-v1": "position velocity touch",
    "FishSwim-v1": "joint_angles upright target velocity",
    "FishUpright-v1": "joint_angles upright velocity",
    **dict.fromkeys(("HumanoidRun-v1", "HumanoidStand-v1", "HumanoidWalk-v1"), _HUMANOID),
    "HumanoidRunPureState-v1": "position velocity",
    "QuadrupedEscape-v1": f"{_QUADRUPED} origin rangefinder",
    "QuadrupedFetch-v1": f"{_QUADRUPED} ball_state target_position",
    **dict.fromkeys(("QuadrupedRun-v1", "QuadrupedWalk-v1"), _QUADRUPED),
}
"""What dm_control's observation holds, in its order, where EnvPool's has other entries beside or another order: one
observation serves all tasks of a domain there."""


def control_suite(env_id: str) -> bool:
    """Whether ``env_id`` is a task of the DeepMind control suite, whose ids are EnvPool's (see ctrlrl_envs.dmc)."""
    with contextlib.suppress(ImportError):
        importlib.import_module("ctrlrl_envs")
    found = gym.registry.get(env_id)
    return found is not None and str(found.entry_point).startswith("ctrlrl_envs.dmc")


@cache
def same_physics() -> bool:
    """Whether the installed MuJoCo computes what EnvPool's own does: from 3.5 on, by the tests' tolerances."""
    try:
        major, minor = importlib.metadata.version("mujoco").split(".")[:2]
    except importlib.metadata.PackageNotFoundError:
        return False
    return (int(major), int(minor)) >= (3, 5)


def agrees(env_id: str) -> bool:
    """Whether EnvPool has ``env_id`` and it is known to be the same environment as Gymnasium's."""
    mujoco = env_id.split("-")[0] in (*_MUJOCO, "Humanoid", "HumanoidStandup", "Pusher")
    return env_id in VERIFIED & ids() and (same_physics() or not mujoco)


def installed() -> bool:
    """Whether EnvPool can be imported."""
    return importlib.util.find_spec("envpool") is not None


@cache
def ids() -> frozenset[str]:
    """Every id EnvPool knows; empty without EnvPool."""
    if not installed():
        return frozenset()
    import envpool

    return frozenset(envpool.list_all_envs())


class EnvPoolVector(gym.vector.VectorEnv):
    """EnvPool behind Gymnasium's vector interface, autoreset NEXT_STEP.

    After an end, the next step ignores that environment's action and returns the first observation of the new
    episode with reward 0. The step limit is that of Gymnasium's registration. Box actions are float32, as
    Gymnasium declares them. Observations of the DeepMind control suite are one float32 vector, dm_control's entries
    in its order.

    EnvPool itself has one fault that cannot be seen from outside: where an episode terminates on exactly the last
    step of its limit, only ``truncated`` is set.

    Args:
        spec: The environment; its kwargs and wrappers must be empty.
        seeds: One seed per environment, fixed for the life of the object: EnvPool cannot be reseeded.
        keep_infos: Return EnvPool's infos (arrays [N]); otherwise an empty dict.
    """

    def __init__(self, spec: EnvSpec, seeds: Sequence[int] | None = None, *, keep_infos: bool = False) -> None:
        check_spec(spec)
        if spec.id in DISAGREE:
            logger.warning("EnvPool's %s is not Gymnasium's: %s", spec.id, DISAGREE[spec.id])
        import envpool

        seeds = list(range(spec.n_envs)) if seeds is None else [int(s) for s in seeds]
        if len(seeds) != spec.n_envs or any(not 0 <= s < 2**31 for s in seeds):
            raise ValueError(f"EnvPool needs {spec.n_envs} seeds in [0, 2^31), found {seeds}")
        options: dict[str, Any] = {} if (limit := step_limit(spec.id)) is None else {"max_episode_steps": limit}
        self.pool: Any = envpool.make(
            spec.id, env_type="gymnasium", num_envs=spec.n_envs, num_threads=spec.threads or 0, seed=seeds, **options
        )
        self.name, self.num_envs, self.keep_infos = spec.id, spec.n_envs, keep_infos
        self.metadata = {**self.pool.metadata, "autoreset_mode": AutoresetMode.NEXT_STEP}
        with warnings.catch_warnings():
            # EnvPool states float32 bounds in float64, of which Gymnasium warns
            warnings.simplefilter("ignore")
            self.single_observation_space = observed = self.pool.observation_space
            self.single_action_space = space = self.pool.action_space
        self._keys: list[str] | None = None
        if control_suite(spec.id):
            self._keys = SUITE_KEYS.get(spec.id, " ".join(observed.spaces)).split()
            size = sum(int(np.prod(observed[key].shape)) for key in self._keys)
            self.single_observation_space = gym.spaces.Box(-np.inf, np.inf, (size,), np.float32)
        self._action_dtype = space.dtype
        if isinstance(space, gym.spaces.Box) and space.dtype == np.float64:
            self.single_action_space = gym.spaces.Box(
                space.low.astype(np.float32), space.high.astype(np.float32), dtype=np.float32
            )
        self.observation_space = batch_space(self.single_observation_space, self.num_envs)
        self.action_space = batch_space(self.single_action_space, self.num_envs)

    def reset(self, *, seed: Any = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Reset every environment.

        Raises:
            ValueError: A seed (EnvPool is seeded at construction) or options were given.
        """
        if seed is not None:
            raise ValueError(
                f"{self.name}: EnvPool ignores reset(seed=...); give the seeds at construction, or use backend='sync'"
            )
        if options:
            raise ValueError(f"{self.name}: EnvPool takes no reset options, found {sorted(options)}; use 'sync'")
        obs, infos = self.pool.reset()
        return self._observation(obs), infos if self.keep_infos else {}

    def step(self, actions: np.ndarray) -> tuple[Any, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """Step every environment that is not in its reset step."""
        obs, reward, terminated, truncated, infos = self.pool.step(np.asarray(actions, dtype=self._action_dtype))
        infos = infos if self.keep_infos else {}
        return self._observation(obs), reward.astype(np.float64), terminated, truncated, infos

    def _observation(self, obs: Any) -> Any:
        if self._keys is None:
            return obs
        parts = [obs[key].reshape(self.num_envs, -1) for key in self._keys]
        return np.concatenate(parts, axis=1, dtype=np.float32)

    def close_extras(self, **kwargs: Any) -> None:
        """Drop the pool; EnvPool ends its threads when the object goes."""
        self.pool = None


def step_limit(env_id: str) -> int | None:
    """Gymnasium's registered step limit of ``env_id``; None where it has none or does not know the id."""
    found = gym.registry.get(env_id)
    return None if found is None else found.max_episode_steps


def check_spec(spec: EnvSpec) -> None:
    """Raise if EnvPool cannot run ``spec``.

    Raises:
        ImportError: EnvPool is not installed.
        ValueError: It does not know the id, or the spec has kwargs or wrappers.
    """
    if not installed():
        raise ImportError("backend='envpool' needs EnvPool: pip install 'ctrlrl[fast]'")
    if spec.id not in ids():
        raise ValueError(f"EnvPool has no environment {spec.id!r}; use backend='sync' or 'async'")
    if spec.kwargs:
        raise ValueError(
            f"EnvPool environments take no env_kwargs here, found {sorted(spec.kwargs)}; use backend='sync' or 'async'"
        )
    if spec.wrappers:
        names = [path for path, _ in spec.wrappers]
        raise ValueError(f"EnvPool environments cannot be wrapped one by one, found {names}; use backend='sync'")
