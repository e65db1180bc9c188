"""What every method offers: act, evaluate, save, load, export."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import gymnasium as gym
import numpy as np
import torch
from torch import Tensor

from ctrlrl.engine import checkpoint, environments, runfolder
from ctrlrl.engine.errors import CheckpointError
from ctrlrl.engine.evaluate import Evaluation, evaluate, evaluate_first
from ctrlrl.engine.robust import RobustEvaluation, evaluate_grid, target
from ctrlrl.engine.seeding import derive, generator
from ctrlrl.engine.spaces import space_to_json
from ctrlrl.engine.uncertainty import Convention
from ctrlrl.types import EnvSpec, Obs


class Agent(ABC):
    """A policy on an environment. Subclasses train it; this class acts, evaluates and saves.

    Attributes:
        method: Name in the registry.
        env_spec: What the environment is built from; None for a live environment that has no id.
        policy: Module with ``act``, ``deterministic``, ``noise`` and ``to_env`` (see nets.actor_critic).
        steps: Environment steps trained.
    """

    capabilities: ClassVar[frozenset[str]] = frozenset()
    """What the method promises; the contract suite checks each."""

    method: str
    env_spec: EnvSpec | None
    observation_space: gym.Space
    action_space: gym.Space
    policy: Any
    device: torch.device
    seed: int
    steps: int = 0

    # -- acting -------------------------------------------------------------------------------

    def predict(
        self,
        observation: Any,
        state: tuple[np.ndarray, ...] | None = None,
        episode_start: np.ndarray | None = None,
        deterministic: bool = False,
    ) -> tuple[np.ndarray, tuple[np.ndarray, ...] | None]:
        """The environment's action at one observation or at a batch of them (Stable-Baselines3's signature).

        Args:
            observation: Raw observation, array or dict of arrays, with or without a leading batch dimension.
            state: Recurrent state; passed through, these policies have none.
            episode_start: Ignored without recurrent state.
            deterministic: The mode of the distribution, or a sample; a deterministic policy (TD3) has only the one.

        Raises:
            ValueError: The observation does not fit the observation space.
        """
        obs, batched = self._as_batch(observation)
        result = self._act(obs, None if deterministic else self._predict_generator())
        return (result if batched else result[0]), state

    def evaluate(
        self, episodes: int = 100, deterministic: bool = True, n_envs: int | None = None, seed: int | None = None
    ) -> Evaluation:
        """Run whole episodes in fresh environments and return the raw returns.

        Args:
            episodes: How many; episode k starts from a seed derived from (seed, k).
            deterministic: Act by the mode or by sampling.
            n_envs: Environments side by side; the result does not depend on it when acting deterministically
                up to the rounding of a batched network.
            seed: Defaults to the agent's seed.
        """
        if episodes < 1:
            raise ValueError(f"episodes={episodes} must be at least 1")
        if self.env_spec is None:
            raise ValueError(
                "this agent was built on a live environment without an id, which cannot be rebuilt for evaluation; "
                "register it with gymnasium and pass its id or an EnvSpec"
            )
        width = min(episodes, n_envs or 10)
        spec = environments.fresh(self.env_spec, width)
        base = derive(self.seed if seed is None else seed, "evaluate")
        act = self.session(None if deterministic else generator(base, "noise"))
        with environments.torch_threads(self.threads):
            if spec.backend == "envpool":
                return evaluate_first(partial(environments.make_vector, spec), act, episodes, base, width)
            env = environments.make_vector(spec, autoreset="disabled")
            try:
                return evaluate(env, act, episodes, base)
            finally:
                env.close()

    def evaluate_robust(
        self,
        points: int = 10,
        episodes: int = 1,
        convention: Convention = "m2td3",
        deterministic: bool = True,
        seed: int | None = None,
        env: str | EnvSpec | None = None,
        env_kwargs: Mapping[str, Any] | None = None,
    ) -> RobustEvaluation:
        """Run whole episodes on a grid over the uncertainty set of ``env``; see :mod:`ctrlrl.engine.robust`.

        Args:
            points: Of the grid, in each dimension.
            episodes: In each cell, from the same reset seeds.
            convention: ``"m2td3"`` includes the upper end of every range, ``"rrls"`` leaves it out.
            deterministic: Act by the mode or by sampling.
            seed: Defaults to the agent's seed.
            env: The agent's own environment by default; another needs the same spaces.
            env_kwargs: Added to the environment's arguments.
        """
        return evaluate_grid(self, points, episodes, convention, seed, deterministic, target(self, env, env_kwargs))

    def session(self, noise: torch.Generator | None = None) -> Callable[[Any, np.ndarray], np.ndarray]:
        """How to act through whole episodes side by side: ``(observations [N, ...], episode numbers [N]) -> actions``.

        An agent with a memory keeps it in the function and forgets a place's when its episode number changes.

        Args:
            noise: Generator to sample actions with; None takes the mode.
        """
        return lambda obs, _: self._act(self._as_batch(obs)[0], noise)

    @property
    def threads(self) -> int | None:
        """Threads that the networks run in; None leaves torch's setting as it is."""
        return getattr(getattr(self, "config", None), "threads", None)

    @property
    def can_evaluate(self) -> bool:
        """Whether fresh environments can be built for :meth:`evaluate`."""
        if self.env_spec is None:
            return False
        try:
            environments.fresh(self.env_spec, 1)
        except environments.UnknownEnvironment:
            return False
        return True

    def _act(self, obs: Obs, noise: torch.Generator | None) -> np.ndarray:
        """The environment's actions [N, ...] at ``obs``: sampled with ``noise``, the mode without."""
        with torch.inference_mode():
            if noise is None or not getattr(self.policy, "stochastic", True):
                action = self.policy.deterministic(obs)
            else:
                count = (next(iter(obs.values())) if isinstance(obs, dict) else obs).shape[0]
                drawn = self.policy.act(obs, self.policy.noise(1, count, noise)[0].to(self.device))
                action = self.policy.to_env(obs, drawn)
        return action.cpu().numpy().astype(self.action_space.dtype, copy=False)

    def _predict_generator(self) -> torch.Generator:
        if not hasattr(self, "_generator"):
            self._generator = generator(self.seed, "predict")
        return self._generator

    def _as_batch(self, observation: Any) -> tuple[Obs, bool]:
        """``observation`` as tensors with a batch dimension, and whether it had one."""
        if isinstance(self.observation_space, gym.spaces.Dict):
            if not isinstance(observation, Mapping) or set(observation) != set(self.observation_space.spaces):
                found = sorted(observation) if isinstance(observation, Mapping) else type(observation).__name__
                raise ValueError(
                    f"expected a dict observation with keys {sorted(self.observation_space.spaces)}, found {found}"
                )
            parts = {k: self._leaf(observation[k], s, k) for k, s in self.observation_space.spaces.items()}
            batched = {b for _, b in parts.values()}
            if len(batched) > 1:
                raise ValueError("some entries of the dict observation have a batch dimension and some have not")
            sizes = {k: v.shape[0] for k, (v, _) in parts.items()}
            if len(set(sizes.values())) > 1:
                raise ValueError(f"the entries of the dict observation have batches of different sizes: {sizes}")
            return {k: v for k, (v, _) in parts.items()}, batched.pop()
        return self._leaf(observation, self.observation_space, "")

    def _leaf(self, value: Any, space: gym.Space, key: str) -> tuple[Tensor, bool]:
        array = np.asarray(value)
        shape = space.shape or ()
        name = f"observation {key!r}" if key else "observation"
        if array.dtype == object or (not np.issubdtype(array.dtype, np.number) and array.dtype != bool):
            raise ValueError(f"{name} has dtype {array.dtype}; expected numbers of {space.dtype}")
        if np.issubdtype(space.dtype, np.integer) and np.issubdtype(array.dtype, np.floating):
            raise ValueError(f"{name} has dtype {array.dtype}; expected {space.dtype}")
        if array.shape == shape:
            batched = False
        elif array.shape[1:] == shape and array.ndim == len(shape) + 1:
            batched = True
        else:
            raise ValueError(f"{name} has shape {array.shape}; expected {shape} or (batch, *{shape})")
        if isinstance(space, gym.spaces.Discrete | gym.spaces.MultiDiscrete):
            end = space.start + (space.n if isinstance(space, gym.spaces.Discrete) else space.nvec)
            if ((array < space.start) | (array >= end)).any():
                raise ValueError(f"{name} is {array}; expected one of {space}")
        if array.dtype == np.float64:
            array = array.astype(np.float32)
        # not ascontiguousarray, which gives the single integer of a Discrete space a dimension
        tensor = torch.from_numpy(np.require(array, requirements=["C", "W"])).to(self.device)
        return (tensor if batched else tensor.unsqueeze(0)), batched

    # -- saving -------------------------------------------------------------------------------

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write the agent into ``folder`` (made if needed): config.json and checkpoints/last.safetensors.

        Raises:
            FileExistsError: The folder holds files that are not an agent's.
        """
        target = Path(folder)
        runfolder.guard_target(target)
        (target / runfolder.CHECKPOINTS).mkdir(parents=True, exist_ok=True)
        runfolder.write_json(target / runfolder.CONFIG, self.document())
        runfolder.write_json(target / runfolder.VERSIONS, runfolder.versions())
        self.write_checkpoint(target, "last")
        return target

    def export(self, path: str | os.PathLike[str], deterministic: bool = True) -> Path:
        """Write the policy as one ONNX file, checked with onnxruntime; see :mod:`ctrlrl.engine.onnx_export`.

        Args:
            path: The file, ending in .onnx; its folder exists.
            deterministic: The mode of the policy; otherwise the noise that selects an action is one input more.

        Raises:
            ExportError: The network has no form as a graph, or the graph differs from it; nothing is written.
            ValueError: The policy has a memory, is of tokens, or is deterministic and was to be sampled.
            ImportError: The extra ``onnx`` is not installed.
        """
        from ctrlrl.engine import onnx_export

        return onnx_export.export(self, path, deterministic)

    @abstractmethod
    def document(self) -> dict[str, Any]:
        """The content of config.json: everything needed to build this agent again."""

    def tensors(self) -> dict[str, Tensor]:
        """Everything a checkpoint holds, by name."""
        return {f"policy/{k}": v for k, v in self.policy.state_dict().items()}

    def counters(self) -> dict[str, Any]:
        """Everything a checkpoint holds beside tensors; JSON values."""
        return {"steps": self.steps}

    @abstractmethod
    def restore(self, tensors: Mapping[str, Tensor], counters: Mapping[str, Any]) -> None:
        """Take over what :meth:`tensors` and :meth:`counters` gave."""

    def identity(self) -> dict[str, Any]:
        """What a checkpoint must agree with to be loaded into this agent."""
        return {
            "method": self.method,
            "observation_space": space_to_json(self.observation_space),
            "action_space": space_to_json(self.action_space),
        }

    def write_checkpoint(self, folder: Path, name: str) -> Path:
        """Write checkpoints/<name>.safetensors in ``folder``, all of it or nothing."""
        path = folder / runfolder.CHECKPOINTS / f"{name}.safetensors"
        checkpoint.write(path, self.tensors(), {**self.identity(), **self.counters()})
        return path

    def load_checkpoint(self, folder: str | os.PathLike[str], name: str = "last") -> None:
        """Read checkpoints/<name>.safetensors of ``folder`` into this agent.

        Raises:
            CheckpointError: Missing, damaged, of another method, or of other spaces.
        """
        path = Path(folder) / runfolder.CHECKPOINTS / f"{name}.safetensors"
        tensors, state = checkpoint.read(path, expect=self.identity())
        self.restore(tensors, state)


def load_module(module: torch.nn.Module, tensors: Mapping[str, Tensor], prefix: str) -> None:
    """Take over the tensors named ``prefix...``, all of them or none.

    Raises:
        CheckpointError: A name or a shape does not fit.
    """
    state = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
    found, wanted = ({k: tuple(v.shape) for k, v in s.items()} for s in (state, module.state_dict()))
    # checked before anything is taken over: load_state_dict would leave half of it behind
    for name in sorted(found.keys() | wanted.keys()):
        if found.get(name) != wanted.get(name):
            raise CheckpointError(
                f"the checkpoint does not fit this agent's network: {prefix}{name} has shape "
                f"{found.get(name, 'none')} in it, expected {wanted.get(name, 'none')}. Use the run's config, "
                "and pass encoder= if it was built with one"
            )
    module.load_state_dict(state)
