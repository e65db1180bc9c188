"""Policies as ONNX files: raw observations in, the environment's actions out, all that lies between in the graph."""

from __future__ import annotations

import contextlib
import copy
import importlib
import json
import logging
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gymnasium as gym
import numpy as np
import torch
from torch import Tensor, nn

from ctrlrl.engine import checkpoint, runfolder
from ctrlrl.engine.spaces import space_from_json, space_to_json
from ctrlrl.nets.actor_critic import is_image
from ctrlrl.nets.flow_policy import OBS, env_obs
from ctrlrl.nets.normalizer import ObsNormalizer, ObsScaling
from ctrlrl.nets.token_policy import TokenPolicy

if TYPE_CHECKING:
    from ctrlrl.engine.agent import Agent

FORMAT = 1
"""Version of the document described at :func:`export`."""
OPSET = 18
"""Version of ONNX's operators that the graph is made of."""
KEY = "ctrlrl"
"""Name of the document in the file's metadata."""
NOISE, ACTION = "noise", "action"
TOLERANCE = 1e-5
"""Largest difference between the graph's action and the policy's, relative to the action's range."""
BATCHES = (256, 1)
"""Numbers of observations that the graph is compared on, the largest first."""
EXAMPLES = 4
"""Observations that the file keeps, with their actions."""


class ExportError(RuntimeError):
    """A policy cannot be written as a graph, or the graph does not do what the policy does."""


def export(agent: Agent, path: str | os.PathLike[str], deterministic: bool = True) -> Path:
    """Write the policy of ``agent`` as one self-contained ONNX file, checked with onnxruntime before it gets its name.

    Inputs are raw observations ``obs`` [N, ...], or ``obs/<key>`` for each entry of a Dict: float32 for any float,
    else the type of the space. The output ``action`` [N, ...] is what the environment takes: float32 for a Box, whose
    own type it still has to be given, int64 in the environment's own numbering else. N is free. The document
    ``"ctrlrl"`` in the file's metadata is JSON:

    ==================================  ================================================================
    format, method, steps, versions     of this document; of the agent; trained; of the libraries
    env                                 id, kwargs and wrappers; None for an agent without an environment
    observation_space, action_space     as in a run's config.json
    action_low, action_high             of each entry of a Box action, in order; infinities are strings
    deterministic, noise                what ``noise`` has to be: None, "normal" or "gumbel"
    test                                inputs by name, and the actions the policy answers with
    ==================================  ================================================================

    Args:
        agent: The agent.
        path: The file, ending in .onnx; its folder exists.
        deterministic: The mode of the policy. Otherwise the graph has one input more, ``noise`` [N, ...], which selects
            the action: independent standard normals, for discrete actions standard Gumbel variates -log(-log u).

    Raises:
        ExportError: The network uses what ONNX cannot express, or file and policy differ by more than 1e-5 of the
            action's range; nothing is written.
        ValueError: A policy with a memory or of tokens; ``deterministic=False`` of a policy that has no noise.
        ImportError: The extra ``onnx`` is not installed.
    """
    target = Path(path)
    if target.suffix != ".onnx":
        raise ValueError(f"the file {str(path)!r} does not end in .onnx; add the ending")
    _refuse(agent, deterministic)
    _need_packages()
    policy = copy.deepcopy(agent.policy).cpu()
    acting = Graph(policy, agent.observation_space, deterministic)
    inputs = typical_inputs(acting, agent.observation_space, BATCHES[0])
    with torch.no_grad():
        actions = acting(*inputs.values())
    if not actions.isfinite().all():
        raise ExportError(f"{agent.method} acts with numbers that are not finite; nothing was written")
    with checkpoint.atomic_path(target) as temporary:
        program = _translate(copy.deepcopy(acting).eval(), inputs, agent.method)
        program.model.metadata_props[KEY] = json.dumps(_about(agent, acting, inputs, actions), allow_nan=False)
        program.save(str(temporary), external_data=False)
        for rows in BATCHES:
            some = {name: value[:rows] for name, value in inputs.items()}
            _compare(run(temporary, some), actions[:rows], _decided(acting, some), agent.action_space)
    return target


