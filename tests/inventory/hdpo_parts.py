"""Small problems as environments of their own, and policies that say what happens to them."""

import gymnasium as gym
import numpy as np
import torch
from ctrlrl_envs.inventory.demand import Normal, Poisson, Series, Split
from ctrlrl_envs.inventory.network import SUPPLIER, Link, Network, Store
from ctrlrl_envs.inventory.simulator import InventorySimulator, Problem, View
from torch import nn
from torch.nn.functional import softplus

from ctrlrl.inventory.policies.base import InventoryPolicy

ID = "HDPOToy-v0"
PRODUCTS = 10


def one_store(lead_time=4, unmet_cost=9.0, kind="normal", clip=True, splits=None):
    """One store whose optimum is known: notes at the tests that use it."""
    if kind == "normal":
        demand = Normal(torch.tensor([5.0]), torch.tensor([1.6]), clip=clip)
    elif kind == "poisson":
        demand = Poisson(torch.tensor([5.0]))
    else:
        values = torch.arange(PRODUCTS, dtype=torch.float32)[:, None, None].expand(PRODUCTS, 1, 40)
        demand = Series(values + 1.0, window=3, time=torch.arange(40.0)[:, None])
    first = 0 if kind != "series" else 3
    splits = splits or {"train": (12, 6), "dev": (12, 6), "test": (24, 12)}
    return Problem(
        "toy",
        Network((Store("store", 1.0, unmet_cost),), (), (Link(SUPPLIER, "store", lead_time),),
                "lost" if kind == "poisson" else "backlogged"),
        demand,
        {name: Split(periods, ignored, first) for name, (periods, ignored) in splits.items()},
    )  # fmt: skip


class Simulator(InventorySimulator):
    """Its observation is the inventory, and nothing else."""

    def observe(self, view):
        return view.inventory.flatten(1)

    def seen(self, obs):
        return View(obs.unflatten(1, (self.places, self.slots)), self.holding_cost, self.unmet_cost)

    def to(self, device):
        return self if torch.device(device) == self.device else Simulator(self.problem, device)


class Toy(gym.Env):
    """One system of it; the reward of a period is what it did not cost."""

    def __init__(self, **kwargs):
        self.simulator = Simulator(one_store(**kwargs))
        network = self.simulator.network
        size = len(network.places) * network.slots
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, (size,), np.float32)
        self.action_space = gym.spaces.Box(0.0, np.inf, (len(network.links),), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        drawing = torch.Generator().manual_seed(int(self.np_random.integers(2**31)))
        self.state = self.simulator.reset(1, generator=drawing)
        return self._observe(), {}

    def step(self, action):
        with torch.no_grad():
            self.state, cost = self.simulator.step(self.state, torch.from_numpy(action)[None])
        done = self.state.period == self.state.drawn.demand.shape[1]
        return self._observe(), -float(cost), False, done, {}

    def _observe(self):
        return self.simulator.observe(self.simulator.view(self.state))[0].numpy()


gym.register(ID, entry_point=Toy)


class Random(InventoryPolicy):
    """Orders one number, drawn when it is built."""

    learning_rate = 0.05

    def __init__(self, network, demand, config):
        super().__init__(network, demand, config)
        self.theta = nn.Parameter(torch.randn(1) + 5.0)
        self.register_buffer("extra", torch.zeros(1))

    def forward(self, view):
        return softplus(self.theta).expand(len(view.inventory), 1)


class Fixed(Random):
    """Has nothing to train."""

    trainable = False


class Prophet(InventoryPolicy):
    """Orders what will be demanded when it arrives."""

    clairvoyant = True
    trainable = False

    def forward(self, view):
        later = self.network.lead_times[0]
        return view.future[:, later] if view.future.shape[1] > later else torch.zeros(len(view.inventory), 1)


class Forecasting(Random):
    """Fits something beforehand, which costs time."""

    calls = 0

    def prepare(self, simulator, generator=None):
        type(self).calls += 1
        self.extra.fill_(7.0)
