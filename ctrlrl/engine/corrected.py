"""Policies whose actions are changed as they act: corrected by the density of a dataset (CDSA), or blended."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import gymnasium as gym
import numpy as np
import torch
from torch import Tensor

from ctrlrl.data.dataset import DatasetInfo, normalized
from ctrlrl.engine import prior
from ctrlrl.engine.agent import Agent
from ctrlrl.nets.score import CorrectionModel, check_flat
from ctrlrl.types import EnvSpec, check_types


@dataclass(frozen=True)
class CorrectionConfig:
    """How a policy's action a_0 at a state s is corrected; all is in units of the data's deviations.

    First the action climbs the density of actions: at each noise level, from the largest to the smallest, some steps
    a <- clip(a + eta_action sigma^2 g_a(s, a)). Where the density is narrow against sigma, each leaves 1 - eta_action
    of the distance to it, at every level. Then the state that the action leads to, s' by the forward model, climbs the
    density of states by D = eta_state sigma^2 g_s, and with the inverse dynamics I the action that leads there is
    a <- clip(a + I(s, s' + D) - I(s, s')).

    The paper's own rules, steps and weights were not at hand: what was not told by its abstract is an option here.
    """

    eta_action: float = 0.5
    """Size of the action's steps; 0 leaves it out."""
    eta_state: float = 0.0
    """Size of the state's step; 0 leaves it out, for a weak one can be worse than none: choose it by the whole curve
    (ctrlrl eval RUN --correct CDSA_RUN --eta-state 0 1 2 3)."""
    sigma_start: float = 1.0
    """Largest noise level of the action's steps."""
    sigma_end: float = 0.12
    """Smallest one; levels between are geometric. The smaller, the less the density is smoothed over states."""
    steps: tuple[int, ...] = (2, 3, 4, 5)
    """Steps at each level; as many levels as numbers."""
    sigma_state: float = 0.2
    """Noise level of the state's step."""
    score_on: Literal["joint", "conditional"] = "conditional"
    """Gradient of log p(s, a), or of log p(a | s) for actions and log p(s) for states. In the former states move with
    an action that the data may never have; on Risky PointMass the latter keeps out of the disc over a wider range of
    noise levels and weights."""
    state_grad_at: Literal["state", "next_state"] = "state"
    """Take the gradient of states where the policy is, or where its action leads to (with the same action)."""
    combine: Literal["add", "replace"] = "add"
    """Add the change of the action that the inverse dynamics asks for, or do what they say: a <- I(s, s' + D)."""
    skip_in_data: bool = True
    """Leave a step out where the gradient is no larger than in nine tenths of the data, at that noise level."""
    clip_steps: bool = True
    """Cut actions to their bounds after every step, and not at the end only: near a bound the smoothed density leads
    beyond it."""

    def __post_init__(self) -> None:
        check_types(self)
        for name in ("eta_action", "eta_state"):
            if not 0.0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)} must not be negative, nor infinite")
        if not 0.0 < self.sigma_end <= self.sigma_start < math.inf:
            raise ValueError(f"0 < sigma_end={self.sigma_end} <= sigma_start={self.sigma_start} does not hold")
        if not 0.0 < self.sigma_state < math.inf:
            raise ValueError(f"sigma_state={self.sigma_state} must be positive")
        if not self.steps:
            raise ValueError("steps=() must have at least one number; eta_action=0 leaves the action's steps out")

    def levels(self) -> list[float]:
        """Noise levels of the action's steps, from sigma_start to sigma_end; sigma_end alone for one level."""
        if len(self.steps) == 1:
            return [self.sigma_end]
        return np.geomspace(self.sigma_start, self.sigma_end, len(self.steps)).tolist()