class Graph(nn.Module):
    """A policy as a function of tensors: observations by entry, the noise last if it is to be sampled."""

    def __init__(self, policy: Any, space: gym.Space, deterministic: bool) -> None:
        super().__init__()
        self.policy = policy
        self.leaves = {f"{OBS}/{k}": s for k, s in space.spaces.items()} if isinstance(space, gym.spaces.Dict) else {}
        self.leaves = self.leaves or {OBS: space}
        self.names = [*self.leaves, *([] if deterministic else [NOISE])]

    def forward(self, *inputs: Tensor) -> Tensor:
        """The environment's actions [N, ...] for the inputs in the order of ``names``."""
        named = dict(zip(self.names, inputs, strict=True))
        obs = env_obs(named)
        if NOISE in named:
            return self.policy.to_env(obs, self.policy.act(obs, named[NOISE]))
        return self.policy.deterministic(obs)


def run(file: str | os.PathLike[str], inputs: dict[str, Tensor]) -> np.ndarray:
    """The actions [N, ...] of an exported file for its inputs by name, computed by onnxruntime in one thread."""
    return _session(file).run([ACTION], {name: value.numpy() for name, value in inputs.items()})[0]


def signature(file: str | os.PathLike[str]) -> tuple[dict[str, str], dict[str, str]]:
    """Inputs and outputs of an ONNX file, type and shape by name: ``"float [batch, 3]"``."""
    session = _session(file)

    def form(node: Any) -> str:
        return f"{node.type.removeprefix('tensor(').removesuffix(')')} [{', '.join(map(str, node.shape))}]"

    return {n.name: form(n) for n in session.get_inputs()}, {n.name: form(n) for n in session.get_outputs()}


def _session(file: str | os.PathLike[str]) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    return onnxruntime.InferenceSession(os.fspath(file), options, providers=["CPUExecutionProvider"])


def typical_inputs(graph: Graph, space: gym.Space, count: int) -> dict[str, Tensor]:
    """``count`` observations of the size that the policy has seen, and noise where it takes some; the same each time.

    Float observations are normal with the mean and the deviation of the statistics inside the policy (0 and 1 where
    there are none), cut to the space's bounds; all others are uniform.
    """
    mean, std = _statistics(graph.policy)
    random, generator, at = np.random.default_rng(0), torch.Generator().manual_seed(0), 0
    found: dict[str, Tensor] = {}
    for name, leaf in graph.leaves.items():
        copied = space_from_json(space_to_json(leaf))  # drawing moves on a generator of the space's own
        copied.seed(0)
        values = np.stack([np.asarray(copied.sample()) for _ in range(count)])
        if isinstance(leaf, gym.spaces.Box) and not is_image(leaf):
            size = int(np.prod(leaf.shape))
            if leaf.dtype.kind == "f":
                part = slice(at, at + size)
                drawn = random.normal(size=(count, size)) * (1.0 if std is None else std[part])
                drawn = (drawn + (0.0 if mean is None else mean[part])).reshape(count, *leaf.shape)
                values = np.clip(drawn, leaf.low, leaf.high).astype(np.float32)
            at += size
        found[name] = torch.from_numpy(values)
    if NOISE in graph.names:
        found[NOISE] = graph.policy.noise(1, count, generator)[0]
    return found


def _statistics(policy: nn.Module) -> tuple[np.ndarray | None, np.ndarray | None]:
    """Mean and deviation of the float observations side by side, from the first statistics that have been fitted."""
    for part in policy.modules():
        if isinstance(part, ObsNormalizer | ObsScaling) and not bool((part.scale == 1.0).all()):
            return (-part.shift / part.scale).numpy(), (1.0 / part.scale).numpy()
    return None, None


def _refuse(agent: Agent, deterministic: bool) -> None:
    from ctrlrl.engine.agent import Agent as Base

    if type(agent).session is not Base.session:
        raise ValueError(
            f"{agent.method} acts by what it remembers of an episode, and its graph would need that memory as an input "
            "and an output, which is not supported; use agent.predict"
        )
    if isinstance(agent.policy, TokenPolicy):
        raise ValueError(f"{agent.method} here writes tokens, and the export of token policies is not supported")
    if not deterministic and not getattr(agent.policy, "stochastic", True):
        raise ValueError(f"the policy of {agent.method} is deterministic, there is no noise to sample it with")


def _need_packages() -> None:
    for name in ("onnx", "onnxscript", "onnxruntime"):
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise ImportError(f"the export to ONNX needs {name}: pip install 'ctrlrl[onnx]' ({error})") from error


def _translate(graph: Graph, inputs: dict[str, Tensor], method: str) -> Any:
    """``graph`` as a ``torch.onnx.ONNXProgram``, traced with observations like ``inputs``."""
    try:
        with _quiet(), torch.no_grad():
            program = torch.onnx.export(
                _trace(graph, inputs), input_names=list(inputs), output_names=[ACTION], opset_version=OPSET,
                dynamic_shapes=(({0: "batch"},) * len(inputs),), dynamo=True, verbose=False,
            )  # fmt: skip
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[0]
        raise ExportError(f"the policy of {method} cannot be written as an ONNX graph: {reason}") from error
    assert program is not None
    for node in program.model.graph:
        node.metadata_props.clear()  # where in this machine's files each line of the policy stands
    return program


