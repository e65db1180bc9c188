"""Names that people type: loading what they point to, and suggesting what was meant."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterable
from typing import Any


def load(path: str, what: str) -> Any:
    """The object that ``package.module:Class`` names.

    Raises:
        ValueError: It cannot be imported; ``what`` (a loss, a wrapper, ...) says what was wanted.
    """
    module, _, name = path.partition(":")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"cannot load the {what} {path!r} (expected 'package.module:Class'): {error}") from error


def hint(name: str, known: Iterable[str]) -> str:
    """`` Did you mean ...?`` with the up to three nearest of ``known``, or nothing."""
    near = difflib.get_close_matches(name, list(known), n=3, cutoff=0.45)
    return f" Did you mean {' or '.join(near)}?" if near else ""
