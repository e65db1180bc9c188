"""Agents that learn what data are like, and do not act."""

from __future__ import annotations

from typing import Any, ClassVar, NoReturn

from ctrlrl.engine.offline import OfflineAgent


class DataModel(OfflineAgent):
    """An agent without a policy: it trains, is saved and resumed as every other, and refuses to act."""

    instead: ClassVar[str]
    """What to do with it, as a sentence."""

    @property
    def can_evaluate(self) -> bool:
        """False: there is no policy to evaluate."""
        return False

    def _no_policy(self, verb: str) -> NoReturn:
        raise ValueError(f"{self.method} is a model of data and no policy: it cannot {verb}. {self.instead}")

    def predict(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Raises ValueError: there is no policy."""
        self._no_policy("act")

    def session(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Raises ValueError: there is no policy."""
        self._no_policy("act")

    def evaluate(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Raises ValueError: there is no policy."""
        self._no_policy("be evaluated")

    def export(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Raises ValueError: there is no policy."""
        self._no_policy("be exported")
