"""Keep a running sum over several turns."""

from __future__ import annotations

import itertools
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

ANSWER, FEEDBACK = 2, 4  # tokens of an answer; of what the environment says between two answers


@dataclass(frozen=True)
class ArithmeticTask(Task):
    """See :class:`TokenArithmetic`."""

    digits: int = 10
    """Base of the numbers; the addends have one digit."""
    turns: int = 3
    """Sums asked, one after the other."""
    binary: bool = False
    """Reward only an episode in which every answer is right."""

    several_turns: ClassVar[bool] = True

    def __post_init__(self) -> None:
        digits_between(self.digits)
        positive(turns=self.turns)
        if (self.turns + 1) * (self.digits - 1) >= self.digits**2:
            raise ValueError(f"turns={self.turns}: the sum would need three digits in base {self.digits}; take fewer")

    @property
    def channels(self) -> int:  # type: ignore[override]
        """One per turn."""
        return self.turns

    @property
    def words(self) -> tuple[str, ...]:
        return (*DIGITS[: self.digits], "+", "=", "right", "wrong")

    @property
    def prompt(self) -> int:
        return 4

    @property
    def schedule(self) -> tuple[int, ...]:
        each = ((turn,) * ANSWER + (-1,) * FEEDBACK for turn in range(self.turns))
        return tuple(itertools.chain(*each))[:-FEEDBACK]

    @property
    def answer_length(self) -> int:
        return ANSWER

    def question(self, rng: np.random.Generator, options: Mapping[str, Any]) -> Question:
        plus, equals, right, _ = range(self.digits, self.digits + 4)
        first, *others = rng.integers(self.digits, size=self.turns + 1).tolist()
        script: list[int] = []
        total = first
        for i, number in enumerate(others):
            total += number
            script += divmod(total, self.digits)
            if i + 1 < self.turns:
                script += [right, plus, others[i + 1], equals]
        return Question([first, plus, others[0], equals], script)

    def reply(self, response: np.ndarray, script: np.ndarray, at: np.ndarray) -> np.ndarray:
        token = super().reply(response, script, at)
        verdict = at % (ANSWER + FEEDBACK) == ANSWER
        here, each = np.where(verdict, at, ANSWER), np.arange(len(at))
        good = np.ones(len(at), dtype=np.bool_)
        for back in range(1, ANSWER + 1):
            good &= response[each, here - back] == script[each, here - back]
        return np.where(verdict & ~good, self.digits + 3, token)

    def outcome(self, response: np.ndarray, script: np.ndarray, count: np.ndarray) -> Outcome:
        mine = np.array(self.schedule) >= 0
        shape = (len(response), self.turns, ANSWER)
        said, right = response[:, mine].reshape(shape), (response == script)[:, mine].reshape(shape)
        void = np.zeros(response.shape, dtype=np.bool_)
        void[:, mine] = np.repeat((said >= self.digits).any(2), ANSWER, axis=1)
        share, success = right.mean(2), right.all((1, 2))
        reward = success.astype(np.float64) if self.binary else share.mean(1)
        return Outcome(reward, success, share, identify(said[:, -1], len(self.words)), void)


class TokenArithmetic(TokenEnv):
    """Add one number per turn and give the running sum, in two digits; the environment speaks in between.

    - Vocabulary (14): the digits, ``+``, ``=``, ``right``, ``wrong``. Prompt (4): ``7 + 5 =``. Each turn the policy
      writes two digits, ``1 2``, and except after the last turn the environment goes on with its verdict and the next
      number, ``right + 9 =``, four tokens. Three turns make 14 positions. What is asked is always the true running
      sum: after a wrong answer it has to be worked out from the numbers.
    - Reward: share of right digits; with ``binary=True`` 1 if all are right, else 0. Channels: the share in each turn.
      A turn is void if its two tokens are not both digits. The final answer is the last turn's.
    - Optimum 1. Uniformly random tokens score 1/14 = 0.0714 (binary: 14^-6).
    """

    task_type = ArithmeticTask


class TokenArithmeticVector(TokenVectorEnv):
    """:class:`TokenArithmetic`, many at once."""

    task_type = ArithmeticTask
