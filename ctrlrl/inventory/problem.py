"""What the methods for inventory ask of a simulator; ctrlrl_envs.inventory has one, and a user may have another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor


class Network(Protocol):
    """Places (stores first, then warehouses), and links between them; an action is what is sent along each link."""

    stores: Sequence[Any]
    """With a name, holding_cost and unmet_cost."""
    warehouses: Sequence[Any]
    """With a name, holding_cost and holds (False: all there is goes out at once)."""
    links: Sequence[Any]
    """With a source, target, lead_time and cost."""
    unmet_demand: str
    """"backlogged" or "lost"."""
    objective: str
    """"cost" or "profit"."""

    @property
    def sources(self) -> Sequence[int]:
        """Place that each link leaves from; -1 is the supplier, which never runs out."""
        ...

    @property
    def targets(self) -> Sequence[int]:
        """Place that each link leads to."""
        ...

    @property
    def lead_times(self) -> Sequence[int]:
        """Periods of each link."""
        ...

    @property
    def slots(self) -> int:
        """The longest lead time, and the length of a place's inventory vector."""
        ...

    @property
    def pipelines(self) -> Sequence[int]:
        """Slots of each place that can ever be filled."""
        ...


class View(Protocol):
    """What policies see of ``B`` systems with ``N`` places of which ``S`` are stores, and ``L`` slots."""

    @property
    def inventory(self) -> Tensor:
        """[B, N, L]: [..., 0] on hand (below 0: backlog), [..., k] arriving in k periods."""
        ...

    @property
    def holding_cost(self) -> Tensor:
        """[B, N] or [1, N]."""
        ...

    @property
    def unmet_cost(self) -> Tensor:
        """[B, S] or [1, S]."""
        ...

    @property
    def past(self) -> Tensor | None:
        """[B, W, S] demand of the periods before, the newest last."""
        ...

    @property
    def time(self) -> Tensor | None:
        """[B, F] or [1, F] features of the period."""
        ...

    @property
    def future(self) -> Tensor | None:
        """[B, H, S] demand of this period and those to come, for policies that know it."""
        ...


class Simulator(Protocol):
    """``env.unwrapped.simulator`` of an inventory environment: batched, differentiable, in torch."""

    problem: Any
    """With network, demand (mean [S], std [S], integer, window, features), splits by name ("train", "dev", "test";
    each with periods and ignored) and known (numbers by name)."""
    device: torch.device

    @property
    def network(self) -> Network:
        """That of the problem."""
        ...

    def to(self, device: torch.device | str) -> Simulator:
        """The same problem elsewhere."""
        ...

    def scenarios(self, count: int | None, split: str = ..., generator: torch.Generator | None = ...) -> Any:
        """Demand of ``count`` scenarios; None: all of a recorded series."""
        ...

    def reset(
        self, batch: int | None, drawn: Any = ..., generator: torch.Generator | None = ..., split: str = ...,
        inventory: Tensor | None = ...,
    ) -> Any:  # fmt: skip
        """Systems at the beginning of their first period."""
        ...

    def step(self, state: Any, action: Tensor) -> tuple[Any, Tensor]:
        """The next state and the cost [B] of the period, summed over places and links."""
        ...

    def view(self, state: Any, clairvoyant: bool = ...) -> View:
        """What a policy sees."""
        ...

    def feasible(self, inventory: Tensor, action: Tensor) -> Tensor:
        """The action made possible."""
        ...

    def observe(self, view: View) -> Tensor:
        """[B, D] float32: the observation of the environment."""
        ...

    def seen(self, obs: Tensor) -> View:
        """The inverse of :meth:`observe`."""
        ...


Known = Mapping[str, float]
"""What is known about the best: "optimum", "lower_bound" or "clairvoyant", a cost per store and period."""
