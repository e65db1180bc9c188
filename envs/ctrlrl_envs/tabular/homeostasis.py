"""Two drives, each of which is fed at one end of a corridor while the other one falls."""

from __future__ import annotations

from fractions import Fraction
from typing import Any, TypeAlias

import numpy as np

from ctrlrl_envs.tabular.base import Outcome, TabularVector, TabularWorld, count, probability, rational

VectorTable: TypeAlias = dict[int, dict[int, list[tuple[float, int, tuple[float, ...], bool]]]]
"""``P`` with a tuple as the reward."""

STAY, LEFT, RIGHT = range(3)


class Homeostasis(TabularWorld):
    """Keep energy and water near their set points, by going to and fro between food and a spring.

    ## Description
    A corridor with food at its left end and a spring at its right one. Both drives fall by 1 in every step; who stays
    with the food or at the spring finds some with probability ``luck``, which feeds that drive by ``meal``. The level
    of a drive, measured from its set point, is where it began plus its rewards: it is the stock of a vector
    reward, and an objective such as minus its norm punishes hunger and surfeit alike.

    ## Action space
    ``Discrete(3)``: 0 stay, 1 left, 2 right; the ends of the corridor stop a move, who bumps into one finds nothing.

    ## Observation space
    ``Discrete(length)``: the place, from the food on. It tells neither the step nor the level of the drives, see
    :class:`TabularWorld`.

    ## Rewards
    The vector reward is how much (energy, water) change in the step: ``info["reward_vector"]`` ([2] float64), and
    ``P_vector``, which is ``P`` with tuples for rewards, outcome by outcome. **The scalar reward is their sum**; as
    that only ever asks for more, it is no measure of balance.

    ## Start and end
    From the middle (``length // 2``). Only the limit of steps ends an episode, 20 as registered.

    ## Arguments
    - ``length``: of the corridor, from 2 to 100.
    - ``meal``: above 1, so that eating feeds more than the step costs.
    - ``luck``: in [0, 1].

    Raises:
        ValueError: Arguments outside of these ranges.
    """

    drives = 2

    def __init__(self, length: int = 3, meal: float | str | Fraction = 4, luck: float | str | Fraction = "3/4") -> None:
        self.length = count("length", length, 2, 100)
        self.meal = rational("meal", meal, "a number above 1", lambda r: r > 1)
        self.luck = probability("luck", luck)
        super().__init__(self.length, 3, self.length // 2)
        self.P_vector: VectorTable = {
            s: {a: [(float(p), to, (float(x), float(y)), False) for p, to, (x, y) in self._changes(s, a)] for a in rows}
            for s, rows in self.P.items()
        }

    def _changes(self, place: int, action: int) -> list[tuple[Fraction, int, tuple[Fraction, Fraction]]]:
        """(probability, next place, change of both drives)."""
        hunger, fed = Fraction(-1), self.meal - 1
        nothing = (hunger, hunger)
        if action != STAY:
            step = -1 if action == LEFT else 1
            return [(Fraction(1), min(max(place + step, 0), self.length - 1), nothing)]
        if 0 < place < self.length - 1:
            return [(Fraction(1), place, nothing)]
        found = (fed, hunger) if place == 0 else (hunger, fed)
        return [(p, place, change) for p, change in ((self.luck, found), (1 - self.luck, nothing)) if p]

    def _outcomes(self, state: int, action: int) -> list[Outcome]:
        return [(p, to, x + y, False) for p, to, (x, y) in self._changes(state, action)]

    def _info(self, state: int, action: int, which: int) -> dict[str, Any]:
        told = super()._info(state, action, which)
        return {**told, "reward_vector": np.array(self.P_vector[state][action][which][2])}


class HomeostasisVector(TabularVector):
    """:class:`Homeostasis`, many at once; infos are also ``reward_vector`` [num_envs, 2], 0 in rows that have ended."""

    world = Homeostasis

    def __init__(self, num_envs: int = 1, *, max_episode_steps: int | None = None, **kwargs: Any) -> None:
        super().__init__(num_envs, max_episode_steps=max_episode_steps, **kwargs)
        self._changes = np.zeros((*self._next.shape, Homeostasis.drives))
        for s, rows in self.single.P_vector.items():
            for a, row in rows.items():
                self._changes[s, a, : len(row)] = [outcome[2] for outcome in row]
        self._change = np.zeros((num_envs, Homeostasis.drives))

    def _note(self, rows: np.ndarray, state: np.ndarray, action: np.ndarray, which: np.ndarray) -> None:
        self._change[:] = 0.0
        self._change[rows] = self._changes[state, action, which]

    def _begin(self, rows: np.ndarray, seeds: Any) -> None:
        super()._begin(rows, seeds)
        self._change[rows] = 0.0

    def _infos(self) -> dict[str, Any]:
        return {**super()._infos(), "reward_vector": self._change.copy()}
