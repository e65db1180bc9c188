"""Errors of the engine that a user may want to catch by name."""

from __future__ import annotations


class CheckpointError(RuntimeError):
    """A checkpoint is missing, damaged, of another format, or belongs to something else."""
