"""Sort a sequence of digits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ctrlrl_envs.tokens.base import DIGITS, Question, Task, TokenEnv, TokenVectorEnv, digits_between, positive


@dataclass(frozen=True)
class SortTask(Task):
    """See :class:`TokenSort`."""

    digits: int = 10
    """Digits to choose from."""
    size: int = 5
    """Length of the sequence."""
    binary: bool = False
    """Reward only a wholly right answer."""

    def __post_init__(self) -> None:
        digits_between(self.digits)
        positive(size=self.size)

    @property
    def words(self) -> tuple[str, ...]:
        return (*DIGITS[: self.digits], "sort", "=")

    @property
    def prompt(self) -> int:
        return self.size + 2

    @property
    def schedule(self) -> tuple[int, ...]:
        return (0,) * self.size

    def question(self, rng: np.random.Generator, options: Mapping[str, Any]) -> Question:
        given = rng.integers(self.digits, size=self.size).tolist()
        return Question([self.digits, *given, self.digits + 1], self.wanted(given))

    def wanted(self, given: list[int]) -> list[int]:
        """The right answer."""
        return sorted(given)


class TokenSort(TokenEnv):
    """Write the prompt's digits in ascending order.

    - Vocabulary (12): the digits, ``sort``, ``=``. Prompt (7): ``sort 3 1 4 1 5 =``; answer (5): ``1 1 3 4 5``.
    - Reward: share of positions that are right; with ``binary=True`` 1 for a wholly right answer, else 0.
    - Optimum 1. Uniformly random tokens score 1/12 = 0.0833 (binary: 12^-5).
    """

    task_type = SortTask


class TokenSortVector(TokenVectorEnv):
    """:class:`TokenSort`, many at once."""

    task_type = SortTask
