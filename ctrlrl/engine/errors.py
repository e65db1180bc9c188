"""Errors of the engine that a user may want to catch by name."""

from __future__ import annotations

from pathlib import Path


class CheckpointError(RuntimeError):
    """A checkpoint is missing, damaged, of another format, or belongs to something else."""


class UnknownEnvironment(ValueError):  # noqa: N818 - reads as what happened
    """No environment of that id is registered, or its package is not installed."""


class ObservationError(ValueError):
    """An environment returned an observation that contradicts its own observation space."""


class NonFiniteError(FloatingPointError):
    """A reward, an observation or an action became NaN or infinite.

    Attributes:
        what: ``"reward"``, ``"observation"``, ``"final observation"`` or ``"action"``.
        env_index: Which of the environments (for groups: which episode).
        step: Steps of each environment since the environments were last created (for groups: within the episode).
        dump: File with everything needed to see it again (``ctrlrl.engine.replay.replay``), or None.
    """

    def __init__(self, what: str, env_index: int, step: int, dump: Path | None = None, detail: str = "") -> None:
        self.what, self.env_index, self.step, self.dump = what, env_index, step, dump
        where = f"environment {env_index}, step {step} since the environments were created"
        seen = f" The steps that led there are in {dump}; ctrlrl.engine.replay.replay shows them again." if dump else ""
        super().__init__(f"non-finite {what} in {where}{': ' + detail if detail else ''}.{seen}")


class NonFiniteUpdateError(FloatingPointError):
    """A loss or a gradient became NaN or infinite.

    Attributes:
        what: The metric: ``"loss"``, ``"grad_norm"``, ``"value_loss"``, ...
        step: Environment steps trained.
        iteration: Iteration of the run.
        optimiser_step: Optimiser step within the iteration.
        dump: File with which ``ctrlrl.engine.replay.replay_update`` repeats the update, or None.
        kept: Whether the agent has the parameters from before the update; otherwise its own are spoilt.
    """

    def __init__(
        self, what: str, step: int, iteration: int, optimiser_step: int, dump: Path | None = None,
        kept: bool = True,
    ) -> None:  # fmt: skip
        self.what, self.step, self.dump = what, step, dump
        self.iteration, self.optimiser_step = iteration, optimiser_step
        seen = f" The update is in {dump} (ctrlrl.engine.replay.replay_update repeats it)." if dump else ""
        self.kept = kept
        parameters = "the parameters before it were kept" if kept else "this agent's parameters are spoilt, load others"
        super().__init__(
            f"non-finite {what} at optimiser step {optimiser_step} of iteration {iteration}, after {step:,} "
            f"environment steps; {parameters}. A lower learning rate or gradient clipping may "
            f"help.{seen}"
        )
