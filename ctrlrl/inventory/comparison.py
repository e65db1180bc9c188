"""Figures of any agent or policy on an inventory problem: cost, gap to the best known, share of the clairvoyant."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, cast

import gymnasium as gym
import numpy as np
import torch
from gymnasium.wrappers import TransformAction
from torch import Tensor

from ctrlrl.engine.seeding import generator
from ctrlrl.inventory.policies import base as policies
from ctrlrl.inventory.problem import Simulator, View

DEMANDS = 2**22
"""Scenarios x periods x stores that are drawn by default: a standard error of a few thousandths of the cost."""
MOST, LEAST = 8192, 64
"""Scenarios that are drawn by default, at most and at least."""
_AT_ONCE = 2**25
"""Numbers of demand held at a time; more scenarios are drawn in turns."""


@dataclass(frozen=True)
class Figures:
    """How a policy did on a split. Money is per store and period; a profit is a negative cost.

    Holding, unmet and links add up to the cost.
    """

    split: str
    """Of the problem."""
    periods: int
    """Counted in each scenario; those that the split ignores are left out."""
    costs: np.ndarray = field(repr=False, compare=False)
    """[scenarios] mean cost of each. Every policy meets the same scenarios under the same seed, so that differences of
    two policies can be taken one by one."""
    holding: float
    """Cost of stock in stores and warehouses."""
    unmet: float
    """Cost of unmet demand; where the objective is profit, what was sold, with a minus."""
    links: float
    """Cost of sending along links."""
    known: Mapping[str, float]
    """What is known about the best there is: "optimum" or "lower_bound"."""
    clairvoyant: float | None
    """Cost of ordering just what will be demanded, in the same scenarios. None where the objective is cost, or the
    network has no such policy."""

    @property
    def scenarios(self) -> int:
        """How many there were."""
        return len(self.costs)

    @property
    def cost(self) -> float:
        """Mean over scenarios."""
        return float(self.costs.mean())

    @property
    def standard_error(self) -> float:
        """Of the cost, over scenarios; nan of a single one."""
        return float(self.costs.std(ddof=1) / self.scenarios**0.5) if self.scenarios > 1 else float("nan")

    @property
    def best(self) -> tuple[str, float] | None:
        """What the gap is to: ("optimum", cost) or ("lower_bound", cost)."""
        return next(((name, self.known[name]) for name in ("optimum", "lower_bound") if name in self.known), None)

    @property
    def gap(self) -> float | None:
        """Percent by which the cost is above the optimum, or the lower bound; sampling error can make it negative."""
        return None if self.best is None else 100.0 * (self.cost - self.best[1]) / abs(self.best[1])

    @property
    def gap_error(self) -> float | None:
        """Standard error of the gap, in percent."""
        return None if self.best is None else 100.0 * self.standard_error / abs(self.best[1])

    @property
    def share(self) -> float | None:
        """Percent of the clairvoyant's profit."""
        return None if self.clairvoyant is None else 100.0 * self.cost / self.clairvoyant

    def document(self) -> dict[str, Any]:
        """Everything as JSON values."""
        names = ("split", "scenarios", "periods", "cost", "standard_error", "holding", "unmet", "links")
        more = ("known", "gap", "gap_error", "clairvoyant", "share", "costs")
        return {name: getattr(self, name) for name in names + more}


class Period(NamedTuple):
    """What happened in one period of ``B`` scenarios."""

    number: int
    """From 0."""
    inventory: Tensor
    """[B, N, L] at its beginning."""
    unmet_cost: Tensor
    """[B, S] or [1, S]."""
    action: Tensor
    """[B, E] sent."""
    demand: Tensor
    """[B, S]."""
    cost: Tensor
    """[B] over all places and links."""


