"""The smallest world in which the best action depends on what was collected: one state, one gamble."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

from ctrlrl_envs.tabular.base import Outcome, TabularVector, TabularWorld, merged, probability, rational


class Ladder(TabularWorld):
    """Stay, or climb a rung with a chance to slip down one; three times.

    ## Description
    The return of three gambles at most. With gamma 1 its best conditional value at risk at level 3/4 is 11/75 and its
    best chance to reach 1 is 93/125, both by a policy that looks at what it has; choosing by the conditional value at
    risk in every step gets 0 and never gambles.

    ## Action space
    ``Discrete(2)``: 0 safe, 1 risk.

    ## Observation space
    ``Discrete(1)``: always 0. It tells neither the step nor the rewards so far, see :class:`TabularWorld`.

    ## Rewards
    Safe 0; risk ``gain`` with probability ``chance``, else ``-loss``.

    ## Start and end
    Every episode has 3 steps, the registered limit; ``gymnasium.make(id, max_episode_steps=H)`` makes it H.

    ## Arguments
    - ``chance``: of a gain, in [0, 1]; a float or a text such as "3/5", see :func:`rational`.
    - ``gain``, ``loss``: in rewards, at least 0.

    Raises:
        ValueError: Arguments outside of these ranges.
    """

    def __init__(self, chance: float | str | Fraction = "3/5", gain: Any = 1, loss: Any = 1) -> None:
        self.chance = probability("chance", chance)
        self.gain, self.loss = (
            rational(name, value, "a number of at least 0", lambda r: r >= 0)
            for name, value in (("gain", gain), ("loss", loss))
        )
        super().__init__(states=1, actions=2, start=0)

    def _outcomes(self, state: int, action: int) -> list[Outcome]:
        if action == 0:
            return [(Fraction(1), 0, Fraction(0), False)]
        return merged([(self.chance, 0, self.gain, False), (1 - self.chance, 0, -self.loss, False)])


class LadderVector(TabularVector):
    """:class:`Ladder`, many at once."""

    world = Ladder
