"""``ctrlrl data generate``: a set drawn from a model of trajectories, as the data are or pushed towards a policy."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from ctrlrl.engine.guidance import GuidanceConfig
from ctrlrl.nets.edm import SamplerConfig

if TYPE_CHECKING:
    from ctrlrl.data.dataset import Dataset


@dataclass(frozen=True)
class Generate:
    """Draw trajectories from a run of policy_guided_diffusion."""

    run: Annotated[Path, tyro.conf.Positional]
    """Its folder."""
    out: str
    """Where to write: a file that ends in .hdf5 or .h5 (D4RL), or a Minari id, [namespace/]name-v0."""
    trajectories: int = 1_000
    """How many, each of the length that the model was trained on."""
    checkpoint: str = "last"
    """Of the run: last, best or interrupted."""
    policy: Path | None = None
    """Run folder of a policy towards whose actions to push, by --kappa."""
    policy_checkpoint: str = "last"
    """Its checkpoint."""
    batch_size: int = 256
    """Trajectories at once; another one draws other trajectories."""
    device: str | None = None
    """cpu, cuda, cuda:1, ...; that of the run by default."""
    seed: int = 0
    """Seed of all noise."""
    quiet: bool = False
    """No progress display."""


@dataclass(frozen=True)
class Options:
    """Draw trajectories from a run of policy_guided_diffusion."""

    drawing: tyro.conf.OmitArgPrefixes[Generate]
    guiding: tyro.conf.OmitArgPrefixes[GuidanceConfig] = field(default_factory=GuidanceConfig)
    sampling: tyro.conf.OmitArgPrefixes[SamplerConfig] = field(default_factory=SamplerConfig)


def run(options: Options) -> int:
    """Generate, write, describe; returns the exit status."""
    from rich.console import Console

    from ctrlrl import api
    from ctrlrl.run.data_cli import check_target, described, write

    drawing, guiding = options.drawing, options.guiding
    if (drawing.policy is None) != (guiding.kappa == 0.0):
        raise ValueError("guidance needs both whose actions and how strongly: --policy RUN and --kappa above 0")
    if drawing.trajectories < 1 or drawing.batch_size < 1:
        raise ValueError(
            f"--trajectories {drawing.trajectories} and --batch-size {drawing.batch_size} must be at least 1"
        )
    check_target(drawing.out)  # before the work, not after it
    model: Any = api.load(drawing.run, drawing.checkpoint, device=drawing.device)
    if not hasattr(model, "generate"):
        raise ValueError(
            f"{drawing.run} is a run of {model.method}, which generates nothing; expected one of "
            "policy_guided_diffusion"
        )
    policy = drawing.policy and api.load(drawing.policy, drawing.policy_checkpoint, device=str(model.device))
    data = _drawn(model, policy, options)
    left_out = write(data, drawing.out)
    Console().print(described(data))
    if left_out:
        print(f"{left_out:,} steps are not in {drawing.out}: the last of trajectories that were cut there")
    return 0


def _drawn(model: Any, policy: Any, options: Options) -> Dataset:
    """The set, with all that it takes to make it again in its words."""
    from ctrlrl.engine import runfolder
    from ctrlrl.engine.data_making import Source, concatenate
    from ctrlrl.engine.seeding import generator

    drawing, guiding, sampling = options.drawing, options.guiding, options.sampling
    noise, parts = generator(drawing.seed, "generate"), []
    with _progress(drawing) as advance:
        for first in range(0, drawing.trajectories, drawing.batch_size):
            count = min(drawing.batch_size, drawing.trajectories - first)
            made = model.generate(count, policy, guiding, sampling, noise, drawing.batch_size)
            parts.append(model.to_dataset(*made, kappa=guiding.kappa))
            advance(count)
    data = concatenate(parts)
    about: dict[str, Any] = {
        **data.info.about, "kind": "generated", "algorithm": model.method, "algorithm_name": model.method,
        "behaviour": Source(model, drawing.run, drawing.checkpoint).about(), "seed": drawing.seed,
        "trajectories": drawing.trajectories, "batch_size": drawing.batch_size,
        "sampler": dataclasses.asdict(sampling), "versions": runfolder.versions(),
    }  # fmt: skip
    if policy is not None:
        about["guidance"] = dataclasses.asdict(guiding)
        about["policy"] = Source(policy, drawing.policy, drawing.policy_checkpoint).about()
    return dataclasses.replace(data, info=dataclasses.replace(data.info, about=about))


@contextlib.contextmanager
def _progress(drawing: Generate) -> Iterator[Any]:
    if drawing.quiet or not sys.stderr.isatty():
        yield lambda count: None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True)) as bar:
        task = bar.add_task("trajectories", total=drawing.trajectories)
        yield lambda count: bar.advance(task, count)
