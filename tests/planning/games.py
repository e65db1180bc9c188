"""Small random games and their answers by trying everything; nothing of the library is used here."""

from itertools import product
from typing import NamedTuple

import numpy as np

STATES, ACTIONS, CHOICES, GAMMA = 4, 2, 2, 0.9
POLICIES = np.array(list(product(range(ACTIONS), repeat=STATES)))
"""[16, S] all deterministic policies."""
MEMBERS = np.array(list(product(range(CHOICES), repeat=STATES * ACTIONS))).reshape(-1, STATES, ACTIONS)
"""[256, S, A] all combinations of rows."""
ON_POLICY = np.array(list(product(range(CHOICES), repeat=STATES)))
"""[16, S] all combinations of the rows that a policy meets."""


class Answers(NamedTuple):
    policy_worst: np.ndarray
    """[G, 16, S] min over members of the value of each policy."""

    member_best: np.ndarray
    """[G, M, S] V* of each member."""

    @property
    def best_worst(self):
        """[G, S] max over deterministic policies of the worst case."""
        return self.policy_worst.max(1)

    @property
    def least_optimum(self):
        """[G, S] min over members of V*."""
        return self.member_best.min(1)

    def worst_of(self, game, policy):
        """[S] worst case of a policy, state by state."""
        return self.policy_worst[game, int(np.flatnonzero((policy == POLICIES).all(-1))[0])]


def draw(seed, games, rows_per_pair=CHOICES):
    """Rows [G, S, A, K, S] and rewards [G, S, A]."""
    rng = np.random.default_rng(seed)
    rows = rng.dirichlet(np.full(STATES, 0.5), size=(games, STATES, ACTIONS, rows_per_pair))
    return rows, rng.standard_normal((games, STATES, ACTIONS))


def members(rows):
    """All 256 members [256, S, A, S] of the rectangular set of one game."""
    s, a = np.ogrid[:STATES, :ACTIONS]
    return rows[s, a, MEMBERS]


def solve_rectangular(rows, rewards):
    """The 256 members differ for a policy in 16 ways only."""
    s = np.arange(STATES)
    values = []
    for policy in POLICIES:
        met = rows[:, s, policy][:, s, ON_POLICY]  # [G, 16, S, S]
        values.append(_values(met, rewards[:, None, s, policy]))
    worst = np.stack([v.min(1) for v in values], 1)
    which = [(MEMBERS[:, s, policy] @ CHOICES ** np.arange(STATES)[::-1]) for policy in POLICIES]
    best = np.maximum.reduce([v[:, of] for v, of in zip(values, which, strict=True)])
    return Answers(worst, best)


def solve_list(models, rewards):
    """Models [G, M, S, A, S], rewards [G, S, A]."""
    s = np.arange(STATES)
    values = [_values(models[:, :, s, policy], rewards[:, None, s, policy]) for policy in POLICIES]
    return Answers(np.stack([v.min(1) for v in values], 1), np.maximum.reduce(values))


def _values(chains, rewards):
    system = np.eye(STATES) - GAMMA * chains
    return np.linalg.solve(system, np.broadcast_to(rewards, chains.shape[:-1])[..., None])[..., 0]
