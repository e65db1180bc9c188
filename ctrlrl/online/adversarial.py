"""Methods that set the environment's parameters while they train: what they share, and the agent that runs them."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import gymnasium as gym
import torch
from torch import Tensor

from ctrlrl.data.transitions import Transitions
from ctrlrl.engine import uncertainty
from ctrlrl.engine.collected import Collected
from ctrlrl.engine.config import ConfigError
from ctrlrl.engine.learner import Learner
from ctrlrl.engine.off_policy import OffPolicyAgent
from ctrlrl.engine.seeding import generator
from ctrlrl.engine.sync import LeanSyncVectorEnv
from ctrlrl.engine.transition_config import TransitionConfig
from ctrlrl.online.td3 import TD3
from ctrlrl.types import Obs


@dataclass(frozen=True)
class Adversarial(TD3):
    """TD3 in environments whose parameters, ``extras["params"]`` [B, d] in [-1, 1], are an adversary's to choose."""

    per_step: ClassVar[bool]
    """Whether the parameters are chosen before every step, or for every episode."""

    @classmethod
    def agent_class(cls) -> type[OffPolicyAgent]:
        return AdversarialAgent

    @abstractmethod
    def choose(
        self, learner: Learner, count: int, obs: Obs | None, generator: torch.Generator, progress: float
    ) -> Tensor:
        """Parameters [count, d] in [-1, 1], once the warm-up is over; before, they are uniform.

        Args:
            learner: The networks.
            count: Environments.
            obs: [count, ...] what they show, on the learner's device; None where the choice is for an episode.
            generator: On the CPU; a function of the run's seed and of where the run stands.
            progress: Share of the run that is over.
        """

    def prepare(self, learner: Learner) -> None:
        """Called once, before the first update and before a checkpoint is read."""

    def ended(self, learner: Learner, episodes: Sequence[tuple[float, int]]) -> None:
        """Called with the return and length of episodes that ended, and at borders with the latest ones again."""

    def noise(
        self, n: int, batch_size: int, action_size: int, generator: torch.Generator, params: int = 0
    ) -> dict[str, Tensor]:
        """Standard normal noise for the targets' actions [n, B, A] and parameters [n, B, d]."""
        sizes = {"next_action": action_size, "next_params": params}
        return {
            k: torch.randn((n, batch_size, size), generator=generator, device=generator.device)
            for k, size in sizes.items()
        }

    def learning_rate(self, network: str, config: TransitionConfig) -> float:
        """The critics' for networks with "critic" in their name, the actor's for all others."""
        return super().learning_rate("critic" if "critic" in network else "actor", config)

    @staticmethod
    def regression(batch: Transitions, inputs: tuple[Tensor, ...], target: Tensor) -> Callable[..., Any]:
        """The loss of a critic whose members are all to predict ``target`` [B] from observation and ``inputs``."""

        def loss(critic: Callable[..., Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
            q = critic(batch.obs, *inputs)
            value = (q - target).square().mean(1).sum()
            return value, {"critic_loss": value.detach(), "q": q.detach().mean()}

        return loss


class AdversarialAgent(OffPolicyAgent):
    """Lets the method set the parameters of every environment, and keeps them beside the transitions.

    Parameters for an episode are set right after the step that ended the one before; environments that reset within
    that step have drawn the new initial state under the old ones. Evaluations and ``predict`` know nothing of all
    this: they run the environment as it is built, with the protagonist's policy.

    Attributes:
        parameters: The uncertainty set.
        scaled: [N, d] those of each environment now, in half-ranges around the set's middle: [-1, 1].

    Raises:
        ConfigError: collect_steps is not 1.
        ValueError: The environment's parameters cannot be set, or not for each environment by itself.
    """

    parameters: uncertainty.UncertaintySet

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        if self.config.collect_steps != 1:
            raise ConfigError(
                f"collect_steps={self.config.collect_steps}: {self.method} looks at its environments after every step "
                "to set their parameters; leave it at 1"
            )
        self.adversary = cast(Adversarial, self.algorithm)
        self.adversary.prepare(self.learner)
        self.scaled = torch.zeros(self.n_envs, self.parameters.dim)
        self._random = generator(self.seed, "parameters", 0)

    def _count_params(self) -> int:
        source = self._source()
        self.parameters = uncertainty.of(source)
        if isinstance(source, gym.vector.VectorEnv) and not isinstance(source, LeanSyncVectorEnv):
            raise ValueError(
                f"{self.method} sets the parameters of each environment by itself, which a live "
                f"{type(source).__name__} does not offer; pass an id with n_envs, an EnvSpec, or a single environment"
            )
        return self.parameters.dim

    def _extras(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        return {"params": ((self.parameters.dim,), torch.float32)}

    def _columns(self, c: Collected) -> dict[str, Tensor]:
        return {"params": self.scaled}

    def _border(self) -> None:
        # nothing is taken over from before the border: a resumed run would not have it
        self._random = generator(self.seed, "parameters", "border", self.iteration)
        self.collector.close()
        self.adversary.ended(self.learner, list(self.recent)[-1:])
        if self.adversary.per_step:
            self.collector.set_params(self.parameters.nominal)
        else:
            self.scaled = self._choose(self.n_envs, None)
            self.collector.set_params(self._named(self.scaled))
        super()._border()

    def _iterate(self) -> dict[str, float]:
        self._random = generator(self.seed, "parameters", self.iteration)
        self._sum, self._count = torch.zeros(self.parameters.dim, dtype=torch.float64), 0
        metrics = super()._iterate()
        means = self._named((self._sum / max(self._count, 1)).unsqueeze(0))[0]
        return metrics | {f"params/{name}": value for name, value in means.items()}

    def _before_collection(self) -> None:
        if self.adversary.per_step:
            obs = self._as_batch(self.collector.observation)[0]
            self.scaled = self._choose(self.n_envs, obs)
            self.collector.set_params(self._named(self.scaled))
        self._sum += self.scaled.sum(0)
        self._count += self.n_envs

    def _after_collection(self, collected: Collected) -> None:
        if collected.episodes:
            self.adversary.ended(self.learner, collected.episodes)
        over = (collected.terminated_t | collected.truncated_t)[-1].cpu()
        if self.adversary.per_step or not over.any():
            return
        self.scaled = self.scaled.clone()
        self.scaled[over] = self._choose(int(over.sum()), None)
        self.collector.set_params(self._named(self.scaled))

    def _choose(self, count: int, obs: Obs | None) -> Tensor:
        if self.steps < self.config.learning_starts:
            return torch.rand(count, self.parameters.dim, generator=self._random) * 2.0 - 1.0
        progress = (self.steps - self.span[0]) / max(self.span[1] - self.span[0], 1)
        with torch.no_grad():
            return self.adversary.choose(self.learner, count, obs, self._random, progress).cpu()

    def _named(self, scaled: Tensor) -> list[dict[str, float]]:
        return self.parameters.from_unit((scaled.double().numpy() + 1.0) / 2.0)

    def _open(self) -> None:
        super()._open()
        self._give_back = uncertainty.keeper(self.collector.live)

    def _close(self) -> None:
        self._give_back()
        super()._close()
