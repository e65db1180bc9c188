"""M2TD3: TD3 against the worst of a few candidates for the environment's parameters."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from ctrlrl.data.transitions import Transitions
from ctrlrl.engine.algorithm import Networks, Spaces, register
from ctrlrl.engine.learner import Learner
from ctrlrl.engine.step import gradient
from ctrlrl.nets.actors import DeterministicActor
from ctrlrl.nets.q_ensemble import QEnsemble
from ctrlrl.online.adversarial import Adversarial
from ctrlrl.types import Obs

if TYPE_CHECKING:
    from ctrlrl.engine.learner import Nets
    from ctrlrl.engine.transition_config import TransitionConfig

LENGTH = 1_000
"""Steps of an episode as long as none has ended."""


class Candidates(nn.Module):
    """``count`` points of [-1, 1]^d, held as logits so that no step leaves the set, each with an Adam of its own.

    All that belongs to a candidate is one row of ``table`` [count, 3 d + 2]: logits, both moments, steps taken, and
    the chance that an episode takes it (how often it was the worst of late). Uniform in the set at first.
    """

    def __init__(self, count: int, dims: int) -> None:
        super().__init__()
        self.dims = dims
        self.table = nn.Parameter(torch.zeros(count, 3 * dims + 2))
        with torch.no_grad():
            self.table[:, :dims] = logits(torch.rand(count, dims))
            self.table[:, -1] = 1.0 / count

    def forward(self) -> Tensor:
        """The points [count, d]."""
        return place(self.table[:, : self.dims])


def place(logit: Tensor) -> Tensor:
    """Logits to coordinates in [-1, 1]."""
    return 2.0 * torch.sigmoid(logit) - 1.0


def logits(share: Tensor) -> Tensor:
    """The logits of places in [0, 1], kept away from the ends, where they are infinite."""
    return share.clamp(1e-5, 1.0 - 1e-5).logit()


@register
@dataclass(frozen=True)
class M2TD3(Adversarial):
    """The actor climbs, and the worst candidate descends, a critic that sees the parameters; simultaneous gradients."""

    paper: ClassVar[str] = (
        "Max-Min Off-Policy Actor-Critic Method Focusing on Worst-Case Robustness to Model Misspecification, "
        "arXiv:2211.03413"
    )
    differs: ClassVar[str] = (
        "Follows the released code: candidates are logits, each with an Adam of its own, restarts come at the start of "
        "an episode. Distances between candidates are in shares of each parameter's range, not in its unit (0.1 there "
        "is about 0.03 here for most published sets); the critic sees them in half-ranges, there in their units. A cut "
        "episode is no end of the task; noise is drawn for each action dimension, where the released code shares one "
        "number; start states are not the same in every episode. max_grad_norm does not apply to the candidates. "
        "10,000 random steps at first, the preset published has 100,000. SoftM2TD3 is soft=True (presets soft, "
        "published_soft), where the noise on the parameters falls over the first half of the run."
    )
    loop_defaults: ClassVar[Mapping[str, Any]] = {"batch_size": 100}
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "published": {"learning_starts": 100_000, "restart_distance": 0.03},
        "soft": {"soft": True, "parameter_noise_final": 0.1},
        "published_soft": {
            "learning_starts": 100_000, "restart_distance": 0.03, "soft": True, "parameter_noise_final": 0.1,
        },
    }  # fmt: skip
    per_step: ClassVar[bool] = False

    candidates: int = 5
    """Candidates for the worst parameters."""
    soft: bool = False
    """Let the actor climb the mean over the candidates, weighted by how often each was the worst of late, instead of
    the worst alone (SoftM2TD3)."""
    restart_distance: float = 0.1
    """Sum over the parameters of the difference, in shares of their ranges, within which the first of two candidates
    is drawn anew; 0 keeps all but equal ones."""
    restart_probability: float = 0.05
    """Probability below which a candidate is drawn anew; 0 keeps all."""
    parameter_noise: float = 1.0
    """Deviation of the noise on the candidate that an episode takes, in half-ranges."""
    parameter_noise_final: float | None = None
    """What that deviation falls to, linearly over the first half of the run; None leaves it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.candidates < 1:
            raise ValueError(f"candidates={self.candidates} must be at least 1")
        if not 0.0 <= self.restart_probability * self.candidates < 1.0:
            raise ValueError(
                f"restart_probability={self.restart_probability} must lie in [0, 1/{self.candidates}), below the mean "
                "probability of a candidate"
            )
        for name in ("restart_distance", "parameter_noise", "parameter_noise_final"):
            value = getattr(self, name)
            if value is not None and not value >= 0.0:
                raise ValueError(f"{name}={value} must not be negative")

    def networks(self, spaces: Spaces, config: TransitionConfig, encoder: Callable[..., nn.Module] | None) -> Networks:
        actor = DeterministicActor(
            spaces.observation, spaces.action, config.network, encoder=encoder, exploration_noise=self.exploration_noise
        )
        critic = QEnsemble(spaces.observation, actor.action_shape[0] + spaces.params, config.network, encoder)
        trained = {"critic": critic, "candidates": Candidates(self.candidates, spaces.params)}
        return Networks(actor, trained, {"actor_target": "actor", "critic_target": "critic"})

    # -- the update ---------------------------------------------------------------------------

    def update(
        self, nets: Nets, batch: Transitions, noise: Mapping[str, Tensor], knobs: Mapping[str, Tensor], phase: int
    ) -> dict[str, Tensor]:
        params = batch.extras["params"]
        with torch.no_grad():
            action = self.smoothed(nets["actor_target"](batch.next_obs), noise["next_action"])
            near = self.smoothed(params, noise["next_params"])
            value = nets["critic_target"](batch.next_obs, action, near).amin(0)
            target = batch.reward_t + knobs["gamma"] * (1.0 - batch.terminated_t) * value
        metrics = nets.descend("critic", self.regression(batch, (batch.action, params), target))
        if phase == self.policy_delay - 1:
            metrics |= self._max_min(nets, batch, knobs)
            for network in ("actor", "critic"):
                nets.track(f"{network}_target", network, knobs["tau"])
        return metrics

    def _max_min(self, nets: Nets, batch: Transitions, knobs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """One step of the worst candidate down and of the actor up the first critic, both from where they stood."""
        # the network's one parameter, whole: descend would move every candidate with a common clock
        table = nets.memory("candidates")[0].view(self.candidates, -1)
        dims = (table.shape[1] - 2) // 3
        with torch.no_grad():
            points, chances, action = place(table[:, :dims]), table[:, -1].clone(), nets["actor"](batch.obs)
            values = self._values(nets, batch.obs, action, points)
            worst = torch.zeros_like(values).scatter(0, values.argmin(0, keepdim=True), 1.0).unsqueeze(0)

        def candidate_loss(logit: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            value = self._values(nets, batch.obs, action, worst @ place(logit))[0]
            return value, {"worst_q": value.detach()}

        def actor_loss(actor: Callable[..., Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
            if self.soft:
                value = -(chances * self._values(nets, batch.obs, actor(batch.obs), points)).sum()
            else:
                value = -self._values(nets, batch.obs, actor(batch.obs), worst @ points)[0]
            return value, {"actor_loss": value.detach()}

        slope, metrics = gradient(candidate_loss, table[:, :dims])
        stepped = adam(table, slope, knobs["lr/candidates"])
        stepped[:, -1].lerp_(worst[0], knobs["chance_rate"])
        table.copy_(torch.where(worst.bool().T, stepped, torch.cat([table[:, :-1], stepped[:, -1:]], 1)))
        return metrics | nets.descend("actor", actor_loss)

    @staticmethod
    def _values(nets: Nets, obs: Obs, action: Tensor, points: Tensor) -> Tensor:
        """[K] mean of the first critic over the batch under each of the parameters ``points`` [K, d], in one call."""
        count, size = points.shape[0], action.shape[0]

        def again(x: Tensor) -> Tensor:
            return x if count == 1 else x.repeat(count, *[1] * (x.dim() - 1))

        many = {k: again(v) for k, v in obs.items()} if isinstance(obs, dict) else again(obs)
        return nets["critic"](many, again(action), points.repeat_interleave(size, 0))[0].view(count, size).mean(1)

    # -- the parameters of an episode ---------------------------------------------------------

    def prepare(self, learner: Learner) -> None:
        learner.knobs["chance_rate"] = torch.tensor(1.0 / LENGTH, device=learner.device)

    def ended(self, learner: Learner, episodes: Sequence[tuple[float, int]]) -> None:
        """The chances follow the worst candidate at one over the length of the last episode."""
        for _, length in episodes[-1:]:
            learner.knobs["chance_rate"].fill_(1.0 / length)

    def _table(self, learner: Learner) -> Tensor:
        return learner.state["candidates"].view(self.candidates, -1)

    def choose(
        self, learner: Learner, count: int, obs: Obs | None, generator: torch.Generator, progress: float
    ) -> Tensor:
        """Candidates drawn by their chances, with noise, cut at the set's bounds; restarts come first."""
        self.restart(learner, generator)
        table = self._table(learner).cpu()
        index = torch.multinomial(table[:, -1], count, replacement=True, generator=generator)
        points = place(table[index, : (table.shape[1] - 2) // 3])
        deviation = self.parameter_noise
        if self.parameter_noise_final is not None:
            deviation += (self.parameter_noise_final - deviation) * min(1.0, 2.0 * progress)
        return (points + deviation * torch.randn(points.shape, generator=generator)).clamp(-1.0, 1.0)

    def restart(self, learner: Learner, generator: torch.Generator) -> list[int]:
        """Draw anew candidates that are close to a later one, then those that are hardly ever the worst.

        A new candidate starts with the mean chance of the others and without Adam's memory.

        Returns:
            Which, in the order of the restarts.
        """
        table = self._table(learner)
        share = torch.sigmoid(table[:, : (table.shape[1] - 2) // 3]).cpu()
        chances: list[float] = table[:, -1].tolist()
        pairs = combinations(range(self.candidates), 2)
        close = {i: None for i, j in pairs if float((share[i] - share[j]).abs().sum()) <= self.restart_distance}
        done = list(close)
        for i in done:
            chances[i] = _mean_of_others(chances, i)
        rare = [i for i, chance in enumerate(chances) if chance < self.restart_probability]
        for i in rare:
            chances[i] = _mean_of_others(chances, i)
        done += [i for i in rare if i not in close]
        table[:, -1] = torch.tensor([c / sum(chances) for c in chances])
        for i in done:
            table[i, :-1] = 0.0
            table[i, : share.shape[1]] = logits(torch.rand(share.shape[1], generator=generator))
        return done


def adam(table: Tensor, slope: Tensor, rate: Tensor) -> Tensor:
    """The rows of a candidates' table [K, 3 d + 2] after a step of Adam (Kingma and Ba 2015) along ``slope`` [K, d]."""
    dims = slope.shape[1]
    logit, m, v, clock, chance = table.split([dims, dims, dims, 1, 1], 1)
    clock = clock + 1.0
    m, v = torch.lerp(m, slope, 0.1), torch.lerp(v, slope * slope, 0.001)
    size = torch.sqrt(v / (1.0 - 0.999**clock)) + 1e-8
    return torch.cat([logit - rate * m / (1.0 - 0.9**clock) / size, m, v, clock, chance], 1)


def _mean_of_others(values: list[float], i: int) -> float:
    return (sum(values) - values[i]) / (len(values) - 1)
