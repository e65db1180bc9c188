"""ctrlrl: reinforcement learning for control.

``ctrlrl.make("bpo", env="HalfCheetah-v5")`` builds an agent, ``ctrlrl.PPO(env)`` does the same by class;
``ctrlrl.load(run)`` brings one back. Nothing heavy is imported before the first of these is used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from ctrlrl.api import available as available
    from ctrlrl.api import load as load
    from ctrlrl.api import make as make
    from ctrlrl.engine.on_policy import OnPolicyAgent
    from ctrlrl.run.report import report as report
    from ctrlrl.types import EnvSpec as EnvSpec

    class PPO(OnPolicyAgent): ...

    class SPO(OnPolicyAgent): ...

    class BPO(OnPolicyAgent): ...

    class BPOMean(OnPolicyAgent): ...

    class MDPO(OnPolicyAgent): ...


_LAZY = {
    "make": "ctrlrl.api",
    "load": "ctrlrl.api",
    "available": "ctrlrl.api",
    "report": "ctrlrl.run.report",
    "EnvSpec": "ctrlrl.types",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    if name[:1].isupper():
        from ctrlrl.api import agent_classes

        classes = agent_classes()
        if name in classes:
            return classes[name]
    raise AttributeError(f"module 'ctrlrl' has no attribute {name!r}")


def __dir__() -> list[str]:
    from ctrlrl.api import agent_classes

    return sorted({*globals(), *_LAZY, *agent_classes()})
