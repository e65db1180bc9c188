"""A task so small that every answer can be listed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ctrlrl_envs.tokens.base import DIGITS, Question, Task, TokenEnv, TokenVectorEnv, positive


@dataclass(frozen=True)
class PatternTask(Task):
    """See :class:`TokenPattern`."""

    vocabulary: int = 4
    """Tokens."""
    size: int = 4
    """Length of the answer."""
    pattern: tuple[int, ...] | None = None
    """The right answer; by default 1, 2, 3, ... and again from 0."""
    binary: bool = False
    """Reward only a wholly right answer."""

    def __post_init__(self) -> None:
        positive(vocabulary=self.vocabulary, size=self.size)
        if self.vocabulary > len(DIGITS):
            raise ValueError(f"vocabulary={self.vocabulary} must be at most {len(DIGITS)}")
        if self.pattern is not None:
            object.__setattr__(self, "pattern", tuple(self.pattern))
            if len(self.pattern) != self.size or not all(0 <= t < self.vocabulary for t in self.pattern):
                raise ValueError(f"pattern={self.pattern} must be {self.size} tokens from 0 to {self.vocabulary - 1}")

    @property
    def words(self) -> tuple[str, ...]:
        return DIGITS[: self.vocabulary]

    @property
    def prompt(self) -> int:
        return 1

    @property
    def schedule(self) -> tuple[int, ...]:
        return (0,) * self.size

    def question(self, rng: np.random.Generator, options: Mapping[str, Any]) -> Question:
        return Question([0], self.pattern or [(i + 1) % self.vocabulary for i in range(self.size)])


class TokenPattern(TokenEnv):
    """Write the one right sequence; for checks against exact sums over all answers.

    - Vocabulary (4): ``0`` to ``3``. Prompt (1): ``0``, always. Answer (4): ``pattern``, by default ``1 2 3 0``.
    - Reward: share of positions that are right; with ``binary=True`` 1 for the whole pattern, else 0.
    - Optimum 1. Uniformly random tokens score 1/4 (binary: 1/256).
    """

    task_type = PatternTask


class TokenPatternVector(TokenVectorEnv):
    """:class:`TokenPattern`, many at once."""

    task_type = PatternTask
