"""What wraps an optimiser step from outside: unrolling, torch.compile, CUDA graphs."""

from __future__ import annotations

import importlib.util
import os
import shutil
import types
import warnings
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ctrlrl.data.rows import rows
from ctrlrl.engine.step import Metrics, OptState, Step
from ctrlrl.types import SequenceBatch


def compiler_available(device: torch.device | None = None) -> bool:
    """Whether torch.compile can build its kernels here: C++ for the CPU, Triton (with a C compiler) for a GPU."""
    if device is not None and device.type != "cpu":
        return importlib.util.find_spec("triton") is not None and any(map(shutil.which, ("gcc", "clang", "cc")))
    compiler = os.environ.get("CXX")
    return any(shutil.which(c) for c in ([compiler] if compiler else ["g++", "clang++", "cl"]))


def many(step: Step, count: int, batch_size: int) -> Step:
    """``step`` on ``count`` update batches, stored one after the other in its batch; metrics are stacked [count]."""

    def steps(state: OptState, batch: SequenceBatch, knobs: dict[str, Tensor]) -> tuple[OptState, Metrics]:
        found: list[Metrics] = []
        for i in range(count):
            state, metrics = step(state, rows(batch, slice(i * batch_size, (i + 1) * batch_size)), knobs)
            found.append(metrics)
        return state, {k: torch.stack([f[k] for f in found]) for k in found[0]}

    return steps


F = TypeVar("F", bound=Callable[..., Any])
T = TypeVar("T")


def compiled(function: F) -> F:
    """``function`` through torch.compile, whole and for fixed shapes."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.compile(function, fullgraph=True, dynamic=False)  # type: ignore[return-value]


def compiled_once(function: Callable[..., T]) -> Callable[..., T]:
    """``function`` through torch.compile for arguments that never change but in their values.

    Nothing is checked before a call, which saves a twentieth of an update of SAC: the caller answers for types, shapes
    and everything that ``function`` closes over. Compiled code is kept by code object, so each call of this makes one
    of its own; two functions from one definition would otherwise find each other's.
    """
    f: Any = function
    own = types.FunctionType(f.__code__.replace(), f.__globals__, f.__name__, f.__defaults__, f.__closure__)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        unchecked: dict[str, Any] = {"guard_filter_fn": lambda guards: [False] * len(guards)}
        return torch.compile(own, fullgraph=True, dynamic=False, options=unchecked)


class CudaGraph:
    """Replay ``function`` as one CUDA graph. Inputs are copied to fixed memory, outputs are copied out.

    Captured at the first call, after three warm-up runs on a side stream; one graph per input shape.
    """

    def __init__(self, function: Step) -> None:
        self.function = function
        self.graphs: dict[tuple[Any, ...], tuple[torch.cuda.CUDAGraph, list[Tensor], Any]] = {}

    def __call__(self, state: OptState, batch: SequenceBatch, knobs: dict[str, Tensor]) -> tuple[OptState, Metrics]:
        leaves, tree = pytree.tree_flatten((state, batch, knobs))
        tensors = [x for x in leaves if isinstance(x, Tensor)]
        key = tuple((x.shape, x.dtype) for x in tensors)
        with torch.cuda.device(tensors[0].device):
            if key not in self.graphs:
                self.graphs[key] = self._capture(leaves, tree)
            graph, inputs, outputs = self.graphs[key]
            for fixed, x in zip(inputs, tensors, strict=True):
                fixed.copy_(x)
            graph.replay()
            return pytree.tree_map(lambda x: x.clone(), outputs)

    def _capture(self, leaves: list[Any], tree: Any) -> tuple[torch.cuda.CUDAGraph, list[Tensor], Any]:
        leaves = [x.clone() if isinstance(x, Tensor) else x for x in leaves]
        arguments = pytree.tree_unflatten(leaves, tree)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                self.function(*arguments)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs = self.function(*arguments)
        return graph, [x for x in leaves if isinstance(x, Tensor)], outputs


class Replayed:
    """Replay ``function(state, *inputs)``, which changes ``state`` in place, as one CUDA graph per input shape.

    Inputs are copied to fixed memory and outputs copied out; the state is never copied, so it must stay in the same
    ``memory``. The warm-up runs before the capture are undone there.
    """

    def __init__(self, function: Callable[..., Metrics], memory: list[Tensor]) -> None:
        self.function, self.memory = function, memory
        self.graphs: dict[tuple[Any, ...], tuple[torch.cuda.CUDAGraph, list[Tensor], Metrics]] = {}

    def __call__(self, state: Any, *inputs: Any) -> Metrics:
        leaves, tree = pytree.tree_flatten(inputs)
        tensors = [x for x in leaves if isinstance(x, Tensor)]
        key = tuple((x.shape, x.dtype) for x in tensors)
        with torch.cuda.device(tensors[0].device):
            if key not in self.graphs:
                fixed = [x.clone() if isinstance(x, Tensor) else x for x in leaves]
                self.graphs[key] = self._capture(state, fixed, tree)
            graph, memory, outputs = self.graphs[key]
            for mine, x in zip(memory, tensors, strict=True):
                mine.copy_(x)
            graph.replay()
            return {k: v.clone() for k, v in outputs.items()}

    def _capture(self, state: Any, leaves: list[Any], tree: Any) -> tuple[torch.cuda.CUDAGraph, list[Tensor], Metrics]:
        inputs = pytree.tree_unflatten(leaves, tree)
        before = [v.clone() for v in self.memory]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                self.function(state, *inputs)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs = self.function(state, *inputs)
        for mine, value in zip(self.memory, before, strict=True):
            mine.copy_(value)
        return graph, [x for x in leaves if isinstance(x, Tensor)], outputs
