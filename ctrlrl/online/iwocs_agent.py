"""The agent of IWOCS: trains in phases, each on the worst case of what the last ones gave, and acts by the best."""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple, Self, TypedDict, cast

import numpy as np
import torch
from torch import Tensor, nn

from ctrlrl.engine import hooks, runfolder, uncertainty, worst_case
from ctrlrl.engine.agent import load_module
from ctrlrl.engine.algorithm import Networks, Spaces
from ctrlrl.engine.collected import Collected
from ctrlrl.engine.config import ConfigError
from ctrlrl.engine.learner import Learner
from ctrlrl.engine.memory import recalled
from ctrlrl.engine.off_policy import OffPolicyAgent
from ctrlrl.engine.seeding import derive
from ctrlrl.nets.actors import BoxActor
from ctrlrl.nets.q_ensemble import QEnsemble
from ctrlrl.online.iwocs import IWOCS, Composite, Memory, Model, Predictor
from ctrlrl.online.sac import SAC

logger = logging.getLogger("ctrlrl")


class Row(TypedDict):
    """One phase of training and the search that ended it; row 0 is the default policy's."""

    steps: int
    """Environment steps trained until then."""
    model: dict[str, float] | None
    """Parameters trained on; None: randomised."""
    threshold: float | None
    """The threshold kept for this model."""
    worst_case: float
    """Return of the policy that this phase completes, under the parameters that are worst for it."""
    worst: dict[str, float]
    """Those parameters; the next phase trains on them."""
    known: float | None
    """Lowest of its returns under the parameters trained on."""
    stopped: Literal["repeated", "gap", "max_models", "steps"] | None
    """Why training ended with this phase."""


class Outcome(NamedTuple):
    """The searches of one phase."""

    found: worst_case.Found
    threshold: float | None
    evaluations: int
    steps: int