def _trace(graph: Graph, inputs: dict[str, Tensor]) -> torch.export.ExportedProgram:
    example = tuple(value[:EXAMPLES].clone() for value in inputs.values())  # one row would be taken for a constant
    shapes = (({0: torch.export.Dim("batch")},) * len(inputs),)
    try:
        return torch.export.export(graph, example, dynamic_shapes=shapes, strict=False)
    except RuntimeError:
        # this one knows what len(observations) is, but takes NumPy's integers for tensors
        return torch.export.export(graph, example, dynamic_shapes=shapes, strict=True)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what the exporter says of its own parts."""
    logger = logging.getLogger("torch.onnx")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(before)


def _about(agent: Agent, graph: Graph, inputs: dict[str, Tensor], actions: Tensor) -> dict[str, Any]:
    space, spec, bounds = agent.action_space, agent.env_spec, {}
    if isinstance(space, gym.spaces.Box):
        bounds = {"action_low": space.low.flatten(), "action_high": space.high.flatten()}
    return runfolder.plain(
        {
            "format": FORMAT,
            "method": agent.method,
            "steps": agent.steps,
            "env": None if spec is None else {"id": spec.id, "kwargs": spec.kwargs, "wrappers": spec.wrappers},
            "observation_space": space_to_json(agent.observation_space),
            "action_space": space_to_json(space),
            **bounds,
            "deterministic": NOISE not in graph.names,
            "noise": None if NOISE not in graph.names else "gumbel" if _discrete(space) else "normal",
            "versions": runfolder.versions(),
            "test": {
                "inputs": {name: value[:EXAMPLES].numpy() for name, value in inputs.items()},
                ACTION: actions[:EXAMPLES].numpy(),
            },
        }
    )


def _discrete(space: gym.Space) -> bool:
    return not isinstance(space, gym.spaces.Box)


def _decided(graph: Graph, inputs: dict[str, Tensor]) -> np.ndarray:
    """[N] whether one choice of discrete actions is better than all others by more than rounding can turn."""
    count = len(next(iter(inputs.values())))
    if not _discrete(graph.policy.action_space):
        return np.ones(count, bool)
    with torch.no_grad():
        logits = graph.policy.distribution(env_obs(inputs)).params()["logits"] + inputs.get(NOISE, 0.0)
    blocks = logits.split(list(getattr(graph.policy.head, "nvec", logits.shape[-1:])), -1)
    best = [block.topk(2).values for block in blocks if block.shape[-1] > 1]
    margins = [top[:, 0] - top[:, 1] > TOLERANCE * top.abs().amax(1).clamp(min=1.0) for top in best]
    return np.logical_and.reduce([np.ones(count, bool), *(margin.numpy() for margin in margins)])


def _compare(found: np.ndarray, wanted: Tensor, decided: np.ndarray, space: gym.Space) -> None:
    """Raise ``ExportError`` if the actions ``found`` in a file are not those ``wanted`` [N, ...] of the policy."""
    expected, count = wanted.numpy(), len(decided)
    if found.shape != expected.shape or found.dtype != expected.dtype:
        raise ExportError(
            f"the graph gives {found.dtype} actions of shape {found.shape} where the policy gives {expected.dtype} of "
            f"shape {expected.shape}; nothing was written"
        )
    if isinstance(space, gym.spaces.Box):
        width = space.high.astype(np.float64) - space.low
        scale = np.where(np.isfinite(width), width, np.maximum(1.0, np.abs(expected).max(0)))
        error = np.abs(found.astype(np.float64) - expected) / np.where(scale > 0, scale, 1.0)
    else:
        error = (found != expected).astype(np.float64)
    error = error.reshape(count, -1).max(1)
    wrong = decided & ~(error <= TOLERANCE)  # NaN too
    if wrong.any():
        row = int(np.nan_to_num(np.where(wrong, error, -1.0), nan=np.inf).argmax())
        raise ExportError(
            f"the graph differs from the policy at {int(wrong.sum())} of {count} observations, by up to "
            f"{error[row]:.2g} of the action's range where {TOLERANCE:g} is allowed: it answers {found[row].tolist()} "
            f"instead of {expected[row].tolist()}; nothing was written"
        )
