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

    Maxima have their derivatives almost everywhere; nothing is smoothed. Where a place has exactly 0 left, those of
    both maxima are 0, as of ``torch.relu``.

    The inventory that a step returns is [B, N, L] by shape, but ``B`` is the innermost dimension in memory, so that
    steps work on long rows. A step has a backward pass written by hand; inside of torch.compile it has none, so that
    policies and steps are derived and fused as one.

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
        self._charged = any(x.cost for x in network.links)
        self._index()

    def _index(self) -> None:
        """Which links leave and join where."""
        network, count = self.network, len(self.network.links)
        whole = {"device": self.device, "dtype": torch.long}
        leaving = [network.leaving(place) for place in range(self.stores, self.places)]
        joining: list[list[int]] = [[] for _ in range(self.slots * self.places)]
        slots = [(t - 1) * self.places + p for t, p in zip(network.lead_times, network.targets, strict=True)]
        for link, slot in enumerate(slots):
            joining[slot].append(link)
        # [J, L * N] links that join each slot; the last row of [E + 1, B], which is 0, fills the gaps
        self._joining = torch.tensor(_padded(joining, count), **whole).T.contiguous()
        self._slot = torch.tensor(slots, **whole)  # [E]: where in [L * N] it joins
        # [E]: warehouse that it leaves from; the supplier is one more
        warehouses = len(network.warehouses)
        self._source = torch.tensor([x - self.stores if x >= 0 else warehouses for x in network.sources], **whole)
        # [W, E]: 1 where it leaves from there
        self._leaving = torch.zeros(warehouses, count, device=self.device, dtype=self.dtype)
        for warehouse, links in enumerate(leaving):
            self._leaving[warehouse, links] = 1.0
        self._counts = torch.tensor([[len(x)] for x in leaving], device=self.device, dtype=self.dtype)  # [W, 1]
        self._holds = torch.tensor([[w.holds] for w in network.warehouses], device=self.device, dtype=torch.bool)
        # [K] slots of the flattened inventory that orders can fill; made here, as a tensor that is first made in
        # inference mode can never be part of a graph
        filled = [place * self.slots + k for place, length in enumerate(network.pipelines) for k in range(length)]
        self._filled = torch.tensor(filled, **whole)

    # -- episodes -----------------------------------------------------------------------------

    def scenarios(self, count: int | None, split: str = "train", generator: torch.Generator | None = None) -> Drawn:
        """Demand of ``count`` scenarios of a split (None: all of a recorded series), drawn on the CPU."""
        drawn = self.problem.demand.draw(count, self.problem.splits[split], generator)
        given = {k: v.to(self.device, self.dtype) for k, v in drawn._asdict().items() if v is not None}
        return drawn._replace(**given)

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
        # as steps lay it out, so that compiled code meets one layout
        rows = inventory.to(self.device, self.dtype).permute(2, 1, 0).contiguous()
        return State(rows.permute(2, 1, 0), 0, drawn)

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
        drawn = state.drawn
        given = (
            state.inventory,
            action,
            drawn.demand[:, state.period],
            self.unmet_cost if drawn.unmet_cost is None else drawn.unmet_cost,
        )
        by_hand = not (torch.compiler.is_compiling() or given[2].requires_grad or given[3].requires_grad)
        inventory, cost = _Period.apply(self, *given) if by_hand else self._period(*given)[:2]
        return State(inventory, state.period + 1, drawn), cost

    def _period(self, inventory: Tensor, action: Tensor, demand: Tensor, unmet_cost: Tensor) -> tuple[Tensor, ...]:
        """Inventory and cost after one period, and [N, B] what is left of the stock on hand before demand is lost."""
        stock, demand, stores = inventory.permute(2, 1, 0), demand.t(), self.stores
        sent = torch.cat([action.t(), action.new_zeros(1, len(action))])
        left = [stock[0, :stores] - demand]
        if len(self._leaving):
            left.append(stock[0, stores:] - self._leaving @ sent[:-1])
        left = torch.cat(left)
        kept, unmet = left.relu(), (-left[:stores]).relu()
        if self.network.objective == "profit":
            unmet = unmet - demand  # min(on hand, demand), less than nothing
        cost = (kept * self.holding_cost.t()).sum(0) + (unmet * unmet_cost.t()).sum(0)
        if self._charged:
            cost = cost + (sent[:-1] * self.link_cost[:, None]).sum(0)
        following = torch.cat([stock[1:], torch.zeros_like(stock[:1])])
        for links in self._joining:
            following = following + sent.index_select(0, links).view_as(following)
        following[0] += kept if self.network.unmet_demand == "lost" else left
        return following.permute(2, 1, 0), cost, left

    def _by_link(self, values: Tensor, supplier: float) -> Tensor:
        """[E, B] of the place that each link leaves from, of [W, B]."""
        return torch.cat([values, values.new_full((1, values.shape[1]), supplier)]).index_select(0, self._source)

    # -- what is seen -------------------------------------------------------------------------

    def view(self, state: State, clairvoyant: bool = False) -> View:
        """What a policy sees; the future too, if it is ``clairvoyant``."""
        drawn, t, window = state.drawn, state.period, self.problem.demand.window
        past = None
        if drawn.past is not None:
            past = drawn.demand[:, max(t - window, 0) : t]
            if t < window:
                past = torch.cat([drawn.past[:, drawn.past.shape[1] + t - window :], past], 1)
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
        cannot hold sends all it has in these proportions (in equal parts where nothing is asked, or next to nothing).
        """
        wish = action.clamp_min(0.0)
        if not len(self._leaving):
            return wish
        there, asked = inventory[:, self.stores :, 0].clamp_min(0.0).t(), self._leaving @ wish.t()
        # the root: 1 / asked has a square in its derivative
        nothing = torch.finfo(wish.dtype).tiny ** 0.5
        cut = torch.where(self._holds, asked > there, asked > nothing)
        sent = wish.t() * self._by_link(torch.where(cut, there / torch.where(cut, asked, 1.0), 1.0), 1.0)
        if not all(w.holds for w in self.network.warehouses):
            sent = torch.where(self._by_link(self._holds | cut, True), sent, self._by_link(there / self._counts, 0.0))
        return sent.t()

    def observe(self, view: View) -> Tensor:
        """[B, D] float32: the observation of environments.

        In this order: of each place (stores first) the slots that orders can fill, from on hand on; where policies see
        past demand, that of each period, the oldest first, at all stores; where scenarios have costs of unmet demand
        of their own, those of the stores; features of the period.
        """
        batch, demand = len(view.inventory), self.problem.demand
        parts = [view.inventory.flatten(1)[:, self._filled]]
        if demand.window:
            parts.append(_given(view.past, "past demand").flatten(1))
        if self._priced:
            parts.append(view.unmet_cost.expand(batch, -1))
        if demand.features:
            parts.append(_given(view.time, "features").expand(batch, -1))
        return torch.cat(parts, 1).float()

    def seen(self, obs: Tensor) -> View:
        """The view that :meth:`observe` turned into ``obs`` [B, D]; the future is in none."""
        demand, stores = self.problem.demand, self.stores
        sizes = [len(self._filled), demand.window * stores, stores * self._priced, demand.features]
        if obs.ndim != 2 or obs.shape[1] != sum(sizes):
            raise ValueError(f"observations have shape {tuple(obs.shape)}; expected (batch, {sum(sizes)})")
        filled, past, unmet_cost, time = obs.to(self.dtype).split(sizes, 1)
        flat = filled.new_zeros(len(obs), self.places * self.slots).index_copy(1, self._filled, filled)
        return View(
            flat.unflatten(1, (self.places, self.slots)),
            self.holding_cost,
            unmet_cost if self._priced else self.unmet_cost,
            past.unflatten(1, (demand.window, stores)) if demand.window else None,
            time if demand.features else None,
        )

    @property
    def _priced(self) -> bool:
        """Whether scenarios have costs of unmet demand of their own."""
        return getattr(self.problem.demand, "unmet", None) is not None

    def to(self, device: torch.device | str) -> InventorySimulator:
        """The same problem, computed on ``device``."""
        return InventorySimulator(self.problem, device, self.dtype)


def _given(part: Tensor | None, what: str) -> Tensor:
    if part is None:
        raise ValueError(f"the view has no {what}, which observations of this problem hold")
    return part


def _padded(lists: list[list[int]], value: int) -> list[list[int]]:
    most = max(map(len, lists), default=0)
    return [x + [value] * (most - len(x)) for x in lists]


class _Period(torch.autograd.Function):
    """A period with its derivatives by hand: half the kernels, and one row of each place to remember."""

    @staticmethod
    def forward(ctx: Any, simulator: InventorySimulator, *given: Tensor) -> tuple[Tensor, Tensor]:
        inventory, cost, left = simulator._period(*given)
        ctx.simulator, ctx.slots = simulator, inventory.shape[2]
        ctx.save_for_backward(left, given[3])
        ctx.set_materialize_grads(False)
        return inventory, cost

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        left, unmet_cost = ctx.saved_tensors
        simulator, stores = ctx.simulator, unmet_cost.shape[1]
        after, paid = grads  # of the inventory that follows and of the cost
        paid = left.new_zeros(left.shape[1]) if paid is None else paid
        rows = left.new_zeros(ctx.slots, *left.shape) if after is None else after.permute(2, 1, 0)
        # threshold_backward(x, y, 0): x where y > 0, else 0
        where_positive = torch.ops.aten.threshold_backward
        held = simulator.holding_cost.t() * paid
        if simulator.network.unmet_demand == "lost":
            now = where_positive(rows[0] + held, left, 0.0)
        else:
            now = rows[0] + where_positive(held, left, 0.0)
        now[:stores] -= where_positive(unmet_cost.t() * paid, -left[:stores], 0.0)
        inventory = torch.cat([now[None], rows[:-1]]).permute(2, 1, 0) if ctx.needs_input_grad[1] else None
        action = None
        if ctx.needs_input_grad[2]:
            action = rows.flatten(0, 1).index_select(0, simulator._slot)
            if simulator._charged:
                action += simulator.link_cost[:, None] * paid
            if len(simulator._leaving):
                action -= simulator._by_link(now[stores:], 0.0)
            action = action.t()
        return None, inventory, action, None, None
