"""Trajectories of a model beside the simulator, for bench_pgd: the tasks, the policies, and what is measured."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from torch import Tensor

from ctrlrl.data.dataset import Dataset, DatasetInfo
from ctrlrl.engine.guidance import Guidance, GuidanceConfig
from ctrlrl.engine.world_model import WorldModel, WorldModelConfig, WorldModelFit
from ctrlrl.nets.edm import SamplerConfig, sample
from ctrlrl.nets.trajectory_codec import Steps
from ctrlrl.nets.trajectory_denoiser import TrajectoryModel
from ctrlrl.types import EnvSpec

STD = 0.25
"""Deviation of every policy's noise, in units of actions in [-1, 1]."""
EPISODE, OFFSET = 200, 0.4
KAPPA_AT = (32, 32, 1)
"""Where the strengths were chosen: sampler steps, length, guided channels."""
HORIZONS = (1, 8, 32)
LINES = {
    "ensemble, target": "#d55e00", "ensemble, behaviour": "#8a8f98", "released predictor, kappa 0": "#cc79a7"
}  # fmt: skip


# -- policies -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Kernel:
    """Acts by a normal around ``mean``, cut at the bounds; its density is that of the uncut normal."""

    mean: Callable[[Tensor], Tensor]
    std: float = STD

    def log_prob(self, obs: Tensor, action: Tensor) -> Tensor:
        """[N] of actions [N, A] in [-1, 1] at raw observations [N, O]."""
        z = (action - self.mean(obs)) / self.std
        return (-0.5 * z.square() - math.log(self.std) - 0.5 * math.log(2.0 * math.pi)).sum(-1)

    @torch.no_grad()
    def act(self, obs: Tensor, noise: torch.Generator) -> Tensor:
        """[N, A] drawn actions."""
        mean = self.mean(obs)
        return (mean + self.std * torch.randn(mean.shape, generator=noise)).clamp(-1.0, 1.0)


def swing_up(obs: Tensor) -> Tensor:
    """[N, 1] mean action of the weak policy: pushes along the velocity while the pendulum's energy is below upright."""
    cosine, velocity = obs[..., :1], obs[..., 2:3]
    missing = 15.0 - (0.5 * velocity.square() + 15.0 * cosine)  # angular acceleration is 15 sin(angle) + 3 torque
    return 0.4 * torch.tanh(0.05 * velocity * missing)


def pendulum_policies() -> tuple[Kernel, Kernel]:
    """The one that made the data, and the target."""
    return Kernel(swing_up), Kernel(lambda obs: swing_up(obs) + OFFSET)


def kernels(folder: Path) -> tuple[Kernel, Kernel]:
    """Behaviour (cloned) and target (TD3+BC) of the runs in ``folder``, with the common noise around their actions."""
    from ctrlrl import api

    behaviour, target = (api.load(folder / name).policy for name in ("bc", "td3_bc"))
    return Kernel(behaviour.mode), Kernel(target.mode)


