"""A point that walks to its goal straight through a disc of rare, large penalties, or around it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import gymnasium as gym
import numpy as np

from ctrlrl_envs.multimodal.base import ToyVector, Uniforms, check

STRIDE = 0.1
"""Largest move in each direction."""
GOAL, REACHED = np.array([0.1, 0.1]), 0.05
CENTRE, RADIUS = np.array([0.5, 0.5]), 0.3
CORNER, SPREAD = 0.85, 0.05
"""Where episodes start with ``start="corner"``: both coordinates in [0.8, 0.85]."""


class RiskyPointMass(gym.Env[np.ndarray, np.ndarray]):
    """Walk to (0.1, 0.1) in the unit square; a disc of radius 0.3 around the middle is dangerous.

    - Observation: position and goal, [4] float32. Action: a move, each coordinate in [-0.1, 0.1]; others are cut.
    - Reward: minus the distance to the goal, minus 0.1, of the place that the step begins at; inside the disc another
      ``-penalty`` with probability ``1 - risk_prob``. Then the point moves, and stays in the square.
    - The episode ends with the step that begins within 0.05 of the goal. The registered limit is 60 steps.
    - ``info["violation"]``: the step began inside the disc. ``info["cost"]``: the penalty that fell, 0 or ``penalty``.
      ``info["is_success"]``: the goal was reached.

    Source: Ma, Jayaraman, Bastani 2021, Conservative Offline Distributional Reinforcement Learning (arXiv:2107.06106)
    and its released code, whose runs have risk_prob 0.9 and penalty 50. There the penalty comes from a generator that
    no seed reaches; here from the environment's own.

    Args:
        risk_prob: Probability that a step inside the disc goes unpunished.
        penalty: What it costs otherwise.
        start: ``corner``, opposite to the goal, or ``uniform`` in [0.1, 0.9]^2 outside of the disc.

    Raises:
        ValueError: Arguments outside of these ranges.
    """

    metadata: dict[str, Any] = {"render_modes": []}  # noqa: RUF012 - as gymnasium declares it

    def __init__(
        self, risk_prob: float = 0.9, penalty: float = 50.0, start: Literal["corner", "uniform"] = "corner"
    ) -> None:
        check("risk_prob", risk_prob, "a number in [0, 1]", lambda p: 0 <= p <= 1)
        check("penalty", penalty, "a number of at least 0", lambda p: p >= 0)
        if start not in ("corner", "uniform"):
            raise ValueError(f"start={start!r} must be 'corner' or 'uniform'")
        self.risk_prob, self.penalty, self.start = float(risk_prob), float(penalty), start
        self.observation_space = gym.spaces.Box(0.0, 1.0, (4,), np.float32)
        self.action_space = gym.spaces.Box(-STRIDE, STRIDE, (2,), np.float32)
        self.position: np.ndarray | None = None

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Begin at a place drawn as ``start`` says."""
        super().reset(seed=seed)
        while True:
            self.position = _place(np.array([self.np_random.random(), self.np_random.random()]), self.start)
            if not bool(inside(self.position)):
                return observation(self.position), {}

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Pay for the place, then move."""
        if self.position is None:
            raise gym.error.ResetNeeded("call reset() before step()")
        place, drawn = self.position, self.np_random.random()
        distance, violation = float(np.linalg.norm(place - GOAL)), bool(inside(place))
        cost = self.penalty if violation and drawn >= self.risk_prob else 0.0
        reached = distance < REACHED
        self.position = _moved(place, np.asarray(action, dtype=np.float64))
        info = {"violation": violation, "cost": cost, "is_success": reached}
        return observation(self.position), -distance - 0.1 - cost, reached, False, info


class RiskyPointMassVector(ToyVector):
    """:class:`RiskyPointMass`, many at once; infos are ``violation``, ``cost`` and ``is_success`` [num_envs]."""

    def __init__(self, num_envs: int = 1, *, max_episode_steps: int | None = None, **kwargs: Any) -> None:
        single = RiskyPointMass(**kwargs)
        super().__init__(single, num_envs, max_episode_steps)
        self.risk_prob, self.penalty, self.start = single.risk_prob, single.penalty, single.start
        self.position, self._uniforms = np.zeros((num_envs, 2)), Uniforms(num_envs)
        self._violation, self._cost = np.zeros(num_envs, dtype=np.bool_), np.zeros(num_envs)

    def _begin(self, rows: np.ndarray, seeds: Sequence[int | None] | None) -> None:
        self._violation[rows], self._cost[rows] = False, 0.0
        while len(rows):
            first = self._uniforms.draw(rows, seeds)
            self.position[rows] = _place(np.stack([first, self._uniforms.draw(rows)], 1), self.start)
            rows, seeds = rows[inside(self.position[rows])], None

    def _move(self, action: np.ndarray, live: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        place, drawn = self.position, np.zeros(self.num_envs)
        rows = np.flatnonzero(live)
        drawn[rows] = self._uniforms.draw(rows)
        distance = np.linalg.norm(place - GOAL, axis=1)
        self._violation = live & inside(place)
        self._cost = np.where(self._violation & (drawn >= self.risk_prob), self.penalty, 0.0)
        reached = live & (distance < REACHED)
        self.position = np.where(live[:, None], _moved(place, action), place)
        return np.where(live, -distance - 0.1 - self._cost, 0.0), reached, reached

    def _observe(self) -> np.ndarray:
        return observation(self.position)

    def _infos(self) -> dict[str, Any]:
        return {"violation": self._violation.copy(), "cost": self._cost.copy(), "is_success": self._success.copy()}


def observation(position: np.ndarray) -> np.ndarray:
    """[..., 4] float32 of positions [..., 2]."""
    return np.concatenate([position, np.broadcast_to(GOAL, position.shape)], -1).astype(np.float32)


def inside(position: np.ndarray) -> np.ndarray:
    """[...] bool: whether positions [..., 2] lie in the disc, its edge included."""
    return np.square(position - CENTRE).sum(-1) <= RADIUS**2


def _place(uniform: np.ndarray, start: str) -> np.ndarray:
    return CORNER - SPREAD * uniform if start == "corner" else 0.1 + 0.8 * uniform


def _moved(place: np.ndarray, action: np.ndarray) -> np.ndarray:
    return np.clip(place + np.clip(action, -STRIDE, STRIDE), 0.0, 1.0)


# -- policies -------------------------------------------------------------------------------------


def straight_action(obs: np.ndarray) -> np.ndarray:
    """[..., 2] float32: straight to the goal at full stride, whatever lies between; observations are [..., 4]."""
    way = np.asarray(obs, np.float64)[..., 2:] - np.asarray(obs, np.float64)[..., :2]
    return _stride(way).astype(np.float32)


def safe_action(obs: np.ndarray, margin: float = 0.06) -> np.ndarray:
    """[..., 2] float32: to the goal around the disc, ``margin`` away from its edge, on the side that is nearer."""
    here = np.asarray(obs, np.float64)[..., :2]
    goal = np.asarray(obs, np.float64)[..., 2:]
    way, out = goal - here, here - CENTRE
    length, far = np.linalg.norm(way, axis=-1, keepdims=True), np.linalg.norm(out, axis=-1, keepdims=True)
    # the point of the way that is nearest to the middle of the disc
    share = np.clip(-(out * way).sum(-1, keepdims=True) / np.maximum(length**2, 1e-12), 0.0, 1.0)
    clear = np.linalg.norm(out + share * way, axis=-1, keepdims=True) >= RADIUS + margin
    normal = out / np.maximum(far, 1e-12)
    side = np.where(normal[..., :1] * way[..., 1:] - normal[..., 1:] * way[..., :1] >= 0.0, 1.0, -1.0)
    along = side * np.stack([-normal[..., 1], normal[..., 0]], -1)
    around = along + 4.0 * (RADIUS + 1.5 * margin - far) * normal
    # shorter strides on the arc, so that steps along the tangent do not leave it
    return np.where(clear, _stride(way), 0.7 * _stride(around * 1e3)).astype(np.float32)


def _stride(way: np.ndarray) -> np.ndarray:
    """``way`` [..., 2] shortened to a move that is allowed, its direction kept."""
    return way * np.minimum(1.0, STRIDE / np.maximum(np.abs(way).max(-1, keepdims=True), 1e-12))