class PolicyAgent(Agent):
    """Any policy as an agent, its actions as they are: it acts and evaluates as others, and holds nothing to save.

    Args:
        policy: An agent of this library, anything with ``predict(observation, deterministic=...)``, or what
            :class:`OnnxPolicy` takes.
        observation_space: Flat Box of floats; the policy's has the same shape.
        action_space: Bounded Box of floats; the policy's has the same bounds.
        env_spec: Where to evaluate; an agent's own environment by default.
        seed: Of evaluations; an agent's own by default.
        info: Of the dataset by whose reference scores returns are normalised.

    Attributes:
        base: The policy.

    Raises:
        TypeError: Nothing that acts, or other kinds of spaces.
        ValueError: The policy's spaces are others.
    """

    def __init__(
        self, policy: Any, *, observation_space: gym.Space, action_space: gym.Space, env_spec: EnvSpec | None = None,
        seed: int = 0, info: DatasetInfo | None = None,
    ) -> None:  # fmt: skip
        check_flat(observation_space)
        self.observation_space, self.action_space = observation_space, action_space
        self.base = policy = self._fitting(policy)
        ours = isinstance(policy, Agent)
        self.env_spec = (policy.env_spec or env_spec) if ours else env_spec
        self.seed, self.steps = (policy.seed, policy.steps) if ours else (seed, 0)
        self.device = torch.device("cpu")
        self.info = info
        self.method = ", ".join(filter(None, (named(policy), self.words())))

    def _fitting(self, policy: Any) -> Any:
        """What acts for ``policy``, whose spaces, where it tells them, are these."""
        found = acting(policy)
        for name in ("observation_space", "action_space"):
            mine, theirs = getattr(self, name), getattr(found, name, None)
            fits = theirs is None or theirs.shape == mine.shape
            if not fits or (theirs is not None and name == "action_space" and not prior.same_bounds(theirs, mine)):
                raise ValueError(f"{named(found)} has {name} {theirs}, what corrects it was trained for {mine}")
        return found

    @property
    def threads(self) -> int:
        """One: small networks on a few rows lose more by waiting for other threads than these save."""
        return 1

    def words(self) -> str:
        """What is done to the policy's actions, in a few words."""
        return ""

    def change(self, observations: np.ndarray, actions: np.ndarray) -> np.ndarray:
        """The environment's actions [N, ...] made of the policy's at ``observations`` [N, O]."""
        return actions.astype(self.action_space.dtype, copy=False)

    def predict(
        self,
        observation: Any,
        state: tuple[np.ndarray, ...] | None = None,
        episode_start: np.ndarray | None = None,
        deterministic: bool = False,
    ) -> tuple[np.ndarray, tuple[np.ndarray, ...] | None]:
        """As in Agent; ``state`` and ``episode_start`` are the policy's own affair, and deterministic its mode."""
        _, batched = self._as_batch(observation)
        rows = np.asarray(observation) if batched else np.asarray(observation)[None]
        # a policy without a memory need not know these arguments
        memory = {} if state is None else {"state": state, "episode_start": episode_start}
        actions, after = self.base.predict(rows, deterministic=deterministic, **memory)
        changed = self.change(rows, np.asarray(actions))
        return (changed if batched else changed[0]), after

    def session(self, noise: torch.Generator | None = None) -> Callable[[Any, np.ndarray], np.ndarray]:
        """As in Agent; a policy that is not of this library is asked without a memory, and draws noise of its own."""
        if isinstance(self.base, OnnxPolicy) and noise is not None:
            self.base.seed(noise.initial_seed())
        if isinstance(self.base, Agent):
            act = self.base.session(noise)
        else:
            act = lambda obs, _: self.base.predict(obs, deterministic=noise is None)[0]  # noqa: E731
        return lambda obs, episodes: self.change(np.asarray(obs), np.asarray(act(obs, episodes)))

    def normalized(self, returns: Any) -> np.ndarray | None:
        """D4RL's score of raw returns, where the data has reference scores."""
        return None if self.info is None else normalized(self.info, returns)

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Raises ValueError: there is nothing of its own to save."""
        raise ValueError(
            f"{self.method}: this is made of policies that are saved elsewhere, and some settings; keep their runs and "
            "build it again when it is needed"
        )

    def export(self, path: str | os.PathLike[str], deterministic: bool = True) -> Path:
        """Raises ValueError: as :meth:`save`."""
        raise ValueError(f"{self.method}: this cannot be written as one ONNX file; export the policy alone")

    def document(self) -> dict[str, Any]:
        """Raises ValueError: as :meth:`save`."""
        raise ValueError(f"{self.method}: this has no config.json")

    def restore(self, tensors: Mapping[str, Tensor], counters: Mapping[str, Any]) -> None:
        """Raises ValueError: as :meth:`save`."""
        raise ValueError(f"{self.method}: this has no checkpoint")


class CorrectedAgent(PolicyAgent):
    """A policy corrected by the density of a dataset (Liu, Yang and Li 2024, arXiv:2406.07541: CDSA).

    Args:
        policy: See PolicyAgent.
        model: What was learned of the dataset.
        config: How to correct.
        **about: See PolicyAgent.

    Raises:
        ValueError: A noise level that the model was not trained at, or densities it did not learn.
    """

    def __init__(
        self, policy: Any, model: CorrectionModel, config: CorrectionConfig | None = None, **about: Any
    ) -> None:
        self.model, self.config = model, config or CorrectionConfig()
        super().__init__(policy, **about)
        self.device = model.action_mean.device
        config, (low, high) = self.config, model.sigma_range
        used = [*(config.levels() if config.eta_action else []), *([config.sigma_state] if config.eta_state else [])]
        outside = [x for x in used if not low * 0.999 <= x <= high * 1.001]
        if outside:
            raise ValueError(
                f"noise level {outside[0]:.3g} lies outside those of the training, {low:.3g} to {high:.3g}"
            )
        if (model.joint if config.score_on == "joint" else model.conditional) is None:
            raise ValueError(f"score_on={config.score_on!r} was not learned: train with densities='both'")
        self._schedule = [
            (torch.tensor(sigma, device=self.device), self._limit(sigma, "action"))
            for sigma, count in zip(config.levels(), config.steps, strict=True)
            for _ in range(count)
        ]
        self._state_level = torch.tensor(config.sigma_state, device=self.device)
        self._state_limit = self._limit(config.sigma_state, "state")
        self._low, self._high = (model.standard_action(torch.full_like(model.action_mean, x)) for x in (-1.0, 1.0))

    def _limit(self, sigma: float, of: Literal["state", "action"]) -> float:
        """Norm of a score up to which nothing is changed."""
        config = self.config
        return self.model.typical_norm(sigma, config.score_on, of) if config.skip_in_data else 0.0

    def words(self) -> str:
        return f"corrected by cdsa (eta_action {self.config.eta_action:g}, eta_state {self.config.eta_state:g})"

    def change(self, observations: np.ndarray, actions: np.ndarray) -> np.ndarray:
        model = self.model
        with torch.inference_mode():
            obs, env = (torch.tensor(x, dtype=torch.float32, device=self.device) for x in (observations, actions))
            unit = ((env.flatten(1) - model.middle) / model.scale).clamp(-1.0, 1.0)
            action = model.to_env(obs, self.correct(obs, unit))
        return action.cpu().numpy().astype(self.action_space.dtype, copy=False)

    def correct(self, obs: Tensor, action: Tensor) -> Tensor:
        """[N, A] corrected actions in [-1, 1] at raw ``obs`` [N, O], from ``action`` [N, A] in [-1, 1]."""
        s, a = self.model.standard_obs(obs), self.model.standard_action(action)
        if self.config.eta_action:
            for sigma, limit in self._schedule:
                g = self.model.score(s, a, sigma, self.config.score_on, "action")
                a = self._bounded(a + _step(g, self.config.eta_action, sigma, limit))
        if self.config.eta_state:
            a = self._bounded(self._by_state(s, a))
        return self.model.unit_action(a).clamp(-1.0, 1.0)

    def _by_state(self, s: Tensor, a: Tensor) -> Tensor:
        """The action that leads to a likelier state than ``a`` does."""
        model, config = self.model, self.config
        change = model.change(s, a)
        at = s if config.state_grad_at == "state" else s + change
        g = model.score(at, a, self._state_level, config.score_on, "state")
        step = _step(g, config.eta_state, self._state_level, self._state_limit)
        wanted = model.action_for(s, change + step)
        if config.combine == "add":
            return a + wanted - model.action_for(s, change)
        return torch.where((step != 0.0).any(-1, keepdim=True), wanted, a)

    def _bounded(self, a: Tensor) -> Tensor:
        return a.clamp(self._low, self._high) if self.config.clip_steps else a


def _step(g: Tensor, eta: float, sigma: Tensor, limit: float) -> Tensor:
    """eta sigma^2 g, and 0 where g [N, D] is no longer than ``limit``."""
    return torch.where(g.norm(dim=-1, keepdim=True) > limit, eta * sigma.square() * g, torch.zeros_like(g))


class BlendedAgent(PolicyAgent):
    """(1 - weight) a_0 + weight b, with b the mode of another policy: the control for a correction towards the data.

    Args:
        policy: The one that gives a_0; see PolicyAgent.
        other: The one that gives b, usually an agent of behaviour cloning.
        weight: In [0, 1].
        **about: See PolicyAgent.
    """

    def __init__(self, policy: Any, other: Any, weight: float, **about: Any) -> None:
        if not 0.0 <= weight <= 1.0:
            raise ValueError(f"weight={weight} must lie in [0, 1]")
        self.other, self.weight = acting(other), weight
        super().__init__(policy, **about)
        self.other = self._fitting(other)

    def words(self) -> str:
        return f"blended with {named(self.other)} (weight {self.weight:g})"

    def change(self, observations: np.ndarray, actions: np.ndarray) -> np.ndarray:
        other = np.asarray(self.other.predict(observations, deterministic=True)[0])
        return ((1.0 - self.weight) * actions + self.weight * other).astype(self.action_space.dtype, copy=False)


class OnnxPolicy:
    """An exported policy, run by onnxruntime in one thread.

    Args:
        source: An onnxruntime session, or the file. Its input ``obs`` (or its only one) holds observations [N, O], its
            output ``action`` (or its only one) the environment's actions; a second input ``noise`` [N, A] takes
            standard normals, as in the files that ``agent.export`` writes.
        seed: Of that noise, where there is any.

    Raises:
        ValueError: Inputs or outputs are others.
        ImportError: onnxruntime is not installed.
    """

    def __init__(self, source: Any, seed: int = 0) -> None:
        self.session = _opened(source) if isinstance(source, str | os.PathLike) else source
        inputs = {node.name: node for node in self.session.get_inputs()}
        outputs = [node.name for node in self.session.get_outputs()]
        self._noise = inputs.pop("noise", None)
        if len(inputs) != 1 or ("action" not in outputs and len(outputs) != 1):
            raise ValueError(
                f"this ONNX file has inputs {sorted(inputs)} and outputs {outputs}; expected observations alone (and "
                "noise), and one output or one named action"
            )
        self._obs = next(iter(inputs.values()))
        self._action = "action" if "action" in outputs else outputs[0]
        self.seed(seed)

    def seed(self, seed: int) -> None:
        """Draw noise by this seed from now on."""
        self._random = np.random.default_rng(seed)

    def predict(self, observation: np.ndarray, deterministic: bool = True) -> tuple[np.ndarray, None]:
        """Actions [N, ...] at observations [N, O]; a file that takes noise gets none where ``deterministic``."""
        feed = {self._obs.name: np.asarray(observation, _dtype(self._obs))}
        if self._noise is not None:
            shape = (len(observation), *self._noise.shape[1:])
            noise = np.zeros(shape) if deterministic else self._random.standard_normal(shape)
            feed["noise"] = noise.astype(_dtype(self._noise))
        return self.session.run([self._action], feed)[0], None


def _opened(path: str | os.PathLike[str]) -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise ImportError(f"an ONNX policy needs onnxruntime: pip install 'ctrlrl[onnx]' ({error})") from error
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    return onnxruntime.InferenceSession(os.fspath(path), options, providers=["CPUExecutionProvider"])


def _dtype(node: Any) -> type[np.floating]:
    return np.float64 if node.type == "tensor(double)" else np.float32


def named(policy: Any) -> str:
    """What a policy is called."""
    return policy.method if isinstance(policy, Agent) else type(policy).__name__


def acting(policy: Any) -> Any:
    """``policy`` itself where it can predict, an OnnxPolicy of an ONNX file or session.

    Raises:
        TypeError: It is neither.
    """
    if isinstance(policy, str | os.PathLike) or hasattr(policy, "get_inputs"):
        if isinstance(policy, str | os.PathLike) and Path(policy).suffix != ".onnx":
            raise TypeError(f"{str(policy)!r} is no ONNX file; load a run by ctrlrl.load first")
        return OnnxPolicy(policy)
    if not callable(getattr(policy, "predict", None)):
        raise TypeError(
            f"expected an agent, anything with predict(observation, deterministic=...), or an ONNX policy; found "
            f"{type(policy).__name__}"
        )
    return policy
