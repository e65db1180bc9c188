"""How commands end that cannot do what was asked."""

from __future__ import annotations

import sys


def fail(message: str, status: int) -> int:
    """Say ``message`` on standard error and give ``status`` back."""
    print(f"ctrlrl: {message}", file=sys.stderr)
    return status
