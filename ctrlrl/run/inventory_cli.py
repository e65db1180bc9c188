"""``ctrlrl eval`` of a run on an inventory network: what it costs, how far it is from the best, and a picture."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import gymnasium as gym
import torch
from torch import Tensor

from ctrlrl.engine import environments
from ctrlrl.inventory import comparison
from ctrlrl.inventory.comparison import Figures
from ctrlrl.inventory.problem import Simulator, View

PICTURE = "inventory.png"
"""In the run folder."""


class Network(NamedTuple):
    """An agent on the network of its environment."""

    actor: Any
    """The agent, as its actions reach the network."""
    simulator: Simulator
    """On the agent's device."""
    seed: int
    """Of scenarios."""
    threads: int | None
    """Of torch."""


def network_of(agent: Any, seed: int | None = None) -> tuple[Network | None, str]:
    """The network of ``agent``'s environment; or None, and why where wrappers stand before it.

    Args:
        agent: Of a run.
        seed: Of scenarios; the agent's by default.
    """
    spec = agent.env_spec
    boxes = isinstance(agent.observation_space, gym.spaces.Box) and isinstance(agent.action_space, gym.spaces.Box)
    if spec is None or spec.backend == "envpool" or not boxes or not agent.can_evaluate:
        return None, ""
    env = environments.build_env(spec)
    try:
        if not comparison.is_inventory(env):
            return None, ""
        actor = comparison.behind(agent, env)
    except ValueError as error:
        return None, str(error)
    finally:
        env.close()
    simulator: Simulator = env.unwrapped.simulator  # type: ignore[attr-defined]
    return Network(actor, simulator.to(agent.device), agent.seed if seed is None else seed, agent.threads), ""


def figures(found: Network, scenarios: int | None = None) -> Figures:
    """On the test split, see :func:`ctrlrl.inventory.comparison.compare`."""
    with environments.torch_threads(found.threads):
        return comparison.compare(found.actor, found.simulator, "test", scenarios, found.seed)


def lines(found: Figures, simulator: Simulator) -> list[str]:
    """For the terminal."""
    network, counted = simulator.network, f"{found.periods:,} of {simulator.problem.splits[found.split].periods:,}"
    rounded = ", orders rounded to whole units" if simulator.problem.demand.integer else ""
    count = f"{found.scenarios:,} scenario{'s' if found.scenarios > 1 else ''}"
    said = [f"  {found.split} split of {simulator.problem.name}: {count}, the last {counted} periods{rounded}"]
    error = f"standard error {found.standard_error:.2g}"
    links = any(link.cost for link in network.links)
    if network.objective == "profit":
        parts = f"sales {-found.unmet:.5g}, holding {-found.holding:.5g}" + f", links {-found.links:.5g}" * links
        said.append(f"  profit per store and period {-found.cost:.5g}, {error} ({parts})")
    else:
        parts = f"holding {found.holding:.5g}, unmet demand {found.unmet:.5g}" + f", links {found.links:.5g}" * links
        said.append(f"  cost per store and period {found.cost:.5g}, {error} ({parts})")
    if found.best is not None:
        name, best = found.best[0].replace("_", " "), found.best[1]
        said.append(f"  gap to the {name} of {best:.5g}: {found.gap:.2f} %, standard error {found.gap_error:.2g} %")
    if found.clairvoyant is not None:
        said.append(f"  share of the clairvoyant's profit of {-found.clairvoyant:.5g}: {found.share:.2f} %")
    return said


def draw(found: Network, path: Path, title: str) -> None:
    """Write the picture of the agent on one scenario of the test split."""
    from ctrlrl.run import inventory_figures as pictures

    actor, simulator = found.actor, found.simulator
    network, problem = simulator.network, simulator.problem
    with environments.torch_threads(found.threads):
        trace = pictures.trace(actor, simulator, "test", found.seed)
        learned, best, level = [], [], None
        if len(network.stores) == len(network.links) == 1 and not comparison.recorded(simulator):
            learned, level = pictures.order_function(actor, simulator, trace), _level(problem)
            if (policy := _best(problem)) is not None:
                best = pictures.order_function(policy, simulator, trace)
    path.write_bytes(pictures.picture(trace, network, title, learned, best, level))


def _level(problem: Any) -> float | None:
    """The best base-stock level of one store, were unmet demand to wait and to be normal."""
    from ctrlrl.inventory import optimal

    (store,), (time,), demand = problem.network.stores, problem.network.lead_times, problem.demand
    mean, std = float(demand.mean[0]), float(demand.std[0])
    if min(mean, std, store.holding_cost, store.unmet_cost) <= 0.0:
        return None
    clip = getattr(demand, "clip", False)
    return optimal.backlogged_store(mean, std, store.holding_cost, store.unmet_cost, time, clip).level


def _best(problem: Any) -> Callable[[View], Tensor] | None:
    """The best policy of one store, where it is known and no base-stock policy."""
    from ctrlrl.inventory import optimal

    (store,), (time,), network = problem.network.stores, problem.network.lead_times, problem.network
    if network.unmet_demand != "lost" or "optimum" not in optimal.known(problem):
        return None
    solution = optimal.lost_sales_store(float(problem.demand.mean[0]), store.holding_cost, store.unmet_cost, time)

    def act(view: View) -> Tensor:
        orders = solution.order(view.inventory[:, 0].cpu().numpy())
        return torch.from_numpy(orders).to(view.inventory)[:, None]

    return act
