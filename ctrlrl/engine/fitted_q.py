"""Fitted Q evaluation: the action values of a given policy, learned from recorded data.

Repeated regression of Q(s, a) on r + gamma E Q(s', a'), a' from the policy (Le, Voloshin and Yue 2019, arXiv
1903.08738). A termination drops the next value, a cut keeps it. What is estimated:

- without ``horizon``: the discounted value, as if cut episodes went on for ever; needs gamma < 1, or terminations;
- with ``horizon``: the (discounted, or with gamma = 1 plain) sum of the rewards of the first ``horizon`` steps. Action
  values then depend on the time, which the networks see.

The policy's value is the mean over the first observations of the data's episodes. Needed is data of what the policy
does: action values of actions that nobody took are guesses. The exact form on linear features is in
:mod:`ctrlrl.engine.linear_fitted_q`.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Protocol

import gymnasium as gym
import numpy as np
import torch
from torch import Tensor, nn

from ctrlrl.core.advantage import linear_recurrence
from ctrlrl.data.dataset import Dataset, DatasetError
from ctrlrl.data.transitions import TransitionReplay, Transitions
from ctrlrl.engine.algorithm import Algorithm, Networks, Spaces
from ctrlrl.engine.learner import Learner, Nets
from ctrlrl.engine.off_policy_config import OffPolicyConfig
from ctrlrl.engine.seeding import derive, generator
from ctrlrl.nets.actors import QNetworkConfig
from ctrlrl.nets.normalizer import ObsScaling, RunningMoments
from ctrlrl.nets.q_ensemble import QEnsemble
from ctrlrl.types import Obs, check_types

ROWS = 8192
"""Rows per forward pass, which bounds the memory."""
AHEAD = 16
"""Updates whose batches are drawn, and whose next actions are chosen, at once."""


class ActsOn(Protocol):
    """How a policy acts on raw observations [N, ...]: the environment's actions [N, ...], drawn with the generator."""

    def __call__(self, obs: Obs, generator: torch.Generator, /) -> Tensor: ...


@dataclass(frozen=True)
class FittedQConfig:
    """How action values are fitted."""

    updates: int = 20_000
    """Steps of Adam."""
    batch_size: int = 256
    """Transitions per update."""
    learning_rate: float = 3e-4
    """Adam's learning rate."""
    tau: float = 0.05
    """Part of the way that target networks go towards the trained ones in an update. Values reach back about
    ``tau x updates`` steps, which should be several times 1 / (1 - gamma), or more than the horizon."""
    resamples: int = 4
    """Bootstrap samples of the episodes, each with a network of its own, that say how uncertain the value is."""
    network: QNetworkConfig = field(default_factory=lambda: QNetworkConfig(normalize_obs=True))
    """Shape of the networks."""
    memory_map: bool = False
    """Keep the data in unnamed files in the system's folder for temporary files instead of memory."""

    def __post_init__(self) -> None:
        check_types(self)
        for name, least in (("updates", 1), ("batch_size", 1), ("resamples", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)} must be at least {least}")
        if not self.learning_rate > 0.0 or not 0.0 < self.tau <= 1.0:
            raise ValueError(f"learning_rate={self.learning_rate} and tau={self.tau} must be positive, tau at most 1")


class FittedQ:
    """Action values of a policy.

    Attributes:
        initial: [1 + resamples] the policy's value: by all data, then by each bootstrap sample of the episodes, over
            its own first observations.
        by_episode: [episodes] values of the first observations, by all data.
        unusable: Steps that were left out, for nothing is known of what follows them.
        converged: Whether the updates were enough for values to reach back through the steps that count.
    """

    initial: np.ndarray
    by_episode: np.ndarray
    unusable: int
    converged: bool

    def __init__(
        self, net: nn.Module, encode: ActionCode, units: Units, act: ActsOn, gamma: float, horizon: int | None
    ) -> None:
        self._net, self._encode, self._units, self._act = net, encode, units, act
        self.gamma, self.horizon = gamma, horizon

    @torch.no_grad()
    def q(self, obs: Obs, action: Tensor, time: Tensor, members: int | None = 1) -> Tensor:
        """[members, N] values of the environment's actions [N, ...]; the first member saw all data.

        Args:
            obs: [N, ...] raw.
            action: [N, ...]
            time: [N] step of the episode; ignored without a horizon.
            members: How many; None is all.
        """
        inputs = [self._encode(action), *_clock(time, self.horizon)]
        return self._units.out(self._net(obs, *inputs, members=members))

    @torch.no_grad()
    def value(
        self, obs: Obs, time: Tensor, generator: torch.Generator, samples: int, members: int | None = 1
    ) -> Tensor:
        """[members, N] mean of the values of ``samples`` actions of the policy at each observation.

        The generator is on the CPU, so that every device draws the same.
        """
        drawn = [self.q(obs, self._act(obs, generator), time, members) for _ in range(samples)]
        return torch.stack(drawn).mean(0)


