"""The agent of HDPO: gradients through the whole simulated horizon of an inventory network."""

from __future__ import annotations

import copy
import dataclasses
import logging
import math
import time
from collections.abc import Mapping
from typing import Any, ClassVar, Self, cast

import gymnasium as gym
import torch
from torch import Tensor, nn

from ctrlrl.engine import devices, environments, runfolder
from ctrlrl.engine.agent import load_module
from ctrlrl.engine.config import ConfigError, build
from ctrlrl.engine.errors import NonFiniteUpdateError
from ctrlrl.engine.graphs import compiled
from ctrlrl.engine.seeding import derive, generator
from ctrlrl.engine.trainer import TrainedAgent
from ctrlrl.inventory.comparison import Figures, begin, compare
from ctrlrl.inventory.hdpo_config import DIFFERS, PAPER, HDPOConfig, HDPOSettings
from ctrlrl.inventory.pathwise import (
    Act,
    Descent,
    as_compared,
    available_memory,
    recorded,
    rows,
    saved_by_a_period,
    total_cost,
)
from ctrlrl.inventory.policies import base as policies
from ctrlrl.inventory.policies.base import Demanded, InventoryPolicy
from ctrlrl.inventory.problem import Simulator
from ctrlrl.types import EnvSpec

logger = logging.getLogger("ctrlrl")

_NEEDED = ("network", "observe", "problem", "reset", "scenarios", "seen", "step", "to", "view", "feasible")
_CHANGING = (
    gym.ActionWrapper, gym.ObservationWrapper, gym.vector.VectorActionWrapper, gym.vector.VectorObservationWrapper,
)  # fmt: skip
_SAMPLE = 512
"""Scenarios by which the memory of an update is estimated."""


class Acting(nn.Module):
    """An inventory policy for environments: from observations [N, D] to actions [N, E]."""

    stochastic = False

    def __init__(self, simulator: Simulator, network: InventoryPolicy) -> None:
        super().__init__()
        self.simulator, self.network = simulator, network

    def deterministic(self, obs: Tensor) -> Tensor:
        """What to send along each link; whole units where demand is.

        Raises:
            ValueError: The policy knows the future, which is no part of an observation.
        """
        if self.network.clairvoyant:
            raise ValueError(
                f"{self.network.name} acts by the demand to come, which no observation holds; agent.cost() simulates it"
            )
        return as_compared(self.simulator, self.network)(self.simulator.seen(obs))


