"""Copy a sequence of digits."""

from __future__ import annotations

from dataclasses import dataclass

from ctrlrl_envs.tokens.base import DIGITS, TokenEnv, TokenVectorEnv
from ctrlrl_envs.tokens.sort import SortTask


@dataclass(frozen=True)
class CopyTask(SortTask):
    """See :class:`TokenCopy`."""

    @property
    def words(self) -> tuple[str, ...]:
        return (*DIGITS[: self.digits], "copy", "=")

    def wanted(self, given: list[int]) -> list[int]:
        return given


class TokenCopy(TokenEnv):
    """Repeat the prompt's digits.

    - Vocabulary (12): the digits, ``copy``, ``=``. Prompt (7): ``copy 3 1 4 1 5 =``; answer (5): ``3 1 4 1 5``.
    - Reward: share of positions that are right; with ``binary=True`` 1 for a wholly right answer, else 0.
    - Optimum 1. Uniformly random tokens score 1/12 = 0.0833 (binary: 12^-5).
    """

    task_type = CopyTask


class TokenCopyVector(TokenVectorEnv):
    """:class:`TokenCopy`, many at once."""

    task_type = CopyTask