@torch.inference_mode()
def compare(
    agent: Any, simulator: Simulator | gym.Env, split: str = "test", scenarios: int | None = None, seed: int = 0
) -> Figures:
    """Run ``agent`` through the scenarios of a split and count what it costs.

    Args:
        agent: See :func:`play`.
        simulator: ``env.unwrapped.simulator`` of an inventory environment, on the device of a policy; or the
            environment itself, for what it and its wrappers do to actions (``scale_actions``, see :func:`behind`).
        split: Whose horizon.
        scenarios: How many; by default every recorded series once, or as many as make ``DEMANDS`` demands.
        seed: Of the scenarios; they do not depend on the agent.

    Raises:
        ValueError: There is no such split, or it leaves nothing to count; no scenarios are asked for; actions do not
            fit the network.
        TypeError: ``agent`` cannot act; the environment is no inventory environment.

    Source: the measures of Alvo, Russo, Kanoria, Lee (arXiv:2306.11246) and of its released code.
    """
    if isinstance(simulator, gym.Env):
        agent, simulator = behind(agent, simulator), cast(Simulator, simulator.unwrapped.simulator)  # type: ignore[attr-defined]
    network, horizon = simulator.network, _horizon(simulator, split)
    if scenarios is not None and scenarios < 1:
        raise ValueError(f"scenarios={scenarios} must be at least 1")
    oracle = _oracle(simulator) if network.objective == "profit" else None
    totals, ideal = [], []
    for turn, count in enumerate(_turns(simulator, horizon.periods, scenarios)):
        start = begin(simulator, split, count, seed, turn)
        totals.append(_totals(agent, simulator, start, horizon))
        if oracle is not None:
            ideal.append(_totals(oracle, simulator, start, horizon)[0])
    counted = horizon.periods - horizon.ignored
    per = len(network.stores) * counted
    cost, unmet, links = (torch.cat(parts) / per for parts in zip(*totals, strict=True))
    known = _known(simulator.problem)
    return Figures(
        split=split,
        periods=counted,
        costs=cost.cpu().numpy(),
        holding=float((cost - unmet - links).mean()),
        unmet=float(unmet.mean()),
        links=float(links.mean()),
        known=known,
        clairvoyant=float(torch.cat(ideal).mean() / per) if ideal else known.get("clairvoyant"),
    )


def begin(simulator: Simulator, split: str, scenarios: int | None, seed: int, turn: int = 0) -> Any:
    """The state at the beginning of ``scenarios`` of a split (None: of every recorded series).

    Where demand is of whole units, so is the stock at the start.
    """
    rng = generator(seed, "compare", split, turn)
    drawn = simulator.scenarios(scenarios, split, rng)
    state = simulator.reset(None, drawn, rng)
    return simulator.reset(None, drawn, inventory=state.inventory.round()) if _whole(simulator) else state


@torch.inference_mode()
def play(agent: Any, simulator: Simulator, state: Any, periods: int) -> Iterator[Period]:
    """Let ``agent`` act for so many periods from ``state``.

    Args:
        agent: An agent of this library, or one with the ``predict`` of Stable-Baselines3: it acts deterministically
            on the environment's observations, and ``simulator.feasible`` makes its actions, which are taken for flows
            (see :func:`behind` where they are not), possible. Or a policy, any function from a view to flows [B, E],
            which are taken as they are. Orders are rounded where demand is of
            whole units; where a warehouse then has too little, its shares may be fractions.
        simulator: Of the environment.
        state: To start from, see :func:`begin`.
        periods: No more than there is demand for.

    Raises:
        ValueError: Actions do not fit the network.
        TypeError: ``agent`` cannot act.
    """
    act, oracle, trusted = _acting(agent, simulator), getattr(agent, "clairvoyant", False), _is_policy(agent)
    whole, links = _whole(simulator), len(simulator.network.links)
    for number in range(periods):
        view, demand = simulator.view(state, oracle), state.drawn.demand[:, number]
        action = act(view)
        if action.shape != (len(view.inventory), links):
            raise ValueError(
                f"actions have shape {tuple(action.shape)}, expected {(len(view.inventory), links)}: one number for "
                "each link of the network. Was it trained on another network?"
            )
        if whole:
            action = action.round()
        if whole or not trusted:
            action = simulator.feasible(view.inventory, action)
        state, cost = simulator.step(state, action)
        yield Period(number, view.inventory, view.unmet_cost, action, demand, cost)


def behind(agent: Any, env: gym.Env) -> Any:
    """``agent`` as it acts on the network of ``env``: what is done to its actions there is done to them.

    That is what wrappers do (rescale, clip) and then ``env.unwrapped.flows``, where there is such a method from actions
    [B, E] to flows. A policy of views gives flows already and stays as it is.

    Raises:
        TypeError: ``env`` is no inventory environment.
        ValueError: A wrapper changes what is observed, or does more to actions than a
            ``gymnasium.wrappers.TransformAction``.
    """
    if not is_inventory(env):
        raise TypeError(f"{env} has no simulator of an inventory network as env.unwrapped.simulator")
    transforms: list[Any] = []
    outer = env
    while isinstance(outer, gym.Wrapper):
        if isinstance(outer, TransformAction):
            transforms.append(outer)
        elif isinstance(outer, gym.ActionWrapper | gym.ObservationWrapper) or _spaces(outer) != _spaces(outer.env):
            raise ValueError(
                f"{type(outer).__name__} stands between the agent and the network, and the simulator cannot do what it "
                "does; wrappers that rescale or clip actions are fine"
            )
        outer = outer.env
    flows = getattr(env.unwrapped, "flows", None)
    if _is_policy(agent) or not (transforms or flows):
        return agent
    return _Behind(agent, transforms, flows)


def is_inventory(env: gym.Env) -> bool:
    """Whether ``env`` is an inventory environment: its simulator can be compared on."""
    simulator = getattr(env.unwrapped, "simulator", None)
    return all(hasattr(simulator, name) for name in ("problem", "network", "observe", "feasible"))


