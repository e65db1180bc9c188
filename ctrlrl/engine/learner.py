"""Networks under training: flat parameters, Adam, target copies, and the update compiled or captured from outside."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from ctrlrl.data.transitions import Transitions
from ctrlrl.engine.agent import load_module
from ctrlrl.engine.algorithm import Algorithm
from ctrlrl.engine.config import ConfigError
from ctrlrl.engine.errors import CheckpointError
from ctrlrl.engine.graphs import Replayed, compiled_once
from ctrlrl.engine.step import FlatParameters
from ctrlrl.engine.transition_config import TransitionConfig

Loss: TypeAlias = Callable[[Callable[..., Any]], tuple[Tensor, dict[str, Tensor]]]
State: TypeAlias = dict[str, list[Tensor]]
Metrics: TypeAlias = dict[str, Tensor]
Update: TypeAlias = Callable[[State, Transitions, dict[str, Tensor], dict[str, Tensor]], Metrics]


class Nets:
    """What an update sees: the networks by name, and how to change them. Changes are made in place."""

    def __init__(
        self, modules: Mapping[str, nn.Module], flats: Mapping[str, FlatParameters], state: State,
        knobs: Mapping[str, Tensor], config: TransitionConfig, split: bool,
    ) -> None:  # fmt: skip
        self._modules, self._flats, self._state = modules, flats, state
        self._knobs, self._config, self._split = knobs, config, split

    def __getitem__(self, name: str) -> Callable[..., Any]:
        """The network ``name`` as it stands; nothing learns by it."""
        # the modules' parameters are views of the state: the compiler would see the same memory twice
        return self._bound(name, self._state[name]) if torch.compiler.is_compiling() else self._modules[name]

    def _bound(self, name: str, values: list[Tensor]) -> Callable[..., Any]:
        module = self._modules[name]
        flat, names = self._flats[name], self._flats[name].names
        views = dict(zip(names, values, strict=True)) if self._split else flat.views(values[0])
        return lambda *inputs, **named: torch.func.functional_call(module, views, inputs, named, tie_weights=False)

    def descend(self, name: str, loss: Loss, weight_decay: float = 0.0) -> dict[str, Tensor]:
        """One Adam step of the network ``name`` on ``loss(network) -> (scalar, anything to return)``.

        Adam is that of Kingma and Ba (2015) with torch.optim.Adam's arithmetic. ``weight_decay`` takes away that share
        of the parameters, times the learning rate: AdamW (Loshchilov and Hutter 2019).
        """
        state, rate = self._state, self._knobs[f"lr/{name}"]
        (clock,), (bias,) = state[f"{name}/clock"], state[f"{name}/bias"]
        grads, aux = gradients(lambda values: loss(self._bound(name, values)), state[name])
        if self._config.max_grad_norm is not None:
            norm = torch.stack([torch.linalg.vector_norm(g) for g in grads]).norm()
            scale = (self._config.max_grad_norm / (norm + 1e-6)).clamp(max=1.0)
            grads = [g * scale for g in grads]
        for p, m, v, g in zip(state[name], state[f"{name}/m"], state[f"{name}/v"], grads, strict=True):
            m.lerp_(g, 0.1)
            v.mul_(0.999).addcmul_(g, g, value=0.001)
            if weight_decay:
                p.mul_(1.0 - rate * weight_decay)
            p.sub_(rate / bias[0] * m / v.sqrt().div_(bias[1].sqrt()).add_(self._config.adam_eps))
        clock.add_(1.0)
        # for the next step: the compiler would repeat a power that it meets above for every parameter
        bias.copy_(_bias(clock, self._knobs["log_betas"]))
        return aux

    def memory(self, name: str) -> list[Tensor]:
        """What holds the parameters of ``name``, to be changed in place: one vector, or by parameters when compiled."""
        return self._state[name]

    def track(self, target: str, source: str, tau: Tensor) -> None:
        """Move the copy ``target`` a part ``tau`` of the way to ``source``: Polyak averaging."""
        for slow, fast in zip(self._state[target], self._state[source], strict=True):
            slow.lerp_(fast, tau)


def gradients(f: Callable[[list[Tensor]], tuple[Tensor, Any]], x: list[Tensor]) -> tuple[list[Tensor], Any]:
    """Gradients and further output of ``f`` at ``x``; torch.func's where the compiler needs it, autograd elsewhere."""
    if torch.compiler.is_compiling():
        return torch.func.grad(f, has_aux=True)(x)
    x = [v.detach().requires_grad_() for v in x]
    value, aux = f(x)
    return list(torch.autograd.grad(value, x)), aux


