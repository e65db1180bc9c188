"""What a run says while it trains: metrics.jsonl, evaluations.jsonl, TensorBoard, wandb, and the progress bar.

The two ``.jsonl`` files are the record (SB3's tag names, always); TensorBoard and wandb are views of it.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias

from ctrlrl.engine.checkpoint import atomic_path
from ctrlrl.engine.runfolder import EVALUATIONS, METRICS, TENSORBOARD, plain, read_lines

if TYPE_CHECKING:
    from typing_extensions import Self  # noqa: UP035  Python 3.10 has it here only

Tags: TypeAlias = Literal["sb3", "cleanrl", "rsl_rl"]

_RENAMED: dict[str, dict[str, str]] = {
    "sb3": {},
    "cleanrl": {
        "rollout/ep_rew_mean": "charts/episodic_return",
        "rollout/ep_len_mean": "charts/episodic_length",
        "time/fps": "charts/SPS",
        "train/learning_rate": "charts/learning_rate",
        "train/value_loss": "losses/value_loss",
        "train/policy_gradient_loss": "losses/policy_loss",
        "train/entropy_loss": "losses/entropy",
        "train/approx_kl": "losses/approx_kl",
        "train/clip_fraction": "losses/clipfrac",
        "train/explained_variance": "losses/explained_variance",
        "train/actor_loss": "losses/actor_loss",
        "train/critic_loss": "losses/qf_loss",
        "train/ent_coef": "losses/alpha",
        "train/ent_coef_loss": "losses/alpha_loss",
        "eval/mean_reward": "eval/episodic_return",
    },
    "rsl_rl": {
        "rollout/ep_rew_mean": "Train/mean_reward",
        "rollout/ep_len_mean": "Train/mean_episode_length",
        "time/fps": "Perf/total_fps",
        "train/learning_rate": "Loss/learning_rate",
        "train/value_loss": "Loss/value",
        "train/policy_gradient_loss": "Loss/surrogate",
        "train/entropy_loss": "Loss/entropy",
        "train/std": "Policy/mean_std",
    },
}
_RESERVED = ("step", "time_s", "returns", "lengths")


class Histogram(NamedTuple):
    """Counts in fixed bins."""

    edges: Sequence[float]
    """[E] rising borders between the bins, two at least."""
    counts: Sequence[int]
    """[E + 1] the first below the first border, the last from the last border on."""


class RunLogger:
    """Writes what a run measures into its folder.

    Args:
        folder: The run's folder; must exist.
        tensorboard: Also write ``tb/``.
        wandb: Arguments of ``wandb.init`` to also send to Weights & Biases; None leaves it alone.
        resume_step: Take up the run at this step: later rows are removed, TensorBoard hides later points, and the
            clock goes on from the last row kept, so that the files become those of a run never stopped.
        resume_iteration: Number of the last iteration done by then; rows of later ones are removed whatever their step.
        tags: Names used in TensorBoard and wandb; the ``.jsonl`` files always use SB3's.

    Raises:
        FileNotFoundError: ``folder`` does not exist.
        ImportError: TensorBoard or wandb was asked for and is not installed.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        tensorboard: bool = True,
        wandb: dict[str, Any] | None = None,
        resume_step: int | None = None,
        resume_iteration: int | None = None,
        tags: Tags = "sb3",
    ) -> None:
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise FileNotFoundError(
                f"cannot log into {self.folder}: no such folder; create it first (runfolder.create)"
            )
        if tags not in _RENAMED:
            raise ValueError(f"tags={tags!r} is unknown; choose one of {', '.join(_RENAMED)}")
        self._names = _RENAMED[tags]
        last = [_trim(self.folder / name, resume_step, resume_iteration) for name in (METRICS, EVALUATIONS)]
        self._writer = _tensorboard_writer(self.folder / TENSORBOARD, resume_step) if tensorboard else None
        self._wandb = None if wandb is None else _wandb_run(self.folder, wandb)
        self._start = time.monotonic() - max(last)
        self._metrics: IO[str] = open(self.folder / METRICS, "a", encoding="utf-8")  # noqa: SIM115
        self._evaluations: IO[str] = open(self.folder / EVALUATIONS, "a", encoding="utf-8")  # noqa: SIM115

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def time_s(self) -> float:
        """Seconds of wall-clock since the run began, without the time between a stop and a resume."""
        return time.monotonic() - self._start

    def log(self, step: int, scalars: Mapping[str, float], histograms: Mapping[str, Histogram] | None = None) -> None:
        """Record ``scalars`` (tag to number) at environment step ``step``; NaN is kept as null.

        Of ``histograms`` the record keeps the list of counts, under the tag; TensorBoard draws them.

        Raises:
            ValueError: A tag that the record uses itself, a value that is not one number, or counts that do not
                fit their borders.
        """
        row: dict[str, Any] = {"step": int(step), "time_s": round(self.time_s, 3)}
        for tag, value in scalars.items():
            if tag in _RESERVED:
                raise ValueError(f"the tag {tag!r} is reserved; use a name like train/{tag}")
            try:
                row[tag] = float(value)
            except (TypeError, ValueError) as error:
                raise ValueError(f"{tag} is {value!r}, expected one number; reduce it before logging") from error
        for tag, (edges, counts) in (histograms or {}).items():
            if tag in row or tag in _RESERVED:
                raise ValueError(f"the tag {tag!r} is taken; give the histogram another name")
            if len(edges) < 2 or len(counts) != len(edges) + 1:
                raise ValueError(f"{tag} has {len(edges)} borders and {len(counts)} counts; expected one count more")
            row[tag] = [int(n) for n in counts]
        _append(self._metrics, row)
        named = {self._names.get(tag, tag): float(value) for tag, value in scalars.items()}
        if self._writer is not None:
            for tag, value in named.items():
                self._writer.add_scalar(tag, value, int(step))
            for tag, histogram in (histograms or {}).items():
                if any(histogram.counts):
                    self._writer.add_histogram_raw(tag, **_raw(histogram), global_step=int(step))
        if self._wandb is not None:
            self._wandb.log({**named, "global_step": int(step)})

    def evaluation(
        self,
        step: int,
        returns: Sequence[float],
        lengths: Sequence[int],
        extra: Mapping[str, Any] | None = None,
    ) -> None:
        """Record one evaluation: raw returns and lengths per episode, and their means as ``eval/...`` metrics.

        Args:
            step: Environment steps trained so far.
            returns: Undiscounted return of each episode.
            lengths: Steps of each episode.
            extra: Further JSON values for the row (``{"deterministic": True, "checkpoint": "last"}``).
        """
        if len(returns) == 0 or len(returns) != len(lengths):
            raise ValueError(
                f"{len(returns)} returns and {len(lengths)} lengths; expected as many of both, one at least"
            )
        extra = dict(extra or {})
        if clash := [name for name in _RESERVED if name in extra]:
            raise ValueError(f"extra holds {', '.join(clash)}, which the record uses itself; choose other names")
        row = {
            "step": int(step), "time_s": round(self.time_s, 3),
            "returns": [float(r) for r in returns], "lengths": [int(n) for n in lengths], **extra,
        }  # fmt: skip
        _append(self._evaluations, row)
        means = {
            "eval/mean_reward": sum(row["returns"]) / len(returns),
            "eval/mean_ep_length": sum(row["lengths"]) / len(lengths),
        }
        if "normalized_score" in extra:
            means["eval/normalized_score"] = extra["normalized_score"]
        self.log(step, means)

    def flush(self) -> None:
        """Hand everything to the disk; called at each border, so that a checkpoint never lies ahead of its log."""
        for file in (self._metrics, self._evaluations):
            if not file.closed:
                file.flush()
                os.fsync(file.fileno())
        if self._writer is not None:
            self._writer.flush()

    def close(self) -> None:
        """Flush and release; may be called twice."""
        self.flush()
        self._metrics.close()
        self._evaluations.close()
        if self._writer is not None:
            self._writer.close()
            self._writer = None
        if self._wandb is not None:
            self._wandb.finish()
            self._wandb = None