class IWOCSAgent(OffPolicyAgent):
    """An agent trained by IWOCS (see :class:`ctrlrl.online.iwocs.IWOCS`).

    It acts by the policy of the phase whose searched worst case is best, the first among equals; until the first
    search is done by the policy under training. Data is always collected with the policy under training alone.

    A phase ends with an iteration, and its search belongs to that iteration: Ctrl-C in a search ends training at once,
    and resuming takes up the search's finished generations from ``checkpoints/searches.json``.

    What it does depends on the step before: give ``predict`` back the state it returns, or every step counts as an
    episode's first. The worst cases it reports are those its searches found, upper estimates of the true ones.

    Raises:
        ConfigError: collect_steps is not 1.
        ValueError: The environment's parameters cannot be set, or it cannot be built again for the searches.
    """

    algorithm: IWOCS

    def __init__(self, env: Any, method: str | None = None, *, encoder: Any = None, **settings: Any) -> None:
        self._encoder = None if isinstance(encoder, str) else encoder
        super().__init__(env, method, encoder=encoder, **settings)
        if self.config.collect_steps != 1:
            raise ConfigError(
                f"collect_steps={self.config.collect_steps}: iwocs looks at its environments after every step to set "
                "their parameters; leave it at 1"
            )
        self.default: BoxActor | None = None
        """The policy of phase 0, frozen."""
        self.models: list[Model] = []
        """What the later phases left, frozen."""
        self.rows: list[Row] = []
        self.phase_steps = 0
        """Environment steps of this phase."""
        self.phase_end = self.model_steps = 0
        self._models_before = 0
        self.search_episodes = self.search_steps = 0
        """Episodes and environment steps of all searches, which ``steps`` does not count."""
        self._renew()

    @property
    def phase(self) -> int:
        """0 under randomised parameters, k on the k-th worst case."""
        return len(self.rows)

    @property
    def iterations_table(self) -> list[Row]:
        """What each finished phase trained on, and the worst case of the policy it completed."""
        return copy.deepcopy(self.rows)

    @property
    def acting(self) -> Composite:
        """The policy that acts outside of training."""
        if self.default is None:
            return Composite(self.policy, [], [])
        best = int(np.argmax([row["worst_case"] for row in self.rows]))
        return Composite(self.default, self.models[:best], self._thresholds(best))

    def _thresholds(self, count: int) -> list[float]:
        return [cast(float, row["threshold"]) for row in self.rows[1 : count + 1]]

    def _count_params(self) -> int:
        if self.env_spec is None:
            raise ValueError(
                "iwocs builds its environment again to search for worst cases, which a live environment without an id "
                "does not allow; register it with gymnasium and pass its id or an EnvSpec"
            )
        self.uncertainty = uncertainty.of(self.env_spec)
        return self.uncertainty.dim

    # -- acting -------------------------------------------------------------------------------

    def predict(
        self,
        observation: Any,
        state: tuple[np.ndarray, ...] | None = None,
        episode_start: np.ndarray | None = None,
        deterministic: bool = False,
    ) -> tuple[np.ndarray, tuple[np.ndarray, ...] | None]:
        """The environment's action, and what to give back as ``state`` at the next step (see ``Agent.predict``).

        Args:
            observation: Raw observation, or a batch [N, ...].
            state: What the last call returned: observations [N, ...], actions [N, A] in [-1, 1], and [N] whether
                there were any. None at the beginning.
            episode_start: [N] bool: where an episode begins, and ``state`` is from another.
            deterministic: The mode of the policy that is chosen, or a sample from it.

        Raises:
            ValueError: The observation does not fit the space, or ``state`` or ``episode_start`` the observation.
        """
        found, batched = self._as_batch(observation)
        obs = cast(Tensor, found)
        width = self.policy.action_shape[0]
        before = recalled(Memory.none(obs, width), state, episode_start, self.device)
        noise = None if deterministic else self._predict_generator()
        action, after = self._decide(self.acting, obs, before, noise)
        return (action if batched else action[0]), tuple(part.cpu().numpy() for part in after)

    def session(self, noise: torch.Generator | None = None) -> worst_case.Act:
        """As in Agent, with the policy as it is now."""
        return self._session(self.acting, noise)

    def _session(self, policy: Composite, noise: torch.Generator | None = None) -> worst_case.Act:
        after: Memory | None = None
        numbers = np.zeros(0)

        def act(observation: Any, episodes: np.ndarray) -> np.ndarray:
            nonlocal after, numbers
            obs = cast(Tensor, self._as_batch(observation)[0])
            if after is None:
                before = Memory.none(obs, self.policy.action_shape[0])
            else:
                before = after._replace(there=torch.as_tensor(episodes == numbers, device=self.device))
            action, after = self._decide(policy, obs, before, noise)
            numbers = episodes.copy()
            return action

        return act

    def _act(self, obs: Any, noise: torch.Generator | None) -> np.ndarray:
        """As in Agent, at the first step of an episode."""
        return self._decide(self.acting, obs, Memory.none(obs, self.policy.action_shape[0]), noise)[0]

    def _decide(
        self, policy: Composite, obs: Tensor, before: Memory, noise: torch.Generator | None
    ) -> tuple[np.ndarray, Memory]:
        """The environment's actions [N, ...], and the memory for the next step."""
        n = obs.shape[0]
        drawn = None if noise is None else self.policy.noise(1, n, noise)[0].to(self.device)
        with torch.inference_mode():
            action = policy.act(obs, before, drawn)
            out = self.policy.to_env(obs, action)
        after = Memory(obs.clone(), action, torch.ones(n, dtype=torch.bool, device=obs.device))
        return out.cpu().numpy().astype(self.action_space.dtype, copy=False), after

    # -- training -----------------------------------------------------------------------------

    def learn(self, steps: int, **options: Any) -> Self:
        """As in TrainedAgent. The steps are shared out among the phases; training ends early where a search says so.

        Raises:
            ConfigError: A phase would be no longer than the warm-up.
        """
        if steps >= 1:
            length, self.model_steps = self.algorithm.plan(steps, self.phase > 0, self.config.learning_starts)
            self.phase_end = self.steps + max(1, length - self.phase_steps)
            self._models_before = len(self.models)
        return super().learn(steps, **options)

    def _open(self) -> None:
        if self.algorithm.search == "cma":
            worst_case.need_cma()  # or hours of training would end in an error
        super()._open()
        self._give_back = uncertainty.keeper(self.collector.live)

    def _close(self) -> None:
        self._give_back()
        super()._close()
        if self._live is None:
            self.collector.env = None  # the next border sets parameters before there is another

    def _border(self) -> None:
        if self.phase == 0:
            draw = np.random.default_rng(derive(self.seed, "border parameters", self.iteration))
            self._drawn = self.uncertainty.from_unit(draw.random((self.n_envs, self.uncertainty.dim)))
            self.collector.set_params(self._drawn)
        else:
            self.collector.set_params(self.rows[-1]["worst"])
        super()._border()

    def _after_collection(self, collected: Collected) -> None:
        if self.phase > 0:
            if self.algorithm.normalize_error:
                obs = cast(Tensor, collected.obs)
                cast(Predictor, self.learner.modules["predictor"]).observe(obs[collected.valid_t])
            return
        ended = (collected.terminated_t | collected.truncated_t).any(0).nonzero().flatten().tolist()
        if ended:
            for n in ended:
                (self._drawn[n],) = self.uncertainty.from_unit(self._draw.random((1, self.uncertainty.dim)))
            self.collector.set_params(self._drawn)

    def _iterate(self) -> dict[str, float]:
        if self.phase > 0 and self.phase_steps == 0:
            self._begin()
        self._draw = np.random.default_rng(derive(self.seed, "parameters", self.iteration))
        before, self.steps = self.steps, self.phase_steps  # so that the warm-up is counted from the phase's beginning
        try:
            metrics = super()._iterate()
        finally:
            self.phase_steps, self.steps = self.steps, before + self.steps - self.phase_steps
        learnt = self.learner.updates > 0
        if self.steps >= self.phase_end or (self.steps >= self.span[1] and learnt):
            metrics |= self._finish()
        return metrics

    def _begin(self) -> None:
        """Everything afresh, on the last worst case."""
        self._renew()
        self.debt = 0.0
        self.recent.clear()
        self.collector.set_params(self.rows[-1]["worst"])
        self.collector.border(derive(self.seed, "phase", self.phase), self.iteration)

    def _renew(self) -> None:
        """New networks, for the update of this phase: the default policy needs no more than SAC."""
        own, keys = self.algorithm, (self.phase,) if self.phase > 0 else ()
        made = self._networks(derive(self.seed, "network", *keys))
        update = own if self.phase > 0 else SAC(own.entropy_temp, own.entropy_temp_init, own.target_entropy)
        modules = {"actor": made.actor, **made.trained}
        self.learner = Learner(update, modules, made.copies, self.config, self.device, self.learner.compile)
        self.policy = self.explorer.policy = cast(BoxActor, made.actor)

    def _networks(self, seed: int) -> Networks:
        spaces = Spaces(self.observation_space, self.action_space, self.uncertainty.dim)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return self.algorithm.networks(spaces, self.config, self._encoder)

    # -- the end of a phase -------------------------------------------------------------------

    def _finish(self) -> dict[str, float]:
        """Freeze what was learnt, find its worst case, and decide how to go on; what to log."""
        # the next phase has networks of its own, so that nothing changes these any more
        default, models = self.default, list(self.models)
        if default is None:
            default = self.policy
        else:
            models.append(_model(self.policy, self.learner.modules))
        outcome = self._search(default, models)
        found = outcome.found
        self.search_episodes += outcome.evaluations * self.algorithm.search_episodes
        self.search_steps += outcome.steps
        (worst,) = self.uncertainty.from_unit(found.point)
        row: Row = {
            "steps": self.steps,
            "model": dict(self.rows[-1]["worst"]) if models else None,
            "threshold": outcome.threshold,
            "worst_case": found.value,
            "worst": worst,
            "known": found.known_value if models else None,
            "stopped": None,
        }
        row["stopped"] = self._reason(row, len(models))
        if row["stopped"] in ("repeated", "gap") and self.steps < self.span[1]:
            logger.warning(
                "Training ends %s steps early: the worst case found, %s with return %.4g, %s.",
                f"{self.span[1] - self.steps:,}", worst, found.value,
                "is one trained on" if row["stopped"] == "repeated" else "is no worse than those trained on",
            )  # fmt: skip
        numbers = {"worst": found.value} | self._validity(models, outcome.threshold)
        self.default, self.models = default, models
        self.rows.append(row)
        self.phase_end, self.phase_steps = self.phase_end + self.model_steps, 0
        self._drop_replay()
        if row["stopped"] is not None:
            self.span = (self.span[0], self.steps)  # where a resumed run ends too
        numbers |= {"episodes": self.search_episodes, "steps": self.search_steps, **worst}
        return {f"search/{name}": float(value) for name, value in numbers.items()}

    def _validity(self, models: Sequence[Model], threshold: float | None) -> dict[str, float]:
        """The threshold kept for the last model, and the share of its own transitions that it explains."""
        if threshold is None or self.replay is None:
            return {}
        batch = self.replay.sample(torch.arange(max(0, len(self.replay) - 10_000), len(self.replay)).to(self.device))
        with torch.inference_mode():
            error = models[-1].predictor(batch.obs, batch.action, batch.next_obs).mean(0)
        share = float((error <= threshold).float().mean())
        if share < 0.5:
            logger.warning(
                "The model of phase %s explains %.0f %% of its own steps at the threshold %s: its policy hardly ever "
                "acts. Larger thresholds (--thresholds) or longer training help.", self.phase, 100 * share, threshold,
            )  # fmt: skip
        return {"threshold": threshold, "valid_share": share}

    def _reason(self, row: Row, count: int) -> Literal["repeated", "gap", "max_models", "steps"] | None:
        """Why training ends with ``row``, which has trained on ``count`` models; None: it goes on."""
        own = self.algorithm
        if count:
            known = self.uncertainty.to_unit([r["worst"] for r in self.rows])
            distance = np.abs(known - self.uncertainty.to_unit(row["worst"])).max(1).min()
            if distance <= own.repeat_tolerance:
                return "repeated"
            if cast(float, row["known"]) - row["worst_case"] <= own.gap_tolerance:
                return "gap"
            if count - self._models_before >= own.max_models:
                return "max_models"
        return "steps" if self.steps >= self.span[1] else None

    def _search(self, default: BoxActor, models: Sequence[Model]) -> Outcome:
        """The worst case of the policy of ``models``, with the threshold of the last that makes it best."""
        own = self.algorithm
        assert self.env_spec is not None
        folder = None if self.run_dir is None else self.run_dir / runfolder.CHECKPOINTS
        record = worst_case.Record(None if folder is None else folder / "searches.json")
        seeds = [derive(self.seed, "search", k) for k in range(own.search_episodes)]
        trials = worst_case.Trials(self.env_spec, seeds, own.search_envs)
        known = self.uncertainty.to_unit([row["worst"] for row in self.rows]) if models else None
        evaluations = steps = 0
        best: tuple[worst_case.Found, float | None] | None = None
        try:
            for threshold in own.thresholds if models else (None,):
                earlier = self._thresholds(len(models) - 1)
                policy = Composite(default, models, earlier if threshold is None else [*earlier, threshold])

                def evaluate(points: np.ndarray, policy: Composite = policy) -> tuple[np.ndarray, int]:
                    act = self._stoppable(self._session(policy))
                    return trials.run(act, self.uncertainty.from_unit(points))

                key = f"{self.phase}-{threshold}-{worst_case.digest([default, *models])}"
                found = worst_case.find(self._searcher(known), evaluate, record, key)
                evaluations, steps = evaluations + found.evaluations, steps + found.steps
                if best is None or found.value > best[0].value:
                    best = found, threshold
        finally:
            trials.close()
        assert best is not None
        return Outcome(*best, evaluations, steps)

    def _searcher(self, known: np.ndarray | None) -> worst_case.Search:
        own, dim = self.algorithm, self.uncertainty.dim
        if own.search == "grid":
            return worst_case.GridSearch(dim, own.grid_points, known)
        # the same draws for every threshold, so that they are compared on the same points to begin with
        seed = derive(self.seed, "cma", self.phase)
        return worst_case.CMASearch(dim, own.generations, own.population, seed, known)

    def _stoppable(self, act: worst_case.Act) -> worst_case.Act:
        """``act``, which ends training where Ctrl-C was pressed."""

        def checked(observation: Any, episodes: np.ndarray) -> np.ndarray:
            if self.interrupted["asked"]:
                if self.run_dir is not None:
                    self.write_checkpoint(self.run_dir, "interrupted")
                raise hooks.Interrupted(self.run_dir, self.steps)
            return act(observation, episodes)

        return checked

    # -- state --------------------------------------------------------------------------------

    def _frozen(self) -> dict[str, nn.Module]:
        named: dict[str, nn.Module] = {} if self.default is None else {"default": self.default}
        return named | {f"model_{j}": model for j, model in enumerate(self.models, 1)}

    def tensors(self) -> dict[str, Tensor]:
        frozen = {f"{n}/{k}": v for n, module in self._frozen().items() for k, v in module.state_dict().items()}
        return super().tensors() | frozen

    def counters(self) -> dict[str, Any]:
        return super().counters() | {
            "rows": self.iterations_table,
            "phase": [self.phase_steps, self.phase_end, self.model_steps, self._models_before],
            "search": [self.search_episodes, self.search_steps],
        }

    def restore(self, tensors: Mapping[str, Tensor], counters: Mapping[str, Any]) -> None:
        self.rows = [cast(Row, dict(row)) for row in counters["rows"]]
        self._renew()
        super().restore(tensors, counters)
        self.phase_steps, self.phase_end, self.model_steps, self._models_before = counters["phase"]
        self.search_episodes, self.search_steps = counters["search"]
        blank = [self._networks(0) for _ in self.rows]
        actors = [cast(BoxActor, made.actor.to(self.device)) for made in blank]
        self.default = actors[0] if actors else None
        self.models = [_model(a, made.trained).to(self.device) for a, made in zip(actors[1:], blank[1:], strict=True)]
        for name, module in self._frozen().items():
            load_module(module.requires_grad_(False), tensors, f"{name}/")


def _model(actor: BoxActor, networks: Mapping[str, nn.Module]) -> Model:
    return Model(actor, cast(QEnsemble, networks["value"]), cast(Predictor, networks["predictor"]))
