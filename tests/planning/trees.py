"""Small decision processes and their answers over whole histories; nothing of the library is used here."""

from fractions import Fraction as F
from itertools import product

import numpy as np

LADDER = {0: {0: [(F(1), 0, 0, False)], 1: [(F(3, 5), 0, 1, False), (F(2, 5), 0, -1, False)]}}
"""Safe: nothing; risk: +1 or -1."""
MEAN_VARIANCE = {
    0: {0: [(F(1, 2), 1, -3, False), (F(1, 2), 1, 3, False)], 1: [(F(1, 2), 1, -3, False), (F(1, 2), 1, 3, False)]},
    1: {0: [(F(1), 1, 0, True)], 1: [(F(1), 1, 1, True)]},
}
"""-3 or +3 by lot, then 0 or +1 as one likes."""


class Dyadic:
    """Probabilities k/8 and whole rewards, so that float64 is exact at gamma = 1 and 1/2."""

    def __init__(self, seed, states=3, actions=2):
        rng = np.random.default_rng(seed)
        self.p = rng.multinomial(8, np.full(states, 1 / states), size=(states, actions)) / 8
        self.r = rng.integers(-2, 3, size=(states, actions, states))
        self.states, self.actions = states, actions

    def table(self):
        n = range(self.states)
        return {
            s: {a: [(float(self.p[s, a, t]), t, int(self.r[s, a, t]), False) for t in n] for a in range(self.actions)}
            for s in n
        }

    def best(self, functions, stocks, gamma, horizon):
        """[functions, stocks] max over all policies of the history of E f(stock + return), from state 0."""
        state, total, levels = np.zeros(1, dtype=int), np.zeros(1), []
        for t in range(horizon):
            levels.append(self.p[state])
            total = (total[:, None, None] + gamma**t * self.r[state]).ravel()
            state = np.tile(np.arange(self.states), len(state) * self.actions)
        values = np.array([[f(c + total) for c in stocks] for f in functions], dtype=float)
        for p in reversed(levels):
            values = (values.reshape(*values.shape[:2], *p.shape) * p).sum(-1).max(-1)
        return values[..., 0]


def laws_of_deterministic_policies(table, horizon):
    """Laws {return: probability} of all deterministic policies of the history from state 0, gamma = 1."""

    def laws(state, left):
        if not left:
            return [{0: 1}]
        found = []
        for outcomes in table[state].values():
            outcomes = [o for o in outcomes if o[0] > 0]
            later = [[{0: 1}] if end else laws(n, left - 1) for _, n, _, end in outcomes]
            for chosen in product(*later):
                law = {}
                for (p, _, r, _), part in zip(outcomes, chosen, strict=True):
                    for x, q in part.items():
                        law[r + x] = law.get(r + x, 0) + p * q
                found.append(law)
        return found

    return laws(0, horizon)


def tail_mean(law, level):
    """Mean of the worst share of {return: probability}."""
    total, left = 0, level
    for x, p in sorted(law.items()):
        total, left = total + x * min(p, left), left - min(p, left)
    return total / level


def lp_over_histories(table, horizon, utility):
    """max over randomised policies of the history of E utility(return), a linear programme over their flows."""
    from scipy.optimize import linprog

    gains, rows, right = [], [], []  # of each (history, action): its final gain; flow out - flow in = 0

    def visit(state, total, left, inflow):
        row = len(rows)
        rows.append({})
        right.append(0.0 if inflow else 1.0)
        if inflow:
            rows[row][inflow[0]] = -inflow[1]
        for outcomes in table[state].values():
            mine = len(gains)
            gains.append(0.0)
            rows[row][mine] = 1.0
            for p, n, r, end in outcomes:
                if end or left == 1:
                    gains[mine] += float(p) * utility(total + r)
                else:
                    visit(n, total + r, left - 1, (mine, float(p)))

    visit(0, 0, horizon, None)
    matrix = np.zeros((len(rows), len(gains)))
    for i, row in enumerate(rows):
        for j, value in row.items():
            matrix[i, j] = value
    return -linprog(-np.array(gains), A_eq=matrix, b_eq=right).fun