def _append(file: IO[str], row: dict[str, Any]) -> None:
    """One write per line, handed to the system at once: a killed run loses at most the line in hand."""
    file.write(json.dumps(plain(row), allow_nan=False) + "\n")
    file.flush()


def _raw(histogram: Histogram) -> dict[str, Any]:
    """``histogram`` as TensorBoard wants it, each count taken to lie in the middle of its bin."""
    edges, counts = [float(e) for e in histogram.edges], histogram.counts
    # it has no open bins: the outer ones get the width of their neighbours
    limits = [2 * edges[0] - edges[1], *edges, 2 * edges[-1] - edges[-2]]
    bins = [(low, high, n) for low, high, n in zip(limits, limits[1:], counts, strict=False)]
    held = [(low, high) for low, high, n in bins if n]
    return {
        "min": held[0][0],
        "max": held[-1][1],
        "num": sum(counts),
        "sum": sum(n * (low + high) / 2 for low, high, n in bins),
        "sum_squares": sum(n * ((low + high) / 2) ** 2 for low, high, n in bins),
        "bucket_limits": limits[1:],
        "bucket_counts": list(counts),
    }


def _trim(file: Path, resume_step: int | None, resume_iteration: int | None) -> float:
    """Remove a torn last line and rows after the step or iteration; return ``time_s`` of the last row, 0 without one.

    Iterations that make no step (a model is fitted) are told apart by their number.
    """
    rows = read_lines(file)
    kept = rows if resume_step is None else [row for row in rows if row["step"] <= resume_step]
    if resume_iteration is not None:
        kept = [row for row in kept if row.get("time/iterations", 0) <= resume_iteration]
    if file.is_file() and (len(kept) < len(rows) or not file.read_bytes().endswith(b"\n")):
        with atomic_path(file) as temporary:
            temporary.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
    return float(kept[-1].get("time_s") or 0.0) if kept else 0.0


