"""What wraps an optimiser step from outside: unrolling, torch.compile, CUDA graphs."""

from __future__ import annotations

import importlib.util
import os
import shutil
import warnings
from typing import Any

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


def compiled(function: Step) -> Step:
    """``function`` through torch.compile, whole and for fixed shapes."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.compile(function, fullgraph=True, dynamic=False)


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