class HDPO(TrainedAgent):
    """Hindsight differentiable policy optimisation: the demand of the past does not depend on what was ordered, so a
    policy can be replayed on it, and the cost of the whole horizon be differentiated by its parameters.

    A step is one update: the mean cost per store and period of ``batch_size`` scenarios, over all periods of the
    training horizon, and one step of Adam against its gradient. Every ``dev_every`` updates the policy is judged on
    dev scenarios; the agent acts with the weights that cost least there, and training goes on from the latest.

    Paper: Neural inventory control in networks via hindsight differentiable policy optimization, arXiv:2306.11246

    Args:
        env: Gymnasium id, EnvSpec or live environment, whose ``unwrapped.simulator`` is a
            :class:`ctrlrl.inventory.problem.Simulator`.
        seed: Seed of everything.
        env_kwargs: Keyword arguments of the environment, with an id.
        preset: Named settings: "paper", the paper's for problems of one store, or "real", those for recorded sales.
        **settings: Fields of HDPOConfig, InventoryPolicyConfig and HDPOSettings, by name.

    Attributes:
        simulator: Of the problem, on the agent's device.
        network_policy: The inventory policy that acts, from views to orders.
        policy: The same for observations of the environment.
        restart: Number of the training under way, from 0.
        best_cost: Lowest cost on the dev scenarios so far, that of ``network_policy``; infinite before the first look.

    Raises:
        TypeError: The environment has no such simulator, or actions or observations that are not the simulator's.
        PolicyError: The policy has no meaning on this network.
        KeyError: There is no such policy.
    """

    method = "hdpo"
    own_name = "hdpo"
    family: ClassVar[str] = "inventory"
    paper: ClassVar[str] = PAPER
    differs: ClassVar[str] = DIFFERS
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = HDPOSettings.presets
    capabilities: ClassVar[frozenset[str]] = frozenset(["resume", "box", "compile"])
    config: HDPOConfig
    policy: Acting

    def __init__(
        self,
        env: str | EnvSpec | gym.Env | gym.vector.VectorEnv,
        *,
        seed: int = 0,
        env_kwargs: dict[str, Any] | None = None,
        preset: str | None = None,
        **settings: Any,
    ) -> None:
        super().__init__()
        self.seed = int(seed)
        config, own = build(HDPOSettings, settings, preset, loop=HDPOConfig)
        one: dict[str, Any] = {"n_envs": 1, "backend": "sync"} if isinstance(env, str | EnvSpec) else {}
        self._use(environments.resolve(env, env_kwargs=env_kwargs, **one))
        self.device = devices.resolve(config.device)
        self.simulator = self._look().to(self.device)
        kind = policies.get(own.policy)
        self._own = dataclasses.replace(own, learning_rate=own.learning_rate or kind.learning_rate)
        self.config = config
        self.network_policy = self._fresh(0)
        self.policy = Acting(self.simulator, self.network_policy)
        threads = config.threads or devices.threads(self.network_policy, config.batch_size)
        self.config = dataclasses.replace(config, device=str(self.device), threads=threads)
        trainee = copy.deepcopy(self.network_policy)
        self.descent = Descent(trainee, own.max_grad_norm)
        self._trained: Act = compiled(trainee) if self._compiles() else trainee
        self.restart = 0
        self.begun, self.until = 0, 0
        """Updates at which this training began, and will end at the latest."""
        self.planned = (0, 0)
        """The span that the trainings share."""
        self.best_cost = self.lowest = math.inf
        """Lowest dev cost of all, and of this training."""
        self.lowest_at = 0
        self.fitted = False
        """Whether the policy has fitted what it forecasts with, if it does."""
        self._fixed: tuple[Any, Tensor] | None = None
        self._dev: Any = None

    def _look(self) -> Simulator:
        """The environment's simulator; notes the spaces."""
        source = self._source()
        probe = environments.build_env(source) if isinstance(source, EnvSpec) else source
        try:
            self.observation_space, self.action_space = environments.spaces(probe)
            simulator: Any = getattr(probe.unwrapped, "simulator", None)
        finally:
            if probe is not source:
                probe.close()
        missing = [name for name in _NEEDED if not hasattr(simulator, name)]
        if missing:
            found = "none" if simulator is None else f"a {type(simulator).__name__} without {', '.join(missing)}"
            raise TypeError(
                f"hdpo differentiates a DifferentiableSimulator, env.unwrapped.simulator as in "
                f"ctrlrl.inventory.problem.Simulator; {self._env_name()} has {found}. ctrlrl/OneStoreLost-v0 and its "
                "neighbours have one"
            )
        wanted = tuple(simulator.observe(simulator.view(simulator.reset(1))).shape[1:]), (len(simulator.network.links),)
        if (shapes := (self.observation_space.shape, self.action_space.shape)) != wanted:
            raise TypeError(
                f"{self._env_name()} has observations and actions of shapes {shapes}, its simulator of {wanted}: "
                "wrappers must leave them as they are"
            )
        if getattr(probe.unwrapped, "scale_actions", False):
            raise TypeError(
                f"actions of {self._env_name()} are scaled, and hdpo decides how much is sent; leave scale_actions out"
            )
        layer: Any = probe
        while layer is not probe.unwrapped:
            if isinstance(layer, _CHANGING):
                raise TypeError(
                    f"{type(layer).__name__} changes actions or observations, and hdpo learns in the simulator behind "
                    "it: wrappers must leave them as they are; leave it out"
                )
            layer = layer.env
        return simulator

    def _fresh(self, restart: int) -> InventoryPolicy:
        """The policy with the weights of that restart's beginning."""
        simulator, demand = self.simulator, self.simulator.problem.demand
        told = Demanded(demand.mean.cpu(), demand.std.cpu(), demand.window, demand.features)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive(self.seed, "network", restart))
            return policies.build(self._own.policy, simulator.network, told, self.config.network).to(self.device)

    # -- training -----------------------------------------------------------------------------

    @property
    def steps_bound(self) -> int:
        """Updates of one iteration."""
        return self.config.iteration_steps

    def _border(self) -> None:
        """There is nothing to recreate: every update draws by a generator of its own."""

    def _prepare(self) -> None:
        if not self.network_policy.trainable or not self.descent.named:
            known = ", ".join(n for n in policies.names() if policies.get(n).trainable)
            raise ConfigError(
                f"{self._own.policy} has nothing to train: it is what it is from the start, and agent.cost() says what "
                f"it costs. Policies to train: {known}"
            )
        if self.config.recompute_periods is None and self.steps == 0:
            self.config = dataclasses.replace(self.config, recompute_periods=self._recompute())

    def _recompute(self) -> int | None:
        """Periods to compute at a time in the backward pass; None where what all of them need can be kept.

        Raises:
            ConfigError: Not even one of them fits.
        """
        simulator, config, network = self.simulator, self.config, self.network_policy
        horizon, free = simulator.problem.splits["train"].periods, available_memory(self.device)
        # what is fitted before training may not act yet
        if free is None or horizon < 3 or type(network).prepare is not InventoryPolicy.prepare:
            return None
        drawing, every = generator(self.seed, "memory"), recorded(simulator, "train")
        size = min(n for n in (config.batch_size, config.scenarios, every and len(every.demand)) if n)
        few = min(size, _SAMPLE)
        first = torch.arange(few, device=self.device)
        drawn = simulator.scenarios(few, "train", drawing) if every is None else rows(every, first)
        state = simulator.reset(None, drawn, drawing, "train")
        with environments.torch_threads(self.threads):
            one = saved_by_a_period(simulator, self.descent.policy, state, network.clairvoyant) * size // few
        need, gib = one * horizon, 2.0**30
        if need <= free / 2:
            return None
        said = (
            f"an update of {size} scenarios over {horizon} periods keeps about {need / gib:.3g} GiB for its backward "
            f"pass; {free / gib:.3g} GiB are free"
        )
        if one > free:
            raise ConfigError(f"{said}, not enough for a single period ({one / gib:.3g} GiB): lower batch_size")
        periods = max(1, min(math.isqrt(horizon), int(free / 2 / one)))
        logger.warning("%s: computing them again, %d periods at a time (recompute_periods).", said, periods)
        return periods

    def _open(self) -> None:
        if self.planned != self.span:  # training anew, or on; not a run that is resumed
            self.planned = self.span
            self._share()
        self._fit_beforehand()
        count = None if recorded(self.simulator, "dev") is not None else self.config.dev_scenarios
        self._dev = begin(self.simulator, "dev", count, self.seed)
        self._fixed = self._training_set()

    def _fit_beforehand(self) -> None:
        """Let the policy fit what it forecasts with, once: that is no part of its training."""
        if not self.fitted and type(self.network_policy).prepare is not InventoryPolicy.prepare:
            self.network_policy.prepare(self.simulator, generator(self.seed, "prepare"))
            self.descent.begin(self.network_policy.state_dict())
        self.fitted = True

    def _training_set(self) -> tuple[Any, Tensor] | None:
        """Demand, and [K, N, L] stock at the start, of the scenarios to train on; None where they have no end."""
        simulator, count = self.simulator, self.config.scenarios
        drawing, every = generator(self.seed, "scenarios"), recorded(simulator, "train")
        if every is None:
            if count is None:
                return None
            every = simulator.scenarios(count, "train", drawing)
        elif count is not None:
            every = rows(every, torch.randperm(len(every.demand), generator=drawing)[:count].to(self.device))
        return every, simulator.view(simulator.reset(None, every, drawing, "train")).inventory

    def _share(self) -> None:
        """Give this training its part of the updates left."""
        self.begun = self.lowest_at = self.steps
        self.until = self.steps + math.ceil((self.span[1] - self.steps) / (self._own.restarts - self.restart))

    def _next(self) -> None:
        """Begin the next training, or end."""
        if self.restart + 1 < self._own.restarts and self.steps < self.span[1]:
            self.restart += 1
            self.lowest = math.inf
            self._share()
            # what is not trained stays
            kept = {k: v for k, v in self.network_policy.state_dict().items() if k not in self.descent.named}
            self.descent.begin(self._fresh(self.restart).state_dict() | kept)
        else:
            self.span = self.planned = (self.span[0], self.steps)

    def _iterate(self) -> dict[str, float]:
        """One line of the log: ``iteration_steps`` updates, or fewer if a training ends."""
        began, found, seen = time.perf_counter(), [], {}
        left = min(self.config.iteration_steps, self.until - self.steps)
        self.cut = over = improved = False
        while left > 0 and not self.cut and not over:
            found.append(self._update(len(found)))
            self.steps += 1
            left -= 1
            if (self.steps - self.begun) % self.config.dev_every == 0 or self.steps == self.until:
                before = self.best_cost
                seen["dev/cost"] = self._judge()
                improved |= self.best_cost < before
                patience = self._own.patience
                over = patience is not None and self.steps - self.lowest_at >= patience
            self.cut = self.interrupted["asked"] and left > 0 and not over
        cost, norm, _ = torch.tensor(found, dtype=torch.float64).mean(0).tolist()
        metrics = {
            "train/cost": cost, "train/grad_norm": norm, "train/learning_rate": found[-1][2],
            "train/restart": float(self.restart), **seen,
        }  # fmt: skip
        self.iteration += 1
        self._keep(improved)
        if over or self.steps == self.until:
            self._next()
        self.timings["update_s"] += time.perf_counter() - began
        return metrics | ({"dev/best": self.best_cost} if math.isfinite(self.best_cost) else {})

    def _update(self, number: int) -> tuple[float, float, float]:
        """One update; returns cost per store and period, norm of its gradient, learning rate."""
        simulator, periods = self.simulator, self.simulator.problem.splits["train"].periods
        total = total_cost(
            simulator, self._trained, self._batch(), periods,
            clairvoyant=self.network_policy.clairvoyant, recompute=self.config.recompute_periods,
        ).mean()  # fmt: skip
        cost = total / (periods * len(simulator.network.stores))
        rate = cast(float, self._own.learning_rate)
        if self._own.schedule == "cosine":
            rate *= 0.5 * (1.0 + math.cos(math.pi * (self.steps - self.begun) / (self.until - self.begun)))
        value = float(cost.detach())
        norm = float(self.descent.step(cost, rate)) if math.isfinite(value) else math.nan
        if not math.isfinite(norm):
            name = "grad_norm" if math.isfinite(value) else "cost"
            raise NonFiniteUpdateError(name, self.steps, self.iteration, number)
        return value, norm, rate

    def _batch(self) -> Any:
        """Systems at the beginning of the next update's horizon."""
        simulator, size = self.simulator, self.config.batch_size
        if self._fixed is None:
            return simulator.reset(size, None, generator(self.seed, "demand", self.steps), "train")
        drawn, inventory = self._fixed
        if size < len(inventory):
            per_epoch = len(inventory) // size
            epoch, place = divmod(self.steps - self.begun, per_epoch)
            order = torch.randperm(len(inventory), generator=generator(self.seed, "order", self.begun, epoch))
            index = order[place * size : (place + 1) * size].to(self.device)
            drawn, inventory = rows(drawn, index), inventory[index]
        return simulator.reset(None, drawn, None, "train", inventory)

    @torch.no_grad()
    def _judge(self) -> float:
        """Cost of the weights under training on the dev scenarios, per store and period that counts."""
        simulator, horizon = self.simulator, self.simulator.problem.splits["dev"]
        act = as_compared(simulator, self.descent.policy)
        total = total_cost(
            simulator, act, self._dev, horizon.periods,
            ignored=horizon.ignored, clairvoyant=self.network_policy.clairvoyant,
        ).mean()  # fmt: skip
        cost = float(total) / ((horizon.periods - horizon.ignored) * len(simulator.network.stores))
        if cost < self.lowest:
            self.lowest, self.lowest_at = cost, self.steps
        if cost < self.best_cost:
            self.best_cost = cost
            self.network_policy.load_state_dict(self.descent.policy.state_dict())
        return cost

    def _keep(self, improved: bool) -> None:
        """Write the checkpoint "best", where there is something to write."""
        if math.isinf(self.best_cost):  # nothing better is known than the latest
            self.network_policy.load_state_dict(self.descent.policy.state_dict())
        elif self.run_dir is not None:
            there = (self.run_dir / runfolder.CHECKPOINTS / "best.safetensors").exists()
            if improved or not there:
                self.write_checkpoint(self.run_dir, "best")

    # -- results ------------------------------------------------------------------------------

    def cost(self, split: str = "test", scenarios: int | None = None, seed: int | None = None) -> Figures:
        """What the policy costs in the batched simulator, per store and period: ``cost``, ``standard_error`` and more.

        Orders are rounded where demand is of whole units. A policy that knows the future is shown it.

        Args:
            split: "train", "dev" or "test": how long the horizon is, and how much of its beginning does not count.
            scenarios: How many to draw; by default every recorded series once, or as many as make about 4 million
                demands, 64 to 8,192.
            seed: Of demand and of the stock at the start; the agent's by default.
        """
        with environments.torch_threads(self.threads):
            self._fit_beforehand()
            seed = self.seed if seed is None else seed
            return compare(self.network_policy, self.simulator, split, scenarios, seed)

    # -- state --------------------------------------------------------------------------------

    @property
    def own(self) -> HDPOSettings:
        """What is HDPO's own; the learning rate is the policy's where none was asked for."""
        return self._own

    @classmethod
    def blueprint(
        cls, preset: str | None = None, env: str = "", env_kwargs: Mapping[str, Any] | None = None, policy: str = "auto"
    ) -> tuple[HDPOConfig, HDPOSettings]:
        """The settings before the user's own: the same for all environments and policies."""
        return build(HDPOSettings, {}, preset, loop=HDPOConfig)

    @classmethod
    def from_document(cls, document: Mapping[str, Any], env: Any, settings: dict[str, Any]) -> Self:
        return cls(env, seed=document["seed"], **settings)

    def tensors(self) -> dict[str, Tensor]:
        return super().tensors() | {f"descent/{k}": v for k, v in self.descent.tensors().items()}

    def counters(self) -> dict[str, Any]:
        return super().counters() | {
            "planned": list(self.planned), "training": [self.begun, self.until], "restart": self.restart,
            "best_cost": self.best_cost, "lowest": [self.lowest, self.lowest_at], "fitted": self.fitted,
        }  # fmt: skip

    def restore(self, tensors: Mapping[str, Tensor], counters: Mapping[str, Any]) -> None:
        load_module(self.policy, tensors, "policy/")
        self.descent.restore({k.removeprefix("descent/"): v for k, v in tensors.items() if k.startswith("descent/")})
        self.fitted, self.restart = counters["fitted"], counters["restart"]
        self.best_cost = counters["best_cost"]
        (self.begun, self.until), (self.lowest, self.lowest_at) = counters["training"], counters["lowest"]
        self.planned = (counters["planned"][0], counters["planned"][1])
        super().restore(tensors, counters)
