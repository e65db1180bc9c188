"""Inventory networks as a Gymnasium environment."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from torch import Tensor

from ctrlrl_envs.inventory import problems
from ctrlrl_envs.inventory.demand import Series
from ctrlrl_envs.inventory.simulator import InventorySimulator, Problem, State
from ctrlrl_envs.inventory.yaml_file import read_network

_MAKERS: dict[str, Callable[..., Problem]] = {
    name: getattr(problems, name)
    for name in (
        "one_store_backlogged", "one_store_lost", "independent_stores", "serial", "transshipment", "one_warehouse",
        "many_warehouses", "real_stores", "real_one_store",
    )
} | {"network": read_network}  # fmt: skip


class Inventory(gym.Env[np.ndarray, np.ndarray]):
    """Decide in every period what is sent along each link of an inventory network, before demand is seen.

    ## Order of events

    A step is a period: orders go out, stores meet demand, what is left is charged, goods on their way move on, and the
    orders join them. What is ordered in period t can meet demand of period t + lead time. Goods on their way are never
    charged. See :class:`ctrlrl_envs.inventory.simulator.InventorySimulator` for costs.

    ## Action space

    ``Box(0, high, (links,), float32)``: one amount for each link, in the order of ``simulator.network.links``. Amounts
    are made possible: where more is asked of a warehouse than it has, each of its links gets the same share of its
    wish; a warehouse that cannot hold sends all it has. ``high`` is four times a large demand of a period (the largest
    of a recorded series; mean and three standard deviations of a distribution), summed over the stores that a link
    leads to: far more than is ever worth it.

    With ``scale_actions``, for agents that start around 0 (PPO, SAC, those of other libraries):
    ``Box(-1, 1, (links,), float32)``, where an action ``a`` asks for the flow ``mean_flow * (1 + 2 a)``, and for 0
    where that is negative. At 0 the mean demand flows through the network: see :func:`mean_flows` (of recorded series
    it is the mean of all products). :meth:`flows` turns actions into flows.

    ## Observation space

    ``Box(-inf, inf, (D,), float32)``: ``simulator.observe``, in this order.

    - Of each place, stores first: what is on hand (below 0: backlog), then what arrives in 1, 2, ... periods, up to the
      longest lead time of a link that leads to it, less 1.
    - With recorded series: demand of the ``window`` last periods, the oldest first, each at all stores.
    - Where they differ between scenarios: the cost of unmet demand (the price) at each store.
    - With recorded series: features of the period.

    ## Rewards

    Minus the cost of the period, per store: its sum over periods, divided by their number, is minus the figure that
    studies print. It is profit where the network's objective says so.

    ``info`` has ``cost`` (minus the reward), and its parts per store: ``holding_cost``, ``unmet_cost`` (minus revenue
    with the objective profit) and ``link_cost``; ``demand`` [S] of the period and ``sent`` [E], what was sent.

    ## Starting state

    Stock at stores is drawn by ``reset`` as the problem says, warehouses are empty; demand of the whole episode is
    drawn, too (of recorded series: one product). ``reset(options={"inventory": [N, L]})`` sets the stock.

    Orders and stock are never rounded here. Figures of ``ctrlrl eval`` and ``ctrlrl.inventory.comparison`` round both
    to whole units where demand is of whole units, as the studies do; so they differ a little from rewards.

    ## Episode end

    Never terminated; truncated after the periods of the split, ``max_episode_steps``. ``simulator.problem.splits`` says
    how many of these the studies leave out of their figures.

    Args:
        problem: One of these, or the name of a function of :mod:`ctrlrl_envs.inventory.problems`, or ``network``.
        split: Whose periods: ``train``, ``dev`` or ``test``.
        scale_actions: Actions in [-1, 1] instead of amounts, see above.
        kwargs: Arguments of that function; for ``network``, ``network=`` the path of a YAML file.

    Raises:
        ValueError: No such problem or split, or what its function refuses; actions of another shape, or not finite.
    """

    metadata: dict[str, Any] = {"render_modes": []}  # noqa: RUF012 - as gymnasium declares it

    def __init__(
        self, problem: str | Problem = "one_store_lost", split: str = "train", *, scale_actions: bool = False,
        **kwargs: Any,
    ) -> None:  # fmt: skip
        if not isinstance(problem, str):
            if kwargs:
                raise ValueError(f"{', '.join(kwargs)}: a problem that is made already takes no arguments")
            made = problem
        elif problem in _MAKERS:
            made = _MAKERS[problem](**kwargs)
        else:
            raise ValueError(f"problem={problem!r} is unknown; known are {', '.join(_MAKERS)}")
        if split not in made.splits:
            raise ValueError(f"split={split!r} is unknown; this problem has {', '.join(made.splits)}")
        self.simulator = InventorySimulator(made)
        self.split, self.periods = split, made.splits[split].periods
        self.max_episode_steps = self.periods
        self.scale_actions, self._mean_flows = scale_actions, mean_flows(made)
        if scale_actions:
            self.action_space = gym.spaces.Box(-1.0, 1.0, (len(made.network.links),), np.float32)
        else:
            self.action_space = gym.spaces.Box(0.0, highest_orders(made), dtype=np.float32)
        generator = torch.Generator().manual_seed(0)
        size = self.simulator.observe(self.simulator.view(self.simulator.reset(1, None, generator, split))).shape[1]
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, (size,), np.float32)
        self._state: State | None = None

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Draw an episode; ``options["inventory"]`` [N, L] is the stock that it starts with."""
        super().reset(seed=seed)
        inventory = start_inventory(self.simulator, options)
        generator = new_generator(self.np_random)
        self._state = self.simulator.reset(1, None, generator, self.split, inventory)
        return self._observation(self._state), {}

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Send ``action`` [links], as far as it is possible."""
        state = self._state
        if state is None or state.period >= self.periods:
            raise gym.error.ResetNeeded("call reset() before step()")
        given = np.asarray(action, dtype=np.float32)
        if given.shape != self.action_space.shape:
            raise ValueError(f"action has shape {given.shape}; expected {self.action_space.shape}")
        wish, simulator = torch.from_numpy(self.flows(given)), self.simulator
        view, demand = simulator.view(state), state.drawn.demand[:, state.period]
        sent = simulator.feasible(view.inventory, wish[None])
        parts = cost_parts(simulator, view.inventory, view.unmet_cost, sent, demand)
        state, cost = simulator.step(state, sent)
        self._state = state
        per_store = float(cost) / simulator.stores
        info: dict[str, Any] = {"cost": per_store} | {name: float(part) for name, part in parts.items()}
        info |= {"demand": demand[0].numpy(), "sent": sent[0].numpy()}
        return self._observation(state), -per_store, False, state.period >= self.periods, info

    def flows(self, action: Any) -> np.ndarray:
        """[..., links] float32: the flows that actions [..., links] ask for; themselves without ``scale_actions``.

        Raises:
            ValueError: One is not finite; the message says on which link.
        """
        asked = np.array(action, dtype=np.float32)
        if asked.shape[-1:] != self._mean_flows.shape:
            raise ValueError(
                f"actions have shape {asked.shape}; expected one number for each of {len(self._mean_flows)} links. "
                "Was the policy trained on another network?"
            )
        if not np.isfinite(asked).all():
            where = tuple(np.argwhere(~np.isfinite(asked))[0])
            link = self.simulator.network.links[where[-1]]
            raise ValueError(
                f"the action of link {link.source} -> {link.target} is {asked[where]}; expected a finite number. "
                "Did the policy diverge?"
            )
        return np.maximum(self._mean_flows * (1.0 + 2.0 * asked), 0.0) if self.scale_actions else asked

    def _observation(self, state: State) -> np.ndarray:
        view = self.simulator.view(state)
        features = state.drawn.time
        if features is not None and state.period == self.periods:
            # after the last period there are none; those of the last one stay
            view = view._replace(time=features[-1:])
        return self.simulator.observe(view)[0].numpy()


# -- shared with the vector form ------------------------------------------------------------------


def highest_orders(problem: Problem) -> np.ndarray:
    """[E] float32: bounds of the action space, four times a large demand: of a series the largest to train on."""
    network, demand = problem.network, problem.demand
    recorded = isinstance(demand, Series)
    large = demand.values[:, :, : demand.training].amax((0, 2)) if recorded else demand.mean + 3.0 * demand.std

    def reached(place: int) -> set[int]:
        if place < len(network.stores):
            return {place}
        return set().union(*(reached(network.targets[link]) for link in network.leaving(place)))

    return np.array([4.0 * float(large[sorted(reached(target))].sum()) for target in network.targets], np.float32)


def mean_flows(problem: Problem) -> np.ndarray:
    """[E] float32: what goes along each link when just the mean demand flows through the network.

    It is the mean demand downstream of the link's target, of which each of the links that lead to that target carries
    the same share: a store needs its own mean demand, a warehouse what goes along the links that leave from it.
    """
    network, demand = problem.network, problem.demand.mean.clamp_min(0.0).tolist()

    def flow(link: int) -> float:
        place = network.targets[link]
        needed = demand[place] if place < len(demand) else sum(map(flow, network.leaving(place)))
        return needed / len(network.arriving(place))

    return np.array([flow(link) for link in range(len(network.links))], np.float32)


def new_generator(rng: np.random.Generator) -> torch.Generator:
    """That of the next episode of an environment's stream."""
    return torch.Generator().manual_seed(int(rng.integers(2**62)))


