"""The batched, differentiable simulator of inventory networks."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ctrlrl_envs.inventory.demand import Demand, Drawn, Split
from ctrlrl_envs.inventory.network import Network


@dataclass(frozen=True)
class Problem:
    """A network with its demand, and how policies on it are trained and compared."""

    name: str
    network: Network
    demand: Demand
    splits: dict[str, Split] = field(
        default_factory=lambda: {"train": Split(50, 30), "dev": Split(100, 60), "test": Split(5000, 3000)}
    )
    """Horizons of training, of choosing between policies (dev) and of their figures (test)."""
    initial: tuple[float, float] = (0.0, 1.0)
    """Each slot of a store's inventory starts with its mean demand times a number drawn from this range. Warehouses
    start empty."""
    initial_slots: int | None = None
    """Slots that start so, from on-hand on; None is all."""
    known: dict[str, Any] = field(default_factory=dict)
    """What is known about the best there is: numbers by name ("optimum", "lower_bound"), per store and period."""


class View(NamedTuple):
    """What policies see of ``B`` systems. The last field is for those that know the future."""

    inventory: Tensor
    """[B, N, L]: [..., 0] on hand (below 0: backlog), [..., k] arriving in k periods. What cannot be filled is 0."""
    holding_cost: Tensor
    """[B, N], or [1, N] where all have the same."""
    unmet_cost: Tensor
    """[B, S] or [1, S]."""
    past: Tensor | None = None
    """[B, W, S] demand of the periods before, the newest last."""
    time: Tensor | None = None
    """[B, F] or [1, F] features of the period."""
    future: Tensor | None = None
    """[B, H, S] demand of this period and those to come: no part of an observation."""


class State(NamedTuple):
    """``B`` systems at the beginning of a period."""

    inventory: Tensor
    """[B, N, L], see View."""
    period: int
    """Periods gone by."""
    drawn: Drawn
    """What comes, and what is known of it."""


class InventorySimulator:
    """One period of a network at a time, for many scenarios at once; gradients flow through all of it.

    A period: all orders are decided at once, before demand is seen; stores meet demand; what is left is charged;
    pipelines move on; the orders of this period join them. An order of period t can meet demand of t + lead time.

    - Stores: with y = on hand - demand, cost objective: ``unmet_cost * max(-y, 0) + holding_cost * max(y, 0)``;
      profit: ``-unmet_cost * min(on hand, demand) + holding_cost * max(y, 0)``. Lost demand then leaves max(y, 0).
    - Warehouses: ``holding_cost * max(on hand - sent, 0)``. Links: ``cost * sent``.

    Maxima have their derivatives almost everywhere; nothing is smoothed.

    Source: Alvo, Russo, Kanoria, Lee, "Neural inventory control in networks via hindsight differentiable policy
    optimization" (arXiv:2306.11246), and its released code.

    Args:
        problem: The network with its demand.
        device: Where to compute.
        dtype: In which precision.
    """

    def __init__(
        self, problem: Problem, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> None:
        self.problem, self.network = problem, problem.network
        self.device, self.dtype = torch.device(device), dtype
        network, options = self.network, {"device": self.device, "dtype": dtype}
        self.stores, self.places, self.slots = len(network.stores), len(network.places), network.slots
        self.holding_cost = torch.tensor([[p.holding_cost for p in network.places]], **options)  # [1, N]
        self.unmet_cost = torch.tensor([[s.unmet_cost for s in network.stores]], **options)  # [1, S]
        self.link_cost = torch.tensor([x.cost for x in network.links], **options)  # [E]
        links, n = len(network.links), self.places
        self._sent = torch.zeros(links, n, **options)  # [E, N]: 1 where the link leaves from the place
        self._joins = torch.zeros(links, n * self.slots, **options)  # [E, N * L]: 1 at the slot that an order joins
        for i, (source, target, time) in enumerate(
            zip(network.sources, network.targets, network.lead_times, strict=True)
        ):
            if source >= 0:
                self._sent[i, source] = 1.0
            self._joins[i, target * self.slots + time - 1] = 1.0

    # -- episodes -----------------------------------------------------------------------------

    def scenarios(self, count: int | None, split: str = "train", generator: torch.Generator | None = None) -> Drawn:
        """Demand of ``count`` scenarios of a split (None: all of a recorded series), drawn on the CPU."""
        drawn = self.problem.demand.draw(count, self.problem.splits[split], generator)
        return Drawn(*(x if x is None else x.to(self.device, self.dtype) for x in drawn))

    def reset(
        self, batch: int | None, drawn: Drawn | None = None, generator: torch.Generator | None = None,
        split: str = "train", inventory: Tensor | None = None,
    ) -> State:  # fmt: skip
        """``batch`` systems at the beginning of their first period.

        Args:
            batch: How many; None: as many as ``drawn`` has, or all of a recorded series.
            drawn: Their demand; drawn from the problem's by default.
            generator: Of demand and of initial stock.
            split: Whose horizon to draw.
            inventory: [B, N, L] stock at the start; drawn as the problem says by default.
        """
        drawn = self.scenarios(batch, split, generator) if drawn is None else drawn
        count = len(drawn.demand)
        if inventory is None:
            inventory = self._initial(count, generator)
        return State(inventory.to(self.device, self.dtype), 0, drawn)

    def _initial(self, count: int, generator: torch.Generator | None) -> Tensor:
        problem, network = self.problem, self.network
        low, high = problem.initial
        share = torch.rand(count, self.stores, self.slots, generator=generator)
        stock = (low + (high - low) * share) * problem.demand.mean[:, None].cpu().float()
        filled = torch.zeros(count, self.places, self.slots)
        for store, length in enumerate(network.pipelines[: self.stores]):
            reach = min(length, problem.initial_slots or length)
            filled[:, store, :reach] = stock[:, store, :reach]
        return filled

    def step(self, state: State, action: Tensor) -> tuple[State, Tensor]:
        """One period.

        Args:
            state: At its beginning.
            action: [B, E] sent along each link, not negative and no more than there is (see :meth:`feasible`).

        Returns:
            The next state, and the cost [B], summed over places and links.
        """
        x, stores, drawn = state.inventory, self.stores, state.drawn
        demand = drawn.demand[:, state.period]
        on_hand = x[:, :, 0]
        short = on_hand - action @ self._sent
        sold = short[:, :stores] - demand
        left = torch.cat([sold, short[:, stores:]], 1)
        unmet_cost = self.unmet_cost if drawn.unmet_cost is None else drawn.unmet_cost
        cost = (self.holding_cost * left.relu()).sum(1) + action @ self.link_cost
        if self.network.objective == "profit":
            cost = cost - (unmet_cost * torch.minimum(on_hand[:, :stores], demand)).sum(1)
        else:
            cost = cost + (unmet_cost * (-sold).relu()).sum(1)
        if self.network.unmet_demand == "lost":
            left = left.relu()
        arriving = action @ self._joins
        moved = torch.cat([x[:, :, 1:], x.new_zeros(len(x), self.places, 1)], 2)
        moved = torch.cat([(left + moved[:, :, 0]).unsqueeze(2), moved[:, :, 1:]], 2)
        return State(moved + arriving.unflatten(1, (self.places, self.slots)), state.period + 1, drawn), cost

    # -- what is seen -------------------------------------------------------------------------

    def view(self, state: State, clairvoyant: bool = False) -> View:
        """What a policy sees; the future too, if it is ``clairvoyant``."""
        drawn, t, window = state.drawn, state.period, self.problem.demand.window
        past = None
        if drawn.past is not None:
            past = torch.cat([drawn.past, drawn.demand[:, :t]], 1)[:, -window:]
        return View(
            state.inventory,
            self.holding_cost,
            self.unmet_cost if drawn.unmet_cost is None else drawn.unmet_cost,
            past,
            None if drawn.time is None else drawn.time[t : t + 1],
            drawn.demand[:, t:] if clairvoyant else None,
        )

    def feasible(self, inventory: Tensor, action: Tensor) -> Tensor:
        """``action`` [B, E] made possible at ``inventory`` [B, N, L]: none negative, none that is not there.

        Where more is asked of a warehouse than it has, every link gets the same share of its wish; a warehouse that
        cannot hold sends all it has in these proportions (in equal parts where nothing is asked).
        """
        action = action.clamp_min(0.0)
        on_hand = inventory[:, :, 0].clamp_min(0.0)
        result = action
        for place, warehouse in enumerate(self.network.warehouses, self.stores):
            links = self.network.leaving(place)
            wish, there = action[:, links], on_hand[:, place : place + 1]
            asked = wish.sum(1, keepdim=True)
            share = there / asked.clamp_min(torch.finfo(wish.dtype).tiny)
            sent = wish * share.clamp_max(1.0)
            if not warehouse.holds:
                sent = torch.where(asked > 0.0, wish * share, there / len(links))
            result = result.index_copy(1, torch.tensor(links, device=action.device), sent)
        return result
