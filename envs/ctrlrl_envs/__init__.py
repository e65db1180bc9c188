"""Environments of ctrlrl; importing this package registers them with Gymnasium under ``ctrlrl/...``.

The tasks of the DeepMind control suite have the ids that EnvPool gives them, without a namespace (``HopperStand-v1``).
"""

from __future__ import annotations

import gymnasium as gym

from ctrlrl_envs.dmc import STEPS, TASKS

_TOKENS = {
    "Sort": "sort",
    "Copy": "copying",
    "Arithmetic": "arithmetic",
    "Format": "form",
    "Ladder": "ladder",
    "Pattern": "pattern",
}

for _name, _module in _TOKENS.items():
    if f"ctrlrl/Token{_name}-v0" not in gym.registry:
        _path = f"{__name__}.tokens.{_module}:Token{_name}"
        gym.register(f"ctrlrl/Token{_name}-v0", entry_point=_path, vector_entry_point=f"{_path}Vector")

for _name in ("Ant", "HalfCheetah", "Hopper", "HumanoidStandup", "InvertedPendulum", "Walker2d"):
    if f"ctrlrl/Robust{_name}-v0" not in gym.registry:
        gym.register(
            f"ctrlrl/Robust{_name}-v0",
            entry_point=f"{__name__}.robust.tasks:Robust{_name}",
            vector_entry_point=f"{__name__}.robust.vector:Robust{_name}Vector",
            max_episode_steps=1000,
        )

for _id, (_domain, _task) in TASKS.items():
    if _id not in gym.registry:
        gym.register(
            _id,
            entry_point=f"{__name__}.dmc.suite:ControlSuite",
            max_episode_steps=STEPS,
            kwargs={"domain": _domain, "task": _task},
        )

for _name, _module, _limit in (
    ("HiddenBit", "hidden_bit", None), ("OneStateBump", "one_state_bump", None),
    ("TwoGoalReacher", "two_goal_reacher", 30),
):  # fmt: skip
    if f"ctrlrl/{_name}-v0" not in gym.registry:
        _path = f"{__name__}.multimodal.{_module}:{_name}"
        gym.register(
            f"ctrlrl/{_name}-v0", entry_point=_path, vector_entry_point=f"{_path}Vector", max_episode_steps=_limit
        )

if "ctrlrl/RiskyPointMass-v0" not in gym.registry:
    _path = f"{__name__}.risky.point_mass:RiskyPointMass"
    gym.register(
        "ctrlrl/RiskyPointMass-v0", entry_point=_path, vector_entry_point=f"{_path}Vector", max_episode_steps=60
    )

# the limits are those of the paper: 200 steps for the cheetah, 500 for the others
for _name, _maker, _limit in (
    ("RiskyHalfCheetah", "half_cheetah", 200), ("RiskyHopper", "hopper", 500), ("RiskyWalker2d", "walker2d", 500),
):  # fmt: skip
    if f"ctrlrl/{_name}-v0" not in gym.registry:
        _entry = f"{__name__}.risky.penalty:{_maker}"
        gym.register(f"ctrlrl/{_name}-v0", entry_point=_entry, max_episode_steps=_limit)

for _name, _module, _limit in (
    ("Ladder", "ladder", 3), ("TargetGrid", "grids", 20), ("RiskyGrid", "grids", 50),
    ("Homeostasis", "homeostasis", 20), ("WindyCliff", "grids", 100),
):  # fmt: skip
    if f"ctrlrl/{_name}-v0" not in gym.registry:
        _path = f"{__name__}.tabular.{_module}:{_name}"
        gym.register(
            f"ctrlrl/{_name}-v0", entry_point=_path, vector_entry_point=f"{_path}Vector", max_episode_steps=_limit
        )

for _name, _problem in (
    ("OneStoreBacklogged", "one_store_backlogged"), ("OneStoreLost", "one_store_lost"),
    ("IndependentStores", "independent_stores"), ("Serial", "serial"), ("Transshipment", "transshipment"),
    ("OneWarehouse", "one_warehouse"), ("ManyWarehouses", "many_warehouses"), ("RealStores", "real_stores"),
    ("RealOneStore", "real_one_store"), ("Inventory", "network"),
):  # fmt: skip
    if f"ctrlrl/{_name}-v0" not in gym.registry:
        _path = f"{__name__}.inventory"
        gym.register(
            f"ctrlrl/{_name}-v0",
            entry_point=f"{_path}.env:Inventory",
            vector_entry_point=f"{_path}.vector:InventoryVector",
            kwargs={"problem": _problem},
        )