def start_inventory(simulator: InventorySimulator, options: dict[str, Any] | None) -> Tensor | None:
    """[1, N, L] of ``options["inventory"]``, None without.

    Raises:
        ValueError: Another option, or another shape.
    """
    options = dict(options or {})
    given = options.pop("inventory", None)
    if options:
        raise ValueError(f"unknown reset options {sorted(options)}; this environment knows: inventory")
    if given is None:
        return None
    inventory, expected = torch.as_tensor(given, dtype=torch.float32), (simulator.places, simulator.slots)
    if inventory.shape != expected:
        raise ValueError(f"inventory has shape {tuple(inventory.shape)}; expected {expected}: places and slots")
    return inventory[None]


def cost_parts(
    simulator: InventorySimulator, inventory: Tensor, unmet_cost: Tensor, sent: Tensor, demand: Tensor
) -> dict[str, Tensor]:
    """[B] each: the parts of a period's cost, per store; they sum to what ``simulator.step`` charges."""
    network, stores = simulator.network, simulator.stores
    on_hand = inventory[:, :, 0]
    inner = [link for link, source in enumerate(network.sources) if source >= 0]
    left = on_hand.index_add(1, torch.tensor([network.sources[i] for i in inner], dtype=torch.int64), -sent[:, inner])
    left[:, :stores] -= demand
    if network.objective == "profit":
        unmet = -unmet_cost * torch.minimum(on_hand[:, :stores], demand)
    else:
        unmet = unmet_cost * (-left[:, :stores]).clamp_min(0.0)
    costs = sent.new_tensor([link.cost for link in network.links])
    parts = {
        "holding_cost": simulator.holding_cost * left.clamp_min(0.0),
        "unmet_cost": unmet,
        "link_cost": costs * sent,
    }
    return {name: part.sum(1) / stores for name, part in parts.items()}
