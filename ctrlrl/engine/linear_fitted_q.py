"""Fitted Q evaluation where it can be solved exactly: linear features, and tables."""

from __future__ import annotations

import gymnasium as gym
import numpy as np
import torch
from torch import Tensor

from ctrlrl.data.dataset import Dataset, DatasetError
from ctrlrl.engine.fitted_q import check_estimand


def linear_fitted_q(
    phi: Tensor, reward_t: Tensor, discount_t: Tensor, phi_t: Tensor, horizon: int | None = None
) -> Tensor:
    """Weights of linear action values, exactly: where least squares of them on their own target ends.

    theta solves  phi' (phi - discount phi_t) theta = phi' r,  the limit of the regressions (and LSTD-Q: Lagoudakis and
    Parr 2003). With a horizon that many regressions are done, from zero. Of several solutions it is the smallest.

    Args:
        phi: [N, K] features of observations and actions taken.
        reward_t: [N]
        discount_t: [N] gamma x (1 - terminated).
        phi_t: [N, K] the policy's mean of the features at the next observation.
        horizon: Steps that count; None is without end.

    Returns:
        [K] weights, of the first step if there is a horizon.
    """
    gram, following, earned = phi.T @ phi, phi.T @ (discount_t.unsqueeze(-1) * phi_t), phi.T @ reward_t
    if horizon is None:
        return torch.linalg.lstsq(gram - following, earned, driver="gelsd").solution
    inverse, theta = torch.linalg.pinv(gram, hermitian=True), torch.zeros_like(earned)
    for _ in range(horizon):
        theta = inverse @ (earned + following @ theta)
    return theta


def tabular_fitted_q(data: Dataset, policy: np.ndarray, gamma: float, horizon: int | None = None) -> np.ndarray:
    """Action values [S, A] of a tabular policy [S, A], exact for the frequencies of the data: every pair a feature.

    For small numbers of pairs; it computes with [N, S A].

    Raises:
        TypeError: Observations or actions are not Discrete.
        DatasetError: The policy takes an action where the data never has it.
    """
    spaces = data.observation_space, data.action_space
    if not all(isinstance(space, gym.spaces.Discrete) for space in spaces):
        raise TypeError(f"a table needs Discrete observations and actions, found {spaces[0]} and {spaces[1]}")
    first, second = (int(space.start) for space in spaces)  # type: ignore[attr-defined]
    check_estimand(data, gamma, horizon)
    kept = np.flatnonzero(data.usable)
    state, action, after = (
        np.asarray(x)[kept].astype(np.int64).reshape(-1) - start
        for x, start in ((data.observations, first), (data.actions, second), (data.next_observations, first))
    )
    ended = np.asarray(data.terminals)[kept]
    n_states, n_actions = policy.shape
    seen = np.zeros((n_states, n_actions), dtype=bool)
    seen[state, action] = True
    visited = np.unique(np.r_[state, after[~ended]])
    missing = np.argwhere((policy[visited] > 0) & ~seen[visited])
    if len(missing):
        s, a = int(visited[missing[0, 0]]), int(missing[0, 1])
        raise DatasetError(
            f"{data.info.id} never has action {a + second} in state {s + first}, where the policy takes it; its value "
            "is not known"
        )
    phi = torch.zeros(len(kept), n_states, n_actions, dtype=torch.float64)
    phi[torch.arange(len(kept)), torch.from_numpy(state), torch.from_numpy(action)] = 1.0
    phi_t = torch.zeros_like(phi)
    phi_t[torch.arange(len(kept)), torch.from_numpy(after)] = torch.from_numpy(policy[after]).double()
    reward = torch.from_numpy(np.asarray(data.rewards, np.float64)[kept])
    discount = torch.from_numpy(gamma * ~ended)
    theta = linear_fitted_q(phi.flatten(1), reward, discount.double(), phi_t.flatten(1), horizon)
    return theta.view(n_states, n_actions).numpy()
