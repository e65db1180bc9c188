"""Be right, in the right form, and brief: three rewards in one task."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from ctrlrl_envs.tokens.base import (
    DIGITS,
    Outcome,
    Question,
    Task,
    TokenEnv,
    TokenVectorEnv,
    digits_between,
    identify,
    positive,
)

SHORTEST = 4  # answer mark, two digits, stop


@dataclass(frozen=True)
class FormatTask(Task):
    """See :class:`TokenFormat`."""

    digits: int = 10
    """Digits to choose from."""
    size: int = 5
    """Digits in the prompt."""
    room: int = 8
    """Longest response."""
    weights: tuple[float, ...] = (0.6, 0.2, 0.2)
    """Of correctness, format and length in the reward, which is their weighted mean."""

    channels: ClassVar[int] = 3

    def __post_init__(self) -> None:
        digits_between(self.digits)
        positive(size=self.size, room=self.room)
        if self.room <= SHORTEST:
            raise ValueError(f"room={self.room} must be more than {SHORTEST}, the length of the shortest good response")
        object.__setattr__(self, "weights", tuple(self.weights))
        if len(self.weights) != 3 or not all(w >= 0 for w in self.weights) or not sum(self.weights) > 0:
            raise ValueError(f"weights={self.weights} must be three numbers, none negative and not all zero")

    @property
    def words(self) -> tuple[str, ...]:
        return (*DIGITS[: self.digits], "=", "answer", "stop")

    @property
    def prompt(self) -> int:
        return self.size + 1

    @property
    def schedule(self) -> tuple[int, ...]:
        return (0,) * self.room

    def question(self, rng: np.random.Generator, options: Mapping[str, Any]) -> Question:
        equals, mark, stop = range(self.digits, self.digits + 3)
        given = rng.integers(self.digits, size=self.size).tolist()
        best = [mark, min(given), max(given), stop]
        return Question([*given, equals], best + [-1] * (self.room - len(best)))

    def over(self, response: np.ndarray, script: np.ndarray, count: np.ndarray) -> np.ndarray:
        return response[np.arange(len(count)), count - 1] == self.digits + 2

    def outcome(self, response: np.ndarray, script: np.ndarray, count: np.ndarray) -> Outcome:
        mark, stop = self.digits + 1, self.digits + 2
        each, position = np.arange(len(count)), np.arange(self.room)
        marks = response == mark
        stopped = response[each, count - 1] == stop
        first = np.where(marks.any(1), marks.argmax(1), self.room)
        # the answer is what stands between the first mark and the stop, or the end
        length = np.maximum(count - stopped - first - 1, 0)
        place = first[:, None] + 1 + position
        taken = np.where(position < length[:, None], response[each[:, None], np.minimum(place, self.room - 1)], -1)
        right = (taken[:, :2] == script[:, 1:3]).sum(1)
        correct = right / np.maximum(length, 2)
        form = ((marks.sum(1) == 1) + stopped.astype(np.float64)) / 2
        brief = 1.0 - np.maximum(count - SHORTEST, 0) / (self.room - SHORTEST)
        rewards = np.stack([correct, form, brief], 1)
        # column by column: a matrix product rounds differently for one row than for many
        reward = sum(w / sum(self.weights) * channel for w, channel in zip(self.weights, rewards.T, strict=True))
        success = (correct == 1.0) & (form == 1.0)
        return Outcome(np.minimum(reward, 1.0), success, rewards, identify(taken, len(self.words)))


class TokenFormat(TokenEnv):
    """Give the smallest and the largest digit of the prompt after an answer mark, then stop.

    - Vocabulary (13): the digits, ``=``, ``answer``, ``stop``. Prompt (6): ``3 1 4 1 5 =``. Response: up to 8 tokens,
      over at the first ``stop``; the best one is ``answer 1 5 stop``. Anything may stand before the mark, as scratch
      paper that costs length.
    - Three channels. Correctness: what stands between the first mark and the stop against the two wanted digits, right
      positions over the length of the longer of the two. Format: half for exactly one mark, half for a stop. Length: 1
      up to four tokens, falling linearly to 0 at eight. The reward is their mean, weighted 0.6, 0.2, 0.2.
      Success needs full correctness and format.
    - Optimum 1. Stopping at once scores 0.3 and is the trap; uniformly random tokens score 0.153, at a mean length
      of 6.15 tokens.
    """

    task_type = FormatTask


class TokenFormatVector(TokenVectorEnv):
    """:class:`TokenFormat`, many at once."""

    task_type = FormatTask
