"""Seeing a non-finite value again: ``for obs, reward in steps(path)`` runs the environments as they were run."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import gymnasium as gym
import numpy as np
from torch import Tensor

from ctrlrl.engine import checkpoint, environments
from ctrlrl.engine.guard import FORMAT
from ctrlrl.engine.seeding import generator
from ctrlrl.types import EnvSpec, SequenceBatch

if TYPE_CHECKING:
    from ctrlrl.engine.on_policy import OnPolicyAgent


class Replay(NamedTuple):
    """What one environment did from its creation up to the recorded event."""

    obs: list[Any]
    """Observation of the reset and after every step; the last one of an episode where a step ended it."""
    rewards: np.ndarray
    """[steps] rewards."""
    actions: np.ndarray
    """[steps, ...] the actions it received."""
    what: str
    """Kind of the recorded non-finite value."""
    env_index: int
    """Which of the environments this is."""


def replay(dump_path: str | os.PathLike[str], env: gym.vector.VectorEnv | None = None) -> Replay:
    """Build the environments of a dump again, repeat every recorded action, and return what the guilty one did.

    Args:
        dump_path: ``nonfinite-*.npz``, as NonFiniteError names it.
        env: Where the run had a live environment: an equal one, at the same state.

    Raises:
        ValueError: Not such a dump, or one of a live environment and no ``env`` given.
    """
    with np.load(dump_path, allow_pickle=False) as file:
        if "about" not in file:
            raise ValueError(f"{dump_path} is not a dump of a non-finite value; expected nonfinite-*.npz of a run")
        about, actions = json.loads(str(file["about"])), file["actions"]
    if about["format"] != FORMAT:
        raise ValueError(f"{dump_path} has format {about['format']}; this version reads {FORMAT}")
    if env is None:
        if about["spec"] is None:
            raise ValueError("this run had a live environment, which cannot be rebuilt; pass an equal one as env=")
        spec = environments.resolve(EnvSpec(**about["spec"]))
        assert isinstance(spec, EnvSpec)
        vector = environments.make_vector(spec, about["seeds"])
    else:
        vector = environments.wrap_live(env)
    try:
        return _run(vector, about, actions)
    finally:
        if env is None:
            vector.close()


def _run(env: gym.vector.VectorEnv, about: dict[str, Any], actions: np.ndarray) -> Replay:
    n, params = about["env_index"], list(about["params"])
    while params and params[0][0] == 0:
        environments.set_params(env, params.pop(0)[1])
    obs = [_pick(environments.start(env, about["seeds"]), n)]
    disabled = env.metadata["autoreset_mode"] == gym.vector.AutoresetMode.DISABLED
    rewards: list[float] = []
    for t, action in enumerate(actions):
        while params and params[0][0] == t:
            environments.set_params(env, params.pop(0)[1])
        try:
            found, reward, terminated, truncated, infos = env.step(action)
        except Exception:
            # the environment itself may refuse to go on from the bad value; what led there is what matters
            break
        rewards.append(float(reward[n]))
        ended = np.logical_or(terminated, truncated)
        final = infos.get("final_obs") if ended[n] else None
        obs.append(_pick(found if final is None else final, n))
        if disabled and ended.any():
            env.reset(options={"reset_mask": ended})
    return Replay(obs, np.array(rewards), actions[:, n], about["what"], n)


def _pick(obs: Any, n: int) -> Any:
    if isinstance(obs, dict):
        return {k: np.array(v[n]) for k, v in obs.items()}
    return {k: np.array(v) for k, v in obs[n].items()} if isinstance(obs[n], dict) else np.array(obs[n])


# -- updates --------------------------------------------------------------------------------------


def dump_update(
    path: Path, agent: OnPolicyAgent, batch: SequenceBatch, knobs: Mapping[str, Tensor], about: Mapping[str, Any]
) -> None:
    """Write what :func:`replay_update` needs: the agent before the update, the batch and the knobs."""
    tensors = {f"agent/{k}": v for k, v in agent.tensors().items()} | {f"knobs/{k}": v for k, v in knobs.items()}
    for name, value in batch._asdict().items():
        if isinstance(value, Tensor):
            tensors[f"batch/{name}"] = value
        elif isinstance(value, dict):
            tensors |= {f"batch/{name}/{k}": v for k, v in value.items()}
    checkpoint.write(path, tensors, {**agent.identity(), **agent.counters(), **about})


def replay_update(path: str | os.PathLike[str], agent: OnPolicyAgent) -> dict[str, Tensor]:
    """Repeat the update of a ``nan_update.safetensors`` and return its metrics, one value per optimiser step.

    Args:
        path: As NonFiniteUpdateError names it.
        agent: Built as the run's was (``ctrlrl.load(run)``); it is put into the state from before the update.
    """
    tensors, state = checkpoint.read(path, expect=agent.identity())
    tensors = {k: v.to(agent.device) for k, v in tensors.items()}
    agent.restore(_under("agent/", tensors), state)
    fields: dict[str, Any] = {}
    for name, value in _under("batch/", tensors).items():
        field, _, key = name.partition("/")
        if key:
            fields.setdefault(field, {})[key] = value
        else:
            fields[field] = value
    with environments.torch_threads(agent.config.threads):
        shuffle = generator(agent.seed, "shuffle", agent.iteration)
        return agent.updater.run(SequenceBatch(**fields), _under("knobs/", tensors), shuffle)


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
