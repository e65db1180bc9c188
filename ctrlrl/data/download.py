"""Fetching files once: resumed where they stopped, and the same file ever after."""

from __future__ import annotations

import errno
import hashlib
import http.client
import json
import os
import shutil
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from ctrlrl.data.dataset import DatasetError

ENVIRONMENT = "D4RL_DATASET_DIR"
MANIFEST = "checksums.json"
_CHUNK = 1 << 20
_TRIES = 4
_checked: set[tuple[str, int, int]] = set()
"""Files compared with the manifest in this session: path, size, time of change."""


def cache_folder() -> Path:
    """Where D4RL keeps its files: the environment variable D4RL_DATASET_DIR, else ~/.d4rl/datasets."""
    return Path(os.environ.get(ENVIRONMENT) or Path.home() / ".d4rl" / "datasets")


def fetch(
    url: str, path: str | os.PathLike[str], *, sha256: str | None = None, progress: bool = True, timeout_s: float = 30.0
) -> Path:
    """The file at ``url``, stored at ``path``; fetched unless it is there.

    What was fetched before an interruption stays in ``<path>.part`` and is continued from there if the server still
    has the same file. The file appears under its name only when it is whole. Processes that want the same file at
    the same moment wait for the first one. The SHA-256 is entered in the manifest beside it, see :func:`verified`.

    Args:
        url: http or https.
        path: Where it goes; folders are made.
        sha256: What it must be, in hexadecimal; also of a file that is there already.
        progress: Show a bar.
        timeout_s: Seconds without an answer after which a try counts as failed.

    Raises:
        DatasetError: No network, the server refuses, the disk is too full, or the SHA-256 is another one.
    """
    target = Path(path)
    if not url.startswith(("http://", "https://")):
        raise DatasetError(f"cannot fetch {url}: expected an address beginning with http:// or https://")
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f"{target.name}.part")
    if not target.exists():
        with _lock(target.with_name(f".{target.name}.lock")):
            if not target.exists():  # another process may have fetched it meanwhile
                _fetch_part(url, part, progress, timeout_s)
                if sha256 is not None and (found := digest(part)) != sha256.lower():
                    part.unlink()
                    raise DatasetError(f"{url} has SHA-256 {found}, expected {sha256}; it was not kept")
                os.replace(part, target)
                _state(part).unlink(missing_ok=True)
    found = verified(target)
    if sha256 is not None and found != sha256.lower():
        raise DatasetError(f"{target} has SHA-256 {found}, expected {sha256}; delete it to fetch it again")
    return target


def verified(path: str | os.PathLike[str]) -> str:
    """SHA-256 of ``path``, compared with the one in ``checksums.json`` beside it and entered there at first use.

    A file that did not change is looked through once in a session. In a folder that cannot be written nothing is
    entered.

    Raises:
        DatasetError: The file is not the one of its first use.
    """
    file = Path(path)
    stat = file.stat()
    state = (str(file.resolve()), stat.st_size, stat.st_mtime_ns)
    manifest = file.parent / MANIFEST
    known = _manifest(manifest).get(file.name, {})
    if known and state in _checked:
        return str(known["sha256"])
    found = digest(file)
    if known and known["sha256"] != found:
        raise DatasetError(
            f"{file} is not the file of its first use ({known['first_used']}): its SHA-256 is {found}, was "
            f"{known['sha256']}. Delete it to fetch it again, or delete its entry in {manifest} to accept it"
        )
    if not known and os.access(file.parent, os.W_OK):
        with _lock(manifest.with_name(f".{MANIFEST}.lock")):
            day = time.strftime("%Y-%m-%d")
            entries = _manifest(manifest) | {file.name: {"sha256": found, "size": stat.st_size, "first_used": day}}
            _write_json(manifest, dict(sorted(entries.items())))
    _checked.add(state)
    return found


