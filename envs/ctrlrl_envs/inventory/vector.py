"""Inventory networks, many episodes at once in one batched simulator."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from gymnasium.utils import seeding

from ctrlrl_envs.inventory.demand import Drawn
from ctrlrl_envs.inventory.env import Inventory, cost_parts, new_generator
from ctrlrl_envs.inventory.simulator import Problem, View
from ctrlrl_envs.multimodal.base import ToyVector


class InventoryVector(ToyVector):
    """:class:`Inventory`, many at once: each row what a single environment of its seed does, rows in any period.

    It does not reset by itself: a truncated row stays as it is, with reward 0, until it is reset through
    ``reset(options={"reset_mask": mask})``. Infos are ``cost``, ``holding_cost``, ``unmet_cost`` and ``link_cost``
    [num_envs] of the step, 0 in rows that did not run.

    Args:
        num_envs: How many.
        max_episode_steps: Truncates earlier than the split does.
        problem: See :class:`Inventory`.
        split: Whose periods.
        scale_actions: Actions in [-1, 1] instead of amounts, see :class:`Inventory`.
        kwargs: Arguments of the problem's function.

    Raises:
        ValueError: As :class:`Inventory`; actions of rows that do not run are never looked at.
    """

    def __init__(
        self, num_envs: int = 1, *, max_episode_steps: int | None = None, problem: str | Problem = "one_store_lost",
        split: str = "train", scale_actions: bool = False, **kwargs: Any,
    ) -> None:  # fmt: skip
        single = Inventory(problem, split, scale_actions=scale_actions, **kwargs)
        limit = single.periods if max_episode_steps is None else min(max_episode_steps, single.periods)
        super().__init__(single, num_envs, limit)
        self.simulator, self.split, self.periods = single.simulator, split, single.periods
        self.scale_actions, self.max_episode_steps, self._single = scale_actions, limit, single
        self._streams: list[np.random.Generator | None] = [None] * num_envs
        simulator = self.simulator
        self._inventory = torch.zeros(num_envs, simulator.places, simulator.slots)
        # what is known of a period: [B, W + T, S] demand with that before, [T, F] features, [B or 1, S] costs
        drawn = simulator.scenarios(1, split, torch.Generator().manual_seed(0))
        past = 0 if drawn.past is None else drawn.past.shape[1]
        self._window, self._time = past, drawn.time
        self._demand = torch.zeros(num_envs, past + self.periods, simulator.stores)
        varies = drawn.unmet_cost is not None
        self._unmet_cost = torch.zeros(num_envs, simulator.stores) if varies else simulator.unmet_cost
        self._infos_of_step = dict.fromkeys(("cost", "holding_cost", "unmet_cost", "link_cost"), np.zeros(num_envs))

    def flows(self, action: Any) -> np.ndarray:
        """See :meth:`Inventory.flows`."""
        return self._single.flows(action)

    def _begin(self, rows: np.ndarray, seeds: Sequence[int | None] | None) -> None:
        for row in rows.tolist():
            seed = None if seeds is None else seeds[row]
            stream = self._streams[row]
            if stream is None or seed is not None:
                stream = self._streams[row] = seeding.np_random(seed)[0]
            state = self.simulator.reset(1, None, new_generator(stream), self.split)
            drawn = state.drawn
            demand = drawn.demand if drawn.past is None else torch.cat([drawn.past, drawn.demand], 1)
            self._inventory[row], self._demand[row] = self.simulator.view(state).inventory[0], demand[0]
            if drawn.unmet_cost is not None:
                self._unmet_cost[row] = drawn.unmet_cost[0]
        kept = ~np.isin(np.arange(self.num_envs), rows)
        self._infos_of_step = {name: part * kept for name, part in self._infos_of_step.items()}

    def _move(self, action: np.ndarray, live: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        simulator, running = self.simulator, torch.from_numpy(live)
        wish = self.flows(np.where(live[:, None], action, 0.0))
        sent = simulator.feasible(self._inventory, torch.from_numpy(wish))
        # every row as if this were its first and only period, as they may be in different ones
        now = torch.from_numpy(np.minimum(self._steps, self.periods - 1))
        demand = self._demand[torch.arange(self.num_envs), self._window + now]
        varying = None if self._unmet_cost is simulator.unmet_cost else self._unmet_cost
        state = simulator.reset(None, Drawn(demand[:, None], unmet_cost=varying), inventory=self._inventory)
        parts = cost_parts(simulator, self._inventory, self._unmet_cost, sent, demand)
        after, cost = simulator.step(state, sent)
        self._inventory = torch.where(running[:, None, None], simulator.view(after).inventory, self._inventory)
        per_store = np.where(live, cost.numpy().astype(np.float64) / simulator.stores, 0.0)
        self._infos_of_step = {"cost": per_store} | {
            name: np.where(live, part.numpy().astype(np.float64), 0.0) for name, part in parts.items()
        }
        over = np.zeros(self.num_envs, dtype=np.bool_)
        return -per_store, over, over

    def _observe(self) -> np.ndarray:
        past = time = None
        if self._window:
            index = torch.from_numpy(self._steps)[:, None] + torch.arange(self._window)
            past = self._demand[torch.arange(self.num_envs)[:, None], index]
        if self._time is not None:
            time = self._time[torch.from_numpy(np.minimum(self._steps, self.periods - 1))]
        view = View(self._inventory, self.simulator.holding_cost, self._unmet_cost, past, time)
        return self.simulator.observe(view).numpy()

    def _infos(self) -> dict[str, Any]:
        return {name: part.copy() for name, part in self._infos_of_step.items()}
