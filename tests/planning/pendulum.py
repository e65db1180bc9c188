"""A pendulum on a grid of angles and speeds, of uncertain mass and length; exact as a finite decision process."""

import numpy as np

GRAVITY, DT_S, SPEED_MAX = 10.0, 0.1, 8.0


def pendulum(mass: float, length: float, cells: int = 41, torques: int = 7):
    """Successors and probabilities [S, A, 4] of one model, S = cells^2.

    A uniform rod: speed changes by (3 g / 2 l sin + 3 / (m l^2) u) dt, the angle by the new speed times dt. A landing
    point is shared bilinearly among the four grid points around it; the angle wraps, the speed is cut at +-8.
    """
    angle, speed, torque = np.meshgrid(*axes(cells, torques), indexing="ij")
    after = speed + DT_S * (1.5 * GRAVITY / length * np.sin(angle) + 3 / (mass * length**2) * torque)
    after = np.clip(after, -SPEED_MAX, SPEED_MAX)
    x = (angle + DT_S * after + np.pi) / (2 * np.pi) * cells % cells
    y = (after + SPEED_MAX) / (2 * SPEED_MAX) * (cells - 1)
    i, j = np.floor(x).astype(int) % cells, np.minimum(np.floor(y).astype(int), cells - 2)
    fx, fy = x - np.floor(x), y - j
    right, up = (i + 1) % cells * cells, j + 1
    to = np.stack([i * cells + j, i * cells + up, right + j, right + up], -1)
    share = np.stack([(1 - fx) * (1 - fy), (1 - fx) * fy, fx * (1 - fy), fx * fy], -1)
    return to.reshape(cells**2, torques, 4), share.reshape(cells**2, torques, 4)


def pendulum_reward(cells: int = 41, torques: int = 7):
    """-(angle^2 + 0.1 speed^2 + 0.001 torque^2), [S, A]."""
    angle, speed, torque = np.meshgrid(*axes(cells, torques), indexing="ij")
    return -(angle**2 + 0.1 * speed**2 + 0.001 * torque**2).reshape(cells**2, torques)


def hanging(cells: int = 41) -> int:
    """The state at the lowest point, at rest (``cells`` odd)."""
    return cells // 2


def axes(cells: int, torques: int):
    """Angles [-pi, pi), where 0 is upright; speeds; torques."""
    angles = np.linspace(-np.pi, np.pi, cells, endpoint=False)
    return angles, np.linspace(-SPEED_MAX, SPEED_MAX, cells), np.linspace(-2.0, 2.0, torques)
