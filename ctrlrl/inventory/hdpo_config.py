"""The settings of HDPO: its loop, and what is its own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from ctrlrl.engine.config import ConfigError, RunConfig
from ctrlrl.inventory.policies.base import InventoryPolicyConfig
from ctrlrl.types import check_types

PAPER = "Neural inventory control in networks via hindsight differentiable policy optimization, arXiv:2306.11246"  # v3
DIFFERS = (
    "Demand is fresh at every update unless scenarios says how many there are; the paper has a fixed set. The learning "
    "rate falls as a cosine; the paper's is constant. Patience is off, and counted in updates. Where orders are of "
    "whole units, policies are chosen by rounded orders, as they are compared; the released code chooses by unrounded "
    "ones. An epoch leaves out what does not fill a batch. float32 throughout; the tables were made in bfloat16. "
    "Networks count stock and orders in mean demands (order_units), the paper's in raw units. --preset paper has the "
    "paper's set, schedule, patience and units for problems of one store, --preset real the batch, widths and units "
    "for recorded sales."
)


@dataclass(frozen=True)
class HDPOConfig(RunConfig):
    """Scenarios, and how often to look at the policy; a step is one update."""

    checkpoint_every: int = 500
    """Updates between checkpoints, rounded up to whole iterations and at least ten of them."""
    eval_every: int | None = 1_000
    """Updates between evaluations by episodes in the environment, for comparisons with other methods: what is kept is
    judged by the dev scenarios. None never evaluates."""
    compile: bool = False
    """Compile the policy with torch.compile: ten to sixty seconds at the start, then faster updates."""
    cudagraphs: bool = False
    """Not supported: the simulated horizon is no fixed graph."""
    iteration_steps: int = 50
    """Updates per line of the log; checkpoints and evaluations fall between two of these iterations."""
    batch_size: int = 512
    """Scenarios per update, each simulated over the whole training horizon; fewer where there are fewer. Memory grows
    with it, the periods and the network: of 8,192 scenarios over 50 periods, the graph network keeps 12 GB for 10
    stores behind a warehouse, 55 GB for 50, and backward passes need some more."""
    scenarios: int | None = None
    """Scenarios to train on, drawn once from the seed; None draws new ones for each update. Recorded series have an
    end: None takes all of them, a number that many."""
    dev_every: int = 50
    """Updates between two looks at the dev scenarios."""
    dev_scenarios: int = 1024
    """Dev scenarios, drawn once from the seed; of recorded series all are taken."""
    recompute_periods: int | None = None
    """Compute every so many periods again in the backward pass, instead of keeping what they need: less memory for
    longer horizons, half as much time again. None keeps everything where that takes no more than half of the free
    memory; else training begins by choosing a number, and says so."""
    network: InventoryPolicyConfig = field(default_factory=InventoryPolicyConfig)
    """Shape of the policy."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._positive("iteration_steps batch_size scenarios dev_every dev_scenarios recompute_periods")
        if self.cudagraphs:
            raise ConfigError("hdpo does not run as a CUDA graph; leave cudagraphs out")


@dataclass(frozen=True)
class HDPOSettings:
    """What is HDPO's own: which policy, and how it descends."""

    name: ClassVar[str] = "hdpo"
    paper: ClassVar[str] = PAPER
    differs: ClassVar[str] = DIFFERS
    loop_defaults: ClassVar[Mapping[str, Any]] = {}
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        # of one store; 500 epochs without improvement, looked at every tenth, of four batches each
        "paper": {
            "scenarios": 32768, "batch_size": 8192, "dev_scenarios": 32768, "dev_every": 40, "schedule": "constant",
            "patience": 2000, "restarts": 3, "order_units": "raw",
        },
        # of recorded sales in 21 stores
        "real": {"batch_size": 72, "hidden": (64, 64), "graph_width": 64, "order_bound": 10.0, "order_units": "raw"},
    }  # fmt: skip

    policy: str = "vanilla"
    """Policy by name (ctrlrl.inventory.policies), or package.module:Class of your own."""
    learning_rate: float | None = None
    """Adam's, at the beginning; None is the policy's own."""
    schedule: Literal["constant", "cosine"] = "cosine"
    """Keep the learning rate, or let it fall to 0 at the last update as half a cosine."""
    max_grad_norm: float | None = 1.0
    """Largest norm of the gradient; None is off."""
    patience: int | None = None
    """Updates without a lower dev cost after which a training ends; None trains to the end."""
    restarts: int = 1
    """Trainings, each from fresh weights, one after the other: they share the updates, and what one of them leaves
    goes to the next. The policy with the lowest dev cost of all is kept."""

    def __post_init__(self) -> None:
        check_types(self)
        for name in ("learning_rate", "max_grad_norm", "patience", "restarts"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name}={value} must be above 0")