class Learner:
    """Owns everything that an update changes.

    Attributes:
        modules: Every network by name, copies included; their parameters are views of ``state``.
        state: Flat parameters by name; for trained ones also Adam's ``<name>/m``, ``<name>/v``, ``<name>/clock`` and,
            of the next step, ``<name>/bias``.
        updates: Updates done.
        copies: Whose copy a target network is, by name.
    """

    def __init__(
        self, algorithm: Algorithm, trained: Mapping[str, nn.Module], copies: Mapping[str, str],
        config: TransitionConfig, device: torch.device, compile: bool,
    ) -> None:  # fmt: skip
        self.algorithm, self.config, self.device, self.compile = algorithm, config, device, compile
        if config.cudagraphs and device.type != "cuda":
            raise ConfigError(f"cudagraphs needs a CUDA device, found {device}; leave it off or set device='cuda'")
        self.trained, self.copies = list(trained), dict(copies)
        self.modules: dict[str, nn.Module] = {k: module.to(device) for k, module in trained.items()}
        for name, source in copies.items():
            self.modules[name] = copy.deepcopy(self.modules[source])
        self.flats = {name: FlatParameters(module, trained_only=True) for name, module in self.modules.items()}
        for module in self.modules.values():
            module.requires_grad_(False)  # gradients are taken with respect to the flat vectors
        self.state: dict[str, Tensor] = {name: flat.flat for name, flat in self.flats.items()}
        for name in self.trained:
            self.state[f"{name}/m"] = torch.zeros_like(self.state[name])
            self.state[f"{name}/v"] = torch.zeros_like(self.state[name])
            self.state[f"{name}/clock"] = torch.zeros((), device=device)
            self.state[f"{name}/bias"] = torch.zeros(2, device=device)
        rates = {f"lr/{name}": algorithm.learning_rate(name, config) for name in self.trained}
        self.knobs = {
            k: torch.tensor(v, device=device) for k, v in {"gamma": config.gamma, "tau": config.tau, **rates}.items()
        }
        self.knobs["log_betas"] = torch.tensor([0.9, 0.999], dtype=torch.float64).log().float().to(device)
        for name in self.trained:
            self.state[f"{name}/bias"].copy_(_bias(self.state[f"{name}/clock"], self.knobs["log_betas"]))
        self.updates = 0
        # one vector each is fastest; compiled code would put every gradient together for it, and is faster by parts
        self._split: State = {k: self._parts(k, v) if compile else [v] for k, v in self.state.items()}
        self._functions: dict[tuple[int, ...], Update] = {}

    def run(self, batch: Transitions, noise: dict[str, Tensor], count: int) -> Metrics:
        """``count`` updates on batches stored one after the other, [count * B, ...]; ``noise`` is [count, B, ...].

        Returns:
            What each logged, [count] by name, still on the device.
        """
        period = self.algorithm.period
        phases = tuple((self.updates + i) % period for i in range(count))
        key = (batch.reward_t.shape[0], *phases)
        if key not in self._functions:
            self._functions[key] = self._wrap(phases)
        self.updates += count
        return self._functions[key](self._split, batch, noise, self.knobs)

    def _wrap(self, phases: tuple[int, ...]) -> Update:
        modules, flats, config, algorithm = self.modules, self.flats, self.config, self.algorithm
        split = self.compile

        def updates(state: State, batch: Transitions, noise: dict[str, Tensor], knobs: dict[str, Tensor]) -> Metrics:
            found: list[Metrics] = []
            size = batch.reward_t.shape[0] // len(phases)
            for i, phase in enumerate(phases):
                nets = Nets(modules, flats, state, knobs, config, split)
                mine = batch if len(phases) == 1 else part(batch, slice(i * size, (i + 1) * size))
                found.append(algorithm.update(nets, mine, {k: v[i] for k, v in noise.items()}, knobs, phase))
            return {k: torch.stack([f[k].detach() for f in found if k in f]) for k in {k: 0 for f in found for k in f}}

        function: Update = compiled_once(updates) if self.compile else updates
        return Replayed(function, list(self.state.values())) if self.config.cudagraphs else function

    def _parts(self, key: str, value: Tensor) -> list[Tensor]:
        """A flat vector by parameters; clocks and biases as they are."""
        name, _, kind = key.partition("/")
        return [value] if kind in ("clock", "bias") else list(self.flats[name].views(value).values())

    def copy(self, target: str, source: str) -> None:
        """Make the network ``target`` equal to ``source``."""
        self.state[target].copy_(self.state[source])

    # -- state --------------------------------------------------------------------------------

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint holds: parameters and buffers by network, Adam's moments flat."""
        found = {f"{n}/net/{k}": v for n, m in self.modules.items() for k, v in m.state_dict().items()}
        return found | {k: v for k, v in self.state.items() if "/" in k}

    def restore(self, tensors: Mapping[str, Tensor], updates: int) -> None:
        """Take over what :meth:`tensors` gave.

        Raises:
            CheckpointError: A shape does not fit.
        """
        for name, module in self.modules.items():
            load_module(module, tensors, f"{name}/net/")
        for key, mine in self.state.items():
            if "/" in key:
                if key not in tensors or tensors[key].shape != mine.shape:
                    raise CheckpointError(f"the checkpoint's {key} does not fit this agent's; use the run's config")
                mine.copy_(tensors[key])
        self.updates = updates


def _bias(clock: Tensor, log_betas: Tensor) -> Tensor:
    """[2] 1 - beta^(clock + 1) for both of Adam's decay rates, without the cancellation of the plain formula."""
    return -torch.expm1((clock + 1.0) * log_betas)


def part(batch: Transitions, index: slice) -> Transitions:
    """The rows of ``batch`` at ``index``."""

    def pick(x: Any) -> Any:
        return {k: v[index] for k, v in x.items()} if isinstance(x, dict) else x[index]

    return Transitions(*(pick(x) for x in batch))
