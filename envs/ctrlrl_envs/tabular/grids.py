"""Grids: one for returns that are wanted exactly, one with a risky short cut, one with a cliff and wind."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

from ctrlrl_envs.tabular.base import DOWN, GridWorld, Outcome, TabularVector, count, merged, probability, rational

LARGEST = 100
"""Cells along a side of a grid."""

TARGETS = ("S.2.", ".#.a", "1..5", ".a.G")
"""The layout of :class:`TargetGrid`."""

STEP = Fraction(-1)
"""Reward of a step on the way to a goal."""


def _stay(cell: int) -> list[Outcome]:
    """What happens where the episode is over, or cannot be."""
    return [(Fraction(1), cell, Fraction(0), True)]


class TargetGrid(GridWorld):
    """Walk over cells that give and take, to go home with the return that is wanted and no other.

    ## Description
    ::

        S . 2 .     S start, G home
        . # . a     1 2 5 what the cell gives
        1 . . 5     a     takes 1
        . a . G     #     wall

    Without slip all integers between -8 and 42 are returns of some walk; with it a walk must be corrected as it goes,
    by what it has collected.

    ## Action space
    ``Discrete(4)``: 0 up, 1 right, 2 down, 3 left. With probability ``slip`` the move goes to one of its two sides.
    Edges and walls stop it.

    ## Observation space
    ``Discrete(height * width)``: the cell, row * width + column. It tells neither the step nor the rewards so far, see
    :class:`TabularWorld`.

    ## Rewards
    What the cell gives or takes, each time that it is entered from another one; nothing for standing still.

    ## Start and end
    From S. The episode ends at G. The registered limit is 20 steps.

    ## Arguments
    - ``slip``: in [0, 1].
    - ``layout``: rows of equal length with one S and at least one G; ``1`` to ``9`` give so much, ``a`` to ``i`` take 1
      to 9, ``#`` is a wall and ``.`` nothing.

    Raises:
        ValueError: Arguments outside of these ranges.
    """

    def __init__(self, slip: float | str | Fraction = 0.1, layout: Sequence[str] = TARGETS) -> None:
        self.layout = tuple(layout)
        cells, width = "".join(self.layout), len(self.layout[0]) if self.layout else 0
        known = set("SG#.123456789abcdefghi")
        if {len(row) for row in self.layout} != {width} or cells.count("S") != 1 or "G" not in cells:
            raise ValueError(f"layout={list(layout)} must be rows of equal length with one S and at least one G")
        if not set(cells) <= known:
            raise ValueError(f"layout has the cells {sorted(set(cells) - known)}; expected S, G, #, ., 1-9 and a-i")
        self.cells = cells
        # a character that is not found has the index -1
        self.rewards = [Fraction("123456789".find(c) - "abcdefghi".find(c)) for c in cells]
        super().__init__(len(self.layout), width, cells.index("S"), slip)

    def _after(self, state: int, move: tuple[int, int]) -> int:
        after = super()._after(state, move)
        return state if self.cells[after] == "#" else after

    def _outcomes(self, state: int, action: int) -> list[Outcome]:
        if self.cells[state] in "G#":
            return _stay(state)
        arrivals = ((p, self._after(state, move)) for p, move in self._ways[action])
        return merged(
            (p, to, Fraction(0) if to == state else self.rewards[to], self.cells[to] == "G") for p, to in arrivals
        )


class RiskyGrid(GridWorld):
    """A short way along the bottom, where every step may be fined, and a long safe one around it.

    ## Description
    The lower half of the rows is risky, but for its first and last column. By default (6 x 4)::

        . . . . . .     S start, G goal
        . . . . . .     r risky
        . r r r r .
        S r r r r G

    Straight on it takes 5 steps, 4 of them risky, around 9. Without slip the returns are -5 less 20 per fine, -7 on
    average, and -9: the mean prefers the short way, conditional value at risk at levels below 1/2 the long one.

    ## Action space
    ``Discrete(4)``: 0 up, 1 right, 2 down, 3 left. With probability ``slip`` the move goes to one of its two sides.
    The edges stop it.

    ## Observation space
    ``Discrete(height * width)``: the cell, row * width + column. It tells neither the step nor the fines so far, see
    :class:`TabularWorld`.

    ## Rewards
    -1 per step, and another ``-penalty`` with probability ``risk`` for a step that ends in a risky cell.

    ## Start and end
    From the bottom left corner; the episode ends in the bottom right one. The registered limit is 50 steps: a wide
    grid needs more (``gymnasium.make(id, max_episode_steps=...)``).

    ## Arguments
    - ``width``: from 3 to 100.
    - ``height``: from 2 to 100; 100 x 100 are 10,000 states.
    - ``slip``, ``risk``: in [0, 1].
    - ``penalty``: at least 0.

    Raises:
        ValueError: Arguments outside of these ranges.
    """

    def __init__(
        self,
        width: int = 6,
        height: int = 4,
        slip: float | str | Fraction = 0.1,
        risk: float | str | Fraction = 0.025,
        penalty: float | str | Fraction = 20,
    ) -> None:
        width, height = count("width", width, 3, LARGEST), count("height", height, 2, LARGEST)
        self.risk = probability("risk", risk)
        self.penalty = rational("penalty", penalty, "a number of at least 0", lambda r: r >= 0)
        self.goal = height * width - 1
        super().__init__(height, width, self.goal - width + 1, slip)

    def risky(self, cell: int) -> bool:
        """Whether a step that ends in ``cell`` may be fined."""
        row, column = divmod(cell, self.width)
        return 2 * row >= self.height and 0 < column < self.width - 1

    def _outcomes(self, state: int, action: int) -> list[Outcome]:
        if state == self.goal:
            return _stay(state)
        found: list[Outcome] = []
        for p, move in self._ways[action]:
            to = self._after(state, move)
            if self.risky(to):
                found += [(p * (1 - self.risk), to, STEP, False), (p * self.risk, to, STEP - self.penalty, False)]
            else:
                found.append((p, to, STEP, to == self.goal))
        return merged(found)


class WindyCliff(GridWorld):
    """Walk along a cliff while gusts push towards it.

    ## Description
    The cliff of Sutton and Barto's book (2nd edition, example 6.6), with wind, which it has not there. By default
    (12 x 4)::

        . . . . . . . . . . . .     S start, G goal
        . . . . . . . . . . . .     c cliff
        . . . . . . . . . . . .
        S c c c c c c c c c c G

    Along the edge it is 13 steps, and a fall in each of ten with probability ``wind``; a row further up 15 steps, and
    a fall needs two gusts with no step up between them.

    ## Action space
    ``Discrete(4)``: 0 up, 1 right, 2 down, 3 left; then a gust pushes one cell down with probability ``wind``. The
    edges stop both.

    ## Observation space
    ``Discrete(height * width)``: the cell, row * width + column. It tells neither the step nor the falls so far, see
    :class:`TabularWorld`.

    ## Rewards
    -1 per step, ``-fall`` instead for one that ends in the cliff.

    ## Start and end
    From the bottom left corner; a fall leads back there. The episode ends in the bottom right one. The registered
    limit is 100 steps.

    ## Arguments
    - ``width``: from 3 to 100.
    - ``height``: from 2 to 100.
    - ``wind``: in [0, 1].
    - ``fall``: at least 0.

    Raises:
        ValueError: Arguments outside of these ranges.
    """

    def __init__(
        self,
        width: int = 12,
        height: int = 4,
        wind: float | str | Fraction = 0.1,
        fall: float | str | Fraction = 100,
    ) -> None:
        width, height = count("width", width, 3, LARGEST), count("height", height, 2, LARGEST)
        self.wind = probability("wind", wind)
        self.fall = rational("fall", fall, "a number of at least 0", lambda r: r >= 0)
        self.goal = height * width - 1
        self.start = self.goal - width + 1
        super().__init__(height, width, self.start, slip=0)

    def _outcomes(self, state: int, action: int) -> list[Outcome]:
        if state >= self.start + 1:  # the cliff and the goal
            return _stay(state)
        (_, move), *_ = self._ways[action]
        calm = self._after(state, move)
        # the edge stops the gust where the move ended in the bottom row
        pushed = self._after(calm, DOWN)
        return merged([self._landed(1 - self.wind, calm), self._landed(self.wind, pushed)])

    def _landed(self, p: Fraction, cell: int) -> Outcome:
        if self.start < cell < self.goal:
            return p, self.start, -self.fall, False
        return p, cell, STEP, cell == self.goal


class TargetGridVector(TabularVector):
    """:class:`TargetGrid`, many at once."""

    world = TargetGrid


class RiskyGridVector(TabularVector):
    """:class:`RiskyGrid`, many at once."""

    world = RiskyGrid


class WindyCliffVector(TabularVector):
    """:class:`WindyCliff`, many at once."""

    world = WindyCliff
