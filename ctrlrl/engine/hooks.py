"""How others take part in training: callbacks, and Ctrl-C."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from ctrlrl.engine.evaluate import Evaluation

if TYPE_CHECKING:
    from ctrlrl.engine.trainer import TrainedAgent

HOOKS = ("on_update", "on_evaluation", "on_checkpoint")


class Callback(Protocol):
    """Hooks into training; each may return False to stop after the current iteration. All are optional."""

    def on_update(self, agent: TrainedAgent, step: int, metrics: Mapping[str, float]) -> bool | None:
        """After every iteration, with everything that was logged."""

    def on_evaluation(self, agent: TrainedAgent, step: int, evaluation: Evaluation) -> bool | None:
        """After every periodic evaluation."""

    def on_checkpoint(self, agent: TrainedAgent, step: int, path: Path) -> bool | None:
        """After every checkpoint at a border and at the end (``last``)."""


def check(callbacks: Sequence[Any]) -> None:
    """Raise ``TypeError`` for a callback that could never be called."""
    for callback in callbacks:
        if not any(hasattr(callback, hook) for hook in HOOKS):
            raise TypeError(f"the callback {callback!r} has none of the methods {', '.join(HOOKS)}")


def notify(callbacks: Sequence[Any], hook: str, agent: TrainedAgent, value: Any) -> bool:
    """Call ``hook`` of every callback that has it; False if any of them asks to stop."""
    go_on = True
    for callback in callbacks:
        method = getattr(callback, hook, None)
        answer = None if method is None else method(agent, agent.steps, value)
        go_on = go_on and not (isinstance(answer, bool | np.bool_) and not answer)
    return go_on


class Interrupted(KeyboardInterrupt):
    """Training was stopped by Ctrl-C after saving."""

    def __init__(self, run_dir: Path | None, steps: int) -> None:
        super().__init__(f"stopped at step {steps}")
        self.run_dir, self.steps = run_dir, steps


@contextlib.contextmanager
def interruptible() -> Iterator[dict[str, bool]]:
    """Turn the first Ctrl-C into a request; the second one raises KeyboardInterrupt. Main thread only."""
    asked = {"asked": False}

    def handle(number: int, frame: Any) -> None:
        if asked["asked"]:
            raise KeyboardInterrupt
        asked["asked"] = True

    try:
        previous = signal.signal(signal.SIGINT, handle)
    except ValueError:
        yield asked
        return
    try:
        yield asked
    finally:
        signal.signal(signal.SIGINT, previous)
