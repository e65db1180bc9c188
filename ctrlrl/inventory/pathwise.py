"""What a policy costs on simulated horizons, and how it descends their gradient."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.utils import clip_grad_norm_
from torch.utils.checkpoint import checkpoint

from ctrlrl.inventory.problem import Simulator, View

Act: TypeAlias = Callable[[View], Tensor]
"""From what is seen to what is sent along each link, [B, E]."""


def total_cost(
    simulator: Simulator, act: Act, state: Any, periods: int, *,
    ignored: int = 0, clairvoyant: bool = False, recompute: int | None = None,
) -> Tensor:  # fmt: skip
    """[B] cost of ``periods`` periods from ``state`` on, without the first ``ignored``.

    Args:
        simulator: Whose periods.
        act: Who decides in each.
        state: [B] systems at the beginning.
        periods: How many; as many as there is demand for at most.
        ignored: That do not count.
        clairvoyant: Show the demand to come.
        recompute: Keep for the backward pass only what every so many periods begin with; None keeps all.
    """

    def stretch(state: Any, first: int, last: int) -> tuple[Any, Tensor]:
        total = torch.zeros((), device=simulator.device)
        for period in range(first, last):
            state, cost = simulator.step(state, act(simulator.view(state, clairvoyant)))
            if period >= ignored:
                total = total + cost
        return state, total

    if recompute is None:
        return stretch(state, 0, periods)[1]
    total = torch.zeros((), device=simulator.device)
    for first in range(0, periods, recompute):
        last = min(first + recompute, periods)
        state, part = checkpoint(stretch, state, first, last, use_reentrant=False, preserve_rng_state=False)  # type: ignore[misc]
        total = total + part
    return total


def saved_by_a_period(simulator: Simulator, act: Act, state: Any, clairvoyant: bool = False) -> int:
    """Bytes that one more period keeps for the backward pass, by the third from ``state`` on.

    What all periods share (weights, demand) does not count, nor does what the first has not: gradients of its stock.
    """
    kept: dict[int, Tensor] = {}

    def keep(x: Tensor) -> None:
        kept.setdefault(x.untyped_storage().data_ptr(), x)  # held, so that no other takes its place

    before = total = 0
    with torch.enable_grad(), saved_tensors_hooks(keep, lambda _: torch.empty(0)):
        for _ in range(3):
            state, _ = simulator.step(state, act(simulator.view(state, clairvoyant)))
            before, total = total, sum(x.untyped_storage().nbytes() for x in kept.values())
    return total - before


def available_memory(device: torch.device) -> int | None:
    """Bytes that are free where ``device`` computes; None where nothing says so."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            lines = dict(line.split(":") for line in file)
        return 1024 * int(lines["MemAvailable"].split()[0])
    except (OSError, KeyError, ValueError):
        pass
    try:  # not said where it is Linux alone that knows
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return None


def as_compared(simulator: Simulator, act: Act) -> Act:
    """``act`` as policies are compared: with orders rounded, and then made possible, where orders are whole units."""
    if not simulator.problem.demand.integer:
        return act
    return lambda view: simulator.feasible(view.inventory, act(view).round())


def recorded(simulator: Simulator, split: str) -> Any | None:
    """All scenarios of a recorded series; None where demand has a distribution, and so no end."""
    try:
        return simulator.scenarios(None, split)
    except ValueError:
        return None


def rows(drawn: Any, index: Tensor) -> Any:
    """The scenarios of ``drawn`` at ``index``; features of the periods are those of all."""
    return drawn._replace(**{k: v[index] for k, v in drawn._asdict().items() if v is not None and k != "time"})


class Descent:
    """Adam on a policy's parameters, with everything that a checkpoint needs of it.

    Attributes:
        policy: Under training.
    """

    def __init__(self, policy: nn.Module, max_grad_norm: float | None) -> None:
        self.policy, self.max_grad_norm = policy, max_grad_norm
        self.named = {name: p for name, p in policy.named_parameters() if p.requires_grad}
        self._forget()

    def _forget(self) -> None:
        # a policy that has nothing to train can still act
        self.adam = torch.optim.Adam(self.named.values()) if self.named else None

    def begin(self, weights: Mapping[str, Tensor]) -> None:
        """Begin again from these weights."""
        self.policy.load_state_dict(weights)
        self._forget()

    def step(self, loss: Tensor, learning_rate: float) -> Tensor:
        """One step down; returns the norm of the gradient. Nothing changes if that is not finite."""
        assert self.adam is not None
        self.adam.zero_grad()
        loss.backward()
        norm = clip_grad_norm_(self.named.values(), self.max_grad_norm or math.inf)
        if norm.isfinite():
            for group in self.adam.param_groups:
                group["lr"] = learning_rate
            self.adam.step()
        return norm

    def tensors(self) -> dict[str, Tensor]:
        """Weights and moments by name."""
        found = {f"weights/{k}": v for k, v in self.policy.state_dict().items()}
        for name, p in self.named.items():
            # empty for what no gradient has reached
            moments = {} if self.adam is None else self.adam.state.get(p, {})
            found |= {f"moments/{name}/{k}": v for k, v in moments.items()}
        return found

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over what :meth:`tensors` gave."""
        self.begin({k.removeprefix("weights/"): v for k, v in tensors.items() if k.startswith("weights/")})
        for name, p in self.named.items():
            prefix = f"moments/{name}/"
            moments = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
            if moments and self.adam is not None:
                self.adam.state[p] = {
                    k: v.clone() if k == "step" else v.to(p.device, copy=True) for k, v in moments.items()
                }
