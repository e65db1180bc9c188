"""One task at graded difficulty."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from ctrlrl_envs.tokens.base import DIGITS, Question, Task, TokenEnv, TokenVectorEnv, digits_between, positive


@dataclass(frozen=True)
class LadderTask(Task):
    """See :class:`TokenLadder`."""

    digits: int = 10
    """Digits to choose from."""
    rungs: int = 6
    """Difficulties; rung k has k digits."""
    binary: bool = True
    """Reward only a wholly right answer, instead of the share of right positions."""

    options: ClassVar[tuple[str, ...]] = ("rung",)

    def __post_init__(self) -> None:
        digits_between(self.digits)
        positive(rungs=self.rungs)

    @property
    def words(self) -> tuple[str, ...]:
        return (*DIGITS[: self.digits], "_", "=")

    @property
    def prompt(self) -> int:
        return self.rungs + 1

    @property
    def schedule(self) -> tuple[int, ...]:
        return (0,) * self.rungs

    def question(self, rng: np.random.Generator, options: Mapping[str, Any]) -> Question:
        # drawn even if it is given, so that the digits do not depend on whether it is
        drawn = int(rng.integers(1, self.rungs + 1))
        rung = int(options.get("rung", drawn))
        if not 1 <= rung <= self.rungs:
            raise ValueError(f"rung={rung} must lie between 1 and {self.rungs}")
        given = rng.integers(self.digits, size=self.rungs).tolist()[:rung]
        blank, equals = self.digits, self.digits + 1
        empty = self.rungs - rung
        return Question([*given, *[blank] * empty, equals], [*sorted(given), *[-1] * empty], rung - 1)


class TokenLadder(TokenEnv):
    """Sort ``k`` digits, where the rung ``k`` from 1 to 6 is the difficulty.

    - The reset seed draws the rung uniformly, or ``reset(options={"rung": k})`` gives it; ``info["task"]`` is k - 1.
    - Vocabulary (12): the digits, ``_``, ``=``. Prompt (7) of rung 3: ``3 1 4 _ _ _ =``; the episode is over after k
      tokens, here ``1 3 4``.
    - Reward: 1 for a wholly right answer, else 0; with ``binary=False`` the share of positions that are right.
    - Optimum 1. Uniformly random tokens score 12^-k on rung k, 0.0152 on average over the six (``binary=False``: 1/12).
    """

    task_type = LadderTask


class TokenLadderVector(TokenVectorEnv):
    """:class:`TokenLadder`, many at once."""

    task_type = LadderTask