def digest(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a file in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _fetch_part(url: str, part: Path, progress: bool, timeout_s: float) -> None:
    """Bring ``part`` to its full length; tries that got further do not count."""
    failures = 0
    while True:
        before = part.stat().st_size if part.exists() else 0
        try:
            if _continue(url, part, progress, timeout_s):
                return
            error: Exception = ConnectionError("the connection ended before the file did")
        except urllib.error.HTTPError as refused:
            if refused.code < 500:
                raise DatasetError(f"cannot fetch {url}: the server answers {refused.code} {refused.reason}") from None
            error = refused
        except (OSError, http.client.HTTPException) as failed:
            if isinstance(failed, OSError) and failed.errno == errno.ENOSPC:
                raise DatasetError(f"cannot fetch {url}: no space is left for {part}; free some, try again") from None
            error = failed
        after = part.stat().st_size if part.exists() else 0
        failures = 1 if after > before else failures + 1
        if failures >= _TRIES:
            kept = f" {after / 1e6:.1f} MB are kept and will be continued." if after else ""
            raise DatasetError(
                f"cannot fetch {url} ({error}).{kept} Is there a network? You can also put "
                f"the file there yourself: {part.with_suffix('')}"
            ) from error
        time.sleep(min(0.2 * 2**failures, 5.0))


def _continue(url: str, part: Path, progress: bool, timeout_s: float) -> bool:
    """One try, from where ``part`` ends; whether it is whole now."""
    have, state = part.stat().st_size if part.exists() else 0, _read_json(_state(part))
    request = urllib.request.Request(url, headers={"Accept-Encoding": "identity", "User-Agent": "ctrlrl"})
    if have and state.get("url") == url and state.get("validator"):
        request.add_header("Range", f"bytes={have}-")
        request.add_header("If-Range", state["validator"])  # the whole file if it is another one by now
    else:
        have = 0
    try:
        answer = urllib.request.urlopen(request, timeout=timeout_s)
    except urllib.error.HTTPError as refused:
        if refused.code != 416:
            raise
        if have == state.get("size"):  # nothing was missing but the new name
            return True
        part.unlink()
        return False
    with answer:
        if answer.status != 206 or not str(answer.headers.get("Content-Range", "")).startswith(f"bytes {have}-"):
            if answer.status == 206:
                raise ConnectionError(f"asked for bytes from {have}, got {answer.headers.get('Content-Range')}")
            have = 0
        length = answer.headers.get("Content-Length")
        size = have + int(length) if length else None
        free = shutil.disk_usage(part.parent).free
        if size is not None and size - have > free:
            raise DatasetError(
                f"cannot fetch {url}: {(size - have) / 1e6:.0f} MB are missing, {free / 1e6:.0f} MB are free in "
                f"{part.parent}; free some, or set {ENVIRONMENT} to a folder on another disk"
            )
        headers = answer.headers
        validator = headers.get("ETag") if not str(headers.get("ETag", "W/")).startswith("W/") else None
        _write_json(_state(part), {"url": url, "validator": validator or headers.get("Last-Modified"), "size": size})
        with open(part, "ab" if have else "wb") as file, _bar(part.stem, size, have, progress) as advance:
            while chunk := answer.read(_CHUNK):
                file.write(chunk)
                have += len(chunk)
                advance(len(chunk))
    return size is None or have == size


@contextmanager
def _bar(name: str, size: int | None, have: int, progress: bool) -> Iterator[Callable[[int], None]]:
    if not progress:
        yield lambda _: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True)) as bar:
        task = bar.add_task(name, total=size, completed=have)
        yield lambda count: bar.advance(task, count)


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Hold ``path`` against other processes, where the system can."""
    try:
        import fcntl
    except ImportError:  # Windows
        fcntl = None
    with open(path, "w") if fcntl else nullcontext() as file:
        if fcntl and file:
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _state(part: Path) -> Path:
    return part.with_name(f"{part.name}.json")


def _manifest(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    found = _read_json(path)
    if not found:
        raise DatasetError(f"{path} is damaged; delete it to record the files beside it anew")
    return found


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _write_json(path: Path, value: dict[str, Any]) -> None:
    beside = path.with_name(f".{path.name}.{os.getpid()}.new")
    beside.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    os.replace(beside, path)
