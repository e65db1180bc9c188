"""Environments of ctrlrl; importing this package registers them with Gymnasium under ``ctrlrl/...``."""

from __future__ import annotations

import gymnasium as gym

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
