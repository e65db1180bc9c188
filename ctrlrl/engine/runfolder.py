"""Where a run lives on disk, and how to read one back.

::

    runs/<env>/<method>/<time>-s<seed>/
        config.json          method, environment, every field, spaces, seed
        versions.json        what it ran with
        metrics.jsonl        one line per log: step, time_s, tag: value
        evaluations.jsonl    one line per evaluation: step, time_s, returns, lengths (raw, one per episode)
        tb/                  TensorBoard
        checkpoints/         last.safetensors, best.safetensors; off-policy the replay, replay-*.safetensors
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
import subprocess
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ctrlrl.engine.checkpoint import atomic_path

if TYPE_CHECKING:
    import pandas as pd

FORMAT = 1
"""Version of config.json's layout."""

CONFIG, VERSIONS = "config.json", "versions.json"
METRICS, EVALUATIONS = "metrics.jsonl", "evaluations.jsonl"
TENSORBOARD, CHECKPOINTS = "tb", "checkpoints"

_KNOWN = {
    CONFIG, VERSIONS, METRICS, EVALUATIONS, TENSORBOARD, CHECKPOINTS, "wandb", "videos", "exports", "robust.json",
    "robust.png", "inventory.png", "law.png",
}  # fmt: skip
_PACKAGES = (
    "ctrlrl", "torch", "numpy", "gymnasium", "mujoco", "envpool", "safetensors", "scipy", "pandas",
    "h5py", "minari", "mujoco-playground", "mjlab", "isaaclab", "onnx", "onnxruntime", "tensorboard", "wandb",
    "stable-baselines3",
)  # fmt: skip


def safe_name(name: str) -> str:
    """``name`` as one folder name on any system: ``ctrlrl/OneStoreLost-v0`` becomes ``ctrlrl_OneStoreLost-v0``."""
    safe = re.sub(r"[^A-Za-z0-9._-]+", "_", name).strip("._ ")
    if not safe:
        raise ValueError(
            f"{name!r} holds no letter or digit to name a folder by; give an environment id or method name"
        )
    return safe


def create(root: str | os.PathLike[str], env_id: str, method: str, seed: int) -> Path:
    """Make a new empty run folder below ``root`` and return it.

    Two runs started in the same second, by whatever process, get two folders (``...-s0`` and ``...-s0-2``).
    """
    parent = Path(root) / safe_name(env_id) / safe_name(method)
    parent.mkdir(parents=True, exist_ok=True)
    base = f"{time.strftime('%Y%m%d-%H%M%S')}-s{seed}"
    for attempt in range(1, 100_000):
        folder = parent / (base if attempt == 1 else f"{base}-{attempt}")
        try:
            folder.mkdir()
        except FileExistsError:
            continue
        (folder / TENSORBOARD).mkdir()
        (folder / CHECKPOINTS).mkdir()
        return folder
    raise FileExistsError(f"{parent} already holds a hundred thousand runs named {base}; use another root")


