"""What a report knows of each run: its records, its group, and where its settings differ from the others'."""

from __future__ import annotations

import json
import math
import os
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ctrlrl.engine import runfolder

if TYPE_CHECKING:
    import pandas as pd

TRAINING_RETURN = "rollout/ep_rew_mean"
DIAGNOSES = "diagnose/"
"""How the names of what ``engine.diagnose`` recorded begin."""
STAGE = "stage/index"

# What names a run or follows from its group is not a difference worth a row.
_IDENTITY = ("format", "method", "env.id", "seed", "spaces")
_VERSION_FIELDS = ("git_dirty",)


@dataclass
class Run:
    """One run, read once."""

    path: Path
    name: str
    """Folder name; unique within the report's list with ``env`` and ``method``."""
    env: str
    method: str
    seed: int | None
    fields: dict[str, str]
    """Settings by dotted name, as JSON text."""
    versions: dict[str, Any]
    evaluations: list[dict[str, Any]]
    training: tuple[np.ndarray, np.ndarray, np.ndarray]
    """step, time_s, training return where it was logged; each [P]."""
    steps: int
    """Last step recorded."""
    time_s: float
    planned: int | None
    """Steps the run was started for."""
    label: str = ""
    """Method, with the settings that tell it from others of the same method and environment."""
    notes: list[str] = field(default_factory=list)
    diagnoses: list[dict[str, Any]] = field(default_factory=list)
    """The rows of the log that hold a diagnosis of the update: their step, and what belongs to it."""
    stages: dict[int, tuple[int, float]] = field(default_factory=dict)
    """step and time_s at which each stage but the first began: those of the last row before it, in which its decoder
    was fitted."""

    def curve(self, evaluated: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """step, time_s and return: the mean of each evaluation, or the training return."""
        if not evaluated:
            return self.training
        rows = self.evaluations
        columns = (
            [r["step"] for r in rows],
            [r.get("time_s") or 0.0 for r in rows],
            [_mean(r["returns"]) for r in rows],
        )
        return tuple(np.array(c, dtype=np.float64) for c in columns)  # type: ignore[return-value]

    def final(self, evaluated: bool) -> float:
        """Last value of :meth:`curve`; NaN without one."""
        values = self.curve(evaluated)[2]
        return float(values[-1]) if len(values) else math.nan


def load(paths: Iterable[str | os.PathLike[str]]) -> list[Run]:
    """All runs at and below ``paths``, grouped, sorted by environment, label and seed.

    Raises:
        FileNotFoundError: A path that holds no run.
        ValueError: A damaged record, with its file and line.
    """
    runs = [_read(path) for path in runfolder.find_runs(paths)]
    for env, method in sorted({(run.env, run.method) for run in runs}):
        same = [run for run in runs if (run.env, run.method) == (env, method)]
        _label(same)
    return sorted(runs, key=lambda r: (r.env, r.label, r.seed if r.seed is not None else -1, r.name))


def differences(runs: Sequence[Run], fields: Sequence[Mapping[str, str]]) -> list[str]:
    """Names of the settings that are not the same in all of ``runs``."""
    names = sorted({name for one in fields for name in one})
    return [name for name in names if len({one.get(name) for one in fields}) > 1] if len(runs) > 1 else []


def version_fields(run: Run) -> dict[str, str]:
    """Versions as text, without what is unknown everywhere."""
    return {k: str(v) for k, v in run.versions.items() if v is not None and k not in _VERSION_FIELDS}


def stage_starts(group: Sequence[Run], column: int) -> list[float]:
    """Where the stages began: the median over the runs that reached each, of the step (column 0) or time_s (1)."""
    numbers = sorted({stage for run in group for stage in run.stages})
    return [float(statistics.median(r.stages[n][column] for r in group if n in r.stages)) for n in numbers]


def _read(path: Path) -> Run:
    config = runfolder.read_config(path)
    table = runfolder.read_metrics(path)
    evaluations = [row for row in runfolder.read_evaluations(path) if row.get("returns")]
    values = table[TRAINING_RETURN].to_numpy() if TRAINING_RETURN in table else np.full(len(table), np.nan)
    kept = np.isfinite(values)
    steps, times = table["step"].to_numpy(), table["time_s"].to_numpy()
    env = config["env"]
    # A live environment has no description: its folder still names it.
    env_id = env.get("id") if isinstance(env, dict) else env
    versions = path / runfolder.VERSIONS
    last = [(int(steps[-1]), float(times[-1]))] if len(table) else []
    last += [(int(row["step"]), float(row.get("time_s") or 0.0)) for row in evaluations[-1:]]
    return Run(
        path=path,
        name=path.resolve().name,
        env=str(env_id or path.resolve().parent.parent.name),
        method=str(config["method"]),
        seed=config.get("seed"),
        fields={k: v for k, v in _flat(config).items() if not any(k == n or k.startswith(f"{n}.") for n in _IDENTITY)},
        versions=runfolder.read_json(versions) if versions.is_file() else {},
        evaluations=evaluations,
        training=(steps[kept].astype(np.float64), times[kept], values[kept]),
        steps=max((s for s, _ in last), default=0),
        time_s=max((t for _, t in last), default=0.0),
        planned=config.get("total_steps"),
        diagnoses=_diagnoses(path) if any(name.startswith(DIAGNOSES) for name in table) else [],
        stages=_stages(table) if STAGE in table else {},
    )


def _diagnoses(path: Path) -> list[dict[str, Any]]:
    rows = runfolder.read_lines(path / runfolder.METRICS)
    kept = [{k: v for k, v in row.items() if k == "step" or k.startswith(DIAGNOSES)} for row in rows]
    return [row for row in kept if len(row) > 1]


def _stages(table: pd.DataFrame) -> dict[int, tuple[int, float]]:
    index, steps, times = table[[STAGE, "step", "time_s"]].dropna().to_numpy().T
    return {int(index[i + 1]): (int(steps[i]), float(times[i])) for i in np.flatnonzero(np.diff(index) > 0)}


_WITHOUT_EFFECT = frozenset(
    {"total_steps", "env.threads"}
    | {f"config.{n}" for n in ("device", "threads", "compile", "cudagraphs", "steps_per_graph", "micro_batches")}
    | {f"config.{n}" for n in ("eval_every", "eval_episodes", "diagnose_every")}
)
"""Settings that say where or how a run was computed, not what: they differ between seeds of one experiment."""


def _label(same: Sequence[Run]) -> None:
    """Runs of one method and environment with different settings are different groups, not seeds of one."""
    names = [n for n in differences(same, [r.fields for r in same]) if n not in _WITHOUT_EFFECT]
    variants = sorted({tuple(run.fields.get(n, "\N{EN DASH}") for n in names) for run in same})
    for run in same:
        mine = tuple(run.fields.get(n, "\N{EN DASH}") for n in names)
        if not names:
            run.label = run.method
        elif len(names) <= 2:
            settings = (f"{n.rsplit('.', 1)[-1]}={v.strip(chr(34))}" for n, v in zip(names, mine, strict=True))
            run.label = f"{run.method}, {', '.join(settings)}"
        else:
            run.label = f"{run.method}, settings {variants.index(mine) + 1}"


def _flat(value: Any, prefix: str = "") -> dict[str, str]:
    if isinstance(value, dict) and (value or not prefix):
        flat: dict[str, str] = {}
        for key, item in value.items():
            flat |= _flat(item, f"{prefix}.{key}" if prefix else str(key))
        return flat
    return {prefix: json.dumps(value)}


def _mean(values: Sequence[Any]) -> float:
    """Mean of raw returns as they lie in the file: null was NaN, strings were infinities."""
    return float(np.mean([math.nan if v is None else float(v) for v in values]))