def _tensorboard_writer(folder: Path, resume_step: int | None) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ImportError("TensorBoard is not installed: pip install tensorboard, or pass tensorboard=False") from error
    return SummaryWriter(str(folder), purge_step=None if resume_step is None else resume_step + 1)


def _wandb_run(folder: Path, arguments: Mapping[str, Any]) -> Any:
    """A wandb run named after the folder, so that a resumed run goes on in the same one; offline where it must be."""
    try:
        import wandb
    except ImportError as error:
        raise ImportError('wandb is not installed: pip install "ctrlrl[wandb]", or leave wandb out') from error
    name = "-".join(folder.resolve().parts[-3:])
    settings = {"project": "ctrlrl", "name": name, "id": name[-64:], "resume": "allow", "dir": str(folder), **arguments}
    try:
        # Without credentials wandb would stop and ask for them.
        if "mode" not in settings and not os.environ.get("WANDB_MODE") and not wandb.login(prompt=False):
            settings["mode"] = "offline"
        run = wandb.init(**settings)
    except Exception as error:
        warnings.warn(
            f"wandb could not go online ({error}); this run is kept offline, upload it with wandb sync", stacklevel=3
        )
        run = wandb.init(**{**settings, "mode": "offline"})
    # Steps of their own: wandb drops points whose built-in step goes back, as it does after a resume.
    run.define_metric("*", step_metric="global_step")
    return run


class Progress:
    """A live line of training in a terminal; a plain line every ten seconds elsewhere; nothing when not enabled.

    Args:
        total: Steps of the whole run.
        start: Steps already done when a run is resumed.
        label: What is shown before the bar (``"ppo HalfCheetah-v5"``).
        enabled: False makes it silent.
        interval_s: Seconds between plain lines.
        file: Where to write; standard output by default.
    """

    def __init__(
        self,
        total: int,
        start: int = 0,
        label: str = "",
        enabled: bool = True,
        interval_s: float = 10.0,
        file: IO[str] | None = None,
    ) -> None:
        self.total, self.start, self.step = int(total), int(start), int(start)
        self.label, self.enabled, self.interval_s = label, enabled, interval_s
        self._file = file
        self._shown: dict[str, float] = {}
        self._live: Any = None
        self._began = self._last_line = time.monotonic()

    def __enter__(self) -> Self:
        self._began = self._last_line = time.monotonic()
        out = self._file or sys.stdout
        if self.enabled and out.isatty() and os.environ.get("TERM") != "dumb":
            self._live = _live_display(self, out)
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.update(0, completed=self.step, **_columns(self))
            self._live.stop()
            self._live = None
        elif self.enabled:
            self._line()

    def update(self, step: int, scalars: Mapping[str, float] | None = None) -> None:
        """Show that ``step`` steps are done; tags not shown are ignored, shown ones stay until given again."""
        self.step = int(step)
        if not self.enabled:
            return
        self._shown.update({tag: float(scalars[tag]) for tag in _SHOWN if scalars and tag in scalars})
        if self._live is not None:
            self._live.update(0, completed=self.step, **_columns(self))
        elif time.monotonic() - self._last_line >= self.interval_s:
            self._line()

    @property
    def steps_per_s(self) -> float:
        """Steps per second since this process took the run up."""
        return (self.step - self.start) / max(time.monotonic() - self._began, 1e-9)

    def _line(self) -> None:
        self._last_line = time.monotonic()
        elapsed, speed = self._last_line - self._began, self.steps_per_s
        left = max(self.total - self.step, 0) / speed if speed > 0 else float("nan")
        parts = [f"{self.step:,}/{self.total:,} steps", f"{speed:,.0f} steps/s", f"{_clock(elapsed)} elapsed"]
        parts.append(f"{_clock(left)} left")
        parts += [f"{name} {self._shown[tag]:.4g}" for tag, name in _SHOWN.items() if tag in self._shown]
        print(" | ".join([self.label, *parts] if self.label else parts), file=self._file or sys.stdout, flush=True)


_SHOWN = {
    "rollout/ep_rew_mean": "return", "eval/mean_reward": "eval", "train/approx_kl": "kl", "dev/best": "cost",
}  # fmt: skip


def _clock(seconds: float) -> str:
    if math.isnan(seconds) or seconds < 0:
        return "-:--:--"
    whole = int(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"


def _columns(progress: Progress) -> dict[str, Any]:
    shown = (f"{name} {progress._shown[tag]:.4g}" for tag, name in _SHOWN.items() if tag in progress._shown)
    return {"speed": f"{progress.steps_per_s:,.0f} steps/s", "scores": "  ".join(shown)}


def _live_display(progress: Progress, out: IO[str]) -> Any:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.progress import Progress as RichProgress

    live = RichProgress(
        TextColumn("[bold]{task.description}"), BarColumn(bar_width=24), MofNCompleteColumn(),
        TextColumn("{task.fields[speed]}"), TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(),
        TextColumn("[cyan]{task.fields[scores]}"),
        console=Console(file=out), refresh_per_second=4,
    )  # fmt: skip
    live.add_task(progress.label, total=progress.total, completed=progress.start, **_columns(progress))
    return live
