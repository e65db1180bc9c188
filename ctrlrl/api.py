"""The registries' public face: build an agent by name, load one, list what there is."""

from __future__ import annotations

import functools
import os
from typing import Any, NamedTuple, TypeAlias

import gymnasium as gym

from ctrlrl import names
from ctrlrl.engine import algorithm as algorithms
from ctrlrl.engine import runfolder
from ctrlrl.engine.algorithm import OfflineAlgorithm
from ctrlrl.engine.off_policy import OffPolicyAgent
from ctrlrl.engine.offline import OfflineAgent
from ctrlrl.engine.on_policy import OnPolicyAgent
from ctrlrl.engine.rebuild import rebuild
from ctrlrl.engine.trainer import TrainedAgent
from ctrlrl.engine.world import capabilities
from ctrlrl.inventory.hdpo import HDPO
from ctrlrl.losses import base as losses
from ctrlrl.online.gorl_agent import GoRL
from ctrlrl.planning.distributional_dp_agent import DistributionalDP
from ctrlrl.types import EnvSpec

COMPOSED: tuple[type[GoRL] | type[HDPO] | type[DistributionalDP], ...] = (GoRL, HDPO, DistributionalDP)
"""Agents that are more than the loop with one loss, and say of themselves what a loss would say."""

AgentClass: TypeAlias = (
    type[OnPolicyAgent] | type[OffPolicyAgent] | type[OfflineAgent] | type[HDPO] | type[DistributionalDP]
)


class Method(NamedTuple):
    """One line of ``ctrlrl list methods``."""

    name: str
    family: str
    paper: str
    capabilities: frozenset[str]
    presets: tuple[str, ...]
    agent: AgentClass


@functools.cache
def agent_classes() -> dict[str, AgentClass]:
    """Agent classes by class name (PPO, SAC, IQL, ...), one for each loss, off-policy and offline method."""
    classes: dict[str, AgentClass] = {}
    for name in losses.names():
        loss = losses.get(name)
        document = f"On-policy agent with the {name} loss. {loss.__doc__}\n\nPaper: {loss.paper}"
        members = {"method": name, "__doc__": document, "capabilities": capabilities(loss)}
        classes[loss.__name__] = type(loss.__name__, (OnPolicyAgent,), members)
    for name in algorithms.names():
        algorithm = algorithms.get(name)
        classes[algorithm.__name__] = _transition_class(name, algorithm.agent_class())
    return classes | {cls.__name__: cls for cls in COMPOSED}


def _transition_class(name: str, kind: type[Any]) -> Any:
    algorithm = algorithms.get(name)
    family = "Offline" if issubclass(kind, OfflineAgent) else "Off-policy"
    document = f"{family} agent with the {name} update. {algorithm.__doc__}\n\nPaper: {algorithm.paper}"
    members = {"method": name, "__doc__": document, "capabilities": algorithm.capabilities}
    return type(algorithm.__name__, (kind,), members)


def methods() -> dict[str, Method]:
    """All trainable methods by name."""
    found = {}
    for cls in agent_classes().values():
        on_policy = issubclass(cls, OnPolicyAgent)
        own: Any = cls if cls in COMPOSED else losses.get(cls.method) if on_policy else algorithms.get(cls.method)
        family = "on-policy" if on_policy else "offline" if issubclass(cls, OfflineAgent) else "off-policy"
        family = getattr(cls, "family", family)
        found[cls.method] = Method(cls.method, family, own.paper, cls.capabilities, tuple(own.presets), cls)
    return found


def available(kind: str = "methods") -> list[str]:
    """Names of ``kind``: "methods", "losses" or "envs"."""
    if kind == "methods":
        return sorted(methods())
    if kind == "losses":
        return losses.names()
    if kind == "envs":
        return sorted(gym.registry)
    raise ValueError(f"nothing is listed under {kind!r}; expected methods, losses or envs")


def get_method(name: str, online: bool = False) -> AgentClass:
    """The agent class of ``name``, or of the user's own loss or method ``package.module:Class``.

    Args:
        name: A name from ``available("methods")``, or a path.
        online: Of an offline method, the class that goes on with it in an environment (see ``start_from``).

    Raises:
        KeyError: Unknown, with the nearest names.
    """
    if online and algorithms.is_one(name) and issubclass(algorithms.get(name), OfflineAlgorithm):
        return _transition_class(name, OffPolicyAgent)
    if ":" in name:
        if algorithms.is_one(name):
            return _transition_class(name, algorithms.get(name).agent_class())
        loss = losses.get(name)
        members = {"method": name, "__doc__": loss.__doc__, "capabilities": capabilities(loss)}
        return type(loss.__name__, (OnPolicyAgent,), members)
    known = methods()
    if name not in known:
        raise KeyError(f"no method named {name!r}.{names.hint(name, known)} Known: {', '.join(sorted(known))}")
    return known[name].agent


def make(
    method: str, env: str | EnvSpec | gym.Env | gym.vector.VectorEnv | None = None, **settings: Any
) -> TrainedAgent:
    """Build an agent: ``make("bpo", env="HalfCheetah-v5", n_envs=8)``, ``make("iql", dataset="hopper-medium-v2")``.

    Args:
        method: A name from ``available("methods")``, or ``package.module:Class`` of your own loss or method.
        env: Gymnasium id, EnvSpec or live environment. Offline methods evaluate in the dataset's own if there is none.
        **settings: ``seed``, ``n_envs``, ``backend``, ``env_kwargs``, ``preset``, and every hyper-parameter by name;
            offline ``dataset``. An offline method with ``start_from`` and no ``dataset`` trains in ``env``.
    """
    online = "start_from" in settings and "dataset" not in settings
    cls = get_method(method, online)
    if env is None and not issubclass(cls, OfflineAgent):
        raise ValueError(f"{method} acts in an environment: pass env=, for example make({method!r}, env='Hopper-v5')")
    return cls(env, **settings)  # type: ignore[arg-type]


def load(
    folder: str | os.PathLike[str],
    checkpoint: str = "last",
    env: str | EnvSpec | gym.Env | gym.vector.VectorEnv | None = None,
    device: str | None = None,
    encoder: Any = None,
) -> TrainedAgent:
    """The agent saved in a run folder or by ``agent.save``.

    Args:
        folder: Run folder.
        checkpoint: last, best, or interrupted (after Ctrl-C).
        env: Replaces the recorded environment; needed for agents trained on a live one without an id.
        device: Replaces the recorded device.
        encoder: The encoder class, if the agent was built with one that cannot be imported by name.

    Raises:
        FileNotFoundError: Not a run.
        CheckpointError: Damaged, or of another method or other spaces.
    """
    document = runfolder.read_config(folder)
    cls: Any = get_method(document["method"], online=OffPolicyAgent.own_name in document)
    if env is None and document["env"] is None and not issubclass(cls, OfflineAgent):
        raise ValueError(f"{folder} was trained on a live environment without an id; pass it as env=")
    return rebuild(cls, folder, checkpoint, env, device, encoder)