def pendulum_set(transitions: int, seed: int) -> Dataset:
    """Whole episodes of 200 steps of the weak policy in Gymnasium's Pendulum-v1."""
    count = max(2, transitions // EPISODE)
    envs = gym.make_vec("Pendulum-v1", num_envs=count, vectorization_mode="sync")
    noise, behaviour = torch.Generator().manual_seed(seed), pendulum_policies()[0]
    obs, _ = envs.reset(seed=seed)
    rows = []
    for t in range(EPISODE):
        action = 2.0 * behaviour.act(torch.as_tensor(obs), noise).numpy()
        following, reward, _, _, _ = envs.step(action)
        rows.append((obs, action, reward.astype(np.float32), following, np.full(count, t == EPISODE - 1)))
        obs = following
    envs.close()
    obs, action, reward, following, cut = (np.stack(c, 1).reshape(-1, *c[0].shape[1:]) for c in zip(*rows, strict=True))
    return Dataset(
        observations=obs, actions=action, rewards=reward, terminals=np.zeros(len(obs), bool), timeouts=cut,
        next_observations=following, next_known=np.ones(len(obs), bool),
        observation_space=envs.single_observation_space, action_space=envs.single_action_space,
        info=DatasetInfo("pendulum-weak-swing-up", EnvSpec("Pendulum-v1")),
    )  # fmt: skip


# -- the simulator --------------------------------------------------------------------------------


class Simulator:
    """The true dynamics, from any observation: Pendulum-v1, or HalfCheetah-v5, whose place along the track is free."""

    def __init__(self, env_id: str) -> None:
        if env_id not in ("Pendulum-v1", "HalfCheetah-v5"):
            raise ValueError(f"the state of {env_id} is not known from its observations; expected HalfCheetah-v5")
        self.env, self.pendulum = gym.make(env_id).unwrapped, env_id == "Pendulum-v1"
        self.env.reset(seed=0)
        space = self.env.action_space
        self.middle, self.half = (space.high + space.low) / 2.0, (space.high - space.low) / 2.0

    def place(self, obs: np.ndarray) -> None:
        """Go to the state of the observation [O]; a generated (cos, sin) counts by its angle."""
        if self.pendulum:
            self.env.state = np.array([math.atan2(obs[1], obs[0]), obs[2]], dtype=np.float64)
            return
        positions = self.env.model.nq - 1  # all but the place along the track
        self.env.set_state(np.r_[0.0, obs[:positions]], np.asarray(obs[positions:], np.float64))

    def step(self, action: np.ndarray) -> np.ndarray:
        """[O] after an action [A] in [-1, 1]."""
        return np.asarray(self.env.step(self.middle + self.half * action)[0], np.float64)

    def following(self, obs: np.ndarray, action: np.ndarray) -> np.ndarray:
        """[M, O] after one step from each of the observations [M, O]."""
        found = np.empty(obs.shape, np.float64)
        for i in range(len(obs)):
            self.place(obs[i])
            found[i] = self.step(action[i])
        return found

    def open_loop(self, start: np.ndarray, action: np.ndarray) -> np.ndarray:
        """[N, T, O]: the observations after each of the actions [N, T, A], from ``start`` [N, O]."""
        found = np.empty((*action.shape[:2], start.shape[1]), np.float64)
        for i in range(len(start)):
            self.place(start[i])
            for t in range(action.shape[1]):
                found[i, t] = self.step(action[i, t])
        return found

    def roll_out(self, policy: Kernel, start: Tensor, steps: int, noise: torch.Generator) -> Steps:
        """[N, T, ...] of a policy here."""
        obs, found = start, []
        for _ in range(steps):
            action = policy.act(obs, noise)
            following = torch.as_tensor(self.following(obs.numpy(), action.numpy())).float()
            found.append(Steps(obs, action, torch.zeros(len(obs)), torch.zeros(len(obs)), following))
            obs = following
        return Steps(*(torch.stack(parts, 1) for parts in zip(*found, strict=True)))


# -- the models -----------------------------------------------------------------------------------


def recorded(data: Dataset) -> Steps:
    """The usable rows, actions in [-1, 1]."""
    used, space = data.usable, data.action_space
    unit = (data.actions - (space.high + space.low) / 2.0) / ((space.high - space.low) / 2.0)
    columns = (data.observations, unit, data.rewards, data.terminals, data.next_observations)
    return Steps(*(torch.as_tensor(np.asarray(c[used])).float() for c in columns))


def fit_ensemble(rows: Steps, epochs: int, seed: int) -> WorldModel:
    """The autoregressive model: MOPO's ensemble."""
    config = WorldModelConfig(model_max_epochs=epochs)
    fit = WorldModelFit(config.ensemble(rows.obs.shape[1], rows.action.shape[1], seed), config, seed)
    fit.begin(lambda places: Steps(*(x[places] for x in rows)), len(rows.obs))
    while not fit.done:
        fit.epoch()
    return WorldModel(fit.finish())


def generate(
    model: TrajectoryModel, count: int, target: Kernel, kappa: float, sampler: SamplerConfig, seed: int
) -> Steps:
    """Trajectories [N, T - 1, ...] pushed towards ``target``, without the last step, whose next observation is unknown.

    All noise is of the seed.
    """
    noise, guide, found = torch.Generator().manual_seed(seed), None, []
    if kappa > 0.0:
        config = GuidanceConfig(kappa=kappa, kappa_at=KAPPA_AT)
        guide = Guidance(target.log_prob, model.codec, model.denoise, config, sampler)
    for part in torch.arange(count).split(256):
        start = torch.randn(len(part), model.codec.channels, model.codec.length, generator=noise)
        with torch.no_grad():
            found.append(model.codec.decode(sample(model.denoise, start, sampler, noise, guide))[0])
    return Steps(*(torch.cat(parts)[:, :-1] for parts in zip(*found, strict=True)))


# -- what is measured -----------------------------------------------------------------------------


def measure(simulator: Simulator, steps: Steps, std: np.ndarray, target: Kernel, behaviour: Kernel) -> dict:
    """Errors of trajectories [N, T, ...] in squared deviations ``std`` [O] of the data, and likelihoods of actions.

    ``ends`` is the share of steps that are said to end an episode; in these tasks none does.
    """
    obs, action, following = (x.double().numpy() for x in (steps.obs, steps.action, steps.next_obs))
    flat_obs, flat_action = steps.obs.flatten(0, 1), steps.action.flatten(0, 1)
    once = simulator.following(flat_obs.double().numpy(), flat_action.double().numpy())
    whole = errors(following, simulator.open_loop(obs[:, 0], action), std)
    with torch.no_grad():
        likelihoods = [float(p.log_prob(flat_obs, flat_action).mean()) for p in (target, behaviour)]
    return {
        "one_step": summary(errors(following.reshape(once.shape), once, std)),
        "open_loop": {str(h): summary(whole[:, h - 1]) for h in HORIZONS if h <= whole.shape[1]},
        "log_target": likelihoods[0], "log_behaviour": likelihoods[1], "ends": float(steps.done.mean()),
    }  # fmt: skip


def errors(found: np.ndarray, true: np.ndarray, std: np.ndarray) -> np.ndarray:
    """[...] mean over dimensions of squared differences in deviations."""
    with np.errstate(over="ignore", invalid="ignore"):
        return np.square((found - true) / std).mean(-1)


def summary(error: np.ndarray) -> dict[str, float | None]:
    """Mean and median of what is finite, and the share that is not; None of nothing."""
    finite = error[np.isfinite(error)]
    if len(finite) == 0:
        return {"mean": None, "median": None, "lost": 1.0}
    return {"mean": float(finite.mean()), "median": float(np.median(finite)), "lost": 1.0 - len(finite) / len(error)}


# -- merging --------------------------------------------------------------------------------------


def table(found: list[dict]) -> dict:
    """By task and source: every number's mean over the shards."""
    merged: dict[str, dict] = {}
    for task in dict.fromkeys(s["task"] for s in found):
        rows = [r for s in found if s["task"] == task for r in s.get("rows", [])]
        for source in dict.fromkeys(r["source"] for r in rows):
            of = [{k: v for k, v in r.items() if k != "source"} for r in rows if r["source"] == source]
            merged.setdefault(task, {})[source] = {"seeds": len(of), **mean(of)}
    return merged


def mean(values: list) -> Any:
    """Of dicts of the same keys, number by number; None is left out."""
    if isinstance(values[0], dict):
        return {k: mean([v[k] for v in values]) for k in values[0]}
    known = [v for v in values if v is not None]
    return fmean(known) if known else None


def show(merged: dict) -> None:
    def text(x: float | None) -> str:
        return "-" if x is None else f"{x:.3g}"

    for task, rows in merged.items():
        print(f"{task}: errors mean (median) of a step, and at horizons")
        for source, row in rows.items():
            errors = {"1 step": row["one_step"], **row["open_loop"]}
            words = "  ".join(f"{h}: {text(e['mean'])} ({text(e['median'])})" for h, e in errors.items())
            logs = f"log target {text(row['log_target'])}, behaviour {text(row['log_behaviour'])}"
            print(f"  {source:28} {words}  {logs}  {row['seeds']} seeds")


def plot(rows: dict, axes: Any, task: str, kappas: tuple[float, ...]) -> None:
    """The error of a step, and the likelihood under the target, over kappa; other sources as lines."""
    for axis, key, title in zip(axes, ("one_step", "log_target"), ("error of a step", "log target"), strict=True):
        values = {source: row[key]["mean"] if key == "one_step" else row[key] for source, row in rows.items()}
        curve = [values.get(f"diffusion, kappa {k:g}") for k in kappas]
        axis.plot([math.nan if y is None else y for y in curve], "o-", color="#0072b2", label="diffusion")
        for source, color in LINES.items():
            if values.get(source) is not None:
                axis.axhline(values[source], color=color, linewidth=1.2, linestyle="--", label=source)
        axis.set_xticks(range(len(kappas)), [f"{k:g}" for k in kappas])
        axis.set_xlabel("kappa", fontsize=9)
        axis.set_title(f"{task}: {title}", fontsize=10)
    axes[0].set_yscale("log")
    axes[1].legend(fontsize=7, frameon=False)