def write_json(path: str | os.PathLike[str], obj: Any) -> None:
    """Write ``obj`` as readable JSON, all of it or nothing.

    Dataclasses, paths, NumPy scalars and arrays are converted; NaN and infinities become null and strings.

    Raises:
        TypeError: A value that JSON cannot hold, with its type.
    """
    text = json.dumps(plain(obj), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def read_json(path: str | os.PathLike[str]) -> Any:
    """Read one JSON file.

    Raises:
        FileNotFoundError, ValueError: With the path and what to do.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise FileNotFoundError(f"no {Path(path).name} in {Path(path).parent}; is this a folder of ctrlrl?") from None
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error}); restore it or remove the run") from error


def read_config(path: str | os.PathLike[str]) -> dict[str, Any]:
    """config.json of the run at ``path``.

    Raises:
        FileNotFoundError: ``path`` is no run.
        ValueError: It is written by something else, or by a newer ctrlrl.
    """
    config = read_json(Path(path) / CONFIG)
    if not isinstance(config, dict) or not {"method", "env"} <= set(config):
        raise ValueError(f"{Path(path) / CONFIG} is not a ctrlrl config: expected the entries 'method' and 'env'")
    found = config.get("format", FORMAT)
    if found != FORMAT:
        raise ValueError(
            f"{Path(path) / CONFIG} has format {found!r}, this ctrlrl reads {FORMAT}; use the ctrlrl that wrote it"
        )
    return config


def is_run(path: str | os.PathLike[str]) -> bool:
    """Whether ``path`` is a folder with a config.json of ctrlrl."""
    try:
        read_config(path)
    except (OSError, ValueError):
        return False
    return True


def find_runs(paths: Iterable[str | os.PathLike[str]]) -> list[Path]:
    """The runs at and below ``paths``, sorted within each, without repetition.

    Raises:
        FileNotFoundError: A path that does not exist or has no run at or below it.
    """
    found: dict[Path, Path] = {}
    for path in map(Path, paths):
        if not path.exists():
            raise FileNotFoundError(f"{path} does not exist; give a run folder, or a folder above runs")
        candidates = sorted(p.parent for p in path.rglob(CONFIG)) if path.is_dir() else []
        runs = [folder for folder in candidates if is_run(folder)]
        if not runs:
            raise FileNotFoundError(
                f"{path} is not a run and has none below it: no {CONFIG} written by ctrlrl was found"
            )
        for run in runs:
            found.setdefault(run.resolve(), run)
    return list(found.values())


def read_metrics(path: str | os.PathLike[str]) -> pd.DataFrame:
    """metrics.jsonl of a run as a table: ``step`` (int), ``time_s``, one column of floats per tag, NaN where not given.

    A torn last line (a run still going, or killed) is left out. A run that logged nothing gives an empty table.
    """
    import pandas as pd

    rows = read_lines(Path(path) / METRICS)
    table = pd.DataFrame(rows)
    if table.empty:
        return pd.DataFrame({"step": np.zeros(0, np.int64), "time_s": np.zeros(0)})
    for name in table.columns.drop("step"):
        table[name] = np.asarray(pd.to_numeric(table[name], errors="coerce"), dtype=np.float64)
    return table.astype({"step": np.int64})


def read_evaluations(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """evaluations.jsonl of a run: ``step``, ``time_s``, ``returns`` and ``lengths`` per episode, and any extras."""
    return read_lines(Path(path) / EVALUATIONS)


def read_lines(file: Path) -> list[dict[str, Any]]:
    """The JSON objects of a ``.jsonl`` file without a torn last line; none if there is no file.

    Raises:
        ValueError: A line that is not the last is damaged.
    """
    if not file.is_file():
        return []
    lines = file.read_bytes().split(b"\n")
    rows = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            if not isinstance(row, dict) or "step" not in row:
                raise ValueError("expected an object with 'step'")
        except ValueError as error:
            if number == len(lines):  # no newline after it: it was being written
                break
            raise ValueError(
                f"{file}, line {number} is damaged ({error}); remove that line to go on without it"
            ) from error
        rows.append(row)
    return rows


def guard_target(folder: str | os.PathLike[str]) -> None:
    """Refuse to save into a folder that holds something else than a run.

    Args:
        folder: Need not exist.

    Raises:
        FileExistsError: With the names that stand in the way.
    """
    target = Path(folder)
    if not target.exists():
        return
    if not target.is_dir():
        raise FileExistsError(f"{target} is a file, expected a folder to save into; choose another name")
    known = _KNOWN | {".DS_Store", "nan_update.safetensors"}
    foreign = sorted(p.name for p in target.iterdir() if p.name not in known and not _ours(p.name))
    if (target / CONFIG).exists() and not is_run(target):
        foreign.insert(0, f"{CONFIG} (not written by ctrlrl)")
    if foreign:
        shown = ", ".join(foreign[:5]) + (f" and {len(foreign) - 5} more" if len(foreign) > 5 else "")
        raise FileExistsError(f"{target} holds files that are not a run's: {shown}. Choose an empty or new folder")


def _ours(name: str) -> bool:
    return ".tmp-" in name or name.startswith("nonfinite-")


def versions() -> dict[str, Any]:
    """What this process runs with: packages (None where not installed), source, system. Holds no paths."""
    import torch

    packages: dict[str, str | None] = {}
    for name in _PACKAGES:
        try:
            packages[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            packages[name] = None
    return {
        "python": platform.python_version(),
        **packages,
        "git_commit": _git("rev-parse", "HEAD"),
        "git_dirty": None if (changed := _git("status", "--porcelain")) is None else bool(changed),
        "platform": platform.platform(),
        "machine": platform.machine(),
        "cpu_count": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "cuda": torch.version.cuda,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def _git(*arguments: str) -> str | None:
    """Output of git in the current folder, or None where there is no git, repository or commit."""
    try:
        done = subprocess.run(["git", *arguments], capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def plain(value: Any) -> Any:
    """``value`` as JSON values; NaN becomes None, infinities the strings ``"inf"`` and ``"-inf"``."""
    if is_dataclass(value) and not isinstance(value, type):
        value = asdict(value)
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, set | frozenset):
        return sorted(plain(item) for item in value)
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, float) and not np.isfinite(value):
        return None if np.isnan(value) else str(float(value))
    if value is None or isinstance(value, str | int | float):
        return value
    raise TypeError(
        f"{value!r} is a {type(value).__name__}, which JSON cannot hold; convert it to numbers, strings or lists"
    )