def recorded(simulator: Simulator) -> bool:
    """Whether demand is of recorded series, each of them a scenario."""
    return getattr(simulator.problem.demand, "values", None) is not None


class _Behind:
    """An agent whose actions pass through ``transforms``, the first first, then through ``flows``."""

    def __init__(self, agent: Any, transforms: Sequence[Any], flows: Callable[[Any], np.ndarray] | None) -> None:
        self.agent, self.transforms, self.flows = agent, transforms, flows

    def session(self, noise: None = None) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
        act = _session(self.agent)

        def decide(obs: np.ndarray, episodes: np.ndarray) -> np.ndarray:
            actions = act(obs, episodes)
            for transform in self.transforms:
                actions = np.stack([transform.action(action) for action in actions])
            return actions if self.flows is None else self.flows(actions)

        return decide


def _spaces(env: gym.Env) -> tuple[gym.Space, gym.Space]:
    return env.observation_space, env.action_space


def _is_policy(agent: Any) -> bool:
    return not hasattr(agent, "session") and not hasattr(agent, "predict")


def _acting(agent: Any, simulator: Simulator) -> Callable[[View], Tensor]:
    if not _is_policy(agent):
        session = _session(agent)

        def act(view: View) -> Tensor:
            actions = session(simulator.observe(view).cpu().numpy(), np.arange(len(view.inventory)))
            return torch.as_tensor(actions).to(view.inventory)

        return act
    if not callable(agent):
        raise TypeError(
            f"{type(agent).__name__} cannot act: give an agent, an object with the predict of Stable-Baselines3, or a "
            "function from a view to flows"
        )
    return cast(Callable[[View], Tensor], agent)


def _session(agent: Any) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    """How ``agent`` acts through whole episodes side by side, deterministically (see ``Agent.session``)."""
    if hasattr(agent, "session"):
        return agent.session(None)
    memory: Any = None
    begun = False

    def decide(obs: np.ndarray, episodes: np.ndarray) -> np.ndarray:
        nonlocal memory, begun
        starts, begun = np.full(len(obs), not begun), True
        actions, memory = agent.predict(obs, state=memory, episode_start=starts, deterministic=True)
        return actions

    return decide


def _totals(agent: Any, simulator: Simulator, start: Any, horizon: Any) -> tuple[Tensor, Tensor, Tensor]:
    """[B] float64 over the counted periods: cost, that of unmet demand (or minus what was sold), that of links."""
    profit, stores = simulator.network.objective == "profit", len(simulator.network.stores)
    price = torch.tensor([x.cost for x in simulator.network.links], dtype=torch.float64, device=simulator.device)
    cost = torch.zeros(len(start.inventory), dtype=torch.float64, device=simulator.device)
    unmet, sent = torch.zeros_like(cost), cost.new_zeros(len(cost), len(price))
    for period in play(agent, simulator, start, horizon.periods):
        if period.number < horizon.ignored:
            continue
        there = period.inventory[:, :stores, 0]
        units = -torch.minimum(there, period.demand) if profit else (period.demand - there).relu()
        cost += period.cost
        unmet += (period.unmet_cost * units).sum(1)
        sent += period.action
    return cost, unmet, sent @ price


def _horizon(simulator: Simulator, split: str) -> Any:
    splits = simulator.problem.splits
    if split not in splits:
        raise ValueError(f"there is no split {split!r}; there are {', '.join(splits)}")
    if not splits[split].ignored < splits[split].periods:
        raise ValueError(f"the split {split!r} ignores all of its {splits[split].periods} periods: nothing to count")
    return splits[split]


def _turns(simulator: Simulator, periods: int, scenarios: int | None) -> list[int | None]:
    """Scenarios to run at a time."""
    if scenarios is None and recorded(simulator):
        return [None]
    size = periods * len(simulator.network.stores)
    left = max(LEAST, min(MOST, DEMANDS // size)) if scenarios is None else scenarios
    width = max(1, _AT_ONCE // size)
    return [min(width, left - done) for done in range(0, left, width)]


def _whole(simulator: Simulator) -> bool:
    return bool(simulator.problem.demand.integer)


def _oracle(simulator: Simulator) -> policies.InventoryPolicy | None:
    """The policy that orders what will be demanded, where the network has one."""
    demand = simulator.problem.demand
    known = policies.Demanded(demand.mean, demand.std, demand.window, demand.features)
    try:
        policy = policies.build("just_in_time", simulator.network, known, policies.InventoryPolicyConfig())
    except policies.PolicyError:
        return None
    return policy.to(simulator.device)


def _known(problem: Any) -> Mapping[str, float]:
    """What the problem says of itself, or what can be computed."""
    from ctrlrl.inventory import optimal

    return dict(problem.known) or dict(optimal.known(problem))
