"""``ctrlrl export``: a run's policy as a file for other programs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro


@dataclass(frozen=True)
class Export:
    """Write a run's policy as one self-contained ONNX file, checked against the policy itself."""

    run: Annotated[Path, tyro.conf.Positional]
    """Run folder."""
    checkpoint: str = "last"
    """last, best or interrupted."""
    out: Path | None = None
    """The file, ending in .onnx; exports/policy.onnx in the run folder by default."""
    stochastic: bool = False
    """With the noise that selects an action as an input, instead of the mode."""


def main(words: list[str]) -> int:
    """Export as ``words`` say; returns the exit status."""
    from ctrlrl import api
    from ctrlrl.engine import onnx_export

    options = tyro.cli(Export, args=words, prog="ctrlrl export")
    agent = api.load(options.run, options.checkpoint, device="cpu")
    out = options.out or options.run / "exports" / "policy.onnx"
    if options.out is None:
        out.parent.mkdir(exist_ok=True)
    path = agent.export(out, deterministic=not options.stochastic)
    print(
        f"{agent.method} on {agent._env_name()}, {options.checkpoint} checkpoint at {agent.steps:,} steps, "
        f"{'with its noise as an input' if options.stochastic else 'deterministic'}"
    )
    for kind, tensors in zip(("input", "output"), onnx_export.signature(path), strict=True):
        for name, form in tensors.items():
            print(f"  {kind:6} {name}: {form}")
    print(f"Policy: {path}")
    return 0
