"""Inventory networks: stores with random demand, the warehouses and suppliers behind them.

==================================  ===========================================================================
id                                  problem, with the function whose arguments the environment takes
==================================  ===========================================================================
``ctrlrl/OneStoreBacklogged-v0``    one store whose customers wait; ``one_store_backlogged``
``ctrlrl/OneStoreLost-v0``          one store whose customers leave, Poisson demand; ``one_store_lost``
``ctrlrl/IndependentStores-v0``     many of those with nothing in common; ``independent_stores``
``ctrlrl/Serial-v0``                a chain of 3 to 7 places; ``serial``
``ctrlrl/Transshipment-v0``         a warehouse that cannot hold, and its stores; ``transshipment``
``ctrlrl/OneWarehouse-v0``          a warehouse and its stores, lost demand; ``one_warehouse``
``ctrlrl/ManyWarehouses-v0``        several warehouses, each of which reaches some stores; ``many_warehouses``
``ctrlrl/RealStores-v0``            recorded sales of 21 stores, profit; ``real_stores``
``ctrlrl/RealOneStore-v0``          the same sales, a store at a time; ``real_one_store``
``ctrlrl/Inventory-v0``             a network of a user's own; ``network="file.yaml"``
==================================  ===========================================================================

All take ``split`` (``train``, ``dev`` or ``test``) and ``scale_actions``, too. :class:`Inventory` says what agents
see, do and earn; :mod:`problems` where the numbers come from; ``example.yaml`` how a network is written down. The
environments are made of one batched, differentiable simulator, ``env.unwrapped.simulator``, through which gradients
flow.
"""

from __future__ import annotations

from ctrlrl_envs.inventory import problems, series
from ctrlrl_envs.inventory.demand import Demand, Drawn, Normal, Poisson, Series, Split
from ctrlrl_envs.inventory.env import Inventory
from ctrlrl_envs.inventory.network import SUPPLIER, Link, Network, NetworkError, Store, Warehouse
from ctrlrl_envs.inventory.simulator import InventorySimulator, Problem, State, View
from ctrlrl_envs.inventory.vector import InventoryVector
from ctrlrl_envs.inventory.yaml_file import read_network

__all__ = [
    "SUPPLIER", "Demand", "Drawn", "Inventory", "InventorySimulator", "InventoryVector", "Link", "Network",
    "NetworkError", "Normal", "Poisson", "Problem", "Series", "Split", "State", "Store", "View", "Warehouse",
    "problems", "read_network", "series",
]  # fmt: skip