def fitted_q(
    act: ActsOn,
    data: Dataset,
    *,
    gamma: float,
    horizon: int | None = None,
    config: FittedQConfig | None = None,
    samples: int = 8,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> FittedQ:
    """Fit action values of the policy that acts by ``act``.

    Args:
        act: How the policy acts, see :class:`ActsOn`; one action is drawn for each row of each batch.
        data: Rows whose next observation is not known, and which are no ends, are left out.
        gamma: Discount per step.
        horizon: Steps that count; None is without end.
        config: How they are fitted.
        samples: Actions drawn at each first observation.
        seed: Of everything.
        device: Where networks and data lie.

    Raises:
        ValueError: gamma = 1 without a horizon, with episodes that were only cut.
        DatasetError: No row is usable.
        TypeError: Actions are neither a Box of floats nor Discrete.
    """
    config, device = config or FittedQConfig(), torch.device(device)
    check_estimand(data, gamma, horizon)
    time = steps_of(data)
    ends = np.asarray(data.terminals) | (time + 1 == horizon if horizon else False)
    rows = np.flatnonzero((data.usable | ends) & (time < horizon if horizon else True))
    if len(rows) == 0:
        raise DatasetError(f"{data.info.id} has no step whose next observation is known")
    counts = _resampled(len(data.episodes), config.resamples, seed)
    encode, units = ActionCode(data.action_space, device), Units.of(data, gamma, rows)
    method = _FittedQ(config.resamples + 1, encode.size, horizon is not None, units.scale, units.shift)
    learner = method.learner(data.observation_space, config, gamma, seed, device)
    memory = _memory(data, rows, ends, time, horizon, counts, encode, config, device)
    scaling = [m for net in learner.modules.values() for m in net.modules() if isinstance(m, ObsScaling)]
    _fit_scaling(scaling, learner.modules["critic"], memory)
    drawing = torch.Generator(device).manual_seed(derive(seed, "fitted_q", "rows"))
    acting = generator(seed, "fitted_q", "actions")
    for left in range(config.updates, 0, -AHEAD):
        count = min(AHEAD, left)
        batch = memory.sample(memory.draw(count, config.batch_size, drawing).flatten())
        with torch.no_grad():
            batch.extras["next_action"] = encode(act(batch.next_obs, acting))
        learner.run(batch, {}, count)
    memory.close()
    found = FittedQ(learner.modules["critic"], encode, units, act, gamma, horizon)
    starts = np.array([episode.start for episode in data.episodes])
    values = over_rows(
        data.observations, starts, device,
        lambda obs, index: found.value(obs, torch.zeros(len(index), device=device), acting, samples, None),
    )  # fmt: skip
    found.by_episode = values[0].numpy()
    reach = config.tau * config.updates
    found.converged = reach * (1.0 - gamma) >= 3.0 or (horizon is not None and reach >= 1.5 * horizon)
    found.initial = (values * counts.T).sum(1).div(counts.sum(0)).numpy()
    found.unusable = int((~np.asarray(data.usable)).sum()) if horizon is None else int(
        ((time < horizon) & ~(data.usable | ends)).sum()
    )  # fmt: skip
    if not np.isfinite(found.initial).all():
        raise FloatingPointError(
            f"fitted Q evaluation diverged on {data.info.id}; try a smaller learning_rate or gamma, or a horizon"
        )
    return found


def check_estimand(data: Dataset, gamma: float, horizon: int | None) -> None:
    """Raise ValueError where the sum that is asked for need not exist."""
    if not 0.0 <= gamma <= 1.0:
        raise ValueError(f"gamma={gamma} must lie in [0, 1]")
    if horizon is not None and horizon < 1:
        raise ValueError(f"horizon={horizon} must be at least 1")
    if gamma == 1.0 and horizon is None and not data.terminals[data.ends].all():
        cut = int((~data.terminals[data.ends]).sum())
        raise ValueError(
            f"gamma=1 without a horizon, but {cut} of {len(data.episodes)} episodes of {data.info.id} were only cut: "
            "the sum has no end. Give the horizon (the environment's time limit), or gamma below 1"
        )


def steps_of(data: Dataset) -> np.ndarray:
    """[N] int64 number of each step within its episode, from 0."""
    starts = np.array([episode.start for episode in data.episodes])
    lengths = np.diff(np.r_[starts, len(data)])
    return np.arange(len(data)) - np.repeat(starts, lengths)


def over_rows(
    observations: np.ndarray | Mapping[str, np.ndarray],
    index: np.ndarray,
    device: torch.device,
    f: Callable[[Obs, np.ndarray], Tensor],
) -> Tensor:
    """``f(observations, their rows)`` by slices of the rows ``index``, joined along the last dimension, in float64."""
    parts = [index[start : start + ROWS] for start in range(0, len(index), ROWS)]
    return torch.cat([f(tensors(observations, part, device), part).double().cpu() for part in parts], -1)


def tensors(observations: np.ndarray | Mapping[str, np.ndarray], index: np.ndarray, device: torch.device) -> Obs:
    """The observations at rows ``index``; float64 becomes float32."""

    def one(x: np.ndarray) -> Tensor:
        rows = np.asarray(x[index])
        return torch.from_numpy(rows.astype(np.float32) if rows.dtype == np.float64 else rows).to(device)

    return {k: one(v) for k, v in observations.items()} if isinstance(observations, Mapping) else one(observations)


# -- pieces -----------------------------------------------------------------------------------------


class ActionCode:
    """The environment's actions [N, ...] as a critic's input [N, size]: bounds on [-1, 1], or one-hot.

    Raises:
        TypeError: Actions are neither a Box of floats nor Discrete.
    """

    def __init__(self, space: gym.Space, device: torch.device) -> None:
        self.discrete = isinstance(space, gym.spaces.Discrete)
        if isinstance(space, gym.spaces.Discrete):
            self.size, self.start = int(space.n), int(space.start)
            return
        if not isinstance(space, gym.spaces.Box) or not np.issubdtype(space.dtype, np.floating):
            raise TypeError(f"fitted Q evaluation needs actions of a Box of floats or Discrete, found {space}")
        self.size = int(np.prod(space.shape))
        low, high = (np.asarray(x, np.float64).flatten() for x in (space.low, space.high))
        bounded = np.isfinite(low) & np.isfinite(high)
        with np.errstate(invalid="ignore"):
            middle, half = np.where(bounded, (high + low) / 2, 0.0), np.where(bounded, (high - low) / 2, 1.0)
        self.middle, self.half = (torch.as_tensor(x, dtype=torch.float32, device=device) for x in (middle, half))

    def __call__(self, action: Tensor) -> Tensor:
        if self.discrete:
            return nn.functional.one_hot(action.reshape(-1).long() - self.start, self.size).float()
        return (action.reshape(len(action), self.size).float() - self.middle) / self.half


@dataclass(frozen=True)
class Units:
    """Values in the units in which networks learn them, value = shift + scale x output: it is the same, but faster."""

    shift: float
    scale: float

    @classmethod
    def of(cls, data: Dataset, gamma: float, rows: np.ndarray) -> Units:
        """Mean and deviation of the recorded returns from each of the ``rows`` on."""
        keep = torch.from_numpy(gamma * ~np.asarray(data.ends)).double()
        ahead = linear_recurrence(keep, torch.from_numpy(np.asarray(data.rewards, np.float64)), reverse=True)
        ahead = ahead[torch.from_numpy(rows)]
        return cls(float(ahead.mean()), max(float(ahead.std(correction=0)), 1e-6))

    def out(self, x: Tensor) -> Tensor:
        """Outputs as values."""
        return self.shift + self.scale * x


@dataclass(frozen=True)
class _FittedQ(Algorithm):
    """The update: every member by its own bootstrap sample, and its own target."""

    paper: ClassVar[str] = "Batch Policy Learning under Constraints, arXiv:1903.08738"
    members: int = 1
    action_size: int = 1
    timed: bool = False
    scale: float = 1.0
    shift: float = 0.0

    def networks(self, spaces: Spaces, config: Any, encoder: Callable[..., nn.Module] | None) -> Networks:
        inputs = self.action_size + int(self.timed)
        critic = QEnsemble(spaces.observation, inputs, config.network, members=self.members)
        return Networks(critic, {"critic": critic}, {"critic_target": "critic"})

    def learner(
        self, space: gym.Space, config: FittedQConfig, gamma: float, seed: int, device: torch.device
    ) -> Learner:
        """What trains it."""
        loop = OffPolicyConfig(
            gamma=gamma, tau=config.tau, learning_rate=config.learning_rate, network=config.network, device=str(device)
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive(seed, "fitted_q", "network"))
            _, trained, copies = self.networks(Spaces(space, gym.spaces.Discrete(1)), loop, None)
        return Learner(self, trained, copies, loop, device, compile=False)

    def update(
        self, nets: Nets, batch: Transitions, noise: Mapping[str, Tensor], knobs: Mapping[str, Tensor], phase: int
    ) -> dict[str, Tensor]:
        now, following = ([batch.extras[k]] if self.timed else [] for k in ("time", "next_time"))
        ahead = self.shift + self.scale * nets["critic_target"](batch.next_obs, batch.extras["next_action"], *following)
        # what follows an end is not looked at: it may be anything finite
        ahead = torch.where(batch.terminated_t > 0, torch.zeros_like(ahead), knobs["gamma"] * ahead)
        target = (batch.reward_t + ahead - self.shift) / self.scale

        def loss(critic: Callable[..., Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
            error = (critic(batch.obs, batch.action, *now) - target.detach()).square()
            value = (batch.extras["weight"].T * error).mean(1).sum()
            return value, {"critic_loss": value.detach()}

        metrics = nets.descend("critic", loss)
        nets.track("critic_target", "critic", knobs["tau"])
        return metrics


def _clock(time: Tensor, horizon: int | None) -> list[Tensor]:
    """[N, 1] the part of the horizon that is gone, from -1 to 1."""
    return [] if horizon is None else [(2.0 * time.float() / horizon - 1.0).unsqueeze(-1)]


def _resampled(episodes: int, resamples: int, seed: int) -> Tensor:
    """[episodes, 1 + resamples] how often each episode counts: once, then as drawn with replacement."""
    rng = np.random.default_rng(derive(seed, "fitted_q", "episodes"))
    drawn = rng.multinomial(episodes, np.full(episodes, 1.0 / episodes), size=resamples)
    return torch.from_numpy(np.concatenate([np.ones((1, episodes)), drawn]).T.copy())


def _memory(
    data: Dataset, rows: np.ndarray, ends: np.ndarray, time: np.ndarray, horizon: int | None, counts: Tensor,
    encode: ActionCode, config: FittedQConfig, device: torch.device,
) -> TransitionReplay:  # fmt: skip
    """The rows to learn from, on the device."""
    extras: dict[str, tuple[tuple[int, ...], torch.dtype]] = {"weight": ((counts.shape[1],), torch.float32)}
    if horizon is not None:
        extras |= {"time": ((1,), torch.float32), "next_time": ((1,), torch.float32)}
    memory = TransitionReplay(
        data.observation_space, (encode.size,), torch.float32, len(rows), device, extras=extras,
        folder=Path(tempfile.gettempdir()) if config.memory_map else None,
    )  # fmt: skip
    episode = np.cumsum(np.r_[0, np.asarray(data.ends)[:-1]])
    for start in range(0, len(rows), ROWS):
        index = rows[start : start + ROWS]
        columns = {"weight": counts[torch.from_numpy(episode[index])].float()}
        for name, ahead in (("time", 0), ("next_time", 1)) if horizon is not None else ():
            columns[name] = _clock(torch.from_numpy(time[index] + ahead), horizon)[0]
        memory.add(
            obs=tensors(data.observations, index, device),
            action=encode(torch.from_numpy(np.asarray(data.actions[index])).to(device)),
            reward=torch.from_numpy(np.asarray(data.rewards[index], np.float32)),
            terminated=torch.from_numpy(ends[index].astype(np.float32)),
            truncated=torch.from_numpy(np.asarray(data.timeouts[index], np.float32)),
            next_obs=tensors(data.next_observations, index, device),
            extras=columns,
        )
    return memory


def _fit_scaling(scaling: list[ObsScaling], critic: nn.Module, memory: TransitionReplay) -> None:
    """Set what normalises observations, where the networks do."""
    if not scaling:
        return
    moments = RunningMoments((scaling[0].shift.numel(),))
    for start in range(0, len(memory), ROWS):
        index = torch.arange(start, min(start + ROWS, len(memory)), device=memory.device)
        floats = critic.features.preprocess.floats(memory.sample(index).obs)  # type: ignore[union-attr, operator]
        moments.update(floats.cpu())
    for module in scaling:
        module.fit(moments.mean, moments.var.sqrt())
