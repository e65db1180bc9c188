"""The grid on which the paper of IWOCS shows its method: three corridors, the shorter the windier."""

from __future__ import annotations

import numpy as np

from ctrlrl.planning.robust_mdp import RobustMDP

SIDE = 6
START, GOAL = (0, 0), (0, SIDE - 1)
WALL_ROWS = (1, 3)
CORRIDOR_COLUMNS = (1, 2, 3)
GUSTS = {0: 1, 2: 3, 4: 6, 5: 6}
"""Row of a corridor -> power of alpha with which the wind blows there."""
MOVES = ((-1, 0), (1, 0), (0, -1), (0, 1))
LEFT = MOVES[2]


def windy_walk(strengths: int = 25, strongest: float = 0.5, gamma: float = 0.95) -> RobustMDP:
    """A 6 x 6 grid, -1 per step to the goal; models are wind strengths alpha, evenly spaced in [0, strongest].

    In a cell of a corridor the move becomes one to the left with probability alpha (top), alpha^3 (middle) or alpha^6
    (bottom). State 6 row + column; actions up, down, left, right; walls and borders stop a move.
    After arXiv 2410.06212, section 4 and Figure 1, whose drawing leaves details open: here the walls are columns 1 to 3
    of rows 1 and 3, and a corridor is those columns of the rows between.
    """
    models = np.stack([_kernel(alpha) for alpha in np.linspace(0.0, strongest, strengths)])
    return RobustMDP.models(models, np.full((SIDE**2, 4), -1.0), gamma, start=_state(START), terminal=[_state(GOAL)])


def _state(cell: tuple[int, int]) -> int:
    return SIDE * cell[0] + cell[1]


def _after(cell: tuple[int, int], move: tuple[int, int]) -> int:
    row, column = cell[0] + move[0], cell[1] + move[1]
    wall = row in WALL_ROWS and column in CORRIDOR_COLUMNS
    return _state((row, column) if 0 <= row < SIDE and 0 <= column < SIDE and not wall else cell)


def _kernel(alpha: float) -> np.ndarray:
    rows = np.zeros((SIDE**2, len(MOVES), SIDE**2))
    for cell in np.ndindex(SIDE, SIDE):
        here = (int(cell[0]), int(cell[1]))
        windy = here[0] in GUSTS and here[1] in CORRIDOR_COLUMNS
        gust = alpha ** GUSTS[here[0]] if windy else 0.0
        for action, move in enumerate(MOVES):
            rows[_state(here), action, _after(here, move)] += 1.0 - gust
            rows[_state(here), action, _after(here, LEFT)] += gust
    return rows
